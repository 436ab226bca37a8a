"""Rows that join, leave and grow."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from exporters.onnx_session import KV
from serving.kv_cache import BLOCK, BatchCache, room_for

K, HEAD_DIM, LAYERS = 2, 3, 2
LIMIT = 4 * BLOCK


def cache_of(values: list[int], capacity: int = BLOCK) -> KV:
    """What a prefill makes: position t of every head holds values[t]."""

    def array(sign: int) -> np.ndarray:
        new = np.full((1, K, capacity, HEAD_DIM), np.nan, np.float32)
        new[0, :, : len(values)] = sign * np.array(values, np.float32)[:, None]
        return new

    return tuple((array(1), array(-1)) for _ in range(LAYERS))


def contents(cache: BatchCache) -> list[list[int]]:
    """What the rows hold, after checking that all layers and heads agree."""
    for key, value in cache.kv:
        assert key.flags.c_contiguous
        assert value.flags.c_contiguous
        for row, length in enumerate(cache.lengths):
            first = cache.kv[0][0][row, 0, :length, 0]
            assert (key[row, :, :length] == first[:, None]).all()
            assert (value[row, :, :length] == -first[:, None]).all()
    return [cache.kv[0][0][row, 0, :length, 0].astype(int).tolist() for row, length in enumerate(cache.lengths)]


def append(cache: BatchCache, values: list[int]) -> None:
    """What a step does: one more position in each row."""
    cache.reserve()
    for key, value in cache.kv:
        for row, (length, new) in enumerate(zip(cache.lengths, values, strict=True)):
            key[row, :, length], value[row, :, length] = new, -new
    cache.lengths += 1


def test_a_random_life_matches_plain_lists() -> None:
    rng = np.random.default_rng(0)
    cache, rows = BatchCache(LIMIT), list[list[int]]()
    for _ in range(400):
        action = rng.random()
        if len(rows) < 6 and action < 0.08:
            new = rng.integers(1, 1000, rng.integers(1, 2 * BLOCK)).tolist()
            cache.join(cache_of(new, room_for(len(new), LIMIT)), len(new))
            rows.append(new)
        elif rows and (action < 0.15 or max(map(len, rows)) == LIMIT):
            row = int(rng.integers(len(rows)))
            cache.leave(row)
            last = rows.pop()
            if row < len(rows):
                rows[row] = last
        elif rows:
            values = rng.integers(1, 1000, len(rows)).tolist()
            append(cache, values)
            for mine, value in zip(rows, values, strict=True):
                mine.append(value)
        assert contents(cache) == rows


def test_the_view_stays_the_same_object_while_the_batch_does() -> None:
    cache = BatchCache(LIMIT)
    cache.join(cache_of([1, 2]), 2)
    cache.join(cache_of([3]), 1)
    before = cache.kv
    append(cache, [5, 6])
    assert cache.kv is before


def test_a_lone_row_is_adopted_without_a_copy() -> None:
    cache, kv = BatchCache(LIMIT), cache_of([1, 2])
    cache.join(kv, 2)
    assert np.shares_memory(cache.kv[0][0], kv[0][0])


def test_a_full_row_grows_up_to_the_context() -> None:
    cache = BatchCache(LIMIT)
    cache.join(cache_of([1] * BLOCK), BLOCK)
    for _ in range(LIMIT - BLOCK):
        append(cache, [2])
    assert contents(cache) == [[1] * BLOCK + [2] * (LIMIT - BLOCK)]
    assert cache.kv[0][0].shape[2] == LIMIT


def test_an_empty_cache_holds_no_memory() -> None:
    cache = BatchCache(LIMIT)
    cache.join(cache_of([1]), 1)
    cache.leave(0)
    assert cache.kv == ()
    assert len(cache.lengths) == 0


def buffers_of(cache: BatchCache) -> list[weakref.ref[np.ndarray]]:
    """The arrays that own the memory behind the views."""
    return [weakref.ref(buffer) for pair in cache._buffer for buffer in pair]


def gone(buffers: list[weakref.ref[np.ndarray]]) -> bool:
    return all(buffer() is None for buffer in buffers)


def test_growth_and_the_last_leave_let_go_of_the_old_buffers() -> None:
    cache = BatchCache(LIMIT)
    cache.join(cache_of([1] * BLOCK), BLOCK)
    lone = buffers_of(cache)
    assert cache.full
    cache.reserve()
    assert gone(lone)
    assert not cache.full
    narrow = buffers_of(cache)
    cache.join(cache_of([2]), 1)
    assert gone(narrow)
    wide = buffers_of(cache)
    cache.leave(0)
    cache.leave(0)
    assert gone(wide)
    assert not cache.full


def test_growth_holds_one_layer_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BatchCache(LIMIT)
    cache.join(cache_of([1] * BLOCK), BLOCK)
    old, alive = buffers_of(cache), []
    right = cache._larger

    def watched(*args: Any) -> np.ndarray:
        alive.append(sum(buffer() is not None for buffer in old))
        return right(*args)

    monkeypatch.setattr(cache, "_larger", watched)
    cache.reserve()
    assert len(alive) == 2 * LAYERS
    assert alive[-1] == 2


@pytest.mark.parametrize(("tokens", "room"), [(1, BLOCK), (BLOCK - 1, BLOCK), (BLOCK, 2 * BLOCK), (LIMIT, LIMIT)])
def test_a_prompt_gets_room_for_one_more_token(tokens: int, room: int) -> None:
    assert room_for(tokens, LIMIT) == room
