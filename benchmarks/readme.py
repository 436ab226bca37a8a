"""Tables of the README, written from committed records: ``python -m benchmarks.readme`` rewrites those that are stale.

A table stands between ``<!-- measured: begin PATH -->`` and ``<!-- measured: end -->``; PATH is the record, from the
root of the repository.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks import record as records
from benchmarks.measures import METRICS
from benchmarks.record import Record
from benchmarks.words import MEANINGS, NAMES, headline, number, quantity, times
from compress.files import write_file

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- measured: begin (\S+) -->\n).*?(<!-- measured: end -->)", re.DOTALL)


def with_fresh_tables(text: str, root: Path = ROOT) -> str:
    """A Markdown text with every measured table made anew from its record.

    Raises:
        ConfigError: a record is missing, or was changed by hand.
    """
    return _BLOCK.sub(lambda block: block[1] + tables(records.read(root / block[2]), block[2]) + block[3], text)


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
    """Rewrite the README's tables."""
    path = ROOT / "README.md"
    write_file(path, with_fresh_tables(path.read_text(encoding="utf-8")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
