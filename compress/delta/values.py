"""What kept elements of a delta are worth: bf16, int8, int4 or a sign, times a scale per row or per tensor.

A stored value v and a scale s stand for the delta fp32(s) * fp32(v). The scale also holds the factor 1/q by which
pruning rescales.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ValueType = Literal["bf16", "int8", "int4", "sign"]
VALUE_TYPES: tuple[ValueType, ...] = ("bf16", "int8", "int4", "sign")
BITS: dict[ValueType, int] = {"bf16": 16, "int8": 8, "int4": 4, "sign": 1}
LARGEST: dict[ValueType, int] = {"int8": 127, "int4": 7}


def quantise(values: Tensor, counts: Tensor, kind: ValueType) -> tuple[Tensor, Tensor]:
    """Round values to what a type can hold.

    Args:
        values: fp32 (n,), one group after the other.
        counts: int64 (G,), how many of them each group has; a group shares a scale.
        kind: of the values.

    Returns:
        The rounded values as fp32 (n,) without their scale: integers, or +-1, or bf16 numbers; and the scales, fp32
        (G,). Integers: the largest magnitude of a group becomes 127 or 7. Sign: the mean magnitude, which is the
        least-squares choice.

    Source of "sign": Liu et al. 2024 (BitDelta).
    """
    if kind == "bf16":
        return values.bfloat16().float(), torch.ones(len(counts))
    magnitudes = values.abs()
    if kind == "sign":
        totals = per_group(magnitudes, counts, "sum")
        return torch.where(values >= 0, 1.0, -1.0), totals / counts.clamp(min=1)
    scale = per_group(magnitudes, counts, "max") / LARGEST[kind]
    spread = scale.where(scale > 0, 1.0).repeat_interleave(counts) if len(counts) > 1 else scale.where(scale > 0, 1.0)
    return (values / spread).round_().clamp_(-LARGEST[kind], LARGEST[kind]), scale


def per_group(values: Tensor, counts: Tensor, what: Literal["sum", "max"]) -> Tensor:
    """Reduce neighbouring groups of values (n,) >= 0, given their sizes (G,); an empty group gives 0."""
    if len(counts) == 1:
        whole = values.sum() if what == "sum" else values.max() if len(values) else torch.tensor(0.0)
        return whole[None]
    return torch.segment_reduce(values, what, lengths=counts, initial=0.0)


def store(values: Tensor, kind: ValueType) -> Tensor:
    """Rounded values (n,) as the tensor that a file holds."""
    if kind == "bf16":
        return values.bfloat16()
    if kind == "int8":
        return values.to(torch.int8)
    if kind == "sign":
        return pack_bits(torch.nn.functional.pad(values > 0, (0, -len(values) % 8)))
    nibbles = torch.nn.functional.pad((values + 8).to(torch.uint8), (0, len(values) % 2))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def restore(stored: Tensor, kind: ValueType, count: int) -> Tensor:
    """The first ``count`` values of a stored tensor, as fp32 (n,)."""
    if kind == "sign":
        return unpack_bits(stored)[:count].float() * 2 - 1
    if kind == "int4":
        return torch.stack([stored & 15, stored >> 4], dim=1).flatten()[:count].float() - 8
    return stored.float()


def stored_length(kind: ValueType, count: int) -> int:
    """Elements of the tensor that holds so many values."""
    per_byte = {"sign": 8, "int4": 2}.get(kind, 1)
    return -(-count // per_byte)


STORED_TYPE: dict[ValueType, torch.dtype] = {
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
    "sign": torch.uint8,
}


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (8 n,) as bytes (n,), the first bit lowest."""
    return (bits.view(-1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """Bytes (n,) as bits (8 n,), the lowest first."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().bool()
