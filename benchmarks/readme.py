"""Tables and pictures of the documents, made from committed records.

``python -m benchmarks.readme`` writes those anew that are stale. A table stands between
``<!-- measured: begin PATH [NAME] -->`` and ``<!-- measured: end -->``; PATH is the record, from the root of the
repository, and NAME says which table of a suite's record. Beside the record of a suite lies its picture.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from benchmarks import delta_table as deltas
from benchmarks import record as records
from benchmarks import table as suites
from benchmarks.consumers import record as consumers
from benchmarks.measures import METRICS
from benchmarks.record import Record
from benchmarks.runtimes import record as runtimes
from benchmarks.throughput import record as throughput
from benchmarks.words import MEANINGS, NAMES, headline, number, quantity, times
from compress.errors import ConfigError
from compress.files import write_file

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- measured: begin (\S+)(?: (\S+))? -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that may hold measured tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_fresh_tables(text: str, root: Path = ROOT, folder: Path | None = None) -> str:
    """A Markdown text with every measured table made anew from its record.

    Args:
        text: of the document.
        root: of the repository, from where the text names its records.
        folder: that the document lies in, from where its links lead; None: the root.

    Raises:
        ConfigError: a record is missing, was changed by hand, or has no such table.
    """
    return _BLOCK.sub(lambda block: block[1] + _tables(root, folder or root, block[2], block[3]) + block[4], text)


def _tables(root: Path, folder: Path, source: str, name: str | None) -> str:
    link = os.path.relpath(root / source, folder)
    if records.format_of(root / source) == consumers.FORMAT:
        return consumers.table(consumers.read(root / source))
    if records.format_of(root / source) == runtimes.FORMAT:
        return runtimes.document(runtimes.read(root / source), link)
    if records.format_of(root / source) == throughput.FORMAT:
        return throughput.document(throughput.read(root / source), link)
    if name is None:
        return tables(records.read(root / source), link)
    if records.format_of(root / source) == deltas.FORMAT:
        grid = deltas.grid_named(deltas.read(root / source), name)
        if grid is None:
            raise ConfigError(f"{source} has no table {name!r}; it has {', '.join(deltas.GRIDS)}")
        return grid.markdown()
    table = suites.read(root / source)
    if name not in suites.GRIDS:
        raise ConfigError(f"{source} has no table {name!r}; it has {', '.join(suites.GRIDS)}")
    return suites.GRIDS[name](table).markdown()


def pictures(root: Path = ROOT) -> dict[Path, str]:
    """Path -> SVG of the picture of every committed suite."""
    found = sorted((root / "benchmarks" / "results").glob("*/*.json"))
    drawn: dict[Path, str] = {}
    for path in found:
        kind = records.format_of(path)
        if kind == suites.FORMAT:
            drawn[path.with_suffix(".svg")] = suites.chart(suites.read(path)) + "\n"
        elif kind == deltas.FORMAT:
            drawn[path.with_suffix(".svg")] = deltas.chart(deltas.read(path)) + "\n"
        elif kind == runtimes.FORMAT:
            drawn[path.with_suffix(".svg")] = runtimes.chart(runtimes.read(path)) + "\n"
        elif kind == throughput.FORMAT:
            drawn[path.with_suffix(".svg")] = throughput.chart(throughput.read(path)) + "\n"
    return drawn


def tables(record: Record, source: str) -> str:
    """What a record says, as Markdown: the ladder, both sides, the verdict, and where it was measured."""
    lines = []
    if record.ladder is not None:
        lines += [
            f"| removed from the blocks | parameters | perplexity ({record.ladder.measured}) | against dense |",
            "|---|---|---|---|",
        ]
        for step in record.ladder.steps:
            chosen = " (chosen)" if step.chosen else ""
            error = "" if step.perplexity_standard_error is None else f" ± {number(step.perplexity_standard_error)}"
            lines.append(
                f"| {step.block_sparsity:.1%}{chosen} | {quantity('parameters', step.parameters)} "
                f"| {number(step.perplexity)}{error} | {times(step.perplexity_ratio)} |"
            )
        lines.append("")
    lines += [f"| {record.measured} | dense | candidate | candidate / dense |", "|---|---|---|---|"]
    for metric in METRICS:
        ours, theirs = record.baseline.get(metric), record.candidate.get(metric)
        lines.append(
            f"| {NAMES[metric]}: {MEANINGS[metric]} | {quantity(metric, ours)} | {quantity(metric, theirs)} "
            f"| {times(record.ratio.get(metric))} |"
        )
    machine = record.machine
    where = f"{machine.cpu}, {machine.usable_cores} cores"
    lines += ["", f"{headline(record)} Measured on {where}; the record is [{record.id}]({source})."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the tables and pictures anew."""
    for document in documents():
        write_file(document, with_fresh_tables(document.read_text(encoding="utf-8"), folder=document.parent))
    for path, drawn in pictures().items():
        write_file(path, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
