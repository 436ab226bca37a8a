"""``python -m benchmarks.throughput``: measure, print a table, and write the record and its picture."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record as records
from benchmarks import throughput
from benchmarks.table import Grid
from benchmarks.throughput.measure import measure, portable
from benchmarks.throughput.record import Settings, chart, conditions, last_line, models_table, table
from benchmarks.throughput.sides import sides_of
from compress.errors import ConfigError, FoldawayError
from compress.files import check_new_file, write_file

PROGRAM = "python -m benchmarks.throughput"
ENVIRONMENT = ("OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
"""Variables that a record's command begins with where they are set: how much a CPU has for it."""
PLAIN_COLUMNS = 160
"""Of tables that go to a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, and write the record, its picture and the logs."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        _main(given)
    except FoldawayError as error:
        parser.error(str(error))
    return 0


def _parser() -> argparse.ArgumentParser:
    description = str(throughput.__doc__)
    parser = argparse.ArgumentParser(
        PROGRAM, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="+", metavar="NAME=PATH", help="what is served; the first is the baseline")
    parser.add_argument("--backend", default="vllm", metavar="NAME", help="of `foldaway serve` (vllm)")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 4, 16], metavar="N", help="(1 4 16)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (5)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of each answer (64)")
    parser.add_argument(
        "--requests-per-slot", type=int, default=2, metavar="N", help="of a turn, for each request in flight (2)"
    )
    parser.add_argument(
        "--flags", type=shlex.split, default=[], metavar='"FLAGS"', help='of the backend: --flags="--dtype bfloat16"'
    )
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and answer, at most")
    parser.add_argument("--title", default="Throughput", help="of the record")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="where the record goes; its picture and the servers' logs beside it",
    )
    return parser


def _main(given: argparse.Namespace) -> None:
    settings = settings_of(given)
    sides = sides_of(given.sides)
    output: Path = given.output
    check_new_file(output)
    record = measure(
        sides,
        settings,
        log_of=lambda name: output.with_name(f"{output.stem}-{name}.log"),
        title=given.title,
        command=command_of(given),
        progress=_tell,
    )
    records.write(record, output, indent=None)
    write_file(output.with_suffix(".svg"), chart(record) + "\n")
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_COLUMNS
    console.print(_for_terminals(models_table(record)), _for_terminals(table(record)))
    console.print(conditions(record), markup=False)
    sys.stdout.write(json.dumps(last_line(record, output)) + "\n")


def settings_of(given: argparse.Namespace) -> Settings:
    """The settings that were asked for.

    Raises:
        ConfigError: one that cannot be meant.
    """
    numbers = {"--repeats": given.repeats, "--requests-per-slot": given.requests_per_slot}
    for name, value in (*numbers.items(), *(("--in-flight", each) for each in given.in_flight)):
        if value < 1:
            raise ConfigError(f"{name} {value}: give 1 or more")
    if given.max_tokens < 2:
        raise ConfigError(
            f"--max-tokens {given.max_tokens}: give 2 or more, for the time of a token is that of later ones"
        )
    if len(set(given.in_flight)) < len(given.in_flight):
        raise ConfigError(f"--in-flight {' '.join(map(str, given.in_flight))}: name every number once")
    return Settings(
        backend=given.backend,
        flags=tuple(given.flags),
        max_model_len=given.max_model_len,
        in_flight=tuple(given.in_flight),
        repeats=given.repeats,
        max_tokens=given.max_tokens,
        requests_per_slot=given.requests_per_slot,
    )


def command_of(given: argparse.Namespace) -> str:
    """The command that repeats this, with all that was left to defaults; no path in it tells where it was run."""
    words = ["python", "-m", "benchmarks.throughput", *(portable(side) for side in given.sides)]
    words += ["--backend", given.backend, "--in-flight", *map(str, given.in_flight), "--repeats", str(given.repeats)]
    words += ["--max-tokens", str(given.max_tokens), "--requests-per-slot", str(given.requests_per_slot)]
    if given.max_model_len is not None:
        words += ["--max-model-len", str(given.max_model_len)]
    if given.flags:
        words.append(f"--flags={shlex.join(portable(word) for word in given.flags)}")
    words += ["-o", portable(str(given.output))]
    settings = [f"{name}={shlex.quote(os.environ[name])}" for name in ENVIRONMENT if name in os.environ]
    return " ".join([*settings, shlex.join(words)])


def _tell(what: str, done: int, total: int) -> None:
    sys.stderr.write(f"{what}: {done} of {total}\n")


def _for_terminals(grid: Grid) -> Table:
    shown = Table(title=None)
    for place, header in enumerate(grid.headers):
        shown.add_column(escape(header), justify="left" if place == 0 else "right")
    for row in grid.rows:
        shown.add_row(*map(escape, row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
