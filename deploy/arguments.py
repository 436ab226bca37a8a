"""What commands share: their help pages, options that several take, and how results are printed."""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.errors import ConfigError

if TYPE_CHECKING:
    from deploy.terminal import Terminal

DONE, USER_ERROR, INTERRUPTED = 0, 2, 130

MODEL_HELP = "a folder, a .gguf file, a hub id (owner/name), an artifact, or demo:smollm2"
TEXT_HELP = "builtin, a text or .jsonl file, or hf:NAME[:CONFIG][:SPLIT]"


def command(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int], what: str, about: str, example: str
) -> Any:
    """One command: its line in the list, and a help page that says what happens and shows a call."""
    parser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.\n\n{textwrap.dedent(about).strip()}",
        epilog=f"Example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def add_output(parser: Any, what: str) -> None:
    parser.add_argument("-o", "--output", metavar="DIR", help=what)


def output_folder(arguments: argparse.Namespace) -> Path:
    if not arguments.output:
        raise ConfigError("say where the result goes: -o DIR")
    return Path(arguments.output)


def add_device(parser: Any, more: str = "") -> None:
    parser.add_argument(
        "--device", default="cpu", help=f"where PyTorch computes: cpu, cuda or cuda:N{more} (default cpu)"
    )


def add_dry_run(parser: Any, what: str) -> None:
    parser.add_argument("--dry-run", action="store_true", help=what)


def checked_device(name: str) -> str:
    from compress.device import device_named

    return str(device_named(name))


def add_check(parser: Any) -> None:
    """What an export is checked on."""
    parser.add_argument("--text", default="builtin", metavar="SOURCE", help=f"to check on: {TEXT_HELP}")
    parser.add_argument("--check-tokens", type=int, default=128, metavar="N", help="tokens to check on (default 128)")


def add_evaluation(parser: Any) -> None:
    parser.add_argument("--text", default="builtin", metavar="SOURCE", help=f"held-out text: {TEXT_HELP}")
    parser.add_argument("--window", type=int, default=2048, metavar="TOKENS", help="tokens per window (default 2048)")
    parser.add_argument("--windows", type=int, metavar="N", help="how many windows (default: all of the text)")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="let windows overlap: a new one starts every so many tokens, and predicts its last so many",
    )


def add_calibration(parser: Any, rows: int = 24, length: int = 2048) -> None:
    parser.add_argument(
        "--calibration", metavar="SOURCE", help=f"{TEXT_HELP}, or self, the model's own samples (default builtin)"
    )
    parser.add_argument("--rows", type=int, metavar="N", help=f"calibration rows (default {rows})")
    parser.add_argument("--length", type=int, metavar="TOKENS", help=f"tokens per row (default {length})")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of shuffling or sampling the calibration text (default 0)"
    )


def calibration_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options about calibration that were given."""
    given = {
        "source": arguments.calibration,
        "rows": arguments.rows,
        "length": arguments.length,
        "seed": arguments.seed,
    }
    return {name: value for name, value in given.items() if value is not None}


def evaluation_spec(arguments: argparse.Namespace) -> Any:
    from deploy.recipe import EvaluationSpec

    return checked(
        EvaluationSpec,
        source=arguments.text,
        window=arguments.window,
        windows=arguments.windows,
        stride=arguments.stride,
    )


def checked(schema: Any, **values: Any) -> Any:
    from pydantic import ValidationError

    from compress.schema import complaint

    try:
        return schema(**values)
    except ValidationError as error:
        raise ConfigError(complaint(error)) from error


def assignments(given: Sequence[str]) -> dict[str, Any]:
    """``["sparsity=0.25"]`` to ``{"sparsity": 0.25}``; values are read as YAML scalars."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {item}: write NAME=VALUE")
        try:
            # YAML takes a number without a point, such as 2e-5, for a string.
            options[name] = float(value) if EXPONENTIAL.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item}: the value cannot be read") from error
    return options


EXPONENTIAL = re.compile(r"[+-]?[0-9]+[eE][+-]?[0-9]+")


def open_terminal() -> Terminal:
    from deploy.terminal import Terminal

    return Terminal()


def finish(result: dict[str, Any]) -> int:
    """Print the last line of stdout; JSON has no word for NaN and infinity, so they become null."""
    print(json.dumps(_finite(result), allow_nan=False))
    return DONE


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
