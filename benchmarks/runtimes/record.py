"""What was measured of runtimes: raw runs, a table of medians, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, Literal

from benchmarks.machine import Machine
from benchmarks.markup import Html
from benchmarks.plots import Spot, panels
from benchmarks.record import VERSION, read_as
from benchmarks.table import Grid
from benchmarks.words import number, times
from compress.schema import Strict

FORMAT: Final = "foldaway-runtimes"


@dataclass(frozen=True)
class Memory:
    """What a process holds beyond what it held after its imports (`idle_bytes`).

    Attributes:
        idle_bytes: after imports.
        loaded_anon_bytes, loaded_file_bytes, loaded_total_bytes: once the model is loaded: memory of its own, pages of
            mapped files, and both.
        used_anon_bytes, used_file_bytes, used_total_bytes: after a first prompt and some tokens.
        peak_bytes: the most by the end of the run.
    """

    idle_bytes: int
    loaded_anon_bytes: int
    loaded_file_bytes: int
    loaded_total_bytes: int
    used_anon_bytes: int
    used_file_bytes: int
    used_total_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        load_seconds: of loading, without imports.
        prefill_tokens_per_second: of the long prompt.
        decode_tokens_per_second: of the steps after the short one.
        memory: None where the system does not tell.
    """

    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    memory: Memory | None


@dataclass(frozen=True)
class SideRuns:
    """One model in one runtime.

    Attributes:
        name: in tables.
        kind: of runtime.
        file_bytes: of graph and weights.
        bytes_per_token: of the weights that decoding one token reads.
        versions: of what the runtime is made of.
        perplexity: as it was measured elsewhere.
        runs: in the order in which they were made.
    """

    name: str
    kind: str
    file_bytes: int
    bytes_per_token: int
    versions: dict[str, str]
    perplexity: float | None
    runs: tuple[Run, ...]

    def median(self, value: Callable[[Run], float | None]) -> float | None:
        """Median over the runs; None where one has no value."""
        values = [found for run in self.runs if (found := value(run)) is not None]
        return median(values) if len(values) == len(self.runs) else None

    @property
    def decode(self) -> float:
        """Median of tokens/second."""
        return median(run.decode_tokens_per_second for run in self.runs)

    @property
    def used_bytes(self) -> float | None:
        """Median of what is held after the first prompt and tokens."""
        return self.median(lambda run: run.memory.used_total_bytes if run.memory else None)


class Runtimes(Strict):
    """The record of one command.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        title: of table and picture.
        baseline: name of the side that the others are compared with.
        threads: of each side.
        settings: lengths of prompts and continuations, in tokens, and repeats in each run.
        bandwidth_bytes_per_second: how fast memory is read with as many threads.
        sides: in the order in which they took turns.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-runtimes"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    title: str
    baseline: str
    threads: int
    settings: dict[str, int]
    bandwidth_bytes_per_second: float
    sides: tuple[SideRuns, ...]
    commands: tuple[str, ...]
    machine: Machine

    def ceiling(self, side: SideRuns) -> float:
        """The most tokens/second that reading the weights once for each leaves."""
        return self.bandwidth_bytes_per_second / side.bytes_per_token


def read(path: Path) -> Runtimes:
    """Read and check a record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(Runtimes, FORMAT, path)


def table(record: Runtimes) -> Grid:
    """Medians, and how they compare with the baseline's."""
    baseline = next(side for side in record.sides if side.name == record.baseline)

    def beside(side: SideRuns, value: Callable[[SideRuns], float | None], unit: float = 1.0) -> str:
        ours, theirs = value(baseline), value(side)
        if theirs is None:
            return "–"
        return number(theirs / unit) + (f" ({times(theirs / ours)})" if ours and side is not baseline else "")

    def row(side: SideRuns) -> tuple[str, ...]:
        used = side.used_bytes
        return (
            side.name,
            beside(side, lambda each: each.file_bytes, 1e6),
            beside(side, lambda each: each.median(lambda run: run.load_seconds)),
            beside(side, lambda each: each.used_bytes, 1e6),
            "–" if used is None else number(used / side.file_bytes),
            beside(side, lambda each: each.median(lambda run: run.memory.peak_bytes if run.memory else None), 1e6),
            beside(side, lambda each: each.median(lambda run: run.prefill_tokens_per_second)),
            beside(side, lambda each: each.decode),
            f"{side.decode / record.ceiling(side):.0%} of {number(record.ceiling(side))}",
            *([] if no_perplexity else [beside(side, lambda each: each.perplexity)]),
        )

    no_perplexity = all(side.perplexity is None for side in record.sides)
    headers = ["", "file, MB", "load, s", "memory, MB", "memory / file", "peak, MB"]
    headers += [f"prefill of {record.settings['prompt_tokens']}, tokens/s", "decode, tokens/s", "of the ceiling"]
    headers += [] if no_perplexity else ["perplexity"]
    return Grid(tuple(headers), tuple(row(side) for side in record.sides))


def conditions(record: Runtimes) -> str:
    """What the table was measured under, in a sentence."""
    first = f"{record.settings['first_tokens']} + {record.settings['first_steps']} tokens"
    return (
        f"{record.threads} threads, medians of {len(record.sides[0].runs)} processes of each, taking turns. Memory is "
        f"beyond imports, after {first}. The ceiling: this machine reads "
        f"{number(record.bandwidth_bytes_per_second / 1e9)} GB/s."
    )


def document(record: Runtimes, source: str) -> str:
    """What documents say of a record that lies at `source`: table, conditions, machine. Markdown."""
    where = f"{record.machine.cpu}, {record.machine.usable_cores} cores"
    about = f"{conditions(record)} Measured on {where}; the record is [{record.id}]({source})."
    return f"{table(record).markdown()}\n{about}\n"


def chart(record: Runtimes) -> Html:
    """Decode speed and memory against the size of the file; lines are the ceiling, and memory of the file's size."""
    spots = [
        Spot(
            side.name, side.file_bytes / 1e6, (side.decode, None if side.used_bytes is None else side.used_bytes / 1e6)
        )
        for side in record.sides
    ]
    ceiling = record.bandwidth_bytes_per_second / 1e6
    return panels(
        record.title,
        spots,
        "file, MB, log scale",
        ("decode, tokens/s", "memory in use, MB"),
        (("memory bandwidth", lambda size: ceiling / size), ("the file itself", lambda size: size)),
    )
