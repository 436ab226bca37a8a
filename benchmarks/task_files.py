"""Files of multiple-choice questions: two shapes of rows, checked line by line, as tasks of lm-eval.

* ``{"query", "choices", "gold"}``: the text is the query, each continuation is a space and a choice. lm-eval gives acc
  (the likeliest continuation) and acc_norm (the likeliest per character).
* ``{"context_options", "continuation", "gold"}``: one continuation after each context, as in lm-eval's winogrande; acc
  only.

Texts are used as they stand, with no "Question:" or "Answer:" around them: lm-eval's own arc_easy and piqa ask
``"Question: ...\\nAnswer:"``, so their numbers differ from those of a file without these words. Where a text ends with
white space, lm-eval moves it to the front of the continuation before both become tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scoring import check_length
from compress.errors import ConfigError, first_line, require


@dataclass(frozen=True)
class _Shape:
    """One of the shapes that rows have.

    Attributes:
        text: the key of the text that all choices of a row share.
        options: the key of the list that the choice is from.
        options_first: whether the options are contexts and the text continues them, or the other way round.
    """

    text: str
    options: str
    options_first: bool

    @property
    def keys(self) -> tuple[str, str, str]:
        """The keys that a row must have."""
        return (self.options, self.text, "gold") if self.options_first else (self.text, self.options, "gold")

    def pairs(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The (context, continuation) texts of a row, as lm-eval makes them."""
        text, options = row[self.text], row[self.options]
        return [(option, f" {text}") if self.options_first else (text, f" {option}") for option in options]

    def config(self, source: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A task's configuration in lm-eval.

        Names of columns, not templates: a template would turn a query of digits into an integer. The rows are handed
        over in memory: a reader of JSON files would turn texts that look like dates into dates, and cache the file.
        """
        columns = [{key: row[key] for key in self.keys} for row in rows]
        metrics = ("acc",) if self.options_first else ("acc", "acc_norm")
        return {
            "task": source,
            "custom_dataset": lambda **_: {"test": require("datasets", "eval").Dataset.from_list(columns)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "gold" if self.options_first else self.text,
            "doc_to_choice": self.options,
            "doc_to_target": self.text if self.options_first else "gold",
            "target_delimiter": " ",
            "num_fewshot": 0,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        }


SHAPES = (
    _Shape(text="query", options="choices", options_first=False),
    _Shape(text="continuation", options="context_options", options_first=True),
)


@dataclass(frozen=True)
class TaskFile:
    """A local file whose rows can be asked; `lines` says where each stands."""

    source: str
    sha256: str
    shape: _Shape
    rows: tuple[Mapping[str, Any], ...]
    lines: tuple[int, ...]

    def check_lengths(self, adapter: Any, limit: int | None) -> None:
        """Refuse a row that is longer than the model's context; lm-eval would cut it and say so in a log."""
        for row, line in list(zip(self.rows, self.lines, strict=True))[:limit]:
            for context, continuation in self.shape.pairs(row):
                before, after = adapter._encode_pair(context, continuation)
                check_length(len(before), len(after), adapter.max_length, f"{self.source}, line {line}")


def names_a_file(source: str) -> bool:
    return source.endswith(".jsonl") or "/" in source or Path(source).is_file()


def read_task_file(source: str) -> TaskFile:
    """Read a file of questions.

    Raises:
        ConfigError: there is none, or a row of it cannot be asked; the message names the line.
    """
    content = _content(source)
    rows: list[Mapping[str, Any]] = []
    lines: list[int] = []
    shape: _Shape | None = None
    for number, line in enumerate(_text(content, source).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        row = _object(line, where)
        found = _shape_of(row, where)
        shape = shape or found
        if found is not shape:
            raise ConfigError(f"{where}: has {found.options}, and line {lines[0]} has {shape.options}: make two files")
        _check_row(row, shape, where)
        rows.append(row)
        lines.append(number)
    if shape is None:
        raise ConfigError(f"{source}, line 1: the file holds no rows")
    return TaskFile(source, hashlib.sha256(content).hexdigest(), shape, tuple(rows), tuple(lines))


def _content(source: str) -> bytes:
    path = Path(source)
    if path.is_dir():
        raise ConfigError(f"{source} is a folder: name a .jsonl file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no file {source}: give a .jsonl file, or the name of a task in lm-eval") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ConfigError(f"cannot read {source}: {first_line(error)}") from None


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{source}, line {line}: not text in UTF-8: convert it first") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({first_line(error)})") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: not a JSON object with {_shapes()}")
    return row


def _shapes() -> str:
    return ", or ".join(" and ".join((", ".join(shape.keys[:-1]), shape.keys[-1])) for shape in SHAPES)


def _shape_of(row: Mapping[str, Any], where: str) -> _Shape:
    """The shape that a row has most keys of; it must have all."""
    shape = max(SHAPES, key=lambda shape: len(row.keys() & set(shape.keys)))
    missing = [key for key in shape.keys if key not in row]
    if missing:
        raise ConfigError(f"{where}: lacks {missing[0]}; a row has {_shapes()}")
    return shape


def _check_row(row: Mapping[str, Any], shape: _Shape, where: str) -> None:
    text, options, gold = row[shape.text], row[shape.options], row["gold"]
    if not _is_text(text):
        raise ConfigError(f"{where}: {shape.text} must be a text that is not empty")
    if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
        raise ConfigError(f"{where}: {shape.options} must be a list of 2 or more texts that are not empty")
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise ConfigError(f"{where}: gold must be an integer, the place of the right one in {shape.options}, from 0")
    if not 0 <= gold < len(options):
        raise ConfigError(f"{where}: gold is {gold}, and {shape.options} has places 0 to {len(options) - 1}")


def _is_text(value: Any) -> bool:
    """Whether a value is a string of more than white space, and without halves of surrogate pairs."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)
