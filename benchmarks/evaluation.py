"""What ``foldaway eval`` found out: one record of one model, or of a model beside its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import JsonValue

from benchmarks.intervals import Interval, retention
from benchmarks.machine import Machine
from benchmarks.measures import Quality
from benchmarks.record import VERSION, Model, read_as
from benchmarks.tasks import TaskScore
from benchmarks.words import number, times, with_error
from compress.evaluate import Perplexity
from compress.schema import Strict

FORMAT: Final = "foldaway-evaluation"


@dataclass(frozen=True)
class Subject:
    """What was evaluated.

    Attributes:
        path: as it was asked for.
        form: for example "int4 ONNX".
        artifact: id of the artifact it is, or was made from; None for a model that is no artifact.
        model: the dense model behind it.
        parameters: distinct weights.
        perplexity: on the text.
        tasks: zero-shot scores.
    """

    path: str
    form: str
    artifact: str | None
    model: Model
    parameters: int
    perplexity: Perplexity
    tasks: tuple[TaskScore, ...]


@dataclass(frozen=True)
class Retention:
    """What is left of the baseline's accuracy above chance.

    Attributes:
        task: its name; "all" for the mean over tasks.
        value: candidate / baseline, both less chance; None where the baseline is not above chance.
        interval: of that, from a bootstrap over the items, the same on both sides; None where there is no value.
        flipped: share of the items that one side answers rightly and the other does not.
    """

    task: str
    value: float | None
    interval: Interval | None
    flipped: float


class Evaluation(Strict):
    """The record of an evaluation.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        subject: what was evaluated.
        baseline: what it was compared with; None without one.
        comparison: both on the same windows; None without a baseline.
        retention: of the tasks together and one by one; empty without a baseline or tasks.
        text: the windows: source, hash, size and stride.
        limit: items asked per task; None for all.
        device: where PyTorch computed.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-evaluation"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    subject: Subject
    baseline: Subject | None
    comparison: Quality | None
    retention: tuple[Retention, ...]
    text: dict[str, JsonValue]
    limit: int | None
    device: str
    commands: tuple[str, ...]
    machine: Machine


def read(path: Path) -> Evaluation:
    """Read and check an evaluation's record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(Evaluation, FORMAT, path)


def outcome(found: Evaluation) -> list[str]:
    """An evaluation in words, a line each."""
    subject, both = found.subject, found.comparison
    ours = with_error(subject.perplexity.value, subject.perplexity.standard_error)
    lines = [f"{subject.path} ({subject.form}): perplexity {ours} on {subject.perplexity.tokens:,} tokens"]
    if both is not None and found.baseline is not None:
        lines.append(
            f"{times(both.perplexity_ratio)} that of {found.baseline.path}; KL {number(both.kl)} nats a token; "
            f"same first choice at {both.top1_agreement:.1%} of the tokens"
        )
    lines += [f"{task.name}: acc {task.acc:.1%} of {task.items} items" for task in subject.tasks]
    return lines


def retained(baseline: Sequence[TaskScore], candidate: Sequence[TaskScore]) -> tuple[Retention, ...]:
    """How much of the baseline's skill the candidate keeps: over all tasks, then in each."""
    if not baseline:
        return ()
    each = [_retention(task.name, [task], [other]) for task, other in zip(baseline, candidate, strict=True)]
    return (_retention("all", baseline, candidate), *each) if len(each) > 1 else tuple(each)


def skill_kept(baseline: Sequence[TaskScore], candidate: Sequence[TaskScore]) -> tuple[float | None, Interval | None]:
    """Share of the baseline's skill above chance that the candidate keeps; see `benchmarks.intervals.retention`."""
    ours, theirs = ([task.right for task in side] for side in (baseline, candidate))
    return retention(ours, theirs, [task.chance for task in baseline])


def _retention(name: str, baseline: Sequence[TaskScore], candidate: Sequence[TaskScore]) -> Retention:
    value, interval = skill_kept(baseline, candidate)
    tasks = zip(baseline, candidate, strict=True)
    pairs = [pair for task, other in tasks for pair in zip(task.right, other.right, strict=True)]
    return Retention(name, value, interval, sum(a != b for a, b in pairs) / len(pairs))


def perplexities(quality: Quality) -> tuple[Perplexity, Perplexity]:
    """The perplexities of baseline and candidate behind a paired comparison."""
    return (
        _perplexity(
            quality.baseline_perplexity, quality.baseline_standard_error, quality.tokens, quality.baseline_window_nll
        ),
        _perplexity(
            quality.candidate_perplexity, quality.candidate_standard_error, quality.tokens, quality.candidate_window_nll
        ),
    )


def _perplexity(value: float, standard_error: float, tokens: int, window_nll: tuple[float, ...]) -> Perplexity:
    return Perplexity(value, standard_error, sum(window_nll) / len(window_nll), tokens, window_nll)
