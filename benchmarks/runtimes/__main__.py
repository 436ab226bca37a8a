"""``python -m benchmarks.runtimes``: measure, print a table, and write the record and its picture."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record as records
from benchmarks import runtimes
from benchmarks.evaluation import read as read_evaluation
from benchmarks.runtimes.measure import measure
from benchmarks.runtimes.record import chart, conditions, table
from benchmarks.runtimes.sides import sides_of
from compress.errors import ConfigError, FoldawayError
from compress.files import check_new_file, write_file

PROGRAM = "python -m benchmarks.runtimes"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write what is asked for."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        _main(given, f"{PROGRAM} {shlex.join(arguments)}")
    except FoldawayError as error:
        parser.error(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    description = str(runtimes.__doc__)
    parser = argparse.ArgumentParser(
        PROGRAM, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="+", metavar="NAME=KIND:PATH", help="what is measured")
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (the first)")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a side")
    parser.add_argument(
        "--quality", action="append", default=[], metavar="NAME=FILE", help="a side's record of `foldaway eval`"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each side (2)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="processes of each side (5)")
    parser.add_argument("--title", default="Runtimes", help="of the record")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where the record goes; its picture beside it"
    )
    return parser


def _main(given: argparse.Namespace, command: str) -> None:
    sides = sides_of(given.sides, given.python)
    names = [side.name for side in sides]
    qualities = dict(_known(text, names) for text in given.quality)
    if given.baseline not in (None, *names):
        raise ConfigError(f"--baseline {given.baseline}: there are {', '.join(names)}")
    if min(given.threads, given.rounds) < 1:
        raise ConfigError(f"--threads {given.threads}, --rounds {given.rounds}: give 1 or more of each")
    if given.output:
        check_new_file(given.output)
    record = measure(
        sides,
        threads=given.threads,
        rounds=given.rounds,
        baseline=given.baseline,
        perplexities={name: perplexity_in(file) for name, file in qualities.items()},
        title=given.title,
        command=command,
        progress=_tell,
    )
    sys.stdout.write(f"{table(record).markdown()}\n{conditions(record)}\n")
    if given.output:
        records.write(record, given.output)
        write_file(given.output.with_suffix(".svg"), chart(record) + "\n")


def _tell(what: str, done: int, total: int) -> None:
    sys.stderr.write(f"{what} {done} of {total}\n")


def _known(text: str, names: Sequence[str]) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if name not in names or not file:
        raise ConfigError(f"{text}: give NAME=FILE with the name of a side: {', '.join(names)}")
    return name, Path(file)


def perplexity_in(file: Path) -> float:
    """The perplexity in a record of `foldaway eval`."""
    return read_evaluation(file).subject.perplexity.value


if __name__ == "__main__":
    sys.exit(main())
