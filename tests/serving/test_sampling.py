"""Picking tokens from logits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.sampling import Sampler, draw, nucleus

LOGITS = np.random.default_rng(0).standard_normal(1000).astype(np.float32)


def weights_of(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float64]:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def picks(count: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = 0) -> list[int]:
    sampler = Sampler(temperature, top_p, seed)
    return [sampler.pick(LOGITS) for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-6])
def test_a_temperature_of_zero_or_nearly_takes_the_likeliest(temperature: float) -> None:
    assert set(picks(20, temperature=temperature, seed=None)) == {int(LOGITS.argmax())}


def test_a_top_p_of_zero_takes_the_likeliest() -> None:
    assert set(picks(20, top_p=0.0, seed=None)) == {int(LOGITS.argmax())}


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("flatness", [0.3, 1.0, 100.0])
def test_the_nucleus_is_the_smallest_set_that_holds_enough(top_p: float, flatness: float) -> None:
    weights = weights_of(LOGITS, flatness).astype(np.float32)
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    mass, expected = 0.0, []
    for index in order:
        expected.append(index)
        mass += float(weights[index])
        if mass >= top_p * float(weights.sum(dtype=np.float64)):
            break
    assert list(nucleus(weights, top_p)) == expected


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.4), (1.5, 0.7)])
def test_tokens_come_as_often_as_their_probability_says(temperature: float, top_p: float) -> None:
    logits = np.array([1.0, -2.0, 0.5, 2.0, 0.0], np.float32)
    expected = weights_of(logits, temperature)
    if top_p < 1:
        kept = nucleus(expected.astype(np.float32), top_p)
        expected = np.where(np.isin(np.arange(5), kept), expected, 0.0)
        expected /= expected.sum()
    sampler = Sampler(temperature, top_p, 1)
    count = 20_000
    found = np.bincount([sampler.pick(logits) for _ in range(count)], minlength=5) / count
    error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 4 * error).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_a_draw_inverts_the_cumulative_distribution(size: int) -> None:
    weights = np.random.default_rng(size).random(size).astype(np.float32)
    cumulative = np.cumsum(weights, dtype=np.float64)
    for uniform in (0.0, 0.1, 0.5, 0.77, 0.999, 1 - 2**-53):
        index = draw(weights, uniform)
        assert cumulative[index] * (1 + 1e-12) >= uniform * cumulative[-1]
        assert index == 0 or cumulative[index - 1] <= uniform * cumulative[-1] * (1 + 1e-12)


def test_a_token_without_weight_is_not_drawn() -> None:
    weights = np.zeros(600, np.float32)
    weights[300] = 1.0
    assert {draw(weights, uniform) for uniform in (0.0, 0.5, 1 - 2**-53)} == {300}


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert picks(30, seed=7) == picks(30, seed=7)
    assert picks(30, seed=-7) == picks(30, seed=-7)
    assert len({tuple(picks(30, seed=seed)) for seed in (7, -7, 8, 2**63 - 1)}) == 4


def test_without_a_seed_draws_differ() -> None:
    assert picks(30, seed=None) != picks(30, seed=None)
