"""What a suite of deltas found out: fine-tunes, and what is left of each in so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import JsonValue

from benchmarks.answers import AnswerScore
from benchmarks.intervals import Interval, gain_kept
from benchmarks.machine import Machine
from benchmarks.markup import Html
from benchmarks.plots import Curve, tradeoff
from benchmarks.record import VERSION, read_as
from benchmarks.table import Grid
from benchmarks.words import number
from compress.schema import Strict

FORMAT: Final = "foldaway-delta-table"


@dataclass(frozen=True)
class Score:
    """What was measured of one model.

    Attributes:
        answers: to the test items of the pair.
        perplexity: on text that has nothing to do with the task; None for an encoder.
        text_kl: KL(fine-tune || model) per token of that text, in nats; None for an encoder and for the fine-tune.
    """

    answers: AnswerScore
    perplexity: float | None = None
    text_kl: float | None = None


@dataclass(frozen=True)
class DeltaCell:
    """One way to store a fine-tune.

    Attributes:
        label: of the way, in tables.
        p: share dropped; None for a low-rank pair.
        values: type of kept values; "bf16" for a low-rank pair.
        config: of the method, as it was in the end (with what was searched).
        bytes: of all its tensors.
        pruned_bytes: of those of the pruned matrices.
        score: of what comes out.
        seconds: of pruning and packing, with calibration and search.
    """

    label: str
    p: float | None
    values: str
    config: Mapping[str, JsonValue]
    bytes: int
    pruned_bytes: int
    score: Score
    seconds: float


@dataclass(frozen=True)
class DeltaPair:
    """A base, a fine-tune of it, and the ways to store that.

    Attributes:
        name: in tables.
        model: the base, as it was asked for.
        finetune: how it was fine-tuned.
        loss: over the last tenth of the steps, in nats per token.
        base, finetuned: their scores.
        pruned_parameters: elements of the matrices that are pruned.
        mean_abs_delta: mean magnitude of what the fine-tune adds to them.
        exact_zeros: share of them that did not change.
        influence_ratio: mean R.
        cells: the ways.
    """

    name: str
    model: str
    finetune: Mapping[str, JsonValue]
    loss: float
    base: Score
    finetuned: Score
    pruned_parameters: int
    mean_abs_delta: float
    exact_zeros: float
    influence_ratio: float
    cells: tuple[DeltaCell, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, run by run, beside safetensors' load and save of the same model in the same run.

    Attributes:
        what: was timed.
        seconds: of each run.
        reference: what it is compared with.
        reference_seconds: of each run, taking turns.
    """

    what: str
    seconds: tuple[float, ...]
    reference: str
    reference_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return float(np.median(self.seconds) / np.median(self.reference_seconds))


class DeltaTable(Strict):
    """The record of a suite of deltas.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        title: the suite's name.
        profile: name of the size that was run.
        settings: that size.
        files: hashes of tasks and texts, by their paths below the data folder.
        pairs: fine-tunes and the ways to store them.
        timings: of pack, apply and switch.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-delta-table"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    title: str
    profile: str
    settings: dict[str, JsonValue]
    files: dict[str, str]
    pairs: tuple[DeltaPair, ...]
    timings: tuple[Timing, ...]
    commands: tuple[str, ...]
    machine: Machine


def read(path: Path) -> DeltaTable:
    """Read and check a record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(DeltaTable, FORMAT, path)


def kept_of(pair: DeltaPair, cell: DeltaCell) -> tuple[float, Interval]:
    """Share of the fine-tune's gain in the likelihood of right answers that a cell keeps."""
    return gain_kept(pair.base.answers.item_nll, pair.finetuned.answers.item_nll, cell.score.answers.item_nll)


# --- What a person reads


def _rows(pair: DeltaPair, values: str, text: Callable[[DeltaCell], str], corner: str) -> Grid:
    cells = [cell for cell in pair.cells if cell.p is not None and cell.values == values and cell.p > 0]
    dropped = sorted({cell.p for cell in cells if cell.p is not None})
    labels = list(dict.fromkeys(cell.label for cell in cells))
    by_place = {(cell.label, cell.p): text(cell) for cell in cells}
    rows = tuple((label, *(by_place.get((label, p), "") for p in dropped)) for label in labels)
    return Grid((corner, *(f"p = {p:g}" for p in dropped)), rows)


def methods_grid(pair: DeltaPair) -> Grid:
    """Share of the fine-tune's gain that int8 packages keep, one row per way to prune."""

    def kept(cell: DeltaCell) -> str:
        value, interval = kept_of(pair, cell)
        accuracy = cell.score.answers.accuracy
        right = "" if accuracy is None else f", {accuracy:.1%} right"
        return f"{value:.0%} ({interval.low:.0%} to {interval.high:.0%}){right}"

    return _rows(pair, "int8", kept, "gain kept, int8")


def divergence_grid(pair: DeltaPair) -> Grid:
    """KL from the fine-tune on answers, and perplexity of other text."""

    def moved(cell: DeltaCell) -> str:
        perplexity = "" if cell.score.perplexity is None else f", perplexity {number(cell.score.perplexity)}"
        return f"{number(cell.score.answers.kl or 0.0)}{perplexity}"

    return _rows(pair, "int8", moved, "KL to the fine-tune, int8")


def bytes_grid(pair: DeltaPair) -> Grid:
    """Every cell by its bytes, smallest first: what it keeps."""
    rows = []
    for cell in sorted(pair.cells, key=lambda each: each.bytes):
        value, interval = kept_of(pair, cell)
        accuracy = cell.score.answers.accuracy
        times = f"{2 * pair.pruned_parameters / cell.pruned_bytes:.1f}" if cell.pruned_bytes else ""
        rows.append(
            (
                cell.label,
                "" if cell.p is None else f"{cell.p:g}",
                cell.values,
                f"{cell.bytes / 1e6:.2f} MB",
                times,
                f"{value:.0%} ({interval.low:.0%} to {interval.high:.0%})",
                "" if accuracy is None else f"{accuracy:.1%}",
            )
        )
    headers = ("way", "p", "values", "tensors", "times smaller than bf16", "gain kept", "right")
    return Grid(headers, tuple(rows))


def pairs_grid(table: DeltaTable) -> Grid:
    """The fine-tunes: what they gained, and what their deltas are like."""
    rows = []
    for pair in table.pairs:
        ours, theirs = pair.base.answers, pair.finetuned.answers
        right = "" if ours.accuracy is None else f"{ours.accuracy:.1%} → {theirs.accuracy:.1%}"
        likely = f"{number(ours.nll)} → {number(theirs.nll)}"
        zeros = f"{pair.exact_zeros:.0%}"
        rows.append((pair.name, right, likely, f"{pair.mean_abs_delta:.2g}", zeros, f"{pair.influence_ratio:.2g}"))
    headers = ("fine-tune", "right", "nats per token of the answer", "mean |delta|", "exact zeros", "R")
    return Grid(headers, tuple(rows))


def timings_grid(table: DeltaTable) -> Grid:
    """Seconds of pack, apply and switch, and their ratios to what they are compared with."""
    rows = tuple(
        (
            timing.what,
            f"{np.median(timing.seconds):.3g} s",
            f"{timing.reference}: {np.median(timing.reference_seconds):.3g} s",
            f"× {timing.ratio:.2f}",
        )
        for timing in table.timings
    )
    return Grid(("what", "median", "beside", "ratio"), rows)


_OF_A_PAIR = {"methods": methods_grid, "divergence": divergence_grid, "bytes": bytes_grid}
_OF_ALL = {"pairs": pairs_grid, "timings": timings_grid}
GRIDS = (*_OF_ALL, *(f"{name}:PAIR" for name in _OF_A_PAIR))
"""The tables of a record, by the name that documents ask for them with."""


def grid_named(table: DeltaTable, name: str) -> Grid | None:
    """The table behind one of the `GRIDS`; None where there is none."""
    if name in _OF_ALL:
        return _OF_ALL[name](table)
    kind, _, wanted = name.partition(":")
    found = [pair for pair in table.pairs if pair.name == wanted]
    return _OF_A_PAIR[kind](found[0]) if kind in _OF_A_PAIR and found else None


def chart(table: DeltaTable) -> Html:
    """Gain kept against bytes for the first pair, one line per way."""
    pair = table.pairs[0]
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in pair.cells:
        name = cell.label if cell.values == "int8" or cell.p is None else f"{cell.label}, {cell.values}"
        lines.setdefault(name, []).append((float(cell.bytes), kept_of(pair, cell)[0]))
    return tradeoff(
        f"{table.title}: {pair.name} on {pair.model}",
        [Curve(label, tuple(sorted(points))) for label, points in lines.items()],
        ("bytes of the package, log scale", "share of the fine-tune's gain kept"),
    )
