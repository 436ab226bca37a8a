"""Random masks that a seed brings back anywhere: integers only, a counter for every draw, the same in any language.

The generator is SplitMix64, keyed by a hash of the tensor's name. Nothing of torch's or NumPy's generators is used:
they promise equal streams across neither releases nor devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["one-of-m", "bernoulli", "columns"]
SCHEMES: tuple[Scheme, ...] = ("one-of-m", "bernoulli", "columns")

CHUNK = 1 << 18
"""Counters that are hashed at once, so that they stay in the cache."""


def _signed(constant: int) -> int:
    """A 64-bit constant as torch's int64 holds it; products and sums wrap alike."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


GAMMA, FIRST, SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def tensor_seed(seed: int, name: str) -> int:
    """The 64-bit seed of one tensor: the first 8 bytes, little endian, of SHA-256 over ``seed:name``."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def mix(seed: int, counters: Tensor) -> Tensor:
    """SplitMix64 at counters k: the output number k of the generator that starts from a seed.

    Args:
        seed: 64 bits, unsigned.
        counters: int64, any shape.

    Returns:
        int64 with the bits of the unsigned result.

    Source: Steele, Lea, Flood 2014 (SplittableRandom), with random access by counter.
    """
    x = counters.add(1).mul_(GAMMA).add_(_signed(seed))
    for shift, constant in ((30, FIRST), (27, SECOND)):
        x ^= _shifted(x, shift)
        x *= constant
    return x ^ _shifted(x, 31)


def uniform(seed: int, counters: Tensor) -> Tensor:
    """The upper 32 bits of `mix`, in [0, 2^32), as int64."""
    return _shifted(mix(seed, counters), 32)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift to the right without the sign, which int64 would bring along."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def one_of_m(seed: int, rows: int, cols: int, m: int, device: str | torch.device = "cpu") -> Tensor:
    """Keep one column of every m in a row: the share 1/m, evenly spread.

    Each row is cut into buckets of m columns, the last of which may be short: where its draw falls beyond the row's
    end it keeps none, so that every element is kept with probability 1/m.

    Returns:
        int64 (n,): flat indices into (rows, cols), ascending.
    """
    if m == 1:
        return torch.arange(rows * cols, device=device)
    buckets = -(-cols // m)
    starts = torch.arange(buckets, device=device) * m
    at_once = max(1, CHUNK // buckets)
    found = []
    for first in range(0, rows, at_once):
        row = torch.arange(first, min(first + at_once, rows), device=device)[:, None]
        counters = torch.arange(first * buckets, (int(row[-1]) + 1) * buckets, device=device)
        column = uniform(seed, counters).mul_(m).bitwise_right_shift_(32).view(-1, buckets).add_(starts)
        inside = None if cols % m == 0 else column < cols
        index = column.add_(row * cols)
        found.append(index.flatten() if inside is None else index[inside])
    return torch.cat(found)


def bernoulli(seed: int, rows: int, cols: int, density: Fraction, device: str | torch.device = "cpu") -> Tensor:
    """Keep every element with the given probability, each for itself, as the paper has it; flat indices, ascending."""
    if density == 1:
        return torch.arange(rows * cols, device=device)
    return torch.cat([k[uniform(seed, k) < _threshold(density)] for k in _counters(rows * cols, device)])


def columns(seed: int, rows: int, cols: int, density: Fraction, device: str | torch.device = "cpu") -> Tensor:
    """Keep whole columns, each with the given probability; flat indices, ascending."""
    kept = bernoulli(seed, 1, cols, density, device)
    return (torch.arange(rows, device=device)[:, None] * cols + kept).flatten()


def random_index(
    scheme: Scheme, density: Fraction, seed: int, name: str, shape: tuple[int, int], device: str | torch.device = "cpu"
) -> Tensor:
    """What a scheme keeps of one tensor.

    Args:
        scheme: "one-of-m" takes a density of 1/m only.
        density: share kept, exactly.
        seed: of the package.
        name: of the tensor.
        shape: (rows, cols).
        device: where the indices are computed.

    Returns:
        int64 (n,): flat indices, ascending.
    """
    own, (rows, cols) = tensor_seed(seed, name), shape
    if scheme == "one-of-m":
        return one_of_m(own, rows, cols, density.denominator, device)
    return (bernoulli if scheme == "bernoulli" else columns)(own, rows, cols, density, device)


def checksum(index: Tensor) -> str:
    """The first 16 hex digits of SHA-256 over indices as little-endian int64."""
    return hashlib.sha256(index.cpu().numpy().astype("<i8", copy=False).data).hexdigest()[:16]


def _threshold(density: Fraction) -> int:
    return (density.numerator << 32) // density.denominator


def _counters(count: int, device: str | torch.device) -> Iterator[Tensor]:
    return (torch.arange(start, min(start + CHUNK, count), device=device) for start in range(0, count, CHUNK))
