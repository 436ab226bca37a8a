"""Numbers and verdicts in words, for the report and the command line."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from benchmarks.gate import Bound, GateLine, Outcome
from benchmarks.intervals import Interval
from benchmarks.measures import METRICS, Metric, is_better
from benchmarks.record import Record

NAMES: dict[Metric, str] = {
    "parameters": "Parameters",
    "size_bytes": "Size on disk",
    "perplexity": "Perplexity",
    "decode_tokens_per_second": "Decode speed",
    "ttft_seconds": "Time to first token",
    "peak_rss_bytes": "Peak memory",
}
MEANINGS: dict[Metric, str] = {
    "parameters": "weights of the model, tied ones counted once",
    "size_bytes": "the model files that are shipped",
    "perplexity": "how surprised the model is by the evaluation text; lower is better",
    "decode_tokens_per_second": "median rate after the first token, one stream; higher is better",
    "ttft_seconds": "median wait from the request to the first text; lower is better",
    "peak_rss_bytes": "largest resident memory while it serves",
}
VERDICTS: dict[Outcome, str] = {"pass": "Pass", "fail": "Fail", "undecided": "Undecided"}
_BOUNDS: dict[Bound, str] = {
    "max_ratio": "at most {} × the baseline",
    "min_ratio": "at least {} × the baseline",
    "max": "at most {}",
    "min": "at least {}",
}
NBSP = "\N{NO-BREAK SPACE}"
UNCHANGED = f"±0{NBSP}%"
_CHANGES: dict[Metric, tuple[str, str]] = {  # when the ratio is above 1, when it is below
    "parameters": ("more parameters", "fewer parameters"),
    "size_bytes": ("larger on disk", "smaller on disk"),
    "perplexity": ("higher perplexity", "lower perplexity"),
    "decode_tokens_per_second": ("faster decoding", "slower decoding"),
    "ttft_seconds": ("longer wait for the first token", "shorter wait for the first token"),
    "peak_rss_bytes": ("more peak memory", "less peak memory"),
}


def number(value: float) -> str:
    """Three or four significant digits, with thin thousands: 0.793, 16.91, 1 274."""
    if not isfinite(value):
        return "not a number" if value != value else "infinite"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3g}"


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error, where there is one: 16.41 ± 0.77."""
    return f"{number(value)} ± {number(error)}" if error is not None and isfinite(error) else number(value)


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{number(value * 1000)}{NBSP}ms" if value < 1 else f"{number(value)}{NBSP}s"


def size(value: float) -> str:
    """Bytes in decimal units."""
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def quantity(metric: Metric, value: float | None) -> str:
    """A metric's value with its unit; a dash when it was not measured."""
    if value is None:
        return "–"
    if metric == "parameters":
        return _scaled(value, (("B", 1e9), ("M", 1e6), ("k", 1e3)), "")
    if metric in ("size_bytes", "peak_rss_bytes"):
        return size(value)
    if metric == "ttft_seconds":
        return seconds(value)
    return f"{number(value)}{NBSP}tokens/s" if metric == "decode_tokens_per_second" else number(value)


def _scaled(value: float, units: tuple[tuple[str, float], ...], smallest: str) -> str:
    for unit, factor in units:
        if value >= factor:
            return f"{number(value / factor)}{NBSP}{unit}"
    return f"{number(value)}{NBSP}{smallest}".strip()


def times(ratio: float | None) -> str:
    """A ratio: × 0.793; a dash when it was not measured."""
    return "–" if ratio is None else f"×{NBSP}{number(ratio)}"


def percent(ratio: float) -> str:
    """How far a ratio is from 1: +24 %, −3.1 %, ±0 %."""
    if not isfinite(ratio):
        return number(ratio)
    change = (ratio - 1) * 100
    digits = 0 if abs(change) >= 10 else 1
    if round(abs(change), digits) == 0:
        return UNCHANGED
    return f"{'+' if change > 0 else '−'}{abs(change):.{digits}f}{NBSP}%"


def share(value: float) -> str:
    """A share of one, in percent with one decimal."""
    return f"{value * 100:.1f}{NBSP}%"


def change(metric: Metric, ratio: float) -> str:
    """A ratio in words: "21 % fewer parameters"."""
    if not isfinite(ratio):
        return f"{NAMES[metric].lower()} that is {number(ratio)}"
    more, fewer = _CHANGES[metric]
    return f"{percent(ratio).lstrip('+−')} {more if ratio > 1 else fewer}"


def limit(line: GateLine) -> str:
    """What a gate line asks for: "at most 2 × the baseline"."""
    is_ratio = line.bound in ("max_ratio", "min_ratio")
    return _BOUNDS[line.bound].format(number(line.limit) if is_ratio else quantity(line.metric, line.limit))


def value(line: GateLine) -> str:
    """What was measured for a gate line."""
    if line.value is None:
        return "not measured"
    return times(line.value) if line.bound in ("max_ratio", "min_ratio") else quantity(line.metric, line.value)


def spread(interval: Interval | None, metric: Metric | None = None) -> str:
    """An interval: "0.77 to 0.81", with units when a metric is given; empty without one."""
    if interval is None:
        return ""
    low, high = (number(end) if metric is None else quantity(metric, end) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def headline(record: Record) -> str:
    """The verdict in one sentence."""
    if record.verdict is None:
        return "No limits were given, so there is no verdict: the numbers are for you to judge."
    if record.verdict == "pass":
        return (
            "The candidate meets its only limit."
            if len(record.gates) == 1
            else (f"The candidate meets all {len(record.gates)} limits.")
        )
    at_fault = [line for line in record.gates if line.outcome == record.verdict]
    if not at_fault:
        return "The candidate fails: even the mildest compression missed the quality limit before it was exported."
    which = ", ".join(dict.fromkeys(NAMES[line.metric].lower() for line in at_fault))
    share = f"{len(at_fault)} of {len(record.gates)} limits"
    if record.verdict == "fail":
        return f"The candidate misses {share}: {which}."
    return f"The candidate misses no limit, but {share} cannot be decided: {which}."


Effect = Literal["better", "worse", "same", "unknown"]


def effect(record: Record, metric: Metric) -> Effect:
    """Whether the candidate gained in a metric, lost, or cannot be told apart from the baseline."""
    ratio, interval = record.ratio.get(metric), record.intervals.ratio.get(metric)
    if ratio is None:
        return "unknown"
    if percent(ratio) == UNCHANGED or (interval is not None and interval.low <= 1 <= interval.high):
        return "same"
    return "better" if is_better(metric, ratio) else "worse"


def gains_and_losses(record: Record) -> tuple[list[str], list[str], list[str]]:
    """What got better, what got worse, and what cannot be told apart, in words; what was not measured is left out."""
    found: dict[Effect, list[str]] = {"better": [], "worse": [], "same": [], "unknown": []}
    for metric in METRICS:
        ratio, how = record.ratio.get(metric), effect(record, metric)
        if ratio is not None:
            found[how].append(NAMES[metric].lower() if how == "same" else change(metric, ratio))
    return found["better"], found["worse"], found["same"]
