"""Positions that no seed brings back, written out: columns in a row, gaps, or a bitmap.

Every decoder checks what it reads: positions ascend, and none lies outside the tensor.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from compress.delta.values import pack_bits, unpack_bits
from compress.errors import CorruptArtifact

Coding = Literal["u16", "gap8", "bitmap"]

ESCAPE = 255
"""A gap byte that only moves on."""
BLOCK = 1 << 16
"""Elements after which gaps start anew, so that a decoder can begin there."""


def encode(index: Tensor, shape: tuple[int, int], coding: Coding | None = None) -> tuple[Coding, dict[str, Tensor]]:
    """Write indices in the given coding, or in the smallest.

    Args:
        index: int64 (n,), flat in ``shape``, ascending.
        shape: (rows, cols).
        coding: "u16" wants the same number in every row, and at most 65,536 columns.

    Returns:
        The coding, and the tensors to store.
    """
    rows, cols = shape
    counts = torch.bincount(index // cols, minlength=rows)
    sizes: dict[Coding, int] = {"bitmap": rows * -(-cols // 8), "gap8": _gap_bytes(index, rows * cols)}
    if cols <= 1 << 16 and bool((counts == counts[0]).all()):
        sizes["u16"] = 2 * len(index)
    chosen: Coding = coding if coding is not None else min(sizes, key=lambda each: sizes[each])
    if chosen == "u16":
        columns = (index % cols).to(torch.uint16)
        return chosen, {"cols": columns.view(rows, -1)}
    if chosen == "gap8":
        return chosen, _gaps(index, rows * cols)
    marks = torch.zeros(rows * cols, dtype=torch.bool)
    marks[index] = True
    padded = torch.nn.functional.pad(marks.view(rows, cols), (0, -cols % 8))
    return chosen, {"bitmap": pack_bits(padded.flatten()).view(rows, -1)}


def decode(coding: Coding, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Read indices back, int64 (n,), ascending.

    Raises:
        CorruptArtifact: a position is outside the tensor, or out of order, or the pieces do not fit each other.
    """
    rows, cols = shape
    if coding == "u16":
        columns = stored["cols"].long()
        ordered = columns.shape[0] == rows and bool((columns.diff(dim=1) > 0).all())
        if not ordered or bool((columns >= cols).any()):
            raise CorruptArtifact("column indices are out of range or out of order")
        return (torch.arange(rows)[:, None] * cols + columns).flatten()
    if coding == "gap8":
        return _ungap(stored["gaps"], stored["blocks"], rows * cols)
    bits = unpack_bits(stored["bitmap"].flatten()).view(rows, -1)
    if bits.shape[1] != -(-cols // 8) * 8 or bool(bits[:, cols:].any()):
        raise CorruptArtifact("a bitmap marks positions beyond its rows")
    return bits[:, :cols].flatten().nonzero().flatten()


def _block_starts(index: Tensor, size: int) -> Tensor:
    """How many indices lie before each block, and before the end."""
    edges = torch.arange(0, size + BLOCK, BLOCK).clamp_(max=size)
    return torch.searchsorted(index, edges)


def _steps(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distance from each index to the one before it in its block, less one; and the starts of blocks."""
    starts = _block_starts(index, size)
    gaps = index.diff(prepend=torch.tensor([-1])) - 1
    first = starts[:-1][starts[1:] > starts[:-1]]
    gaps[first] = index[first] % BLOCK
    return gaps, starts


def _gap_bytes(index: Tensor, size: int) -> int:
    gaps, starts = _steps(index, size)
    return int((gaps // ESCAPE).sum()) + len(index) + 4 * len(starts)


def _gaps(index: Tensor, size: int) -> dict[str, Tensor]:
    gaps, starts = _steps(index, size)
    escapes = gaps // ESCAPE
    ends = (escapes + 1).cumsum(0)
    stream = torch.full((int(ends[-1]) if len(ends) else 0,), ESCAPE, dtype=torch.uint8)
    stream[ends - 1] = (gaps % ESCAPE).to(torch.uint8)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])[starts]
    return {"gaps": stream, "blocks": offsets.to(torch.int32)}


def _ungap(stream: Tensor, blocks: Tensor, size: int) -> Tensor:
    offsets, count = blocks.long(), -(-size // BLOCK)
    sound = len(offsets) == count + 1 and int(offsets[0]) == 0 and int(offsets[-1]) == len(stream)
    if not sound or bool((offsets.diff() < 0).any()):
        raise CorruptArtifact("the blocks of a stream of gaps do not fit it")
    steps = np.where(stream.numpy() == ESCAPE, ESCAPE, stream.numpy().astype(np.int64) + 1)
    walked = np.concatenate([[0], np.cumsum(steps)])
    before = walked[offsets.numpy()[:-1]]
    lengths = offsets.diff().numpy()
    local = walked[1:] - np.repeat(before, lengths) - 1
    final = stream.numpy() != ESCAPE
    limits = np.minimum(size - np.arange(count) * BLOCK, BLOCK)
    if bool((local[final] >= np.repeat(limits, lengths)[final]).any()):
        raise CorruptArtifact("a stream of gaps leads outside the tensor")
    return torch.from_numpy((local + np.repeat(np.arange(count) * BLOCK, lengths))[final])
