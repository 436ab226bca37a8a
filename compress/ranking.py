"""Scores to decisions. Ties always go to the lowest index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest of scores (X,), ascending."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def lowest_indices(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the ``count`` lowest scores, lowest first."""
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]


@dataclass(frozen=True)
class Removal:
    """One step of a greedy removal: what went, and what each candidate would have cost."""

    index: int
    costs: dict[int, float]


def remove_greedily(
    candidates: Sequence[int], count: int, cost: Callable[[int], float], remove: Callable[[int], None]
) -> list[Removal]:
    """Remove the cheapest candidate, ``count`` times; costs are taken anew after each removal.

    Args:
        candidates: indices, ascending.
        count: how many to remove.
        cost: what the model would lose without this one; NaN counts as infinite.
        remove: makes a removal final.
    """
    left, steps = list(candidates), []
    for _ in range(count):
        costs = {index: cost(index) for index in left}
        cheapest = min(left, key=lambda i: (math.inf if math.isnan(costs[i]) else costs[i], i))
        remove(cheapest)
        left.remove(cheapest)
        steps.append(Removal(cheapest, costs))
    return steps
