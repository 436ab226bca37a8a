"""Steps that both the command line and the pipeline take."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from compress import artifact
from compress.artifact import Step
from compress.calibration import TokenRows, draw, windows
from compress.methods import METHODS, method_config
from compress.result import Progress, Run
from compress.sources import Loaded, load
from deploy.recipe import CalibrationSpec, EvaluationSpec


def compress_model(
    loaded: Loaded,
    method: str,
    options: dict[str, Any],
    calibration: CalibrationSpec,
    path: Path,
    *,
    device: str,
    progress: Progress,
    consume: bool,
) -> artifact.Manifest:
    """Apply one method to a model and save the artifact.

    Args:
        loaded: the model; cut in place when ``consume``.
        method: name in METHODS.
        options: of the method.
        calibration: where its rows come from.
        path: the artifact's folder.
        device: where the forward passes run.
        progress: told of each step.
        consume: the model given is not needed any more.
    """
    config = method_config(method, options)
    rows = draw(
        calibration.source,
        loaded.tokenizer,
        rows=calibration.rows,
        length=calibration.length,
        seed=calibration.seed,
        model=loaded.model,
        progress=progress,
    )
    origin, past, parent = artifact.ancestry(loaded)
    loaded.model.to(device)  # type: ignore[arg-type]
    run = Run(progress=progress, device=device, consume=consume)
    compressed = METHODS[method].compress(loaded.model, rows, config, run)
    step = Step(
        method=method,
        config=dict(compressed.report.config),
        calibration=rows.record(),
        numbers=dict(compressed.report.numbers),
    )
    smaller = compressed.model.to("cpu")  # type: ignore[arg-type]
    return artifact.save(smaller, loaded.tokenizer, path, origin=origin, steps=[*past, step], parent=parent)


def compress_chain(
    model: str,
    steps: Sequence[tuple[str, dict[str, Any]]],
    calibration: CalibrationSpec,
    path: Path,
    *,
    device: str,
    progress: Progress,
) -> artifact.Manifest:
    """Load a model, apply methods one after the other, and save what comes out of the last.

    Args:
        model: as for ``compress.sources.load``.
        steps: method names and options.
        calibration: of every step.
        path: the artifact's folder.
        device: where the forward passes run.
        progress: told of each step.
    """
    loaded = load(model)
    *before, (method, options) = steps
    with tempfile.TemporaryDirectory() as scratch:
        for place, (earlier, its_options) in enumerate(before):
            between = Path(scratch) / str(place)
            compress_model(
                loaded, earlier, its_options, calibration, between, device=device, progress=progress, consume=True
            )
            loaded = load(str(between))
        return compress_model(
            loaded, method, options, calibration, path, device=device, progress=progress, consume=True
        )


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, context_length: int) -> TokenRows:
    """The windows that perplexity is measured on."""
    return windows(spec.source, tokenizer, length=spec.window, count=spec.windows, context_length=context_length)
