"""What a consumer of an ONNX export is, what it is compared with, and what came out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from compress.errors import BackendError, FoldawayError
from exporters.onnx_session import OnnxSession, load_tokenizer, read_settings

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".consumers"
"""Where consumers that cannot share our environment get one of their own, a folder each."""

PROMPT = "The three primary colours are"
NEW_TOKENS = 24
REASON_CHARACTERS = 240


class Consumer(Protocol):
    """A runtime that people open an ONNX export with. Every run is a process of its own."""

    def prepare(self) -> None:
        """Build its environment where it is missing.

        Raises:
            BackendError: that does not work; the message says why.
        """

    def versions(self) -> dict[str, str]:
        """Versions of what it is made of, by name."""

    def run(self, export: Path, prompt: str, new_tokens: int) -> str:
        """The text that it continues a prompt with, greedily: no chat template, no special tokens in the answer.

        Raises:
            BackendError: it does not open the export, or fails; the message is one line.
        """


@runtime_checkable
class MeasuringConsumer(Consumer, Protocol):
    """One that also finds numbers, which must agree with ours."""

    def measure(self, export: Path, prompt: str, new_tokens: int, dtype: str) -> Measured:
        """What `run` returns, the numbers, and what is wrong with them.

        Raises:
            BackendError: as `run`.
        """


class Measured(NamedTuple):
    """What a consumer generates and finds, and what is wrong with its numbers; None where nothing is."""

    text: str
    numbers: Mapping[str, float]
    wrong: str | None


@dataclass(frozen=True)
class Outcome:
    """What a consumer made of an export.

    Attributes:
        consumer: its name.
        ok: whether it generates the reference's text, and agrees with us in what else was measured.
        text: what it generates; None where it fails.
        reason: why `ok` is false; None where it is true.
        versions: of the packages that it is made of.
        numbers: what else was measured.
    """

    consumer: str
    ok: bool
    text: str | None
    reason: str | None
    versions: Mapping[str, str]
    numbers: Mapping[str, float]


def greedy_text(export: Path, prompt: str = PROMPT, new_tokens: int = NEW_TOKENS) -> str:
    """The reference: what the export continues a prompt with in our own session, without special tokens.

    Raises:
        BackendError: it is no export, or cannot be loaded.
    """
    session, tokenizer = OnnxSession(export, threads=1), load_tokenizer(export)
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    ends = _ends(export)
    logits, kv = session.prefill(np.array([tokens]), capacity=len(tokens) + new_tokens)
    made: list[int] = []
    while len(made) < new_tokens:
        made.append(int(logits.argmax()))
        if made[-1] in ends:
            break
        logits, kv = session.step(np.array([[made[-1]]]), kv, np.array([len(tokens) + len(made) - 1]))
    return str(tokenizer.decode(made, skip_special_tokens=True))


def _ends(export: Path) -> set[int]:
    """The tokens that end a text."""
    file = export / "generation_config.json"
    found: Any = read_settings(file if file.is_file() else export / "config.json").get("eos_token_id")
    return set(found) if isinstance(found, list) else {found}


def judge(name: str, consumer: Consumer, export: Path, reference: str, dtype: str) -> Outcome:
    """Run a consumer on an export of a dtype, and compare its text with the reference."""
    versions: dict[str, str] = {}
    try:
        versions = consumer.versions()
        if isinstance(consumer, MeasuringConsumer):
            found = consumer.measure(export, PROMPT, NEW_TOKENS, dtype)
        else:
            found = Measured(consumer.run(export, PROMPT, NEW_TOKENS), {}, None)
    except FoldawayError as error:
        return Outcome(name, False, None, _without_paths(str(error), export), versions, {})
    reason = found.wrong
    if found.text != reference:
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found.text, reference, strict=False)))
        reason = f"another text after {alike} of {len(reference)} characters"
    return Outcome(name, reason is None, found.text, reason, versions, found.numbers)


def _without_paths(reason: str, export: Path) -> str:
    """A record says nothing of where things lay, and a reason is no longer than can be read in a table."""
    for path in (export.resolve(), export, ENVIRONMENTS, Path(sys.prefix)):
        reason = reason.replace(str(path), path.name)
    return reason if len(reason) <= REASON_CHARACTERS else f"{reason[:REASON_CHARACTERS]}..."


def last_line(command: Sequence[str], timeout_seconds: float, cwd: Path | None = None) -> Any:
    """Run a program whose last line of stdout is JSON.

    Raises:
        BackendError: it fails, takes too long, or says something else; the message is the last line of its stderr.
    """
    what = Path(command[-1] if len(command) < 2 else command[1]).name
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds, cwd=cwd
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{what} did not end within {timeout_seconds:.0f} seconds") from error
    except OSError as error:
        raise BackendError(f"{what} does not start: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"{what} failed with exit code {done.returncode}"]
        raise BackendError(said[-1])
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise BackendError(f"{what} ended without its result") from error
