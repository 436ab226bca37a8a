"""How two sides are put next to each other."""

from __future__ import annotations

import pytest

from benchmarks.measures import METRICS, Measures, PairedRuns, compare, is_better, paired_runs, ratios
from benchmarks.record import Record


@pytest.fixture
def decode() -> PairedRuns:
    return paired_runs("decode", "tokens/second", (100.0, 110.0, 90.0, 120.0), (125.0, 130.0, 120.0, 126.0))


def test_paired_runs_keep_the_raw_numbers_and_their_medians(decode: PairedRuns) -> None:
    assert decode.baseline == (100.0, 110.0, 90.0, 120.0)
    assert (decode.baseline_summary.median, decode.candidate_summary.median) == (105.0, 125.5)
    assert decode.ratio == pytest.approx(125.5 / 105.0)
    assert decode.ratio_interval.low <= decode.ratio <= decode.ratio_interval.high


def test_the_baseline_against_itself_compares_every_second_run_with_the_others(decode: PairedRuns) -> None:
    assert decode.a_a_ratio == pytest.approx(115.0 / 95.0)
    assert paired_runs("one", "seconds", (1.0,), (2.0,)).a_a_ratio is None


def test_a_ratio_is_candidate_over_baseline_and_missing_where_a_side_is() -> None:
    found = ratios(Measures(parameters=200, perplexity=10.0), Measures(parameters=150, size_bytes=7))
    assert found == dict.fromkeys(METRICS) | {"parameters": 0.75}


def test_a_comparison_takes_medians_counts_and_intervals(decode: PairedRuns, record: Record) -> None:
    quality = record.quality["candidate int4 against dense int4"]
    found = compare(parameters=(200, 150), quality=quality, decode=decode)
    assert found.baseline == Measures(200, None, quality.baseline_perplexity, 105.0)
    assert found.candidate == Measures(150, None, quality.candidate_perplexity, 125.5)
    assert set(found.intervals.ratio) == {"perplexity", "decode_tokens_per_second"}
    assert found.ratio["perplexity"] == pytest.approx(quality.perplexity_ratio)
    assert found.ratio["ttft_seconds"] is None


def test_more_is_better_for_speed_alone() -> None:
    assert [metric for metric in METRICS if is_better(metric, 1.1)] == ["decode_tokens_per_second"]
