"""One buffer of KV rows that sequences join and leave while others decode.

Rows 0..B-1 of each (slots, K, capacity, head_dim) array are in use, so the batch that a step runs on is a view of its
first B rows, and the graph appends to it in place. What is copied, in bytes of KV (SmolLM2-135M in fp32: 46 kB per
token):

* a decode step: nothing;
* a sequence that joins: itself, once (nothing when it is alone: its prefill's arrays become the buffer);
* a sequence that leaves: the last row, once, into the gap;
* growth: all rows, once; slots and capacity double, so that it is rare.

A change of the batch also costs the session one rebinding of its 2 x layers inputs and outputs.

Growth moves one layer after the other and lets go of each old one, and when the last row leaves the buffer is dropped.
Both give memory back only where nobody else refers to it: whoever bound `BatchCache.kv` to a session unbinds it before
`join`, before `reserve` while `full`, and when the cache is empty.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporters.onnx_session import KV

BLOCK = 256
"""Capacity is a multiple of this many tokens."""


def room_for(tokens: int, limit: int) -> int:
    """A capacity for `tokens` and at least one more: a multiple of BLOCK, `limit` at most."""
    return min((tokens // BLOCK + 1) * BLOCK, limit)


class BatchCache:
    """KV of a batch of sequences of different lengths.

    Attributes:
        kv: (key, value) per attention, each (B, K, capacity, head_dim): views of the rows in use. The same object as
            long as the batch does not change, so that bindings to it can be kept.
        lengths: int64 (B,), tokens in each row.
    """

    def __init__(self, context_length: int) -> None:
        """Rows grow to `context_length` tokens at most."""
        self._limit = context_length
        self._buffer: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self.lengths = np.zeros(0, np.int64)
        self.kv: KV = ()

    def join(self, kv: KV, length: int) -> None:
        """Append a row: (1, K, capacity, head_dim) arrays, filled up to `length`. They may be kept and written to."""
        row = len(self.lengths)
        if row == 0:
            self._buffer = list(kv)
        else:
            self.kv = ()  # views, which would keep the old buffers
            slots, _, capacity, _ = self._buffer[0][0].shape
            self._reshape(slots if row < slots else 2 * slots, max(capacity, kv[0][0].shape[2]))
            for ours, theirs in zip(self._buffer, kv, strict=True):
                for buffer, new in zip(ours, theirs, strict=True):
                    buffer[row, :, :length] = new[0, :, :length]
        self.lengths = np.append(self.lengths, length)
        self._view()

    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            used = int(self.lengths[last])
            for pair in self._buffer:
                for buffer in pair:
                    buffer[row, :, :used] = buffer[last, :, :used]
            self.lengths[row] = used
        self.lengths = self.lengths[:last].copy()
        if last == 0:
            self._buffer = []
        self._view()

    @property
    def full(self) -> bool:
        """Whether some row has no room for one more token."""
        return bool(self._buffer) and bool(self.lengths.max() >= self._buffer[0][0].shape[2])

    def reserve(self) -> None:
        """Make sure that each row has room for one more token."""
        if self.full:
            self.kv = ()  # views, which would keep the old buffers
            slots, _, capacity, _ = self._buffer[0][0].shape
            self._reshape(slots, min(2 * capacity, self._limit))
            self._view()

    def _reshape(self, slots: int, capacity: int) -> None:
        """Move the rows into a larger buffer, one layer after the other, so that only one layer is held twice.

        `self.kv` must have been dropped.
        """
        old_slots, _, old_capacity, _ = self._buffer[0][0].shape
        if (slots, capacity) != (old_slots, old_capacity):
            for i, (key, value) in enumerate(self._buffer):
                self._buffer[i] = (self._larger(key, slots, capacity), self._larger(value, slots, capacity))

    def _larger(self, old: NDArray[np.float32], slots: int, capacity: int) -> NDArray[np.float32]:
        new = np.zeros((slots, old.shape[1], capacity, old.shape[3]), old.dtype)
        for row, length in enumerate(self.lengths):
            new[row, :, :length] = old[row, :, :length]
        return new

    def _view(self) -> None:
        rows = len(self.lengths)
        self.kv = tuple((key[:rows], value[:rows]) for key, value in self._buffer)
