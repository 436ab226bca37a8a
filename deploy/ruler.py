"""What a budget limits, and what counts alone say of it: a model's size without its weights, and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from compress import budget
from compress.layout import layout_of

Kind = Literal["parameters", "bytes", "memory", "latency"]


@dataclass(frozen=True)
class Target:
    """What must not be exceeded.

    Attributes:
        kind: what is limited.
        limit: parameters; bytes on disk; bytes in memory; or seconds per decoded token.
        context: tokens that the KV cache holds, for memory and latency; None for the others.
    """

    kind: Kind
    limit: float
    context: int | None = None


@dataclass(frozen=True)
class Size:
    """What can be counted of a model without its weights.

    Attributes:
        parameters: distinct ones.
        kv_per_token: numbers that the KV cache keeps of each token.
        read_per_token: weights that a decoded token is multiplied with, those of shared blocks each time.
        parts: attentions and FFNs that a token passes.
    """

    parameters: int
    kv_per_token: int
    read_per_token: int
    parts: int


def size_of(model: PreTrainedModel) -> Size:
    """Count a model of any layout, on any device."""
    costs, blocks = budget.costs(model), layout_of(model).blocks
    parts = len(layout_of(model).attention_blocks) + sum(block.intermediate_size > 0 for block in blocks)
    return Size(budget.count(model).total, costs.kv_per_token, costs.flops_per_token // 2, parts)


@dataclass(frozen=True)
class Ruler:
    """How counts become the value that a budget limits.

    Attributes:
        item_bytes: of one weight, and of one number in the KV cache.
        more_bytes: beside weights and cache: the header of a file, or what a process needs to compute.
        seconds_per_part: of an attention or an FFN, however small it is.
        seconds_per_byte: of weights and cache that a decoded token reads.
    """

    item_bytes: int
    more_bytes: int = 0
    seconds_per_part: float = 0.0
    seconds_per_byte: float = 0.0

    def predict(self, target: Target, size: Size) -> float:
        """The value to expect of a model of some size, in the unit of the target's limit."""
        if target.kind == "parameters":
            return size.parameters
        if target.kind == "bytes":
            return size.parameters * self.item_bytes + self.more_bytes
        if target.kind == "memory":
            numbers = size.parameters + size.kv_per_token * (target.context or 0)
            return numbers * self.item_bytes + self.more_bytes
        return self.seconds_per_part * size.parts + self.seconds_per_byte * self.bytes_per_token(target, size)

    def bytes_per_token(self, target: Target, size: Size) -> int:
        """Weights and cache that a decoded token reads."""
        return (size.read_per_token + size.kv_per_token * (target.context or 0)) * self.item_bytes


def fit_line(target: Target, ruler: Ruler, points: Sequence[tuple[Size, float]]) -> Ruler:
    """Seconds per part and per byte by least squares through measured latencies, neither below zero.

    Args:
        target: with the context at which they were measured.
        ruler: with the size of a number.
        points: sizes and seconds per decoded token.
    """
    rows = [[float(size.parts), float(ruler.bytes_per_token(target, size))] for size, _ in points]
    seconds = torch.tensor([[value] for _, value in points], dtype=torch.float64)
    matrix = torch.tensor(rows, dtype=torch.float64)
    scale = matrix.amax(0)
    found = torch.linalg.lstsq(matrix / scale, seconds).solution[:, 0] / scale
    if (found < 0).any():
        keep = int((found > 0).nonzero()[0])
        column = matrix[:, keep]
        found = torch.zeros(2, dtype=torch.float64)
        found[keep] = (column @ seconds[:, 0]) / (column @ column)
    return dataclasses.replace(ruler, seconds_per_part=float(found[0]), seconds_per_byte=float(found[1]))
