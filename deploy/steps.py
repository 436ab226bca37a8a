"""Steps that both the command line and the pipeline take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress import artifact
from compress.arch import composite_of
from compress.artifact import Step, TeacherEntry
from compress.calibration import TokenRows, draw, windows
from compress.device import AUTO, put, take_back
from compress.errors import ConfigError
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.result import Progress, Run
from compress.sources import Loaded
from compress.surgery import without_weights
from deploy.recipe import DISTILL, CalibrationSpec, EvaluationSpec, StepSpec

CHECK_TOKENS = 128
"""Tokens that every export is checked on, whole and one by one."""


def compress_model(
    loaded: Loaded,
    steps: Sequence[StepSpec],
    calibration: CalibrationSpec,
    path: Path,
    *,
    device: str,
    progress: Progress,
    consume: bool,
    scratch: Path | None = None,
    spill_bytes: int = Run.spill_bytes,
    teacher: Loaded | None = None,
    score: Callable[[PreTrainedModel], float] | None = None,
) -> artifact.Manifest:
    """Apply methods to a model, one after the other, and save the artifact.

    Args:
        loaded: the model; cut in place when ``consume``.
        steps: methods with their options.
        calibration: where the rows of every step come from that does not say so itself.
        path: the artifact's folder.
        device: where the forward passes run, "auto" included.
        progress: told of each step.
        consume: the model given is not needed any more.
        scratch: where an interrupted call leaves what the next one goes on from.
        spill_bytes: as in `Run`.
        teacher: what a method learns from in place of the model, with the same tokenizer. Without it a distillation
            behind other steps learns from the model given.
        score: judges models for a method that asks for it.

    Raises:
        ConfigError: the teacher has another tokenizer, or no method learns from one.
        UnsupportedArchitecture: a vision-language model whose blocks a method would make differ, or blocks that share
            weights where a method would change those of single ones.
    """
    if composite_of(loaded.model.config) is not None or layout_of(loaded.model).kind == "shared" or len(steps) > 1:
        try_on_shapes(without_weights(loaded.model), steps, calibration)
    if teacher is not None:
        check_taught([step.method for step in steps])
        _check_tokenizers(loaded, teacher)
        put(teacher.model, device)
    origin, taken, parent = artifact.ancestry(loaded)
    model = loaded.model
    distils = any(step.method == DISTILL for step in steps[1:]) and teacher is None
    if distils and device == AUTO:
        raise ConfigError("distill behind other steps takes one device: give one, or distil the result afterwards")
    for place, step in enumerate(steps):
        method, config, drawn = step.method, method_config(step.method, step.set), step.calibration or calibration
        inputs_go_to = put(model, device)
        rows = draw(
            drawn.source,
            loaded.tokenizer,
            rows=drawn.rows,
            length=drawn.length,
            seed=drawn.seed,
            model=model,
            progress=progress,
        )
        learns_from = loaded if distils and place and method == DISTILL else teacher
        if not METHODS[method].learns_from_teacher:
            learns_from = None
        run = Run(
            progress,
            inputs_go_to,
            scratch,
            consume=place > 0 or (consume and not distils),
            teacher=None if learns_from is None else learns_from.model,
            score=score,
            spill_bytes=spill_bytes,
        )
        compressed = METHODS[method].compress(model, rows, config, run)
        model, report = compressed.model, compressed.report
        taken.append(
            Step(
                method=method,
                config=dict(report.config),
                calibration=rows.record(),
                numbers=dict(report.numbers),
                teacher=None if learns_from is None else TeacherEntry.of(learns_from),
            )
        )
    take_back(model)
    return artifact.save(
        model, loaded.tokenizer, path, origin=origin, steps=taken, parent=parent, processor=loaded.processor
    )


def check_taught(methods: Sequence[str]) -> None:
    """Raise ConfigError unless one of some methods learns from a teacher."""
    if not any(METHODS[method].learns_from_teacher for method in methods):
        able = ", ".join(name for name, method in METHODS.items() if method.learns_from_teacher)
        raise ConfigError(f"{', '.join(methods)} does not learn from a teacher, only {able}: leave --teacher out")


def _check_tokenizers(loaded: Loaded, teacher: Loaded) -> None:
    """Raise ConfigError for a teacher whose tokens mean something else."""
    if loaded.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ConfigError(f"{teacher.origin.name} has another tokenizer than {loaded.origin.name}: it cannot teach it")


def try_on_shapes(shape: PreTrainedModel, steps: Sequence[StepSpec], calibration: CalibrationSpec) -> None:
    """Let a method refuse a model before the work of the methods before it is done.

    Args:
        shape: the model on the meta device; cut in place.
        steps: that will be taken.
        calibration: of those that have none of their own.
    """
    for step in steps:
        rows = (step.calibration or calibration).rows
        METHODS[step.method].outline(shape, rows, method_config(step.method, step.set))


def evaluation_windows(spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, context_length: int) -> TokenRows:
    """The windows that perplexity is measured on."""
    return windows(
        spec.source,
        tokenizer,
        length=spec.window,
        count=spec.windows,
        stride=spec.stride,
        context_length=context_length,
    )


def data_file(data: Path | None, below: str, suite: Path) -> Path:
    """A file that a suite names by its path below the data folder.

    Raises:
        ConfigError: there is no data folder, or no such file in it.
    """
    if data is None:
        raise ConfigError(f"{suite} names files of a data folder ({below}): say where it is with --data DIR")
    path = data / below
    if not path.resolve().is_relative_to(data.resolve()):
        raise ConfigError(f"{suite}: {below} lies outside the data folder")
    if not path.is_file():
        raise ConfigError(f"{suite}: there is no {below} in {data}")
    return path
