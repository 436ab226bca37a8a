"""Scores to decisions. Ties always go to the lowest index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of scores (X,), ascending."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def lowest_indices(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the ``count`` lowest scores, lowest first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]
