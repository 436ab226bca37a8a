"""Delta packages from names of models: load what a configuration needs, calibrate, search, pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compress.arch import check_text_model
from compress.calibration import draw, windows
from compress.delta.advise import Advice, advise
from compress.delta.checkpoint import Adapter, Checkpoint, model_folder, open_base, open_finetuned, roles_of
from compress.delta.pack import Storage, pack
from compress.delta.package import Description, Package, check_base
from compress.delta.tune import label_score, matrix_inputs, output_score, tuned
from compress.files import check_free
from compress.finetune import Example
from compress.methods.darex import DarexConfig
from compress.remote_code import base_config
from compress.result import Progress, Run
from compress.schema import configured
from compress.sources import Loaded, config_of, load, read_tokenizer, stated_licence
from deploy.recipe import CalibrationSpec
from exporters.base import Exported
from exporters.onnx_delta import patch
from exporters.onnx_graph import context_of


def split_options(options: Mapping[str, Any]) -> tuple[DarexConfig, Storage]:
    """What ``--set`` gave, as the method's configuration and the format's.

    Raises:
        ConfigError: an option is not known, or has a value that cannot be meant.
    """
    stored = {field.name for field in dataclasses.fields(Storage)}
    ours = {name: value for name, value in options.items() if name not in stored}
    storage = {name: value for name, value in options.items() if name in stored}
    return configured(DarexConfig, ours, "a delta"), configured(Storage, storage, "a delta")


class Pair:
    """A base and a fine-tune, and what is measured on them.

    Raises:
        ConfigError: one of them is no folder of safetensors.
    """

    def __init__(self, base: str, finetuned: str, *, device: str, progress: Progress) -> None:
        self.names = (Path(base).name, Path(finetuned).name)
        self.base: Checkpoint = open_base(base)
        self.finetuned: Checkpoint | Adapter = open_finetuned(finetuned, self.base)
        self.run = Run(progress=progress, device=device)
        self._finetuned_name, self._base_name = finetuned, base

    def live(self) -> Loaded:
        """The fine-tune as a model, on the device."""
        if isinstance(self.finetuned, Adapter):
            loaded = load(self._base_name)
            for name, parameter in loaded.model.named_parameters():
                if name in self.finetuned.names:
                    parameter.copy_(self.finetuned.get(name))
        else:
            loaded = load(self._finetuned_name)
        # Checkpoints of composites name their tensors otherwise than the live model does.
        check_text_model(loaded.model.config, "a delta that is calibrated or searched for")
        loaded.model.to(self.run.device)  # type: ignore[arg-type]
        return loaded

    def calibrated(
        self, loaded: Loaded, calibration: CalibrationSpec
    ) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        """Rows of tokens, their record, and what enters each matrix on them."""
        rows = draw(
            calibration.source,
            loaded.tokenizer,
            rows=calibration.rows,
            length=calibration.length,
            seed=calibration.seed,
            model=loaded.model,
            progress=self.run.progress,
        )
        folder = model_folder(self.base, self.finetuned)
        live = dict(loaded.model.named_parameters())
        names = [name for name in roles_of(folder).matrices if name in live and name in self.finetuned.names]
        return rows.tokens, rows.record(), matrix_inputs(loaded.model, names, rows.tokens, self.run)


def pack_delta(
    pair: Pair,
    path: Path,
    config: DarexConfig,
    storage: Storage,
    calibration: CalibrationSpec,
    labelled: list[Example] | None,
) -> Description:
    """Pack a pair; a model is loaded only where the configuration looks at inputs, or searches.

    Args:
        pair: base and fine-tune.
        path: of the package.
        config: what is dropped, and how the rest is rescaled.
        storage: what the rest is stored as.
        calibration: text for inputs, and for a search without labels.
        labelled: examples for a search with labels.
    """
    check_free(path)
    inputs: dict[str, Tensor] = {}
    record = None
    if config.needs_inputs or config.needs_search:
        loaded = pair.live()
        rows, record, inputs = pair.calibrated(loaded, calibration)
        if config.needs_search:
            score = label_score(loaded.tokenizer, labelled) if labelled else output_score(loaded.model, rows)
            model: PreTrainedModel = loaded.model
            config = tuned(model, pair.base, pair.finetuned, config, storage, score, inputs, pair.run.progress)
    seen: Callable[[str], Tensor | None] = inputs.get
    return pack(
        pair.base,
        pair.finetuned,
        path,
        config,
        storage,
        inputs=seen,
        names=pair.names,
        licence=stated_licence(str(pair.finetuned.folder)),
        calibration=record,
        progress=pair.run.progress,
    )


def advise_delta(pair: Pair, calibration: CalibrationSpec | None, *, labels: bool) -> Advice:
    """Measure a pair, on text where there is some, and recommend how to pack it."""
    inputs: dict[str, Tensor] = {}
    if calibration is not None:
        _, _, inputs = pair.calibrated(pair.live(), calibration)
    return advise(pair.base, pair.finetuned, inputs.get, labels=labels, progress=pair.run.progress)


def verify(path: Path, base: str | None, progress: Progress) -> Description:
    """Check a package; with its base, down to the last bit of what will come out.

    Raises:
        ArtifactError: it is no package, or a broken one.
        ConfigError: it is another base.
    """
    package = Package(path)
    if base is not None:
        checkpoint = open_base(base)
        check_base(package, checkpoint)
        for done, (name, entry) in enumerate(package.tensors.items(), start=1):
            package.result(name, checkpoint.get(name) if entry.base is not None else None)
            progress("verifying", done, len(package.tensors))
    return package.description


def export_delta(
    export: Path, package: Path, base: str, path: Path, text: str, check_tokens: int, progress: Progress
) -> Exported:
    """Make a fine-tune's ONNX export from that of its base, and check it on text.

    Args:
        export: of the base.
        package: of the fine-tune.
        base: the base itself.
        path: of the result.
        text: source of the text to check on.
        check_tokens: how much of it; at most the context is used.
        progress: told of the work.

    Raises:
        ConfigError, ArtifactError, ParityError: as `exporters.onnx_delta.patch`.
    """
    check_free(path)
    name = str(Package(package).folder)
    tokenizer, context = read_tokenizer(name), context_of(base_config(config_of(name)))
    rows = windows(text, tokenizer, length=min(check_tokens, context), count=1, context_length=context)
    return patch(export, package, base, path, rows.tokens, progress)


def summary(description: Description) -> list[str]:
    """A package in words."""
    sizes, measured = description.sizes, description.measured
    kinds: dict[str, int] = {}
    for entry in description.tensors.values():
        kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
    words = [
        f"delta {description.id}: {description.finetuned.name} as what it adds to {description.base.name}",
        f"{description.density} of each matrix kept, as {description.values} with a scale per {description.scale}; "
        f"tensors: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}",
    ]
    if sizes.pruned:
        times = 2 * sizes.pruned_parameters / sizes.pruned
        words.append(
            f"{sizes.pruned_parameters:,} pruned parameters in {sizes.pruned / 1e6:,.2f} MB, {times:,.1f} times less "
            f"than in bf16: values {sizes.values / 1e6:,.2f}, positions {sizes.positions / 1e6:,.2f}, "
            f"scales {sizes.scales / 1e6:,.2f}"
        )
    words.append(
        f"beside them {sizes.rows / 1e6:,.2f} MB of embedding rows, {sizes.dense / 1e6:,.2f} MB of other tensors and "
        f"{sizes.headers / 1e6:,.2f} MB of headers"
    )
    ratio = "" if measured.influence_ratio is None else f", R {measured.influence_ratio:.3g}"
    words.append(
        f"before pruning: mean magnitude {measured.mean_abs_delta:.3g}, {measured.exact_zeros:.1%} exact zeros{ratio}"
    )
    return words


def difference(one: Path, other: Path) -> dict[str, Any]:
    """What is different between two packages: options, and tensors that come out otherwise.

    Raises:
        ArtifactError: one of them is no package, or a broken one.
    """
    ours, theirs = Package(one).description, Package(other).description
    names = sorted(set(ours.tensors) | set(theirs.tensors))
    differ = [name for name in names if _result(ours, name) != _result(theirs, name)]
    settings = ("density", "scheme", "seed", "values", "scale", "rows", "config")
    return {
        "same_base": _same_base(ours, theirs),
        "options": {
            key: [getattr(ours, key), getattr(theirs, key)]
            for key in settings
            if getattr(ours, key) != getattr(theirs, key)
        },
        "tensors": len(names),
        "tensors_that_differ": differ,
        "bytes": [_total(ours), _total(theirs)],
    }


def _same_base(ours: Description, theirs: Description) -> bool:
    """Whether the bases agree where both packages need them."""
    both = [(entry.base, theirs.tensors[name].base) for name, entry in ours.tensors.items() if name in theirs.tensors]
    needed = [(one, other) for one, other in both if one is not None and other is not None]
    return bool(needed) and all(one == other for one, other in needed)


def _result(description: Description, name: str) -> str | None:
    entry = description.tensors.get(name)
    return None if entry is None else entry.result


def _total(description: Description) -> int:
    sizes = description.sizes
    return sizes.pruned + sizes.rows + sizes.dense
