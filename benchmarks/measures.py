"""What is measured, as plain data: the metrics of one side, paired runs, paired quality, and how two sides compare.

Seconds and bytes are the units. A ratio is always candidate / baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from benchmarks.intervals import Interval, Summary, bootstrap_of_median, bootstrap_of_median_ratio, summary

Metric = Literal["parameters", "size_bytes", "perplexity", "decode_tokens_per_second", "ttft_seconds", "peak_rss_bytes"]
METRICS: tuple[Metric, ...] = get_args(Metric)
HIGHER_IS_BETTER: frozenset[Metric] = frozenset({"decode_tokens_per_second"})


@dataclass(frozen=True)
class Measures:
    """The metrics of one side; None where it was not measured.

    Attributes:
        parameters: distinct weights (tied ones count once).
        size_bytes: the files that are shipped.
        perplexity: exp of the mean negative log-likelihood per token, on the evaluation text.
        decode_tokens_per_second: median rate after the first token, one stream.
        ttft_seconds: median time from the request to the first content (time to first token).
        peak_rss_bytes: largest resident memory of the serving process and its children.
    """

    parameters: int | None = None
    size_bytes: int | None = None
    perplexity: float | None = None
    decode_tokens_per_second: float | None = None
    ttft_seconds: float | None = None
    peak_rss_bytes: int | None = None

    def get(self, metric: Metric) -> float | None:
        """The value of a metric by name."""
        value: float | None = getattr(self, metric)
        return value


@dataclass(frozen=True)
class PairedRuns:
    """Raw runs of both sides that took turns, and what they say.

    Attributes:
        name: what was timed, for example "served decode".
        unit: "seconds", "tokens/second" or "bytes".
        baseline: one number per run, in the order of the runs; run i is paired with run i of the candidate.
        candidate: likewise.
        baseline_summary: median and spread of the baseline's runs.
        candidate_summary: of the candidate's.
        ratio: candidate median / baseline median.
        ratio_interval: of that ratio.
        candidate_interval: of the candidate's median.
        a_a_ratio: median of every second baseline run / median of the others: how far from 1 the same thing measured
            twice comes out here. None with fewer than two runs.
    """

    name: str
    unit: str
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]
    baseline_summary: Summary
    candidate_summary: Summary
    ratio: float
    ratio_interval: Interval
    candidate_interval: Interval
    a_a_ratio: float | None


def paired_runs(name: str, unit: str, baseline: tuple[float, ...], candidate: tuple[float, ...]) -> PairedRuns:
    """Summarise runs that took turns.

    Raises:
        ValueError: the sides differ in length, or hold no run.
    """
    ratio_interval = bootstrap_of_median_ratio(baseline, candidate)
    below, above = summary(baseline), summary(candidate)
    a_a_ratio = summary(baseline[1::2]).median / summary(baseline[0::2]).median if len(baseline) > 1 else None
    return PairedRuns(
        name=name,
        unit=unit,
        baseline=baseline,
        candidate=candidate,
        baseline_summary=below,
        candidate_summary=above,
        ratio=above.median / below.median,
        ratio_interval=ratio_interval,
        candidate_interval=bootstrap_of_median(candidate),
        a_a_ratio=a_a_ratio,
    )


@dataclass(frozen=True)
class Quality:
    """How well both sides predict the same text, and how far apart they are.

    Attributes:
        baseline_perplexity, candidate_perplexity: exp of the mean loss.
        baseline_standard_error, candidate_standard_error: of those perplexities.
        perplexity_ratio: candidate / baseline.
        ratio_interval: of that ratio, from the paired windows; None with fewer than two windows.
        candidate_interval: of the candidate's perplexity.
        kl: mean KL divergence of the candidate from the baseline, nats per token.
        kl_standard_error: of that mean.
        top1_agreement: share of positions where both find the same token the likeliest.
        flipped: share of tokens that the first choice of one side gets right and that of the other does not; None in
            records from before it was measured.
        tokens: tokens predicted.
        baseline_window_nll, candidate_window_nll: mean loss of each window, nats per token: the raw runs.
        text_sha256: which text.
    """

    baseline_perplexity: float
    candidate_perplexity: float
    baseline_standard_error: float
    candidate_standard_error: float
    perplexity_ratio: float
    ratio_interval: Interval | None
    candidate_interval: Interval | None
    kl: float
    kl_standard_error: float
    top1_agreement: float
    tokens: int
    baseline_window_nll: tuple[float, ...]
    candidate_window_nll: tuple[float, ...]
    text_sha256: str
    flipped: float | None = None


@dataclass(frozen=True)
class Intervals:
    """Intervals by metric: of the ratios, and of the candidate's own values. A metric that is not here has none."""

    ratio: Mapping[Metric, Interval] = field(default_factory=dict)
    candidate: Mapping[Metric, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Both sides of one comparison and how sure it is."""

    baseline: Measures
    candidate: Measures
    intervals: Intervals

    @property
    def ratio(self) -> dict[Metric, float | None]:
        """Candidate / baseline of every metric; None where a side was not measured."""
        return ratios(self.baseline, self.candidate)


def compare(
    *,
    parameters: tuple[int, int] | None = None,
    size_bytes: tuple[int, int] | None = None,
    peak_rss_bytes: tuple[int, int] | None = None,
    quality: Quality | None = None,
    decode: PairedRuns | None = None,
    ttft: PairedRuns | None = None,
) -> Comparison:
    """Gather one comparison from its measurements; pairs are (baseline, candidate), and None was not measured."""
    pairs: dict[Metric, tuple[float, float]] = {}
    of_ratio: dict[Metric, Interval] = {}
    of_candidate: dict[Metric, Interval] = {}
    counted: dict[Metric, tuple[int, int] | None] = {
        "parameters": parameters,
        "size_bytes": size_bytes,
        "peak_rss_bytes": peak_rss_bytes,
    }
    pairs.update({metric: pair for metric, pair in counted.items() if pair is not None})
    if quality is not None:
        pairs["perplexity"] = (quality.baseline_perplexity, quality.candidate_perplexity)
        if quality.ratio_interval is not None and quality.candidate_interval is not None:
            of_ratio["perplexity"], of_candidate["perplexity"] = quality.ratio_interval, quality.candidate_interval
    timed: dict[Metric, PairedRuns | None] = {"decode_tokens_per_second": decode, "ttft_seconds": ttft}
    for metric, runs in timed.items():
        if runs is not None:
            pairs[metric] = (runs.baseline_summary.median, runs.candidate_summary.median)
            of_ratio[metric], of_candidate[metric] = runs.ratio_interval, runs.candidate_interval
    baseline = Measures(**{metric: pair[0] for metric, pair in pairs.items()})  # type: ignore[arg-type]
    candidate = Measures(**{metric: pair[1] for metric, pair in pairs.items()})  # type: ignore[arg-type]
    return Comparison(baseline, candidate, Intervals(of_ratio, of_candidate))


def ratios(baseline: Measures, candidate: Measures) -> dict[Metric, float | None]:
    """Candidate / baseline of every metric; None where a side was not measured or the baseline is zero."""
    return {metric: _ratio(baseline.get(metric), candidate.get(metric)) for metric in METRICS}


def _ratio(baseline: float | None, candidate: float | None) -> float | None:
    if baseline is None or candidate is None or baseline == 0:
        return None
    return candidate / baseline


def is_better(metric: Metric, ratio: float) -> bool:
    """Whether a ratio is a gain."""
    return ratio > 1 if metric in HIGHER_IS_BETTER else ratio < 1
