"""What a delta package changes in the ONNX export of its base, matrix by matrix, as the exporter would write it.

A package is made for one base to the bit, so the base's own weights must be at hand. An fp32 export holds them exactly:
they are read out of it, and checked against the package. A rounded or quantised one does not, and the base's checkpoint
is needed beside it. It is checked against the package, and what the package leaves alone must be in the graph as the
exporter makes it of the checkpoint; what the package changes is made anew, whatever the graph had there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from compress.arch import architecture_of
from compress.delta.checkpoint import Checkpoint
from compress.delta.package import Package, check_base
from compress.errors import ConfigError
from compress.remote_code import base_config
from compress.result import Progress, no_progress
from compress.sources import config_of
from exporters.base import QUANTISED, ExportRecord, read_export
from exporters.onnx_file import DATA_SUFFIX
from exporters.onnx_graph import context_of
from exporters.onnx_weights import Part, Slot, Stored, slots

HELD = {"float32": ("F32", "F16", "BF16"), "float16": ("F16",)}
"""Dtype of an initialiser -> dtypes of checkpoints whose numbers it holds exactly."""
WRITTEN_OTHERWISE = ("layer_types", "max_position_embeddings", "num_hidden_layers")
"""Keys of a config to which the exporter gives other values."""
NOT_COMPUTED = ("architectures", "dtype", "initializer_range", "transformers_version", "use_cache")
"""Keys of a config that do not shape what a graph computes; nor do those of tokens and dropout."""
OF_LONG_ROPE = ("attention_factor", "original_max_position_embeddings", "type")
"""What the exporter, or transformers, writes into RoPE parameters."""


def changes(
    export: Path, package: Package, base: Checkpoint | None, progress: Progress = no_progress
) -> Iterator[tuple[Stored, NDArray[Any]]]:
    """The initialisers of a base's export that a package changes, one by one, as the exporter would write them.

    Args:
        export: folder of the export.
        package: of a fine-tune.
        base: its base; None to read the base out of the export.
        progress: told of the parts of the graph that were looked at.

    Yields:
        Where the initialiser lies, and its new content, of the same shape and dtype.

    Raises:
        ArtifactError: there is no export, or the package is broken.
        ConfigError: the export or `base` is not the package's base, `base` is needed, or the package changes what the
            graph computes beside its weights.
        BackendError: the graph is none of ours.
    """
    record, config = read_export(export), config_of(str(package.folder))
    _check_config(export, record, config)
    places = slots(export, config, record.options)
    _check_fits(places, package)
    if base is not None:
        check_base(package, base)
        _check_names(places, base)
    held = _Held(places, package)
    for done, slot in enumerate(places, start=1):
        yield from _from_export(slot, package, held) if base is None else _from_checkpoint(slot, package, base)
        progress("comparing with the graph", done, len(places))


def _from_export(slot: Slot, package: Package, held: _Held) -> Iterator[tuple[Stored, NDArray[Any]]]:
    """What is new in one place of a graph that holds the base itself."""
    if slot.source.offset and not _changes(package, slot):
        return  # a sum: what was added to cannot be read out of it
    new = {}
    for part in slot.source.parts:
        needed = package.tensors[part.name].base is not None
        new[part.name] = package.result(part.name, held.get(part.name) if needed else None)
    if _changes(package, slot):
        yield from _new(slot, new)


def _from_checkpoint(slot: Slot, package: Package, base: Checkpoint) -> Iterator[tuple[Stored, NDArray[Any]]]:
    """What is new in one place of a graph beside the base's checkpoint."""
    parameters = {part.name: package.result(part.name, base.get(part.name)) for part in slot.source.parts}
    for stored, array in _new(slot, parameters):
        if not _changes(package, slot):
            raise ConfigError(
                f"{stored.name} of the export is not what {package.description.base.name} gives: it is the export of "
                "another model, or was made by other versions; export the base again"
            )
        yield stored, array


def _changes(package: Package, slot: Slot) -> bool:
    """Whether a package changes anything here."""
    return any(package.tensors[part.name].kind != "same" for part in slot.source.parts)


def _new(slot: Slot, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Stored, NDArray[Any]]]:
    """The initialisers that do not hold what is made of these parameters, and what that is."""
    for stored, array in zip(slot.stored, slot.encode(parameters), strict=True):
        if not stored.holds(array):
            yield stored, array


class _Held:
    """A base's parameters, read out of its own export.

    Raises:
        ConfigError: the export rounds them.
    """

    def __init__(self, places: Sequence[Slot], package: Package) -> None:
        self._package = package
        self._pieces: dict[str, dict[int, tuple[Slot, int, int]]] = {}
        for slot in places:
            row = 0
            for part in slot.source.parts:
                height = _height(package, part)
                self._pieces.setdefault(part.name, {})[part.index] = (slot, row, height)
                row += height

    def get(self, name: str) -> Tensor:
        """The parameter, in the dtype of the package."""
        entry, found = self._package.tensors[name], []
        for _, (slot, row, height) in sorted(self._pieces[name].items()):
            if entry.dtype not in HELD.get(slot.dtype, ()):
                raise ConfigError(
                    f"this export does not hold the base's weights exactly ({slot.dtype} from {entry.dtype}): give the "
                    "base's checkpoint too"
                )
            numbers = slot.stored[0].numbers
            piece = (numbers.T if slot.source.transposed else numbers)[row : row + height]
            found.append(torch.from_numpy(np.array(piece, order="C")))
        return torch.cat(found).to(entry.torch_dtype)


def _height(package: Package, part: Part) -> int:
    """Outputs of a part."""
    return package.tensors[part.name].shape[0] // part.of


def _check_fits(places: Sequence[Slot], package: Package) -> None:
    """Every changed tensor must have a place in the graph, of its shape.

    Raises:
        ConfigError: naming the tensor.
    """
    placed = set()
    for slot in places:
        names = [part.name for part in slot.source.parts]
        missing = [name for name in names if name not in package.tensors]
        if missing:
            raise ConfigError(
                f"{package.folder.name} has no {missing[0]}, which the graph holds: it is of another model"
            )
        rows = sum(_height(package, part) for part in slot.source.parts)
        if rows != slot.height:
            raise ConfigError(
                f"{package.folder.name} changes the model's shape at {names[0]}: the graph has {slot.height} rows "
                f"there, the fine-tune {rows}; bring it back with foldaway delta apply, and export that"
            )
        placed |= set(names)
    lost = [name for name, entry in package.tensors.items() if entry.kind != "same" and name not in placed]
    if lost:
        raise ConfigError(
            f"{package.folder.name} changes {lost[0]}, for which the graph has no place; bring the fine-tune back "
            "with foldaway delta apply, and export that"
        )


def _check_names(places: Sequence[Slot], base: Checkpoint) -> None:
    """The package may hold a whole tensor that its base lacks; the graph was made of the base.

    Raises:
        ConfigError: naming the tensor.
    """
    lost = {part.name for slot in places for part in slot.source.parts} - set(base.names)
    if lost:
        raise ConfigError(f"the export was not made of {base.folder.name}: that has no {min(lost)}")


def _check_config(export: Path, record: ExportRecord, config: Any) -> None:
    """What the graph computes beside its weights is the base's, and must be the fine-tune's as well.

    Raises:
        ConfigError: naming what differs.
    """
    if record.to != "onnx":
        raise ConfigError(f"{export} is an export to {record.to}: a delta can be put into one to onnx")
    stock = base_config(config)
    quantised = record.options.dtype in QUANTISED
    if (quantised and record.options.algorithm is None) or not any(f.endswith(DATA_SUFFIX) for f in record.files):
        raise ConfigError(f"{export} was made by an earlier foldaway: export the base anew")
    if record.options.algorithm == "hqq" and len(architecture_of(config).attention_in) == 1:
        raise ConfigError(
            f"{export} was rounded by hqq, which rounds parts of a fused matrix otherwise than the whole: bring the "
            "fine-tune back with foldaway delta apply, and export that"
        )
    if record.options.smooth:
        raise ConfigError(
            f"{export} was smoothed, by scales that only the base's own activations give: bring the fine-tune back "
            "with foldaway delta apply, and export that"
        )
    if record.model_type != stock.model_type:
        raise ConfigError(
            f"{export} is of a {record.model_type} model, and the fine-tune is a {stock.model_type} model"
        )
    ours = _computed(AutoConfig.from_pretrained(export, trust_remote_code=False, local_files_only=True))
    theirs = _computed(stock)
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            raise ConfigError(
                f"the fine-tune's config has another {key} than the export's ({theirs[key]}, not {ours[key]}): bring "
                "the fine-tune back with foldaway delta apply, and export that"
            )


def _computed(config: Any) -> dict[str, Any]:
    """What in a stock config shapes a graph."""
    left_out = ("_name_or_path", *WRITTEN_OTHERWISE, *NOT_COMPUTED, *OF_LONG_ROPE)
    kept = {key: value for key, value in config.to_dict().items() if key not in left_out}
    kept = {key: value for key, value in kept.items() if "dropout" not in key and not key.endswith("token_id")}
    return {key: _short(value) for key, value in kept.items()} | {"context": context_of(config)}


def _short(value: Any) -> Any:
    """A value of a config, less what `OF_LONG_ROPE` lists, however deep."""
    if not isinstance(value, dict):
        return value
    return {key: _short(each) for key, each in value.items() if key not in OF_LONG_ROPE}
