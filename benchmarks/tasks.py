"""Zero-shot tasks: how often a model finds the right choice likelier than the others.

lm-eval builds the requests, compares the choices and computes acc and acc_norm. Here are the adapter through which it
asks a model, and what makes a task of a local file. A `.jsonl` file has rows of one of two shapes:

* ``{"query", "choices", "gold"}``: the text is the query, each continuation is a space and a choice. lm-eval gives acc
  (the likeliest continuation) and acc_norm (the likeliest per character).
* ``{"context_options", "continuation", "gold"}``: one continuation after each context, as in lm-eval's winogrande; acc
  only.

Texts are used as they stand, with no "Question:" or "Answer:" around them: lm-eval's own arc_easy and piqa ask
``"Question: ...\\nAnswer:"``, so their numbers differ from those of a file without these words. Where a text ends with
white space, lm-eval moves it to the front of the continuation before both become tokens.

Source: Sutawika et al., lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import ConfigError, first_line, require
from compress.evaluate import Logits, standard_error
from compress.result import Progress, no_progress

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest."""

REGISTERED = "lm-eval"
"""The source of a task that is not a file."""

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
"""What a task of lm-eval may ask for; the others need generated text."""


Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Tokens that all answers of a question begin with, at least one, and how each goes on, S >= 1 tokens."""

BATCH_TOKENS = 512
"""Questions are asked together up to so many tokens of their endings, and as many of their beginnings, with padding."""


class Scorer(Protocol):
    """What a model must answer: the logits that predict how questions go on."""

    def __call__(self, questions: Sequence[Question]) -> list[list[Tensor]]:
        """For each question the logits of each ending, fp32 (S, V): row i predicts ending[i].

        The last token of an ending is only predicted: it takes no place in the context.
        """


def torch_scorer(model: PreTrainedModel) -> Scorer:
    """Read the beginnings of all questions as one batch, then all endings as another, on copies of the KV cache.

    The model makes its own cache, so that one with blocks without attention or with sliding windows gets the right one.
    """
    # All logits are asked for: those of the last token alone would come from a strided product, which is slow in bf16.
    places_are_taken = "position_ids" in inspect.signature(model.forward).parameters

    def run(tokens: Tensor, mask: Tensor, **options: Any) -> Any:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options |= {"position_ids": places.to(model.device)} if places_are_taken else {}
        return model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **options)

    @torch.no_grad()
    def score(questions: Sequence[Question]) -> list[list[Tensor]]:
        beginnings, mask = _padded([beginning for beginning, _ in questions], left=True)
        read = run(beginnings, mask)
        rows = torch.tensor([row for row, (_, endings) in enumerate(questions) for _ in endings])
        first = read.logits[:, -1:]
        endings, _ = _padded([ending[:-1] for _, endings in questions for ending in endings])
        if endings.shape[1] == 0:
            return _by_question((first[row] for row in rows), questions)
        read.past_key_values.batch_select_indices(rows.to(model.device))
        both = torch.cat((mask[rows], torch.ones_like(endings)), dim=1)
        others = run(endings, both, past_key_values=read.past_key_values).logits
        return _by_question(
            (torch.cat((first[row], other)) for row, other in zip(rows, others, strict=True)), questions
        )

    return score


def logits_scorer(logits: Logits) -> Scorer:
    """Run a beginning with all its endings as one batch: for anything that maps tokens to logits."""

    @torch.no_grad()
    def score(questions: Sequence[Question]) -> list[list[Tensor]]:
        found = []
        for question in questions:
            beginning, endings = question
            whole, _ = _padded([[*beginning, *ending[:-1]] for ending in endings])
            found += _by_question(logits(whole)[:, len(beginning) - 1 :], [question])
        return found

    return score


def _padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one int64 (B, T) with its mask; zeros where a row is too short, after it or before it."""
    length = max(len(row) for row in rows)
    gaps = [[0] * (length - len(row)) for row in rows]
    tokens = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*gap, *one] if left else [*one, *gap] for one, gap in zip(ones, gaps, strict=True)]
    return tuple(torch.tensor(each, dtype=torch.long).view(len(rows), length) for each in (tokens, mask))  # type: ignore[return-value]


def _by_question(rows: Iterable[Tensor], questions: Sequence[Question]) -> list[list[Tensor]]:
    """Deal out one (T, V) per ending, without what is padding."""
    left = iter(rows)
    return [[next(left)[: len(ending)].float() for ending in endings] for _, endings in questions]


@dataclass(frozen=True)
class TaskScore:
    """How well a model does on one task.

    Attributes:
        name: the file's name without its suffix, or the task's name in lm-eval.
        source: the file as it was named, or "lm-eval".
        sha256: of the file; None for a task of lm-eval.
        items: questions asked.
        acc: share of items whose right choice is the likeliest.
        acc_standard_error: of `acc`; NaN for a single item.
        acc_norm: share where it is the likeliest per character; None where lm-eval gives none.
        acc_norm_standard_error: of `acc_norm`.
        chance: `acc` of a guess: the mean over items of 1 / number of choices, and 0 where a task has no choices.
        correct: one digit per item, in the order of the file: 1 where `acc` counts it as right.
        correct_norm: the same for `acc_norm`.
    """

    name: str
    source: str
    sha256: str | None
    items: int
    acc: float
    acc_standard_error: float
    acc_norm: float | None
    acc_norm_standard_error: float | None
    chance: float
    correct: str
    correct_norm: str | None

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether `acc` counts each item as right."""
        return tuple(digit == "1" for digit in self.correct)


def evaluate(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    progress: Progress = no_progress,
) -> tuple[TaskScore, ...]:
    """Ask a model the questions of some tasks, without examples before them, whatever a task of lm-eval prefers.

    Args:
        scorer: the model.
        tokenizer: of the model.
        context_length: the most tokens that the model can read.
        tasks: local `.jsonl` files, and names that lm-eval knows. A name that stands for several tasks gives as many
            scores. Only names use the network.
        limit: ask the first items of each task only; None asks all.
        progress: told of each item.

    Returns:
        In the order of `tasks`.

    Raises:
        ConfigError: a task that is neither, a row that cannot be asked, an item longer than the context, a task that
            needs generated text, or a data set that cannot be loaded.
        MissingExtra: lm-eval is not installed.
    """
    _check_request(tasks, limit)
    require("lm_eval", "eval")
    files = {source: _read_file(source) for source in tasks if _names_a_file(source)}
    adapter = language_model(scorer, tokenizer, context_length, progress)
    for file in files.values():
        file.check_lengths(adapter, limit)
    evaluator = require("lm_eval.evaluator", "eval")
    with _quiet(), _own_randomness():
        asked = list(_distinct(q for source in tasks for q in _questions(source, files)))
        found = evaluator.evaluate(
            adapter, {"tasks": {q.key: q.task for q in asked}}, limit=limit, log_samples=True, bootstrap_iters=0
        )
    return tuple(_task_score(q, found["samples"][q.key], found["results"][q.key]) for q in asked)


def check(tasks: Sequence[str], limit: int | None = None) -> None:
    """Refuse early what `evaluate` would refuse: everything that can be told without a model and without network.

    Raises:
        ConfigError: a file that cannot be asked, a name that is not known, or a limit below 1.
        MissingExtra: lm-eval is not installed.
    """
    _check_request(tasks, limit)
    require("lm_eval", "eval")
    for source in tasks:
        if _names_a_file(source):
            _read_file(source)
        else:
            _check_name(source)


def _check_request(tasks: Sequence[str], limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: ask 1 item or more of each task, or give no limit to ask all")
    if not tasks:
        raise ConfigError("no task is named: give .jsonl files, or names of tasks in lm-eval")
    names = [Path(source).stem if _names_a_file(source) else source for source in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"two tasks are named {max(names, key=names.count)}: name each once, files by their stem")


# The adapter.


def language_model(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase, context_length: int, progress: Progress = no_progress
) -> Any:
    """A model as lm-eval asks it: an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)`` too.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    template = require("lm_eval.api.model", "eval").TemplateLM
    return type("Adapter", (_Adapter, template), {})(scorer, tokenizer, context_length, progress)


class _Adapter:
    """Answers lm-eval's requests with a `Scorer`; mixed with ``lm_eval.api.model.TemplateLM``, which makes the tokens.

    Conventions are those of HFLM, lm-eval's own class for models of transformers, so that the accuracies are the same:
    the tokenizer's default decides about special tokens, none are added to a text that begins with the first token
    (BOS), and an empty context is that token, or the last one (EOS) where there is no first. Two things differ: the
    softmax is fp32 whatever the model computes in, and an item too long for the context is refused rather than cut.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, context_length: int, progress: Progress
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.max_length = context_length
        self.progress = progress

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        first: int | None = self.tokenizer.bos_token_id
        token = self.eot_token_id if first is None else first
        if token is None:
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token, and tasks need one of them")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; None leaves special tokens to the tokenizer, unless the text brings the first one."""
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode(self.prefix_token_id))):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, verbose=False, **special)
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Answer requests, without lm-eval's own bar."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows that predict each token once with the most context."""
        utils = require("lm_eval.utils", "eval")
        totals = []
        for done, request in enumerate(requests, start=1):
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = (utils.make_disjoint_window(window) for window in windows)
            totals.append(sum(self._loglikelihood_tokens([("", *pair)])[0][0] for pair in pairs))
            self.progress("rolling log-likelihood", done, len(requests))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: the adapter scores, it does not generate."""
        raise NotImplementedError("this adapter answers log-likelihoods only")

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
        """Answer (texts, context, continuation) requests; those of one question share what they begin with."""
        for _texts, context, continuation in requests:
            _check_length(len(context), len(continuation), self.max_length, "an item of the task")
        asked = [(group, _question([requests[number][1:] for number in group])) for group in _groups(requests)]
        asked.sort(key=lambda each: (_lengths(each[1])[0] // 4, _lengths(each[1])[1]))  # so that little is padding
        groups, questions = [group for group, _ in asked], [question for _, question in asked]
        answers: dict[int, Answer] = {}
        done = 0
        for batch in _batches(questions):
            for found in self.scorer(questions[batch]):
                for number, logits in zip(groups[done], found, strict=True):
                    answers[number] = _answer(logits, requests[number][2])
                done += 1
            self.progress("zero-shot tasks", done, len(questions))
        return [answers[number] for number in range(len(requests))]


def _groups(requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[list[int]]:
    """Numbers of requests that are scored together: neighbours with one context, or with one continuation.

    A question of lm-eval gives such requests. Others may meet the rule by chance, which costs time and nothing else.
    """
    groups: list[list[int]] = []
    for number, (_texts, context, continuation) in enumerate(requests):
        _, before, ending = requests[groups[-1][-1]] if groups else ("", [], [])
        alike = bool(groups) and before[0] == context[0] and (before == context or ending == continuation)
        if alike:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _question(pairs: Sequence[tuple[list[int], list[int]]]) -> Question:
    """What (context, continuation) pairs begin with, and how each goes on."""
    columns = zip(*(context for context, _ in pairs), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return pairs[0][0][:shared], [(context + continuation)[shared:] for context, continuation in pairs]


def _lengths(question: Question) -> tuple[int, int]:
    """Tokens of the longest ending, and of the beginning."""
    return max(map(len, question[1])), len(question[0])


def _batches(questions: Sequence[Question]) -> Iterator[slice]:
    """Neighbouring questions that are asked together: a single one, or as many as `BATCH_TOKENS` allows."""
    start, rows, longest = 0, 0, (0, 0)
    for place, question in enumerate(questions):
        ending, beginning = map(max, longest, _lengths(question))
        tokens = max((rows + len(question[1])) * ending, (place + 1 - start) * beginning)
        if place > start and tokens > BATCH_TOKENS:
            yield slice(start, place)
            start, rows, (ending, beginning) = place, 0, _lengths(question)
        rows, longest = rows + len(question[1]), (ending, beginning)
    if questions:
        yield slice(start, len(questions))


def _check_length(context: int, continuation: int, context_length: int, where: str) -> None:
    """Refuse tokens that cannot be scored. The last token is only predicted, so one more than the context fits."""
    if continuation == 0:
        raise ConfigError(f"{where}: its continuation is no token of its own with this tokenizer")
    if context + continuation > context_length + 1:
        raise ConfigError(
            f"{where}: {context + continuation - 1} tokens, and the model reads {context_length}: leave this item out"
        )


def _answer(logits: Tensor, continuation: Sequence[int]) -> Answer:
    """Sum the log-probabilities of a continuation, which the last rows of the logits (S, V) predict."""
    tokens = torch.tensor(continuation, device=logits.device)
    probabilities = functional.log_softmax(logits[-len(continuation) :].float(), dim=-1)
    total = float(probabilities.gather(1, tokens[:, None]).sum())
    if math.isnan(total):  # lm-eval would take the first choice for the likeliest, and count chance as skill
        raise ConfigError("the model computes NaN, so none of its choices is the likeliest")
    return total, bool((probabilities.argmax(-1) == tokens).all())


# Local files.


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
class _File:
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
                _check_length(len(before), len(after), adapter.max_length, f"{self.source}, line {line}")


def _names_a_file(source: str) -> bool:
    return source.endswith(".jsonl") or "/" in source or Path(source).is_file()


def _read_file(source: str) -> _File:
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
    return _File(source, hashlib.sha256(content).hexdigest(), shape, tuple(rows), tuple(lines))


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


# Tasks of lm-eval.


@dataclass(frozen=True)
class _Questions:
    """A task as lm-eval runs it, and what a score says of it; `key` tells it from the others of the call."""

    key: str
    name: str
    source: str
    sha256: str | None
    task: Any


def _questions(source: str, files: Mapping[str, _File]) -> list[_Questions]:
    """The tasks behind one entry of the list that was asked for."""
    if source in files:
        file = files[source]
        config = file.shape.config(source, file.rows)
        task = require("lm_eval.api.task", "eval").ConfigurableTask(config=config)
        return [_Questions(source, Path(source).stem, source, file.sha256, task)]
    loaded = _load_registered(source)
    for name, task in loaded.items():
        _check_output_type(name, task.OUTPUT_TYPE)
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(require("lm_eval.defaults", "eval").DEFAULT_OTHER_SEED)
    return [_Questions(name, name, REGISTERED, None, task) for name, task in loaded.items()]


def _distinct(asked: Iterable[_Questions]) -> Iterator[_Questions]:
    seen = set()
    for questions in asked:
        if questions.key in seen:
            raise ConfigError(f"the task {questions.key} is named twice: name each task once")
        seen.add(questions.key)
        yield questions


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of the tasks that it knows; reading it takes seconds."""
    return require("lm_eval.tasks", "eval").TaskManager()


def _check_name(name: str) -> None:
    """Refuse a name that lm-eval does not know, or that stands for tasks which need generated text."""
    manager = _task_manager()
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise ConfigError(f"{name} is neither a .jsonl file nor a task that lm-eval knows{hint}")
    for task, output_type in _output_types(manager.task_index, name):
        _check_output_type(task, output_type)


def _load_registered(name: str) -> dict[str, Any]:
    """The tasks that a name stands for, with their data sets, which lm-eval fetches."""
    _check_name(name)
    try:
        tasks: dict[str, Any] = _task_manager().load(name)["tasks"]
    except Exception as error:  # network, data sets and the tasks' own code fail in many unrelated classes
        raise ConfigError(f"lm-eval cannot load the task {name}: {first_line(error)}") from error
    if not tasks:
        raise ConfigError(f"{name} stands for no task in lm-eval: name another one")
    return tasks


def _output_types(index: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """The tasks that a name stands for and what each asks for, as far as it can be told before any is loaded."""
    entry = index[name]
    config = entry.cfg or {}
    if entry.kind.name == "TASK":
        yield name, config.get("output_type", "generate_until")
    elif entry.kind.name in ("GROUP", "TAG"):
        for member in config.get("task", sorted(entry.tags)):
            if isinstance(member, str) and member in index:  # the rest is defined in place, and seen once it is loaded
                yield from _output_types(index, member)


def _check_output_type(name: str, output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"the task {name} asks for {output_type}: only {' and '.join(OUTPUT_TYPES)} are supported")


def _task_score(questions: _Questions, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> TaskScore:
    """What lm-eval found, with the items in the order of their task."""
    kept = samples[0]["filter"]
    ordered = sorted((s for s in samples if s["filter"] == kept), key=lambda sample: int(sample["doc_id"]))
    correct, correct_norm = (_correct(questions.name, ordered, metric) for metric in ("acc", "acc_norm"))
    if correct is None:
        raise ConfigError(f"the task {questions.name} has no accuracy: name a task that has acc")
    choices = questions.task.OUTPUT_TYPE == "multiple_choice"
    return TaskScore(
        name=questions.name,
        source=questions.source,
        sha256=questions.sha256,
        items=len(ordered),
        acc=float(results[f"acc,{kept}"]),
        acc_standard_error=standard_error(list(map(float, correct))),
        acc_norm=None if correct_norm is None else float(results[f"acc_norm,{kept}"]),
        acc_norm_standard_error=None if correct_norm is None else standard_error(list(map(float, correct_norm))),
        chance=fmean(1 / len(sample["arguments"]) for sample in ordered) if choices else 0.0,
        correct=correct,
        correct_norm=correct_norm,
    )


def _correct(name: str, samples: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """One digit per item, 1 where it counts; None where the task has no such metric."""
    if not all(metric in sample for sample in samples):
        return None
    values = [sample[metric] for sample in samples]
    if not all(value in (0, 1) for value in values):
        raise ConfigError(f"the task {name} has items that are partly right: name a task where each is right or wrong")
    return "".join("1" if value else "0" for value in values)


# While lm-eval works.


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval and what it loads data with from logging and from drawing bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    tasks: Any = require("lm_eval.api.task", "eval")
    drawing = [
        utils
        for utils in (require("datasets.utils", "eval"), require("huggingface_hub.utils", "eval"))
        if not utils.are_progress_bars_disabled()
    ]
    bar, tasks.tqdm = tasks.tqdm, lambda items, **_: items
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        for utils in drawing:
            utils.disable_progress_bars()
        yield
    finally:
        tasks.tqdm = bar
        for utils in drawing:
            utils.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Seed what a task's code may draw from as lm-eval's command does, and give the caller's states back."""
    defaults = require("lm_eval.defaults", "eval")
    python, arrays = random.getstate(), np.random.get_state()
    try:
        random.seed(defaults.DEFAULT_RANDOM_SEED)
        np.random.seed(defaults.DEFAULT_OTHER_SEED)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
