"""How sure a number is: intervals for ratios of paired measurements.

Three kinds of numbers come here. Timings are few and skewed, so the ratio of their medians gets a bootstrap over
*pairs* of runs (a slow moment of the machine hits both sides of a pair). Perplexities are exponentials of means over
windows, so their ratio gets Student's t on the *paired* differences of the windows' losses, in which the difficulty of
the text cancels. Answers to the items of tasks are right or wrong, so the share of skill that is kept gets a bootstrap
over *paired* items.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """Where the true value lies with probability `level`, and how that was found."""

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True)
class Summary:
    """Several runs of one thing: the median, and how far they spread. Units are those of the runs."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float


def summary(runs: Sequence[float]) -> Summary:
    """Median, quartiles (linear interpolation) and range of at least one run."""
    minimum, lower, median, upper, maximum = (float(value) for value in np.percentile(runs, (0, 25, 50, 75, 100)))
    return Summary(len(runs), median, lower, upper, minimum, maximum)


def bootstrap_of_median_ratio(
    baseline: Sequence[float], candidate: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Interval of median(candidate) / median(baseline); run i of one side is paired with run i of the other.

    Raises:
        ValueError: the sides differ in length, or hold no run.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"{len(baseline)} baseline runs cannot be paired with {len(candidate)} candidate runs")
    chosen = np.random.default_rng(seed).integers(0, len(baseline), (draws, len(baseline)))
    below = np.median(np.asarray(baseline, dtype=np.float64)[chosen], axis=1)
    above = np.median(np.asarray(candidate, dtype=np.float64)[chosen], axis=1)
    return _percentiles(above / below, "bootstrap of the ratio of medians, paired runs")


def bootstrap_of_median(runs: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Interval of the median of one side's runs."""
    chosen = np.random.default_rng(seed).integers(0, len(runs), (draws, len(runs)))
    return _percentiles(np.median(np.asarray(runs, dtype=np.float64)[chosen], axis=1), "bootstrap of the median")


def retention(
    baseline: Sequence[Sequence[bool]],
    candidate: Sequence[Sequence[bool]],
    chance: Sequence[float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float | None, Interval | None]:
    """Share of the baseline's skill that the candidate keeps; skill is the mean of (accuracy - chance) over tasks.

    The interval is a bootstrap over the items of each task; both sides get the same items. In a draw in which the
    baseline is not above chance the ratio says nothing, so it counts as minus infinity for the lower end and as
    infinity for the upper one: when that happens too often, the interval is unbounded.

    Args:
        baseline: one sequence for each task: whether each item is right.
        candidate: likewise; item i is the same question on both sides.
        chance: accuracy of a guess in each task.
        draws: bootstrap draws.
        seed: of the draws.

    Returns:
        The ratio and its interval; None and None when the baseline is not above chance.

    Raises:
        ValueError: no tasks, a task without items, or sides that differ in tasks or items.
    """
    items = [len(task) for task in baseline]
    if items != [len(task) for task in candidate] or len(items) != len(chance) or not items or 0 in items:
        raise ValueError(f"{items} baseline items cannot be paired with {[len(task) for task in candidate]}")
    tasks = [np.array(sides, dtype=np.float64) for sides in zip(baseline, candidate, strict=True)]
    below, above = np.sum([task.mean(axis=1) - guess for task, guess in zip(tasks, chance, strict=True)], axis=0)
    if below <= _NO_SKILL:
        return None, None
    generator = np.random.default_rng(seed)
    drawn = [_resampled(task, draws, generator) - guess for task, guess in zip(tasks, chance, strict=True)]
    below_drawn, above_drawn = np.sum(drawn, axis=0)
    skilled = below_drawn > _NO_SKILL
    ratios = above_drawn / np.where(skilled, below_drawn, 1)
    # No interpolation, which would make NaN of infinities.
    low = np.percentile(np.where(skilled, ratios, -np.inf), 50 * (1 - LEVEL), method="lower")
    high = np.percentile(np.where(skilled, ratios, np.inf), 50 * (1 + LEVEL), method="higher")
    return float(above / below), Interval(float(low), float(high), LEVEL, "bootstrap of items within tasks, paired")


def gain_kept(
    base: Sequence[float], finetuned: Sequence[float], candidate: Sequence[float], *, seed: int = 0
) -> tuple[float, Interval]:
    """Share of a fine-tune's gain that a candidate keeps: mean(candidate - base) / mean(fine-tune - base).

    Args:
        base: one number per item, for example its loss.
        finetuned, candidate: likewise, of the same items.
        seed: of the bootstrap over items.
    """
    values = np.array([base, finetuned, candidate])
    chosen, below, above = _gains_drawn(tuple(base), tuple(finetuned), seed)
    ratios = (values[2].take(chosen).mean(axis=1) - below) / (above - below)
    whole = values.mean(axis=1)
    value = float((whole[2] - whole[0]) / (whole[1] - whole[0]))
    return value, _percentiles(ratios, "bootstrap of items, paired")


@functools.lru_cache(maxsize=1)
def _gains_drawn(
    base: tuple[float, ...], finetuned: tuple[float, ...], seed: int
) -> tuple[NDArray[np.int64], Array, Array]:
    """The items of each draw, and the means of base and fine-tune there: the same for all candidates of a pair."""
    chosen = np.random.default_rng(seed).integers(0, len(base), (DRAWS, len(base)))
    below, above = (np.array(side).take(chosen).mean(axis=1) for side in (base, finetuned))
    return chosen, below, above


_NO_SKILL = 1e-12  # chance is a rounded number: a model that guesses may come out this far above it


def _resampled(task: Array, draws: int, generator: np.random.Generator) -> Array:
    """Accuracies (2, draws) of both sides of a task (2, items) on items drawn with replacement.

    An item is one of four kinds, by which sides are right. How many of each kind a draw holds is multinomial, which
    costs less than the items themselves.
    """
    kinds = np.bincount((2 * task[0] + task[1]).astype(int), minlength=4)
    counts = generator.multinomial(task.shape[1], kinds / task.shape[1], size=draws)
    right: Array = np.stack((counts[:, 2] + counts[:, 3], counts[:, 1] + counts[:, 3])) / task.shape[1]
    return right


def exponential_of_mean(values: Sequence[float], method: str) -> Interval | None:
    """Interval of exp(mean of `values`) by Student's t on the values; None for fewer than two.

    With the windows' losses (nats per token) this is the interval of a perplexity; with paired differences of losses,
    that of a ratio of perplexities.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = student_t(0.5 + LEVEL / 2, len(values) - 1) * error
    return Interval(exponential(mean - reach), exponential(mean + reach), LEVEL, method)


def exponential(value: float) -> float:
    """exp, with infinity where a float has no room."""
    return math.exp(value) if not value > 700 else math.inf


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution: exact for 1 and 2 degrees of freedom, else within 0.2 % at 97.5 %.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z = NormalDist().inv_cdf(probability)
    terms_beyond_normal: float = sum(
        sum(factor * z**power for power, factor in terms.items()) / (divisor * degrees**order)
        for order, (divisor, terms) in enumerate(_EXPANSION, start=1)
    )
    return z + terms_beyond_normal


_EXPANSION: tuple[tuple[int, dict[int, int]], ...] = (
    (4, {3: 1, 1: 1}),
    (96, {5: 5, 3: 16, 1: 3}),
    (384, {7: 3, 5: 19, 3: 17, 1: -15}),
    (92160, {9: 79, 7: 776, 5: 1482, 3: -1920, 1: -945}),
)


def _percentiles(values: np.ndarray[tuple[int], np.dtype[np.float64]], method: str) -> Interval:
    low, high = np.percentile(values, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return Interval(float(low), float(high), LEVEL, method)
