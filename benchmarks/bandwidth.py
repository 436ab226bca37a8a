"""How fast this machine reads memory: the ceiling of whatever reads every weight for every token."""

from __future__ import annotations

from time import perf_counter

import torch

ARRAY_BYTES = 1 << 29
"""Much more than any cache holds."""


def bandwidth(threads: int, *, repeats: int = 20, array_bytes: int = ARRAY_BYTES) -> float:
    """Bytes/second of a sum over a large array, in so many threads; the best of `repeats`, for it is a ceiling."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        array = torch.ones(array_bytes // 4)
        best = float("inf")
        for _ in range(repeats):
            start = perf_counter()
            array.sum()
            best = min(best, perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return array.numel() * array.element_size() / best
