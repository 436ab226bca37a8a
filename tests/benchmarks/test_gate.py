"""Gate files, and verdicts that know when the measurement cannot tell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.gate import EXIT_CODES, GateFile, Limit, judge, read_gate
from benchmarks.intervals import Interval
from benchmarks.measures import Intervals, Measures
from compress.errors import ConfigError

BASELINE = Measures(1000, 4000, 10.0, 50.0, 0.2, 500)
CANDIDATE = Measures(750, 3000, 15.0, 60.0, 0.1, 400)


def between(low: float, high: float) -> Interval:
    return Interval(low, high, 0.95, "made up")


def outcome_of(limit: dict[str, Any], interval: Interval | None = None, candidate: Measures = CANDIDATE) -> str:
    given = Limit(**limit)
    known = {given.metric: interval} if interval else {}
    return judge([given], BASELINE, candidate, Intervals(ratio=known, candidate=known)).verdict


def test_the_example_of_the_design_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(
        "limits: [{metric: perplexity, max_ratio: 1.1}, {metric: peak_rss_bytes, max: 300_000_000}, "
        "{metric: decode_tokens_per_second, min_ratio: 1.15}]"
    )
    limits = read_gate(path).limits
    assert [(limit.metric, limit.bound, limit.value) for limit in limits] == [
        ("perplexity", "max_ratio", 1.1),
        ("peak_rss_bytes", "max", 300_000_000),
        ("decode_tokens_per_second", "min_ratio", 1.15),
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("limits: [{metric: perplexety, max_ratio: 1.1}]", "'decode_tokens_per_second'"),
        ("limits: [{metric: perplexity, maxratio: 1.1}]", "limits.0.maxratio: this key is not known"),
        ("limits: [{metric: perplexity, max_ratio: 1.1}]\nextra: 1", "extra: this key is not known"),
        ("limits: [{metric: perplexity}]", "perplexity has 0 bounds: give exactly one of max_ratio"),
        ("limits: [{metric: perplexity, max: 20, max_ratio: 2}]", "perplexity has 2 bounds"),
        ("limits: [{metric: perplexity, max_ratio: -1}]", "limits.0.max_ratio"),
        ("limits: [{metric: perplexity, max_ratio: .nan}]", "limits.0.max_ratio"),
        ("limits: []", "limits"),
        ("", "gate.yaml"),
        ("{", "not YAML"),
    ],
)
def test_a_gate_file_that_cannot_be_meant_is_refused_on_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_gate(tmp_path / "gate.yaml")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gate_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the gate file"):
        read_gate(tmp_path / "gate.yaml")


@pytest.mark.parametrize(
    ("limit", "outcome"),
    [
        ({"metric": "perplexity", "max_ratio": 1.5}, "pass"),
        ({"metric": "perplexity", "max_ratio": 1.49}, "fail"),
        ({"metric": "perplexity", "max": 15}, "pass"),
        ({"metric": "perplexity", "max": 14.9}, "fail"),
        ({"metric": "decode_tokens_per_second", "min_ratio": 1.2}, "pass"),
        ({"metric": "decode_tokens_per_second", "min_ratio": 1.21}, "fail"),
        ({"metric": "decode_tokens_per_second", "min": 60}, "pass"),
        ({"metric": "decode_tokens_per_second", "min": 61}, "fail"),
        ({"metric": "size_bytes", "max_ratio": 0.75}, "pass"),
    ],
)
def test_without_an_interval_the_value_stands_for_itself(limit: dict[str, Any], outcome: str) -> None:
    assert outcome_of(limit) == outcome


@pytest.mark.parametrize(
    ("low", "high", "upper", "lower"),
    [
        (1.0, 1.1, "pass", "fail"),
        (1.0, 1.2, "pass", "undecided"),  # an end on the limit is still within it
        (1.1, 1.3, "undecided", "undecided"),
        (1.2, 1.3, "undecided", "pass"),
        (1.21, 1.3, "fail", "pass"),
    ],
)
def test_an_interval_that_straddles_the_limit_leaves_it_undecided(
    low: float, high: float, upper: str, lower: str
) -> None:
    interval = between(low, high)
    assert outcome_of({"metric": "decode_tokens_per_second", "max_ratio": 1.2}, interval) == upper
    assert outcome_of({"metric": "decode_tokens_per_second", "min_ratio": 1.2}, interval) == lower
    assert outcome_of({"metric": "decode_tokens_per_second", "max": 1.2}, interval) == upper


def test_a_ratio_is_judged_by_the_interval_of_the_ratio_and_a_value_by_that_of_the_value() -> None:
    intervals = Intervals(ratio={"perplexity": between(1.4, 1.6)}, candidate={"perplexity": between(12, 18)})
    limits = (Limit(metric="perplexity", max_ratio=1.7), Limit(metric="perplexity", max=16))
    assert [line.outcome for line in judge(limits, BASELINE, CANDIDATE, intervals).gates] == ["pass", "undecided"]


def test_what_was_not_measured_is_undecided() -> None:
    assert outcome_of({"metric": "ttft_seconds", "max_ratio": 5.0}, candidate=Measures()) == "undecided"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_measurement_that_is_no_number_fails(broken: float) -> None:
    assert outcome_of({"metric": "perplexity", "max_ratio": 5.0}, candidate=Measures(perplexity=broken)) == "fail"


@pytest.mark.parametrize(
    ("ratios", "verdict", "code"),
    [((0.8, 2.0), "pass", 0), ((0.8, 1.4), "fail", 3), ((None, 2.0), "undecided", 3), ((None, 1.4), "fail", 3)],
)
def test_one_failure_fails_the_gate_and_else_one_doubt_leaves_it_undecided(
    ratios: tuple[float | None, float], verdict: str, code: int
) -> None:
    size, perplexity = ratios
    limits = [Limit(metric="size_bytes", max_ratio=size or 0.8), Limit(metric="perplexity", max_ratio=perplexity)]
    candidate = Measures(size_bytes=3000 if size else None, perplexity=15.0)
    found = judge(limits, BASELINE, candidate)
    assert (found.verdict, EXIT_CODES[found.verdict]) == (verdict, code)


def test_a_line_says_its_name_and_whether_it_passed() -> None:
    limits = (Limit(metric="perplexity", max_ratio=1.4), Limit(metric="parameters", max=800))
    first, second = judge(limits, BASELINE, CANDIDATE).gates
    assert (first.name, first.value, first.passed) == ("perplexity.max_ratio", 1.5, False)
    assert (second.name, second.value, second.passed) == ("parameters.max", 750, True)


def test_a_gate_cannot_be_changed_after_it_was_read() -> None:
    gate = GateFile(limits=(Limit(metric="perplexity", max_ratio=1.4),))
    with pytest.raises(ValidationError):
        gate.limits = ()  # type: ignore[misc]
