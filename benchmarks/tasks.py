"""Zero-shot tasks: how often a model finds the right choice likelier than the others.

lm-eval builds the requests, compares the choices and computes acc and acc_norm. A task is a `.jsonl` file of questions
(`benchmarks.task_files`), or one that lm-eval knows by name.

Source: Sutawika et al., lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import difflib
import functools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.scoring import Scorer, language_model
from benchmarks.task_files import TaskFile, names_a_file, read_task_file
from compress.errors import ConfigError, first_line, require
from compress.evaluate import standard_error
from compress.result import Progress, no_progress

REGISTERED = "lm-eval"
"""The source of a task that is not a file."""

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
"""What a task of lm-eval may ask for; the others need generated text."""


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
    files = {source: read_task_file(source) for source in tasks if names_a_file(source)}
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
        if names_a_file(source):
            read_task_file(source)
        else:
            _check_name(source)


def _check_request(tasks: Sequence[str], limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: ask 1 item or more of each task, or give no limit to ask all")
    if not tasks:
        raise ConfigError("no task is named: give .jsonl files, or names of tasks in lm-eval")
    names = [Path(source).stem if names_a_file(source) else source for source in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"two tasks are named {max(names, key=names.count)}: name each once, files by their stem")


# Tasks of lm-eval.


@dataclass(frozen=True)
class _Questions:
    """A task as lm-eval runs it, and what a score says of it; `key` tells it from the others of the call."""

    key: str
    name: str
    source: str
    sha256: str | None
    task: Any


def _questions(source: str, files: Mapping[str, TaskFile]) -> list[_Questions]:
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
