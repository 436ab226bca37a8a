"""What a model misses without each of its blocks, in three ways. The block of the lowest score goes first.

All three can look at runs of consecutive blocks in the place of single ones.
"""

from __future__ import annotations

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
def macro_influence(decoder: Decoder, calibration: TokenRows, rows: int, run: Run, size: int = 1) -> list[float]:
    """MI_i = 1 - E[cos(H, H without block i)], with H what leaves the last block, before the final norm.

    Skipping block i changes nothing below it: a trial starts above it, with what entered it.

    Args:
        decoder: the model as it is now.
        calibration: rows (N, T).
        rows: how many of them are looked at, the first ones.
        run: progress and device.
        size: blocks a run.

    Returns:
        One influence for each of the L - size + 1 runs, by its first block; the mean is over rows and tokens.

    Source: FuseGPT, section 3.1.
    """
    blocks, length = len(decoder), calibration.tokens.shape[1]
    similarity = [0.0] * (blocks - size + 1)
    for part in parts(rows, length):
        inputs = calibration.batch(part, run.device)
        *entering, whole = block_states(decoder, inputs)
        for i, state in enumerate(entering[: len(similarity)]):
            without = state if i == blocks - size else through(decoder, inputs, state, i + size, blocks)
            similarity[i] += cosines(whole, without).sum().item()
            done = part.start * len(similarity) + (part.stop - part.start) * (i + 1)
            run.progress("macro influence", done, rows * len(similarity))
    return [1 - total / (rows * length) for total in similarity]


def block_influence(decoder: Decoder, calibration: TokenRows, rows: int, run: Run, size: int = 1) -> list[float]:
    """BI_i = 1 - E[cos(input of block i, output of block i + size - 1)], over all tokens.

    Source: Men et al. 2024 (ShortGPT), section 3.1; Muralidharan et al. 2024 (Minitron), section 2.2, for runs.
    """
    first = calibration.rows(slice(0, rows))
    return [1 - cosine for cosine in block_similarity(decoder, first, run, last_token_only=False, size=size)]


@torch.no_grad()
def loss_without(decoder: Decoder, calibration: TokenRows, rows: int, run: Run, size: int = 1) -> list[float]:
    """Mean next-token cross-entropy of the model without each run of ``size`` blocks.

    Source: Song et al. 2024 (SLEB), section 3.2.
    """
    blocks, length = len(decoder), calibration.tokens.shape[1]
    nll = [0.0] * (blocks - size + 1)
    for row in range(rows):
        inputs = calibration.batch(slice(row, row + 1), run.device)
        entering = block_states(decoder, inputs)[: len(nll)]
        for i, state in enumerate(entering):
            with starting_at(decoder, i + size, state):
                logits = decoder.model(**inputs, use_cache=False).logits[0]
            nll[i] += cross_entropy(logits, calibration.tokens[row])
            run.progress("loss without each block", row * len(nll) + i + 1, rows * len(nll))
    return [total / (rows * (length - 1)) for total in nll]


RANKINGS: dict[str, Callable[..., list[float]]] = {
    "macro_influence": macro_influence,
    "block_influence": block_influence,
    "loss": loss_without,
}
"""Called with the model, calibration rows, how many of them are looked at, how to run, and the size of runs or none."""


def cosines(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosine of each token of (B, T, D), float64 (B, T)."""
    # They lie on two devices where the model is spread over several.
    return functional.cosine_similarity(wide(ours).to(theirs.device), wide(theirs), dim=-1).double()
