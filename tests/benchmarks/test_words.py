"""Numbers and verdicts in words."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks import words
from benchmarks.intervals import Interval
from benchmarks.measures import Intervals, Metric
from benchmarks.record import Record


def plain(text: str) -> str:
    """Text with ordinary spaces."""
    return text.replace(words.NBSP, " ").replace("\N{NARROW NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("parameters", 134_515_008, "134.5 M"),
        ("parameters", 912, "912"),
        ("parameters", 1_100_000_000, "1.1 B"),
        ("size_bytes", 86_433_291, "86.43 MB"),
        ("peak_rss_bytes", 1_274_000_000, "1.27 GB"),
        ("perplexity", 16.693, "16.69"),
        ("perplexity", 8437.2, "8 437"),
        ("perplexity", math.inf, "infinite"),
        ("perplexity", math.nan, "not a number"),
        ("decode_tokens_per_second", 233.94, "233.9 tokens/s"),
        ("ttft_seconds", 0.0531, "53.1 ms"),
        ("ttft_seconds", 2.5, "2.5 s"),
        ("ttft_seconds", None, "–"),
    ],
)
def test_a_quantity_has_its_unit(metric: Metric, value: float | None, said: str) -> None:
    assert plain(words.quantity(metric, value)) == said


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.2317, "+23 %"), (0.7909, "−21 %"), (1.031, "+3.1 %"), (1.0002, "±0 %"), (0.9999, "±0 %"), (2.5, "+150 %")],
)
def test_a_ratio_is_a_change_in_percent(ratio: float, said: str) -> None:
    assert plain(words.percent(ratio)) == said


def test_gains_and_losses_are_told_apart(record: Record) -> None:
    gained, lost, same = words.gains_and_losses(record)
    assert [plain(word) for word in gained] == [
        "21 % fewer parameters",
        "20 % smaller on disk",
        "23 % faster decoding",
        "15 % shorter wait for the first token",
        "12 % less peak memory",
    ]
    assert [plain(word) for word in lost] == ["44 % higher perplexity"]
    assert same == []


def test_a_ratio_whose_interval_holds_one_is_neither_gain_nor_loss(record: Record) -> None:
    unsure = record.model_copy(
        update={"intervals": Intervals(ratio={"ttft_seconds": Interval(0.8, 1.02, 0.95, "made up")})}
    )
    gained, _, same = words.gains_and_losses(unsure)
    assert same == ["time to first token"]
    assert not any("wait" in word for word in gained)


def test_what_was_not_measured_is_not_mentioned(record: Record) -> None:
    without = record.model_copy(update={"ratio": {**record.ratio, "perplexity": None}})
    assert words.gains_and_losses(without)[1] == []


def _with_outcome(record: Record, outcome: str) -> Record:
    first = dataclasses.replace(record.gates[0], outcome=outcome)
    return record.model_copy(update={"verdict": outcome, "gates": (first, *record.gates[1:])})


def test_the_headline_says_the_verdict_and_which_limits_made_it(record: Record) -> None:
    assert words.headline(record) == "The candidate meets all 4 limits."
    assert words.headline(_with_outcome(record, "fail")) == "The candidate misses 1 of 4 limits: perplexity."
    undecided = words.headline(_with_outcome(record, "undecided"))
    assert undecided == "The candidate misses no limit, but 1 of 4 limits cannot be decided: perplexity."
    assert "no verdict" in words.headline(record.model_copy(update={"verdict": None, "gates": ()}))
    assert (
        words.headline(record.model_copy(update={"gates": record.gates[:1]})) == "The candidate meets its only limit."
    )


def test_a_failure_before_the_export_is_explained(record: Record) -> None:
    assert "even the mildest compression" in words.headline(record.model_copy(update={"verdict": "fail"}))
