"""What a model misses without each of its blocks, in three ways. The block of the lowest score goes first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from compress.activations import block_similarity, block_states, through
from compress.calibration import TokenRows, parts
from compress.decoder import Decoder
from compress.evaluate import cross_entropy
from compress.gating import starting_at
from compress.losses import wide
from compress.result import Run


@torch.no_grad()
def macro_influence(decoder: Decoder, calibration: TokenRows, rows: int, run: Run) -> list[float]:
    """MI_i = 1 - E[cos(H, H without block i)], with H what leaves the last block, before the final norm.

    Skipping block i changes nothing below it: a trial starts above it, with what entered it.

    Args:
        decoder: the model as it is now.
        calibration: rows (N, T).
        rows: how many of them are looked at, the first ones.
        run: progress and device.

    Returns:
        One influence for each of the L blocks; the mean is over rows and tokens.

    Source: FuseGPT, section 3.1.
    """
    blocks, length = len(decoder), calibration.tokens.shape[1]
    similarity = [0.0] * blocks
    for part in parts(rows, length):
        inputs = calibration.batch(part, run.device)
        *entering, whole = block_states(decoder, inputs)
        for i, state in enumerate(entering):
            without = state if i == blocks - 1 else through(decoder, inputs, state, i + 1, blocks)
            similarity[i] += cosines(whole, without).sum().item()
            run.progress("macro influence", part.start * blocks + (part.stop - part.start) * (i + 1), rows * blocks)
    return [1 - total / (rows * length) for total in similarity]


def block_influence(decoder: Decoder, calibration: TokenRows, rows: int, run: Run) -> list[float]:
    """BI_i = 1 - E[cos(input of block i, its output)], over all tokens.

    Source: Men et al. 2024 (ShortGPT), section 3.1.
    """
    first = dataclasses.replace(calibration, tokens=calibration.tokens[:rows])
    return [1 - cosine for cosine in block_similarity(decoder, first, run, last_token_only=False)]


@torch.no_grad()
def loss_without(decoder: Decoder, calibration: TokenRows, rows: int, run: Run) -> list[float]:
    """Mean next-token cross-entropy of the model without each block.

    Source: Song et al. 2024 (SLEB), section 3.2.
    """
    blocks, length = len(decoder), calibration.tokens.shape[1]
    nll = [0.0] * blocks
    for row in range(rows):
        inputs = calibration.batch(slice(row, row + 1), run.device)
        entering = block_states(decoder, inputs)[:-1]
        for i, state in enumerate(entering):
            with starting_at(decoder, i + 1, state):
                logits = decoder.model(**inputs, use_cache=False).logits[0]
            nll[i] += cross_entropy(logits, calibration.tokens[row])
            run.progress("loss without each block", row * blocks + i + 1, rows * blocks)
    return [total / (rows * (length - 1)) for total in nll]


RANKINGS: dict[str, Callable[[Decoder, TokenRows, int, Run], list[float]]] = {
    "macro_influence": macro_influence,
    "block_influence": block_influence,
    "loss": loss_without,
}
"""What a model misses without each of its blocks; the block of the lowest score goes."""


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosine of each token of (B, T, D), float64 (B, T)."""
    # They lie on two devices where the model is spread over several.
    return functional.cosine_similarity(wide(ours).to(theirs.device), wide(theirs), dim=-1).double()
