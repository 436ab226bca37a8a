"""Run source and export on the same tokens, whole and token by token, and say how far apart they are.

Two checks, because they fail separately: a whole forward shows wrong weights and shapes; decoding with a cache shows
wrong cache numbers, positions and windows. A runtime that reads prompts in runs of several tokens is checked in that,
too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from compress.errors import ParityError
from compress.evaluate import Logits, cross_entropy, kl_sum
from compress.result import Progress, no_progress

Decode = Callable[[Tensor], Iterator[Tensor]]
"""From tokens (T,) to T logits (V,), each computed with a cache from one token at a time."""

Prefill = Callable[[Tensor], Tensor]
"""From tokens (T,) to the logits (V,) after the last, read as a prompt is when serving."""


@dataclass(frozen=True)
class Side:
    """One model in its ways: whole forwards, decoding with a cache, and reading prompts where that is another."""

    whole: Logits
    decode: Decode
    prefill: Prefill | None = None


@dataclass(frozen=True)
class Parity:
    """How closely an export follows its source.

    Attributes:
        max_abs_difference: worst difference of any logit, whole forward, export against source.
        argmax_agreement: share of positions where both prefer the same next token.
        tokens: positions compared.
        decode_max_abs_difference: the same for decoding token by token with a cache, and for reading each row as a
            prompt, where the runtime does that in another way.
        decode_argmax_agreement: the same for decoding alone.
        decode_tokens: positions decoded.
        decode_against: what decoding was compared with: ``"source"``, or ``"export"`` where the weights are quantised
            or rounded: a whole forward of those weights, both in full precision.
        tolerance: the largest difference allowed: in decoding, and in the whole forward where the weights are exact.
        min_argmax_agreement: the smallest agreement allowed in the whole forward.
        kl: KL(source || export) of the next token, whole forwards, mean over tokens, in nats.
        perplexity_ratio: of the export over the source, on the tokens compared; None for rows of one token.
        max_kl: the largest divergence allowed; None: not limited.
    """

    max_abs_difference: float
    argmax_agreement: float
    tokens: int
    decode_max_abs_difference: float
    decode_argmax_agreement: float
    decode_tokens: int
    decode_against: Literal["source", "export"]
    tolerance: float
    min_argmax_agreement: float
    kl: float | None = None
    perplexity_ratio: float | None = None
    max_kl: float | None = None


def check(
    source: Logits,
    export: Side,
    tokens: Tensor,
    *,
    tolerance: float,
    min_argmax_agreement: float,
    max_kl: float | None = None,
    full_precision: Side | None = None,
    decoded: int | None = None,
    progress: Progress = no_progress,
) -> Parity:
    """Compare an export with its source.

    An export with quantised or rounded weights cannot be near its source, and where activations are rounded too not
    even near itself: decoding then differs from a whole forward by more than a wrong position would. So its decoding is
    compared where that shows, in `full_precision`, and its whole forward by the share of equal choices alone.

    Args:
        source: whole forward of the source.
        export: the export as it will run.
        tokens: int64 (B, T), on which to compare.
        tolerance: the largest logit difference.
        min_argmax_agreement: the smallest share of positions where the whole forwards prefer the same token. Even an
            exact export needs less than 1: two tokens within rounding of each other may change places.
        max_kl: the largest mean divergence from the source, nats per token.
        full_precision: of an export whose weights are not the source's: the weights it stores, computed without
            rounding activations.
        decoded: tokens of each row that are decoded one by one; None: all.
        progress: told of each token decoded.

    Raises:
        ParityError: a limit is not kept.
    """
    full, stepped, read, quality = _Distance(), _Distance(), _Distance(), _Quality()
    cached = full_precision or export
    for index, row in enumerate(tokens):
        reference = source(row[None])[0].float()
        whole = export.whole(row[None])[0].float()
        full.add(reference, whole)
        quality.add(reference, whole, row)
        target = reference
        if full_precision:
            target = whole if full_precision is export else full_precision.whole(row[None])[0].float()
        if cached.prefill is not None:
            read.add(target[-1], cached.prefill(row).float())
        count = min(decoded or len(row), len(row))
        for position, logits in enumerate(cached.decode(row[:count])):
            stepped.add(target[position], logits.float())
            progress("check export", index * count + position + 1, len(tokens) * count)
    parity = Parity(
        max_abs_difference=full.worst,
        argmax_agreement=full.agreement,
        tokens=full.tokens,
        decode_max_abs_difference=max(stepped.worst, read.worst),
        decode_argmax_agreement=stepped.agreement,
        decode_tokens=stepped.tokens,
        decode_against="export" if full_precision else "source",
        tolerance=tolerance,
        min_argmax_agreement=min_argmax_agreement,
        kl=quality.kl,
        perplexity_ratio=quality.perplexity_ratio,
        max_kl=max_kl,
    )
    _judge(parity, exact=full_precision is None)
    return parity


@dataclass
class _Distance:
    """Worst difference and argmax agreement so far."""

    worst: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Take in logits (..., V) of the same positions."""
        difference = float((ours - theirs).abs().max())
        self.worst = max(self.worst, math.inf if math.isnan(difference) else difference)
        same = ours.argmax(-1) == theirs.argmax(-1)
        self.agreed += int(same.sum())
        self.tokens += same.numel()

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens


@dataclass
class _Quality:
    """Divergence and likelihood so far."""

    nats: float = 0.0
    tokens: int = 0
    lost: float = 0.0
    targets: int = 0

    def add(self, source: Tensor, export: Tensor, row: Tensor) -> None:
        """Take in logits (T, V) of both after each token of a row (T,)."""
        self.nats += kl_sum(source, export)
        self.tokens += len(row)
        self.lost += cross_entropy(export, row) - cross_entropy(source, row)
        self.targets += len(row) - 1

    @property
    def kl(self) -> float:
        return math.inf if math.isnan(self.nats) else self.nats / self.tokens

    @property
    def perplexity_ratio(self) -> float | None:
        return math.exp(min(self.lost / self.targets, 700.0)) if self.targets else None


def _judge(parity: Parity, *, exact: bool) -> None:
    wrong = "the export does not compute what its source does, and was discarded"
    differences = {"decoding with a cache": parity.decode_max_abs_difference}
    if exact:
        differences["a whole forward"] = parity.max_abs_difference
    for what, difference in differences.items():
        if difference > parity.tolerance:
            raise ParityError(f"{wrong}: in {what} a logit is off by {difference:.3g}, allowed is {parity.tolerance:g}")
    if parity.argmax_agreement < parity.min_argmax_agreement:
        raise ParityError(
            f"{wrong}: both prefer the same token at {parity.argmax_agreement:.1%} of {parity.tokens} positions, "
            f"wanted is {parity.min_argmax_agreement:.0%}"
        )
    if parity.max_kl is not None and parity.kl is not None and parity.kl > parity.max_kl:
        raise ParityError(
            f"{wrong}: it diverges from its source by {parity.kl:.3g} nats per token, and max_kl={parity.max_kl:g}"
        )
