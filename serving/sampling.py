"""From logits to a token.

Temperature first, then the nucleus (top-p), then one uniform number through the inverse of the cumulative distribution.
Each request has a generator of its own, so that what it draws does not depend on its neighbours in the batch.

Greedy is one pass over the V logits; sampling is a few, and with top_p a partial sort of the likeliest tokens, of more
of them the flatter the distribution is.

Source: nucleus sampling is Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLDEST = 1e-5
"""Below this temperature the likeliest token has all the weight, up to rounding."""

FIRST_CANDIDATES = 512
"""How many of the likeliest tokens are sorted at first when searching the nucleus; it is nearly always within them."""

BLOCK = 256
"""A draw first finds the block of this many tokens, then the token in it: cheaper than one long cumulative sum."""


class Sampler:
    """Picks one token after the other, for one request."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """Args are those of `Request`; a negative seed is as good as any."""
        self._temperature = np.float32(temperature)
        self._top_p = top_p
        # numpy takes non-negative seeds only: a negative one becomes its two's complement.
        self._generator = np.random.default_rng(None if seed is None else seed % 2**64)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits (V,)."""
        if self._temperature < COLDEST:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()) / self._temperature)
        if self._top_p == 1:
            return draw(weights, self._generator.random())
        tokens = nucleus(weights, self._top_p)
        return int(tokens[draw(weights[tokens], self._generator.random())])


def nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.intp]:
    """The smallest set of likeliest tokens that holds `top_p` of the weight, at least one; likeliest first.

    Args:
        weights: (V,), not negative; need not sum to 1.
        top_p: share of their sum, in [0, 1).
    """
    total = weights.sum(dtype=np.float64)
    # All tokens lighter than this weigh less than 1 - top_p together, so none of them is needed.
    possible = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    size = FIRST_CANDIDATES
    while True:
        likeliest = possible if size >= len(possible) else possible[_largest(weights[possible], size)]
        candidates = likeliest[np.argsort(-weights[likeliest], kind="stable")]
        mass = np.cumsum(weights[candidates], dtype=np.float64)
        if mass[-1] >= top_p * total or size >= len(possible):
            return candidates[: int(np.searchsorted(mass, top_p * total)) + 1]
        size *= 8


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the largest values, in rising order of index, so that ties are sorted alike later."""
    return np.sort(np.argpartition(values, len(values) - count)[len(values) - count :])


def draw(weights: NDArray[np.float32], uniform: float) -> int:
    """The index at which the cumulative weight passes `uniform` (in [0, 1)) of the total."""
    blocks = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    target = uniform * blocks[-1]
    block = int(np.searchsorted(blocks, target, side="right"))
    within = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    before = blocks[block - 1] if block else 0.0
    index = int(np.searchsorted(within, target - before, side="right"))
    return block * BLOCK + min(index, len(within) - 1)
