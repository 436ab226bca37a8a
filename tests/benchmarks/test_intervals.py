"""Intervals against numbers worked out by hand, printed tables and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.intervals import (
    bootstrap_of_median,
    bootstrap_of_median_ratio,
    exponential,
    exponential_of_mean,
    retention,
    student_t,
    summary,
)


def test_a_summary_holds_median_quartiles_and_range() -> None:
    found = summary((4.0, 1.0, 3.0, 2.0, 10.0))
    assert (found.count, found.minimum, found.lower_quartile) == (5, 1.0, 2.0)
    assert (found.median, found.upper_quartile, found.maximum) == (3.0, 4.0, 10.0)


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (11, 2.201), (30, 2.042), (1000, 1.962)],
)
def test_student_t_is_that_of_the_printed_tables(degrees: int, printed: float) -> None:
    assert student_t(0.975, degrees) == pytest.approx(printed, rel=0.002)


def test_the_interval_of_a_perplexity_ratio_is_that_worked_out_by_hand() -> None:
    # Mean 0.2, standard deviation 0.1, standard error 0.1 / sqrt(3), t(2) = 4.3027.
    found = exponential_of_mean((0.1, 0.2, 0.3), "by hand")
    assert found is not None
    assert found.low == pytest.approx(math.exp(0.2 - 4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert found.high == pytest.approx(math.exp(0.2 + 4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)


def test_one_window_has_no_interval() -> None:
    assert exponential_of_mean((0.3,), "") is None


def test_the_exponential_of_too_much_is_infinite() -> None:
    assert exponential(1e4) == math.inf
    assert math.isnan(exponential(math.nan))


def test_the_bootstrap_of_three_pairs_reaches_from_the_smallest_to_the_largest() -> None:
    # A median of three draws is the smallest value in 7 of 27 cases and the largest in 7: both beyond 2.5 %.
    found = bootstrap_of_median_ratio((1.0, 1.0, 1.0), (1.0, 2.0, 3.0))
    assert (found.low, found.high, found.level) == (1.0, 3.0, 0.95)


def test_pairs_that_differ_by_one_factor_have_an_interval_of_no_width() -> None:
    found = bootstrap_of_median_ratio((1.0, 3.0, 2.0, 7.0, 5.0), (2.0, 6.0, 4.0, 14.0, 10.0))
    assert (found.low, found.high) == (2.0, 2.0)


def test_the_bootstrap_says_the_same_each_time() -> None:
    runs = ((1.0, 1.1, 0.9, 1.3, 1.2), (0.8, 0.9, 0.7, 1.0, 0.9))
    assert bootstrap_of_median_ratio(*runs) == bootstrap_of_median_ratio(*runs)
    assert bootstrap_of_median(runs[0]) == bootstrap_of_median(runs[0])


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_of_median_ratio((1.0, 2.0), (1.0,))


def test_intervals_of_perplexity_ratios_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for differences in generator.normal(0.3, 0.05, (1000, 8)):
        found = exponential_of_mean(differences.tolist(), "")
        assert found is not None
        covered += found.low <= math.exp(0.3) <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_bootstrap_intervals_cover_the_true_ratio_of_medians() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        shared = generator.lognormal(0.0, 0.3, 11)  # a slow moment of the machine hits both sides of a pair
        baseline, candidate = shared, 0.8 * shared * generator.lognormal(0.0, 0.02, 11)
        found = bootstrap_of_median_ratio(baseline.tolist(), candidate.tolist(), draws=500)
        covered += found.low <= 0.8 <= found.high
    assert covered / 200 >= 0.9


def test_retention_is_that_worked_out_by_hand() -> None:
    # Accuracies 3/4 and 4/4 against 2/4 and 3/4: (1/4 + 1/4) / (1/2 + 1/2) above chances of 1/4 and 1/2.
    baseline = ((True, True, True, False), (True, True, True, True))
    candidate = ((True, True, False, False), (True, True, True, False))
    share, interval = retention(baseline, candidate, (0.25, 0.5))
    assert share == pytest.approx(0.5)
    assert interval is not None
    assert interval.low < 0.5 < interval.high


def test_a_model_keeps_all_of_its_own_skill_and_without_doubt() -> None:
    share, interval = retention([[True] * 60 + [False] * 40], [[True] * 60 + [False] * 40], [0.25])
    assert share == 1.0
    assert interval is not None
    assert (interval.low, interval.high, interval.level) == (1.0, 1.0, 0.95)


def test_a_candidate_below_chance_keeps_less_than_nothing() -> None:
    share, _ = retention([[True, True, True, False]], [[False] * 4], [0.25])
    assert share == pytest.approx(-0.5)


@pytest.mark.parametrize("chance", [0.5, 0.75])
def test_a_baseline_that_guesses_has_no_skill_to_keep(chance: float) -> None:
    assert retention([[True, False]], [[True, True]], [chance]) == (None, None)


def test_chance_that_is_a_rounded_number_is_no_skill() -> None:
    third = [True, False, False]
    assert retention([third] * 3, [third] * 3, [0.1 + 0.2 + 1 / 30] * 3) == (None, None)


def test_a_baseline_that_may_be_guessing_leaves_the_share_unbounded() -> None:
    share, interval = retention([[True] * 6 + [False] * 4], [[True] * 5 + [False] * 5], [0.5])
    assert share == pytest.approx(0.0)
    assert interval is not None
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_retention_says_the_same_each_time_and_another_seed_something_else() -> None:
    generator = np.random.default_rng(0)
    sides = ([(generator.random(80) < 0.7).tolist()], [(generator.random(80) < 0.6).tolist()], [0.25])
    assert retention(*sides) == retention(*sides)
    assert retention(*sides, draws=50) != retention(*sides, draws=50, seed=1)


@pytest.mark.parametrize(
    ("baseline", "candidate", "chance"),
    [
        ([[True, False]], [[True]], [0.5]),
        ([[True], [True]], [[True]], [0.5]),
        ([[True]], [[True]], [0.5, 0.5]),
        ([[]], [[]], [0.5]),
        ([], [], []),
    ],
)
def test_answers_that_cannot_be_paired_are_refused(
    baseline: list[list[bool]], candidate: list[list[bool]], chance: list[float]
) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        retention(baseline, candidate, chance)


def test_intervals_of_retention_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        difficulty = generator.random((2, 300))  # an item that is hard for one side is hard for the other
        lucky = generator.random((2, 300)) < 0.1
        baseline, candidate = difficulty < 0.75, (difficulty < 0.55) | lucky  # right 0.75 and 0.595 of the time
        _, found = retention(baseline.tolist(), candidate.tolist(), (0.25, 0.25), draws=500)
        assert found is not None
        covered += found.low <= (0.595 - 0.25) / (0.75 - 0.25) <= found.high
    assert 0.92 <= covered / 400 <= 0.98
