"""Evaluate one thing that is there, or two in comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from benchmarks import tasks
from benchmarks.evaluation import Evaluation, Subject, perplexities, retained
from benchmarks.machine import machine
from benchmarks.quality import quality
from benchmarks.record import sealed
from benchmarks.scoring import torch_scorer
from benchmarks.tasks import TaskScore
from compress.calibration import context_length_of
from compress.evaluate import Perplexity, perplexity
from compress.result import Progress
from compress.sources import Loaded
from deploy.bench import model_of, now
from deploy.recipe import EvaluationSpec
from deploy.sides import Side, check_comparable, open_side
from deploy.steps import evaluation_windows


def evaluate(
    path: str,
    against: str | None,
    spec: EvaluationSpec,
    task_sources: Sequence[str],
    *,
    limit: int | None,
    device: str,
    progress: Progress,
    command: str,
) -> Evaluation:
    """Measure perplexity on a text and accuracy on tasks; with a baseline also how far the model has moved from it.

    Args:
        path: an export, an artifact or a model.
        against: the baseline, likewise; None measures `path` alone.
        spec: the text and its windows.
        task_sources: jsonl files, or names of lm-eval's tasks.
        limit: ask the first so many items of each task; None asks all.
        device: where PyTorch computes.
        progress: told of each step.
        command: the call, for the record.

    Raises:
        ConfigError: a text, a task or an option cannot be meant, or the two sides have different tokenizers.
        MissingExtra: tasks without lm-eval.
    """
    if task_sources:
        tasks.check(task_sources, limit)  # before anything takes time
    candidate = open_side(path, device)
    baseline = None if against is None else open_side(against, device)
    context = candidate.context_length
    if baseline is not None:
        check_comparable(baseline, candidate)
        context = min(context, baseline.context_length)
    rows = evaluation_windows(spec, candidate.tokenizer, context)
    comparison = None
    if baseline is None:
        own = perplexity(candidate.logits, rows.tokens, progress, predicted=rows.predicted)
    else:
        comparison = quality(baseline.logits, candidate.logits, rows, progress)
        of_baseline, own = perplexities(comparison)

    def score(side: Side) -> tuple[TaskScore, ...]:
        if not task_sources:
            return ()
        return tasks.evaluate(side.scorer, side.tokenizer, context, task_sources, limit=limit, progress=progress)

    subject = _subject(candidate, own, score(candidate))
    other = None if baseline is None else _subject(baseline, of_baseline, score(baseline))
    return sealed(
        Evaluation(
            created=now(),
            subject=subject,
            baseline=other,
            comparison=comparison,
            retention=() if other is None else retained(other.tasks, subject.tasks),
            text=rows.record(),
            limit=limit,
            device=device,
            commands=(command,),
            machine=machine(),
        )
    )


def accuracy_score(
    loaded: Loaded, task_sources: Sequence[str], limit: int | None
) -> Callable[[PreTrainedModel], float]:
    """A judge of models that come from one: their mean accuracy over tasks.

    Raises:
        ConfigError: a task or the limit cannot be meant.
        MissingExtra: tasks without lm-eval.
    """
    tasks.check(task_sources, limit)

    def score(model: PreTrainedModel) -> float:
        context = context_length_of(model)
        found = tasks.evaluate(torch_scorer(model), loaded.tokenizer, context, task_sources, limit=limit)
        return sum(each.acc for each in found) / len(found)

    return score


def _subject(side: Side, found: Perplexity, scores: tuple[TaskScore, ...]) -> Subject:
    return Subject(side.path, side.form, side.origin.artifact_id, model_of(side), side.parameters, found, scores)
