"""What a suite found out: one record with a cell for every method and sparsity, and the dense model for reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final, Literal

from pydantic import JsonValue

from benchmarks.evaluation import skill_kept
from benchmarks.intervals import exponential, exponential_of_mean
from benchmarks.machine import Machine
from benchmarks.markup import Html
from benchmarks.measures import PairedRuns
from benchmarks.plots import Curve, curves, lessons
from benchmarks.record import VERSION, Model, read_as
from benchmarks.tasks import TaskScore
from benchmarks.words import number, quantity, times, with_error
from compress.budget import Costs
from compress.evaluate import Perplexity
from compress.schema import Strict

FORMAT: Final = "foldaway-table"


@dataclass(frozen=True)
class ExportedCell:
    """A cell's model as it is shipped.

    Attributes:
        dtype: of its weights.
        size_bytes: of graph and weights.
        decode: tokens/second in one process, taking turns with the dense model's export.
        resident_bytes: what a process of its own holds for it after some tokens, mapped files included.
        perplexity: as it is shipped, on the same windows.
    """

    dtype: str
    size_bytes: int
    decode: PairedRuns
    resident_bytes: int | None = None
    perplexity: Perplexity | None = None


@dataclass(frozen=True)
class Distilled:
    """What a cell's model learnt from the dense one after it was cut.

    Attributes:
        options: of the distillation.
        calibration: rows that were learnt from: source, hash, size and seed.
        tokens: learnt from, as often as they were.
        seconds: of learning alone.
        before: perplexity of the model that was cut, before it learnt.
        losses: mean loss of each epoch.
    """

    options: Mapping[str, JsonValue]
    calibration: Mapping[str, JsonValue]
    tokens: int
    seconds: float
    before: Perplexity
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity with one calibration.

    Attributes:
        label: of the method in tables; "dense" for the model as it came.
        method: its name; None for the dense model.
        options: of the method.
        sparsity: asked for.
        calibration: rows that were looked at: source, hash, size and seed; None for the dense model.
        parameters: distinct weights.
        layout: "plain", "ragged" or "shared".
        perplexity: on the evaluation text, with standard error and window losses.
        tasks: zero-shot accuracies; empty where they were not asked for.
        compression_seconds: of the method alone, without loading; None for the dense model.
        peak_rss_bytes: host memory of a process that loads the model and compresses it.
        numbers: the method's own report.
        exported: what its export is like, where that was asked for.
        costs: what running it takes.
        distilled: what it learnt, where it did; perplexity and tasks are those after it.
    """

    label: str
    method: str | None
    options: Mapping[str, JsonValue]
    sparsity: float
    calibration: Mapping[str, JsonValue] | None
    parameters: int
    layout: str
    perplexity: Perplexity
    tasks: tuple[TaskScore, ...]
    compression_seconds: float | None
    peak_rss_bytes: int
    numbers: Mapping[str, JsonValue]
    exported: ExportedCell | None = None
    costs: Costs | None = None
    distilled: Distilled | None = None

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy over the tasks."""
        return sum(task.acc for task in self.tasks) / len(self.tasks) if self.tasks else None


class Table(Strict):
    """A suite's record.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        title: the suite's name.
        model: the dense model.
        profile: name of the size that was run.
        settings: that size: calibration rows and length, windows, items per task, device.
        jobs: cells that were computed side by side by the call that finished the table; each had its share of the
            cores, so their seconds are comparable with each other only.
        texts: logical name -> hash of the text.
        dense: the model as it came.
        cells: methods and sparsities.
        calibrations: one method and sparsity with other calibration texts.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-table"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    title: str
    model: Model
    profile: str
    settings: dict[str, JsonValue]
    jobs: int
    texts: dict[str, str]
    dense: Cell
    cells: tuple[Cell, ...]
    calibrations: tuple[Cell, ...]
    commands: tuple[str, ...]
    machine: Machine


def read(path: Path) -> Table:
    """Read and check a suite's record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(Table, FORMAT, path)


# --- What a person reads: headers and rows of strings


@dataclass(frozen=True)
class Grid:
    """A table of strings."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.headers, tuple("---" for _ in self.headers), *self.rows]
        return "".join(f"| {' | '.join(text.replace('|', '&#124;') for text in line)} |\n" for line in lines)


def perplexity_grid(table: Table) -> Grid:
    """Perplexity with its standard error, one row per method."""
    return _grid(table, "perplexity", lambda cell: with_error(cell.perplexity.value, cell.perplexity.standard_error))


def ratio_grid(table: Table) -> Grid:
    """Perplexity of each method over that of the first one, with an interval from the paired windows."""
    first = {cell.sparsity: cell for cell in table.cells if cell.label == table.cells[0].label}

    def ratio(cell: Cell) -> str:
        pairs = zip(cell.perplexity.window_nll, first[cell.sparsity].perplexity.window_nll, strict=True)
        differences = [theirs - ours for theirs, ours in pairs]
        interval = exponential_of_mean(differences, "Student's t on paired window losses")
        value = times(exponential(fmean(differences)))
        return value if interval is None else f"{value} ({number(interval.low)} to {number(interval.high)})"

    others = [cell for cell in table.cells if cell.label != table.cells[0].label and cell.sparsity in first]
    return _grid(table, f"perplexity / that of {table.cells[0].label}", ratio, others, dense=False)


def accuracy_grid(table: Table) -> Grid:
    """Mean accuracy over the tasks, and the share of the dense model's skill above chance that is kept."""

    def accuracy(cell: Cell) -> str:
        if cell.accuracy is None:
            return "-"
        kept, interval = skill_kept(table.dense.tasks, cell.tasks)
        if kept is None or interval is None or cell.method is None:
            return f"{cell.accuracy:.1%}"
        return f"{cell.accuracy:.1%}, keeps {_percent(kept)} ({_percent(interval.low)} to {_percent(interval.high)})"

    return _grid(table, "mean accuracy", accuracy)


def cost_grid(table: Table) -> Grid:
    """What compressing takes: seconds, block forward passes, and the peak of memory over all sparsities."""

    def cost(cell: Cell) -> str:
        return f"{cell.compression_seconds:,.0f} s, {cell.numbers['block_forwards']:,} blocks"

    grid = _grid(table, "compression", cost, dense=False)
    peaks = {label: max(c.peak_rss_bytes for c in table.cells if c.label == label) for label in _labels(table.cells)}
    rows = tuple((*row, f"{peaks[row[0]] / 1e9:.2f} GB") for row in grid.rows)
    return Grid((*grid.headers, "peak resident memory"), rows)


def calibration_grid(table: Table) -> Grid:
    """One method and sparsity, calibrated in several ways."""
    rows = tuple(
        (
            str((cell.calibration or {}).get("source")),
            str((cell.calibration or {}).get("seed")),
            with_error(cell.perplexity.value, cell.perplexity.standard_error),
        )
        for cell in table.calibrations
    )
    return Grid(("calibration text", "seed", "perplexity"), rows)


def export_grid(table: Table) -> Grid:
    """What is shipped: size, memory, perplexity and decode speed of the exports, against the dense model's."""
    exported = [cell for cell in (table.dense, *table.cells) if cell.exported is not None]
    headers = ("export", "parameters", "size", "resident", "perplexity", "decode", "decode / dense")
    return Grid((*headers, "parameters dense / candidate"), tuple(_exported(cell, table.dense) for cell in exported))


def _exported(cell: Cell, dense: Cell) -> tuple[str, ...]:
    found = cell.exported
    assert found is not None
    ratio, interval = found.decode.ratio, found.decode.ratio_interval
    judged = found.perplexity
    return (
        f"{cell.label}, {found.dtype}" + (f", {cell.sparsity:.1%}" if cell.method else ""),
        quantity("parameters", cell.parameters),
        quantity("size_bytes", found.size_bytes),
        quantity("peak_rss_bytes", found.resident_bytes),
        "–" if judged is None else with_error(judged.value, judged.standard_error),
        quantity("decode_tokens_per_second", found.decode.candidate_summary.median),
        f"{times(ratio)} ({number(interval.low)} to {number(interval.high)})",
        times(dense.parameters / cell.parameters),
    )


def size_grid(table: Table) -> Grid:
    """What each model weighs and what running it takes, as shares of the dense model, with its perplexity."""
    rows = tuple(
        (
            cell.label + (f", {cell.sparsity:.1%}" if cell.method else ""),
            quantity("parameters", cell.parameters),
            f"{cell.parameters / table.dense.parameters:.1%}",
            *_running(cell, table.dense),
            with_error(cell.perplexity.value, cell.perplexity.standard_error),
        )
        for cell in (table.dense, *table.cells)
    )
    return Grid(("model", "stored parameters", "of dense", "FLOPs a token", "KV cache a token", "perplexity"), rows)


def learning_grid(table: Table) -> Grid:
    """The dense model and those that learnt from it: from what, how long, and perplexity before and after."""
    rows = tuple(
        (
            cell.label + (f", {cell.sparsity:.1%}" if cell.sparsity else ""),
            quantity("parameters", cell.parameters),
            *_learnt(cell),
            with_error(cell.perplexity.value, cell.perplexity.standard_error),
        )
        for cell in (table.dense, *(cell for cell in table.cells if cell.distilled is not None))
    )
    return Grid(("model", "parameters", "before learning", "tokens", "minutes", "perplexity"), rows)


def _learnt(cell: Cell) -> tuple[str, str, str]:
    learnt = cell.distilled
    if learnt is None:
        return "–", "–", "–"
    tokens = f"{learnt.tokens:,} of {learnt.calibration['source']}".replace(",", " ")
    return number(learnt.before.value), tokens, f"{learnt.seconds / 60:.1f}"


def _running(cell: Cell, dense: Cell) -> tuple[str, str]:
    if cell.costs is None or dense.costs is None:
        return "–", "–"
    flops = cell.costs.flops_per_token / dense.costs.flops_per_token
    return f"{flops:.1%}", f"{cell.costs.kv_per_token / dense.costs.kv_per_token:.1%}"


GRIDS: dict[str, Callable[[Table], Grid]] = {
    "perplexity": perplexity_grid,
    "ratio": ratio_grid,
    "accuracy": accuracy_grid,
    "cost": cost_grid,
    "calibration": calibration_grid,
    "export": export_grid,
    "size": size_grid,
    "learning": learning_grid,
}
"""The tables of a record, by the name that documents ask for them with."""


def chart(table: Table) -> Html:
    """Perplexity against remaining parameters, one line per method; against tokens learnt from where models learn."""
    title = f"{table.title}: {table.model.name}"
    if any(cell.distilled is not None for cell in table.cells):
        teacher = table.dense.perplexity.value
        return lessons(title, _lessons(table.cells), teacher, CHART_CEILING * teacher)
    lines = [
        Curve(label, tuple((c.parameters, c.perplexity.value) for c in table.cells if c.label == label))
        for label in _labels(table.cells)
    ]
    dense = (table.dense.parameters, table.dense.perplexity.value)
    return curves(title, lines, dense, CHART_CEILING * dense[1])


def _lessons(cells: Sequence[Cell]) -> list[Curve]:
    """One line for each cut and way to learn; it bears the shortest label among its cells."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.distilled is not None:
            alike = (cell.method, dict(cell.options), cell.sparsity, dict(cell.distilled.options))
            found.setdefault(repr(alike), []).append(cell)
    lines = []
    for group in found.values():
        learnt = sorted((each.distilled.tokens, each.perplexity.value) for each in group if each.distilled is not None)
        (start, *_) = (each.distilled.before.value for each in group if each.distilled is not None)
        lines.append(Curve(min((each.label for each in group), key=len), ((0.0, start), *learnt)))
    return lines


CHART_CEILING = 200.0
"""Times the dense perplexity: beyond it a model is broken, and how badly says nothing."""


def _grid(
    table: Table, corner: str, text: Callable[[Cell], str], cells: Sequence[Cell] | None = None, *, dense: bool = True
) -> Grid:
    """One row per method and one column per sparsity, behind the dense model if it has something to say."""
    cells = table.cells if cells is None else cells
    sparsities = sorted({cell.sparsity for cell in cells})
    by_place = {(cell.label, cell.sparsity): cell for cell in cells}
    rows = [
        (label, *(text(by_place[label, s]) if (label, s) in by_place else "" for s in sparsities))
        for label in _labels(cells)
    ]
    if dense:
        rows.insert(0, ("dense", text(table.dense), *([""] * (len(sparsities) - 1))))
    return Grid((corner, *(f"{s:.1%}" for s in sparsities)), tuple(rows))


def _percent(share: float) -> str:
    """Whole percent, without a sign on zero."""
    return str(round(100 * share)) if math.isfinite(share) else number(share)


def _labels(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.label for cell in cells))
