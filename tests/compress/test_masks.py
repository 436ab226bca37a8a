"""Random masks: the page's numbers, and the slow reference, which draws them with Python's integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from compress.delta import masks
from compress.delta.masks import Scheme
from tests.reference import darex as reference

NAME = "model.layers.0.self_attn.q_proj.weight"
SEED = 8667216950854852445
SPLITMIX = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
ONE_OF_100 = [81, 84, 66, 79, 8, 92, 25, 54]
BERNOULLI_100 = [11, 185, 186, 236, 247, 287, 440, 630, 674, 777]

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 10), (13, 37), (5, 101), (64, 80)]
DENSITIES = [Fraction(1), Fraction(1, 2), Fraction(1, 10), Fraction(3, 20), Fraction(1, 37), Fraction(1, 1000)]
CASES: list[tuple[Scheme, Fraction]] = [
    (scheme, density)
    for scheme in masks.SCHEMES
    for density in DENSITIES
    if scheme != "one-of-m" or density.numerator == 1
]


def unsigned(x: torch.Tensor) -> list[int]:
    return [value % (1 << 64) for value in x.tolist()]


def slow(scheme: Scheme, density: Fraction, seed: int, name: str, shape: tuple[int, int]) -> list[int]:
    """The same by the reference."""
    own = reference.tensor_seed(seed, name)
    if scheme == "one-of-m":
        return reference.one_of_m(own, *shape, density.denominator)
    draw = reference.bernoulli if scheme == "bernoulli" else reference.columns
    return draw(own, *shape, density.numerator, density.denominator)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_generator_gives_the_numbers_that_splitmix64_is_known_for() -> None:
    assert unsigned(masks.mix(1234567, torch.arange(5))) == SPLITMIX
    assert [reference.mix(1234567, k) for k in range(5)] == SPLITMIX


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_no_sign_gets_into_64_bits(seed: int) -> None:
    counters = [0, 1, 2, 12345, (1 << 40) + 7, (1 << 62) + 1]
    assert unsigned(masks.mix(seed, torch.tensor(counters))) == [reference.mix(seed, k) for k in counters]
    assert masks.uniform(seed, torch.tensor(counters)).tolist() == [reference.u32(seed, k) for k in counters]


def test_a_tensor_has_a_seed_of_its_own_and_the_known_masks() -> None:
    shape = (2, 1000)
    assert masks.tensor_seed(42, NAME) == reference.tensor_seed(42, NAME) == SEED
    kept = masks.random_index("one-of-m", Fraction(1, 100), 42, NAME, shape)
    assert (kept % 100)[:8].tolist() == ONE_OF_100
    assert [i % 100 for i in slow("one-of-m", Fraction(1, 100), 42, NAME, shape)][:8] == ONE_OF_100
    kept = masks.random_index("bernoulli", Fraction(1, 100), 42, NAME, shape)
    assert kept[:10].tolist() == BERNOULLI_100
    assert slow("bernoulli", Fraction(1, 100), 42, NAME, shape)[:10] == BERNOULLI_100
    assert reference.threshold(1, 100) == 42949672
    assert masks.tensor_seed(42, "another") != SEED != masks.tensor_seed(43, NAME)


@pytest.mark.parametrize(("scheme", "density"), CASES)
def test_every_scheme_keeps_what_the_reference_keeps(scheme: Scheme, density: Fraction) -> None:
    for shape in SHAPES:
        kept = masks.random_index(scheme, density, 7, "name", shape)
        expected = slow(scheme, density, 7, "name", shape)
        assert kept.dtype == torch.int64
        assert kept.tolist() == expected
        assert masks.checksum(kept) == reference.index_checksum(expected)


@pytest.mark.parametrize("scheme", masks.SCHEMES)
def test_threads_and_chunks_change_nothing(scheme: Scheme, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1500, 977)
    drawn = []
    for count in (1, 4):
        torch.set_num_threads(count)
        drawn.append(masks.checksum(masks.random_index(scheme, Fraction(1, 20), 3, NAME, shape)))
    monkeypatch.setattr(masks, "CHUNK", 1013)
    drawn.append(masks.checksum(masks.random_index(scheme, Fraction(1, 20), 3, NAME, shape)))
    assert len(set(drawn)) == 1


@pytest.mark.parametrize(("scheme", "density"), [case for case in CASES if case[1] < 1])
def test_elements_are_kept_as_often_as_the_density_says(scheme: Scheme, density: Fraction) -> None:
    """Counted over independent draws: elements, buckets of m columns, or columns."""
    rows, cols = (1, 1_000_000) if scheme == "columns" else (1000, 1001)
    kept = len(masks.random_index(scheme, density, 0, "frequency", (rows, cols)))
    p = float(density)
    deviation = math.sqrt(rows * cols * p * (1 - p))
    if scheme == "one-of-m":  # only the last, short bucket of a row is left to chance
        share = cols % density.denominator / density.denominator
        deviation = math.sqrt(rows * share * (1 - share))
    assert abs(kept - rows * cols * p) <= 4 * deviation


def test_no_column_of_a_bucket_is_preferred() -> None:
    m, rows, cols = 10, 4000, 97
    index = masks.one_of_m(masks.tensor_seed(0, "places"), rows, cols, m)
    counts = np.bincount(index.numpy() % cols, minlength=cols)
    assert np.abs(counts - rows / m).max() <= 4 * math.sqrt(rows / m * (1 - 1 / m))


@pytest.mark.parametrize(("cols", "m"), [(100, 10), (101, 10), (109, 10), (7, 10), (64, 64), (80, 1)])
def test_every_row_of_one_of_m_keeps_the_floor_or_the_ceiling_of_its_share(cols: int, m: int) -> None:
    index = masks.random_index("one-of-m", Fraction(1, m), 5, "rows", (300, cols))
    counts = np.bincount(index.numpy() // cols, minlength=300)
    assert set(counts.tolist()) <= {cols // m, -(-cols // m)}
    assert bool((index.diff() > 0).all())


def test_columns_are_kept_whole() -> None:
    index = masks.random_index("columns", Fraction(1, 3), 5, "columns", (4, 60)).view(4, -1)
    assert 0 < index.shape[1] < 60
    assert torch.equal(index % 60, (index[:1] % 60).expand(4, -1))
