"""The gate: limits on the candidate, and a verdict on each that knows when the measurement cannot tell.

    limits:
      - {metric: perplexity, max_ratio: 1.1}
      - {metric: peak_rss_bytes, max: 300_000_000}
      - {metric: decode_tokens_per_second, min_ratio: 1.15}

A limit passes when the whole interval of the measured value lies on the right side of it, fails when the whole interval
lies on the wrong side, and is undecided in between or when nothing was measured. Without an interval the value stands
for itself. One failed line fails the gate; else one undecided line leaves it undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from benchmarks.intervals import Interval
from benchmarks.measures import Intervals, Measures, Metric, ratios
from compress.schema import Strict, read_yaml

Bound = Literal["max_ratio", "min_ratio", "max", "min"]
BOUNDS: tuple[Bound, ...] = ("max_ratio", "min_ratio", "max", "min")
Outcome = Literal["pass", "fail", "undecided"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 3, "undecided": 3}
"""What a command that ends with a verdict returns."""


class Limit(Strict):
    """One line of a gate: a metric, and exactly one bound on its ratio to the baseline or on its own value."""

    metric: Metric
    max_ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    min_ratio: float | None = Field(None, gt=0, allow_inf_nan=False)
    max: float | None = Field(None, ge=0, allow_inf_nan=False)
    min: float | None = Field(None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _exactly_one_bound(self) -> Limit:
        given = [bound for bound in BOUNDS if getattr(self, bound) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.metric} has {len(given)} bounds: give exactly one of {', '.join(BOUNDS)}")
        return self

    @property
    def bound(self) -> Bound:
        """Which bound this limit sets."""
        return next(bound for bound in BOUNDS if getattr(self, bound) is not None)

    @property
    def value(self) -> float:
        """The bound's number: a ratio, or the metric's own unit."""
        value: float = getattr(self, self.bound)
        return value


class GateFile(Strict):
    """A gate file, or the gate of a recipe."""

    limits: tuple[Limit, ...] = Field(min_length=1)


@dataclass(frozen=True)
class GateLine:
    """One limit, judged.

    Attributes:
        metric, bound, limit: what was asked.
        value: the ratio or the candidate's value; None when it was not measured.
        interval: of that value, where there is one.
        outcome: pass, fail or undecided.
    """

    metric: Metric
    bound: Bound
    limit: float
    value: float | None
    interval: Interval | None
    outcome: Outcome

    @property
    def name(self) -> str:
        """For example ``perplexity.max_ratio``."""
        return f"{self.metric}.{self.bound}"

    @property
    def passed(self) -> bool | None:
        """True, False, or None when undecided."""
        return {"pass": True, "fail": False, "undecided": None}[self.outcome]


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and why."""

    verdict: Outcome
    gates: tuple[GateLine, ...]


def read_gate(path: Path) -> GateFile:
    """Read a gate file.

    Raises:
        ConfigError: no such file, no YAML, an unknown key or metric, no limit, or not exactly one bound in a limit.
    """
    return read_yaml(path, GateFile, "gate file")


def judge(
    limits: Sequence[Limit], baseline: Measures, candidate: Measures, intervals: Intervals | None = None
) -> Verdict:
    """Hold the candidate against every limit.

    Args:
        limits: at least one.
        baseline: the dense model's metrics.
        candidate: the smaller model's.
        intervals: of the ratios and of the candidate's values; None when there are none.
    """
    known = intervals or Intervals()
    ratio = ratios(baseline, candidate)
    lines = []
    for limit in limits:
        if limit.bound in ("max_ratio", "min_ratio"):
            value, interval = ratio[limit.metric], known.ratio.get(limit.metric)
        else:
            value, interval = candidate.get(limit.metric), known.candidate.get(limit.metric)
        outcome = _outcome(limit, value, interval)
        lines.append(GateLine(limit.metric, limit.bound, limit.value, value, interval, outcome))
    return Verdict(_worst([line.outcome for line in lines]), tuple(lines))


def _outcome(limit: Limit, value: float | None, interval: Interval | None) -> Outcome:
    if value is None:
        return "undecided"
    low, high = (interval.low, interval.high) if interval else (value, value)
    if not all(map(isfinite, (value, low, high))):  # NaN or infinity: it was measured, and is worthless
        return "fail"
    if limit.bound in ("min_ratio", "min"):
        return "pass" if low >= limit.value else "fail" if high < limit.value else "undecided"
    return "pass" if high <= limit.value else "fail" if low > limit.value else "undecided"


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    if "fail" in outcomes:
        return "fail"
    return "undecided" if "undecided" in outcomes else "pass"
