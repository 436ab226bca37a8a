"""Two checkpoints to a delta package, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress.artifact import versions
from compress.delta import indices, package
from compress.delta.checkpoint import (
    DESCRIPTION,
    TYPES,
    Roles,
    Tensors,
    bits,
    digest,
    model_folder,
    roles_of,
    same_bits,
)
from compress.delta.masks import checksum
from compress.delta.package import COPIED, Change, Description, Entry, Kind, Measured, Sizes, Source
from compress.delta.parallel import in_order
from compress.delta.values import VALUE_TYPES, ValueType, quantise, store
from compress.errors import ConfigError
from compress.files import new_folder
from compress.methods.darex import DarexConfig, factors, influence_ratio, kept_index, scattered
from compress.result import Progress, no_progress
from compress.schema import list_files

SHARD_BYTES = 1_000_000_000
"""Of a package, after which its tensors go on in another file."""


@dataclass(frozen=True)
class Storage:
    """What kept elements are stored as.

    Attributes:
        values: "bf16", "int8", "int4" or "sign".
        scale: a scale for each "row", or one for the "tensor"; None: rows up to p = 0.95, where they are a small part.
        rows: changed rows of embeddings as "int8", or "exact".
    """

    values: ValueType = "int8"
    scale: Literal["row", "tensor"] | None = None
    rows: Literal["int8", "exact"] = "int8"

    def __post_init__(self) -> None:
        if self.values not in VALUE_TYPES:
            raise ConfigError(f"values={self.values!r} is not known: {', '.join(VALUE_TYPES)}")
        if self.scale not in (None, "row", "tensor") or self.rows not in ("int8", "exact"):
            raise ConfigError("scale is row or tensor, and rows is int8 or exact")

    def scale_for(self, config: DarexConfig) -> Literal["row", "tensor"]:
        """What shares a scale."""
        return self.scale or ("row" if config.density >= Fraction(1, 20) else "tensor")


@dataclass(frozen=True)
class Pruned:
    """One matrix as it will be stored.

    Attributes:
        index: int64 (n,): flat positions, rows are outputs.
        values: fp32 (n,), rounded, without a scale.
        scale: fp32 (1,).
        row_scale: fp16 (rows,), at most 1; None where the whole tensor shares a scale.
    """

    index: Tensor
    values: Tensor
    scale: Tensor
    row_scale: Tensor | None

    def addend(self, shape: tuple[int, int]) -> Tensor:
        """What is added at the positions, fp32 (n,)."""
        return package.scaled(self.values, self.index, self.scale, self.row_scale, shape)


def prune(
    name: str,
    delta: Tensor,
    config: DarexConfig,
    storage: Storage,
    inputs: Tensor | None = None,
    bias_delta: Tensor | None = None,
) -> Pruned:
    """Drop, round and rescale one matrix; a factor that looks at inputs makes good for rounding as well.

    Args:
        name: of the tensor.
        delta: fp32 (out, in).
        config: what is dropped, and how the rest is rescaled.
        storage: what the rest is rounded to.
        inputs: what enters the matrix on calibration text, (T, in), where ``config`` needs it.
        bias_delta: fp32 (out,): of its bias, which the paper's bound counts in.
    """
    rows, cols = delta.shape
    index = kept_index(name, delta, config, inputs)
    by_row = storage.scale_for(config) == "row"
    counts = package.row_counts(index, (rows, cols)) if by_row else torch.tensor([len(index)])
    values, scales = quantise(delta.reshape(-1)[index], counts, storage.values)
    needs_kept = config.rescale == "least-squares"
    whole = values * scales.repeat_interleave(counts) if needs_kept else values
    kept = scattered(index, whole, delta.shape) if needs_kept else delta
    scales = scales * factors(delta, kept, effective(config, storage), inputs, bias_delta)
    if not by_row:
        return Pruned(index, values, scales, None)
    largest = scales.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return Pruned(index, values, largest[None], (scales / largest).half())


def bias_delta(name: str, base: Tensors, finetuned: Tensors, config: DarexConfig) -> Tensor | None:
    """The delta of the bias that belongs to a weight, fp32 (out,), where the paper's bound wants it."""
    bias = f"{name.removesuffix('weight')}bias"
    if config.rescale != "paper-bound" or bias not in base.names or bias not in finetuned.names:
        return None
    return finetuned.get(bias).float() - base.get(bias).float()


def effective(config: DarexConfig, storage: Storage) -> DarexConfig:
    """Without scales of rows there is room for one factor per matrix only."""
    return dataclasses.replace(config, per_row=config.per_row and storage.scale_for(config) == "row")


class _Writer:
    """Tensors into files of bounded size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.size = self.shards = 0

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Take tensors; their bytes."""
        self.waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.size += size
        if self.size >= SHARD_BYTES:
            self.flush()
        return size

    def flush(self) -> None:
        """Write what waits."""
        self.shards += 1
        save_file(self.waiting, self.folder / f"delta-{self.shards:05d}.safetensors")
        self.waiting, self.size = {}, 0


@dataclass(frozen=True)
class _Packed:
    """One tensor, packed.

    Attributes:
        entry: its description.
        parts: tensors to store, by what they are for.
        magnitude: sum of the delta's magnitudes; of a pruned matrix, like the two below.
        zeros: elements that did not change.
        ratio: R; None where nothing was calibrated.
    """

    entry: Entry
    parts: Mapping[str, Mapping[str, Tensor]]
    magnitude: float = 0.0
    zeros: int = 0
    ratio: float | None = None


@dataclass(frozen=True)
class _Packer:
    """How tensors are packed, each for itself."""

    base: Tensors
    finetuned: Tensors
    config: DarexConfig
    storage: Storage
    inputs: Callable[[str], Tensor | None]

    @cached_property
    def _roles(self) -> Roles:
        return roles_of(model_folder(self.base, self.finetuned))

    @cached_property
    def _base_names(self) -> set[str]:
        return set(self.base.names)

    def __call__(self, name: str) -> _Packed:
        """Pack one tensor."""
        tensor = self.finetuned.get(name)
        if name not in self._base_names:
            return self._dense(name, tensor)
        base = self.base.get(name)
        if same_bits(base, tensor):
            found = digest(base)
            return _Packed(self._entry(name, "same", base=found, result=found), {})
        floating = base.dtype in _FLOATING and tensor.dtype in _FLOATING
        if floating and name in self._roles.embeddings and base.shape[1:] == tensor.shape[1:]:
            return self._rows(name, base, tensor)
        if floating and name in self._roles.matrices and base.shape == tensor.shape:
            return self._pruned(name, base, tensor)
        return self._dense(name, tensor)

    def _entry(self, name: str, kind: Kind, **values: Any) -> Entry:
        return Entry(shape=self.finetuned.shape(name), dtype=self.finetuned.dtype(name), kind=kind, **values)

    def _dense(self, name: str, tensor: Tensor) -> _Packed:
        _check_finite(name, tensor)
        return _Packed(self._entry(name, "dense", result=digest(tensor)), {"dense": {name: tensor}})

    def _rows(self, name: str, base: Tensor, tensor: Tensor) -> _Packed:
        """An embedding: the rows that changed, and those that are new."""
        _check_finite(name, tensor)
        old = min(len(base), len(tensor))
        ids = (bits(tensor[:old]) != bits(base[:old].to(tensor.dtype))).any(1).nonzero().flatten()
        pieces = {f"{name}.row_ids": ids.to(torch.int32), f"{name}.new_rows": tensor[old:]}
        result = tensor.clone()
        if self.storage.rows == "exact":
            pieces[f"{name}.values"] = tensor[ids]
        else:
            delta = tensor[ids].float() - base[ids].float()
            values, scale = quantise(delta.flatten(), torch.full((len(ids),), delta.shape[1]), "int8")
            values = values.view_as(delta)
            pieces |= {f"{name}.values": values.to(torch.int8), f"{name}.scale": scale}
            result[ids] = (base[ids].float() + scale[:, None] * values).to(tensor.dtype)
        entry = self._entry(name, "rows", nnz=len(ids), base=digest(base), result=digest(result))
        return _Packed(entry, {"rows": pieces})

    def _pruned(self, name: str, base: Tensor, tensor: Tensor) -> _Packed:
        transposed = self._roles.matrices[name]
        delta = tensor.float() - base.float()
        magnitude = _magnitude(name, delta)
        delta = delta.T.contiguous() if transposed else delta
        inputs = self.inputs(name)
        bias = bias_delta(name, self.base, self.finetuned, self.config)
        pruned = prune(name, delta, self.config, self.storage, inputs, bias)
        shape = (delta.shape[0], delta.shape[1])
        index = package.as_stored(pruned.index, shape, transposed=transposed)
        result = package.added(base, Change(index, pruned.addend(shape)), tensor.dtype)
        if self.config.density == 1 and self.storage.values == "bf16" and not same_bits(result, tensor):
            return self._dense(name, tensor)  # nothing is dropped, so nothing may be lost
        kind, positions = self._positions(pruned.index, shape)
        scales = {f"{name}.scale": pruned.scale}
        scales |= {} if pruned.row_scale is None else {f"{name}.row_scale": pruned.row_scale}
        entry = self._entry(
            name,
            kind,
            transposed=transposed,
            nnz=len(index),
            base=digest(base),
            result=digest(result),
            index=checksum(pruned.index),
        )
        return _Packed(
            entry,
            {
                "values": {f"{name}.values": store(pruned.values, self.storage.values)},
                "positions": {f"{name}.{piece}": each for piece, each in positions.items()},
                "scales": scales,
            },
            magnitude=magnitude,
            zeros=int((tensor == base).sum()),
            ratio=None if inputs is None else influence_ratio(delta, inputs),
        )

    def _positions(self, index: Tensor, shape: tuple[int, int]) -> tuple[Kind, dict[str, Tensor]]:
        if self.config.keep == "random":
            return "seed", {}
        return indices.encode(index, shape)


class _Totals:
    """What adds up over tensors."""

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(("values", "positions", "scales", "rows", "dense"), 0)
        self.parameters, self.magnitude, self.zeros, self.ratios = 0, 0.0, 0, list[float]()

    def add(self, packed: _Packed, writer: _Writer) -> Entry:
        """Write a tensor's parts, and count them."""
        for part, tensors in packed.parts.items():
            self.bytes[part] += writer.add(tensors)
        if packed.entry.kind in package.PRUNED:
            self.parameters += packed.entry.elements
        self.magnitude += packed.magnitude
        self.zeros += packed.zeros
        self.ratios += [] if packed.ratio is None else [packed.ratio]
        return packed.entry

    def measured(self) -> Measured:
        """What was seen of the delta."""
        pruned = max(self.parameters, 1)
        ratio = sum(self.ratios) / len(self.ratios) if self.ratios else None
        return Measured(mean_abs_delta=self.magnitude / pruned, exact_zeros=self.zeros / pruned, influence_ratio=ratio)


def pack(
    base: Tensors,
    finetuned: Tensors,
    path: Path,
    config: DarexConfig,
    storage: Storage | None = None,
    *,
    inputs: Callable[[str], Tensor | None] = lambda name: None,
    names: tuple[str, str] | None = None,
    licence: str | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> Description:
    """Write a delta package. It appears whole or not at all.

    Matrices inside the model's body are pruned. Changed rows of embeddings and output layers are stored as rows, and
    new rows (a vocabulary that grew) as they are; norms, biases and heads that the base lacks stay exact. Where
    nothing is dropped (p = 0) and values are bf16, a matrix that would not come back bit for bit is stored whole.

    Args:
        base: what the package will be added to.
        finetuned: what shall come out.
        path: a folder that does not exist yet, or is empty.
        config: what is dropped, and how the rest is rescaled.
        storage: what the rest is stored as.
        inputs: name of a matrix -> what enters it, (T, in), for a ``config`` that needs it.
        names: of base and fine-tune, for the description; None takes those of their folders.
        licence: of the fine-tune's weights.
        calibration: rows that the inputs come from, for the description.
        progress: told of each tensor.

    Raises:
        ConfigError: ``path`` is not empty, or weights are not finite, or the models share nothing.
    """
    storage = storage or Storage()
    if not set(base.names) & set(finetuned.names):
        raise ConfigError(
            f"{base.folder} and {finetuned.folder} have no tensor in common: they are no base and fine-tune"
        )
    base_name, finetuned_name = names or (base.folder.name, finetuned.folder.name)
    with new_folder(path) as folder:
        writer, totals, tensors = _Writer(folder), _Totals(), {}
        packer = _Packer(base, finetuned, config, storage, inputs)
        for done, (name, packed) in enumerate(
            zip(finetuned.names, in_order(packer, finetuned.names), strict=True), start=1
        ):
            tensors[name] = totals.add(packed, writer)
            progress("packing", done, len(finetuned.names))
        writer.flush()
        _copy_files(model_folder(base, finetuned), folder)
        headers = sum(file.stat().st_size for file in folder.glob("*.safetensors")) - sum(totals.bytes.values())
        description = Description(
            base=Source(name=base_name),
            finetuned=Source(name=finetuned_name),
            licence=licence,
            density=str(config.density),
            scheme=config.drawn if config.keep == "random" else None,
            seed=config.seed,
            values=storage.values,
            scale=storage.scale_for(config),
            rows=storage.rows,
            config=dataclasses.asdict(effective(config, storage)),
            calibration=dict(calibration) if calibration else None,
            measured=totals.measured(),
            sizes=Sizes(pruned_parameters=totals.parameters, **totals.bytes, headers=headers),
            tensors=tensors,
            versions=versions(),
            files={},
        )
        source = Source(name=base_name, digest=description.base_digest())
        description = description.model_copy(update={"base": source})
        (folder / "README.md").write_text(_card(description), encoding="utf-8")
        description = description.model_copy(update={"files": list_files(folder)}).sealed()
        (folder / DESCRIPTION).write_text(description.model_dump_json() + "\n", encoding="utf-8")
    return description


_FLOATING = {getattr(torch, name) for name in TYPES.values()}


def _magnitude(name: str, delta: Tensor) -> float:
    """The sum of magnitudes, which is finite only where all elements are."""
    magnitude = float(delta.abs().sum())
    if not math.isfinite(magnitude):
        raise ConfigError(f"{name} has weights that are not finite: this fine-tune or its base is broken")
    return magnitude


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ConfigError(f"{name} has weights that are not finite: this fine-tune is broken")


def _copy_files(source: Path, folder: Path) -> None:
    """Config and tokenizer of the fine-tune."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _card(description: Description) -> str:
    """README.md of a package."""
    sizes, measured = description.sizes, description.measured
    header = ["---", *([f"license: {description.licence.lower()}"] if description.licence else [])]
    header += ["tags:", "- foldaway", "- delta", "---", ""]
    pruned = f"{sizes.pruned_parameters:,} pruned parameters in {sizes.pruned:,} bytes"
    lines = [
        f"# {description.finetuned.name}, as a delta of {description.base.name}",
        "",
        f"Of every matrix {description.density} of the elements are kept, as {description.values}: {pruned} "
        f"({sizes.values:,} values, {sizes.positions:,} positions, {sizes.scales:,} scales); {sizes.rows:,} bytes of "
        f"changed embedding rows and {sizes.dense:,} of other tensors.",
        "",
        f"Mean magnitude of the delta {measured.mean_abs_delta:.3g}; {measured.exact_zeros:.1%} of it was zero.",
        "",
        f"Licence of the weights: {description.licence or 'not stated by the source'}. It can be added to "
        f"{description.base.name} and to no other model:",
        "",
        "    foldaway delta apply BASE THIS_FOLDER -o DIR",
    ]
    return "\n".join([*header, *lines]) + "\n"
