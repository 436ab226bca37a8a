"""``python -m benchmarks.consumers EXPORT...``: which runtimes open some exports and generate the same text."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.consumers import CONSUMERS
from benchmarks.consumers.base import Consumer
from benchmarks.consumers.python import InItsOwn
from benchmarks.consumers.record import ask, table
from benchmarks.record import write
from compress.errors import FoldawayError


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and write the record if a file for it is named; 0 when all of them open all exports."""
    parser = argparse.ArgumentParser("python -m benchmarks.consumers", description=str(__doc__).partition(": ")[2])
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT", help="ONNX exports")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="where the record goes; while it asks, what it knows lies beside that in a .part.json",
    )
    parser.add_argument("--only", nargs="+", choices=CONSUMERS, default=list(CONSUMERS), help="consumers (all)")
    parser.add_argument("--prepare", action="store_true", help="only build the environments that they need")
    parser.add_argument("--torch-index", metavar="URL", help="where torch alone comes from, for those environments")
    given = parser.parse_args(argv)
    if bool(given.exports) == given.prepare:
        parser.error("name exports, or say --prepare")
    consumers = {name: CONSUMERS[name] for name in CONSUMERS if name in given.only}
    command = shlex.join(["python", "-m", "benchmarks.consumers", *(sys.argv[1:] if argv is None else argv)])
    try:
        for consumer in consumers.values():
            prepare(consumer, given.torch_index)
        if given.prepare:
            return 0
        output: Path | None = given.output
        part = output.with_suffix(".part.json") if output else None
        record = ask(given.exports, consumers, command, lambda known: write(known, part) if part else None)
        if output and part:
            write(record, output)
            part.unlink()
    except FoldawayError as error:
        parser.error(str(error))
    sys.stdout.write(table(record))
    return 0 if all(outcome.ok for export in record.exports for outcome in export.outcomes) else 3


def prepare(consumer: Consumer, torch_index: str | None) -> None:
    """Build what a consumer needs."""
    if isinstance(consumer, InItsOwn):
        consumer.prepare(torch_index)
    else:
        consumer.prepare()


if __name__ == "__main__":
    sys.exit(main())
