"""Perplexity with its standard error, and divergence, over anything that maps tokens to logits.

Cross-entropy and KL are taken in fp32 whatever the model computes in, in chunks of tokens so that (T, V) is not held
twice in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compress.result import Progress, no_progress

Logits = Callable[[Tensor], Tensor]
"""From tokens (B, T), int64, to logits (B, T, V)."""

CHUNK_TOKENS = 256


def logits_of(model: PreTrainedModel) -> Logits:
    """The full forward pass of a model, without cache."""

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        output: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
        return output

    return logits


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        value: exp of the mean cross-entropy.
        standard_error: of `value`, from the spread of the windows (delta method); NaN for a single window.
        nll: mean cross-entropy per token, in nats.
        tokens: how many were predicted.
        window_nll: mean cross-entropy of each window; all windows have the same number of tokens.
    """

    value: float
    standard_error: float
    nll: float
    tokens: int
    window_nll: tuple[float, ...]


def cross_entropy(logits: Tensor, tokens: Tensor, predicted: int | None = None) -> float:
    """Sum of the next-token cross-entropy of one row, in nats.

    Args:
        logits: (T, V).
        tokens: (T,); the first one is not predicted.
        predicted: only the last so many tokens count; None counts all T - 1.
    """
    total = 0.0
    targets, known = _scored(logits, tokens, predicted)
    for part in _chunks(len(targets)):
        total += functional.cross_entropy(known[part].float(), targets[part], reduction="sum").item()
    return total


def _scored(logits: Tensor, tokens: Tensor, predicted: int | None) -> tuple[Tensor, Tensor]:
    """The last tokens of a row, and the logits (.., V) that predict them."""
    first = len(tokens) - (len(tokens) - 1 if predicted is None else predicted)
    return tokens[first:].to(logits.device), logits[first - 1 : -1]


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK_TOKENS, length)) for start in range(0, length, CHUNK_TOKENS))


def perplexity(
    logits: Logits, rows: Tensor, progress: Progress = no_progress, *, predicted: int | None = None
) -> Perplexity:
    """Perplexity over windows.

    Args:
        logits: the model.
        rows: tokens (N, T), one window a row.
        progress: told of each window.
        predicted: the last so many tokens of each window are predicted; None predicts T - 1. All windows weigh the
            same, because all predict as many tokens.
    """
    predicted = rows.shape[1] - 1 if predicted is None else predicted
    window_nll = []
    for done, row in enumerate(rows):
        window_nll.append(cross_entropy(logits(row[None])[0], row, predicted) / predicted)
        progress("perplexity", done + 1, len(rows))
    nll = math.fsum(window_nll) / len(window_nll)
    error = standard_error(window_nll)
    return Perplexity(_exp(nll), _exp(nll) * error, nll, predicted * len(rows), tuple(window_nll))


def standard_error(values: list[float]) -> float:
    """Standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class Divergence:
    """How far a candidate's predictions are from the baseline's on the same text.

    Attributes:
        kl: mean KL(baseline || candidate) per token, in nats.
        kl_standard_error: of `kl`, from the spread of the windows.
        top1_agreement: share of tokens where both prefer the same next token.
        flipped: share of tokens that the first choice of one side gets right and that of the other does not.
        tokens: how many were predicted.
    """

    kl: float
    kl_standard_error: float
    top1_agreement: float
    flipped: float
    tokens: int


def divergence(
    baseline: Logits,
    candidate: Logits,
    rows: Tensor,
    progress: Progress = no_progress,
    *,
    predicted: int | None = None,
) -> Divergence:
    """Compare two models on the same windows, rows (N, T), on the tokens that `perplexity` predicts.

    Source of `flipped`: Dutta et al. 2024 (Accuracy is not all you need), for tokens in place of answers.
    """
    predicted = rows.shape[1] - 1 if predicted is None else predicted
    window_kl, agreed, flipped = [], 0, 0
    for done, row in enumerate(rows):
        targets, ours = _scored(baseline(row[None])[0], row, predicted)
        _, theirs = _scored(candidate(row[None])[0], row, predicted)
        kl, same, moved = _compare(ours, theirs, targets)
        window_kl.append(kl / predicted)
        agreed += same
        flipped += moved
        progress("divergence", done + 1, len(rows))
    mean, tokens = math.fsum(window_kl) / len(window_kl), predicted * len(rows)
    return Divergence(mean, standard_error(window_kl), agreed / tokens, flipped / tokens, tokens)


def kl_sum(ours: Tensor, theirs: Tensor) -> float:
    """Sum of KL(ours || theirs) over positions of logits (T, V), in nats."""
    return sum((_kl(p, q) for _, p, q in _log_probabilities(ours, theirs)), 0.0)


def _log_probabilities(ours: Tensor, theirs: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some positions at a time, and what both sides make of their logits (T, V) there, in fp32."""
    for part in _chunks(len(ours)):
        p = functional.log_softmax(ours[part].float(), dim=-1)
        yield part, p, functional.log_softmax(theirs[part].float().to(p.device), dim=-1)


def _kl(p: Tensor, q: Tensor) -> float:
    return functional.kl_div(q, p, log_target=True, reduction="sum").item()


def _compare(ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[float, int, int]:
    """Sum of KL(ours || theirs) over logits (T, V); how many argmax agree; how many are right on one side only."""
    kl, same, flipped = 0.0, 0, 0
    for part, p, q in _log_probabilities(ours, theirs):
        kl += _kl(p, q)
        below, above, right = p.argmax(-1), q.argmax(-1), targets[part]
        same += int((below == above).sum())
        flipped += int(((below == right) != (above == right)).sum())
    return kl, same, flipped
