"""What ``foldaway fit`` found out: every candidate that was tried, how good it is, and which one was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from pydantic import JsonValue

from benchmarks.machine import Machine
from benchmarks.record import VERSION, Model, read_as
from benchmarks.tasks import TaskScore
from benchmarks.words import NBSP, number, quantity, seconds, share, with_error
from compress.evaluate import Perplexity
from compress.schema import Strict
from compress.shape import Shape
from deploy.ruler import Kind, Ruler, Size, Target
from deploy.search import Candidate

FORMAT: Final = "foldaway-fit"
FILE = "fit.json"
DENSE = "dense"

AXES: dict[Kind, str] = {
    "parameters": "parameters",
    "bytes": "bytes on disk",
    "memory": "memory with a cache of {:,} tokens",
    "latency": "time of a decoded token behind {:,} others",
}


@dataclass(frozen=True)
class Measured:
    """What was found of the value that the budget limits.

    Attributes:
        value: the median of the runs. Where they took turns with the dense model, the dense model's own value times the
            median of the ratios, so that a slow moment of the machine is not taken for a slow model.
        runs: in the order in which they were made; one where it is counted.
        dense_runs: of the dense model, in turns with them; empty where none were needed.
        peak_bytes: the most that one of the processes held, for memory; None for the others.
    """

    value: float
    runs: tuple[float, ...]
    dense_runs: tuple[float, ...] = ()
    peak_bytes: int | None = None


def measured(runs: Sequence[float], peak_bytes: int | None = None) -> Measured:
    """Runs with their median."""
    return Measured(float(median(runs)), tuple(map(float, runs)), peak_bytes=peak_bytes)


def in_turns(dense: float, dense_runs: Sequence[float], runs: Sequence[float]) -> Measured:
    """Runs that took turns with the dense model, whose value was measured before."""
    ratios = [own / reference for own, reference in zip(runs, dense_runs, strict=True)]
    return Measured(dense * float(median(ratios)), tuple(runs), tuple(dense_runs))


@dataclass(frozen=True)
class Judged:
    """How good a model was found to be.

    Attributes:
        perplexity: on the text; None where tasks judge.
        tasks: one score each; empty where text judges.
        seconds: that it took.
    """

    perplexity: Perplexity | None
    tasks: tuple[TaskScore, ...]
    seconds: float

    @property
    def value(self) -> float:
        """Perplexity, or the mean accuracy over the tasks."""
        if self.perplexity is not None:
            return self.perplexity.value
        return math.fsum(task.acc for task in self.tasks) / len(self.tasks)

    @property
    def standard_error(self) -> float:
        """Of `value`: over windows, or over the items of every task."""
        if self.perplexity is not None:
            return self.perplexity.standard_error
        return math.hypot(*(task.acc_standard_error for task in self.tasks)) / len(self.tasks)

    @property
    def badness(self) -> float:
        """Lower is better, whatever judged."""
        return self.value if self.perplexity is not None else -self.value


@dataclass(frozen=True)
class Made:
    """What a method left.

    Attributes:
        artifact: its id.
        layout: "plain", "ragged" or "shared".
        parameters: distinct ones, counted again.
        seconds: of compressing, and of learning where the candidate did.
    """

    artifact: str
    layout: str
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One candidate, or the dense model.

    Attributes:
        name: in the table, and in the names of files.
        method: that made it; None for the dense model.
        options: of the method.
        shape: that it was cut to; None where the method does not cut to one.
        size: counted before anything was made.
        predicted: value that the budget limits.
        made: what came of it; None for the dense model, and for a candidate whose shape alone was too slow.
        measured: the same value, of the artifact, or of the shape where it was not made.
        fits: whether `measured` is within the budget.
        judged: None where it was not made.
    """

    name: str
    method: str | None
    options: Mapping[str, JsonValue]
    shape: Shape | None
    size: Size
    predicted: float
    made: Made | None
    measured: Measured
    fits: bool
    judged: Judged | None


@dataclass(frozen=True)
class Searched:
    """What a method had to offer.

    Attributes:
        method: its name.
        options: that the user set for all its candidates.
        enumerated: shapes or sparsities that were looked at.
        fitting: those predicted to fit.
        smallest: the lowest value that it reaches, as predicted; None where it reaches none.
    """

    method: str
    options: Mapping[str, JsonValue]
    enumerated: int
    fitting: int
    smallest: float | None


class FitRecord(Strict):
    """The record of a search.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        model: the dense one.
        target: what must not be exceeded.
        ruler: how values were predicted from counts.
        judge: what candidates were judged by.
        dense: the model itself, for reference.
        searched: what each method had to offer.
        candidates: all that were tried, in that order.
        chosen: name of the best one that fits; None where none does.
        settings: everything else that was asked for.
        texts: calibration and evaluation: source, hash and size.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-fit"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    model: Model
    target: Target
    ruler: Ruler
    judge: Literal["perplexity", "accuracy"]
    dense: Row
    searched: tuple[Searched, ...]
    candidates: tuple[Row, ...]
    chosen: str | None
    settings: dict[str, JsonValue]
    texts: dict[str, dict[str, JsonValue]]
    commands: tuple[str, ...]
    machine: Machine

    @property
    def best(self) -> Row | None:
        """The chosen candidate."""
        return next((row for row in self.candidates if row.name == self.chosen), None)


def read(path: Path) -> FitRecord:
    """Read and check the record of a search; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(FitRecord, FORMAT, path)


def choose(rows: Sequence[Row]) -> Row | None:
    """The best judged of those that fit; of equals the one of the lower value. None where none fits."""
    able = [row for row in rows if row.fits and row.judged is not None and not math.isnan(row.judged.badness)]

    def order(row: Row) -> tuple[float, float]:
        assert row.judged is not None
        return row.judged.badness, row.measured.value

    return min(able, key=order, default=None)


# --- In words


def amount(kind: Kind, value: float) -> str:
    """A value of a budget with its unit: 98.3 M, 197 MB, 41.2 ms."""
    if kind == "parameters":
        return quantity("parameters", value)
    return seconds(value) if kind == "latency" else quantity("size_bytes", value)


def axis(target: Target) -> str:
    """What a budget limits."""
    return AXES[target.kind].format(target.context)


def described(method: str | None, shape: Shape | None, options: Mapping[str, Any]) -> str:
    """What a candidate is, for a person."""
    if method is None:
        return DENSE if shape is None else f"{DENSE}: {shape}"
    if shape is not None:
        return f"{method}: {shape}"
    return f"{method}: sparsity {share(options['sparsity'])}"


def describe_candidate(candidate: Candidate) -> str:
    """What a candidate is, before it was tried."""
    return described(candidate.method, candidate.shape, candidate.options)


def judgement(judged: Judged | None) -> str:
    """How good, with the standard error."""
    if judged is None:
        return "not judged"
    if judged.perplexity is not None:
        return f"perplexity {with_error(judged.value, judged.standard_error)}"
    return f"accuracy {accuracy(judged)}"


def accuracy(judged: Judged) -> str:
    """45.1 ± 1.2 %."""
    error = judged.standard_error
    spread = "" if math.isnan(error) else f" ± {number(100 * error)}"
    return f"{number(100 * judged.value)}{spread}{NBSP}%"


def outcome(found: FitRecord) -> list[str]:
    """A search in words, a line each."""
    target, best = found.target, found.best
    asked = f"{found.model.name} in at most {amount(target.kind, target.limit)} ({axis(target)})"
    counts = f"{sum(each.enumerated for each in found.searched):,} candidates were counted"
    counts += f", {sum(each.fitting for each in found.searched):,} fit, {len(found.candidates)} were tried"
    lines = [f"{asked}: {counts}"]
    if best is None:
        return [*lines, "none of those that were tried fits"]
    lines.append(f"chosen: {described(best.method, best.shape, best.options)}")
    lines.append(
        f"{amount(target.kind, best.measured.value)} where the dense model has "
        f"{amount(target.kind, found.dense.measured.value)}; {judgement(best.judged)}, dense "
        f"{judgement(found.dense.judged).split(' ', 1)[1]}"
    )
    return lines
