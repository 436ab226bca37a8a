"""Where text comes from: a file, a data set, or the reference text that every Python ships.

A `Text` is plain strings. Chat rows become strings while they are read, by the `render` that the caller gives
(calibration passes the tokenizer's chat template).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import ConfigError, require

Part = Literal["calibration", "evaluation"]
Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]
"""One conversation, a list of ``{"role", "content"}``, as the string that is tokenised."""

BUILTIN_LICENCE = "PSF-2.0"
CALIBRATION_SHARE = 5 / 8  # of the characters of `builtin`: 24 x 2048 tokens and a margin for other tokenizers
OVERLAP_WORDS = 12  # no evaluation paragraph of `builtin` shares this many words in a row with calibration
HUB_CHARACTERS = 8_000_000  # read at most this much of a hub data set (about 2 million tokens)
HUB_SPLITS: dict[Part, str] = {"calibration": "train", "evaluation": "test"}


@dataclass(frozen=True)
class Text:
    """Documents in their order.

    Attributes:
        name: where they come from, for records.
        documents: joined with two newlines they are the whole text.
        sha256: of that whole text in UTF-8.
        licence: SPDX name or what the data set says; None when unknown.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    licence: str | None


def read(source: str, *, part: Part = "calibration", render: Render | None = None) -> Text:
    """Read text from a source that the user named.

    Args:
        source: ``builtin``; a text file (paragraphs separated by an empty line are its documents); a ``.jsonl`` file
            with rows of ``text``, ``messages`` or ``prompt`` and ``response``; or ``hf:NAME[:CONFIG][:SPLIT]``, a data
            set with such rows (an empty CONFIG is the default one). Only the last uses the network.
        part: which part of `builtin`; also the split of a data set when none is named (``train`` or ``test``).
        render: makes a string of a conversation; None joins plain ``role: content`` lines.

    Raises:
        ConfigError: nothing is there, it is empty or not text, or a row has none of the known keys.
        MissingExtra: ``hf:`` without `datasets`.
    """
    if part not in HUB_SPLITS:
        raise ConfigError(f"unknown part of a text {part!r}: one of {', '.join(HUB_SPLITS)}")
    render = render or plain_chat
    if source == "builtin":
        return _text(f"builtin:{part}", _builtin(part), BUILTIN_LICENCE)
    if source.startswith("hf:"):
        return _read_hub(source, part, render)
    content = _read_file(Path(source), source)
    if Path(source).suffix == ".jsonl":
        return _text(source, _jsonl_documents(content.split("\n"), source, render))
    return _text(source, content.split("\n\n"))


def text_hash(source: str, part: Part) -> str:
    """The SHA-256 of the text behind a source; ``self`` has none, for it comes from the model."""
    return source if source == "self" else read(source, part=part).sha256


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation as ``role: content`` lines, for tokenizers without a chat template."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _text(name: str, documents: Sequence[str], licence: str | None = None) -> Text:
    whole = "\n\n".join(documents)
    if not whole.strip():
        raise ConfigError(f"{name} holds no text: give a source with some, for example builtin")
    return Text(name, tuple(documents), hashlib.sha256(whole.encode()).hexdigest(), licence)


def _read_file(path: Path, source: str) -> str:
    if path.is_dir():
        raise ConfigError(f"{source} is a folder: name a text or .jsonl file in it")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no text at {source}: give a text or .jsonl file, builtin, self or hf:NAME") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not text in UTF-8 (byte {error.start}): convert it first") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ConfigError(f"cannot read {source}: {error}") from None
    if "\0" in content:
        raise ConfigError(f"{source} is a binary file: give text in UTF-8")
    return content


def _jsonl_documents(lines: Iterable[str], source: str, render: Render) -> list[str]:
    documents = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{source}, line {number}: not valid JSON ({error})") from None
            documents.append(_document(row, f"{source}, line {number}", render))
    return documents


def _document(row: Any, where: str, render: Render) -> str:
    """The text of one row of a jsonl file or a data set."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with text, messages, or prompt and response")
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    else:
        keys = ", ".join(sorted(row)) or "no keys"
        raise ConfigError(f"{where}: has {keys}; expected text, or prompt and response (strings), or messages (a list)")
    if not messages or not all(_is_message(message) for message in messages):
        raise ConfigError(f"{where}: messages must be a list of objects with a role and a content, both strings")
    try:
        return render(messages)
    except Exception as error:  # a chat template may raise anything, for example when roles do not alternate
        raise ConfigError(f"{where}: the chat template refuses these messages ({_one_line(error)})") from error


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _read_hub(source: str, part: Part, render: Render) -> Text:
    """The first `HUB_CHARACTERS` of a data set, streamed, so that a huge one costs no more than it gives."""
    fields = source.removeprefix("hf:").split(":")
    name, config, split = (*fields, "", "")[:3]
    if not name or len(fields) > 3:
        raise ConfigError(f"{source}: a data set is written hf:NAME[:CONFIG][:SPLIT]")
    split = split or HUB_SPLITS[part]
    datasets = require("datasets", "eval")
    documents: list[str] = []
    characters = 0
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            documents.append(_document(row, f"{source}, row {number}", render))
            characters += len(documents[-1])
            if characters >= HUB_CHARACTERS:
                break
    except ConfigError:
        raise
    except Exception as error:  # network, name, config and split errors come as many unrelated classes
        raise ConfigError(f"cannot read {source} (split {split}): {_one_line(error)}") from error
    return _text(f"hf:{name}:{config}:{split} (first {len(documents)} rows)", documents, rows.info.license or None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _builtin(part: Part) -> list[str]:
    """The Python language reference, one document a topic, without the paragraphs that its topics repeat.

    Topic by topic, in alphabetical order, the part that is further below its share takes the whole topic. Then
    evaluation loses the paragraphs that share `OVERLAP_WORDS` words in a row with calibration.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigError("this Python ships no pydoc_data, so there is no builtin text: give a text file") from None
    calibration: list[list[str]] = []
    evaluation: list[list[str]] = []
    for paragraphs in _without_repeats(topics[name] for name in sorted(topics)):
        filled = _characters(calibration) / CALIBRATION_SHARE, _characters(evaluation) / (1 - CALIBRATION_SHARE)
        (calibration if filled[0] <= filled[1] else evaluation).append(paragraphs)
    if part == "calibration":
        return ["\n\n".join(paragraphs) for paragraphs in calibration]
    seen = {gram for paragraphs in calibration for gram in word_grams("\n\n".join(paragraphs))}
    kept = ([p for p in paragraphs if seen.isdisjoint(word_grams(p))] for paragraphs in evaluation)
    return ["\n\n".join(paragraphs) for paragraphs in kept if paragraphs]


def _without_repeats(documents: Iterable[str]) -> Iterable[list[str]]:
    """Each document as its paragraphs, less those that came before (whatever their white space)."""
    seen: set[str] = set()
    for document in documents:
        fresh = []
        for paragraph in document.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        if fresh:
            yield fresh


def _characters(documents: list[list[str]]) -> int:
    return sum(len(paragraph) for paragraphs in documents for paragraph in paragraphs)


def word_grams(text: str, size: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    """Every run of `size` words in `text`, lower case and without punctuation: what overlap is measured by."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
