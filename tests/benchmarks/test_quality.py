"""Paired quality against a recount with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.quality import quality
from compress.calibration import TokenRows
from compress.evaluate import divergence, perplexity

V = 13
ROWS = TokenRows(torch.randint(V, (5, 9), generator=torch.Generator().manual_seed(3)), "made up", "hash", 0)
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(4))


def baseline(tokens: Tensor) -> Tensor:
    return TABLE[tokens]


def candidate(tokens: Tensor) -> Tensor:
    return TABLE[tokens] * 0.8 + 0.02 * torch.arange(V)


def test_quality_agrees_with_each_side_measured_alone() -> None:
    found = quality(baseline, candidate, ROWS)
    ours, theirs = perplexity(baseline, ROWS.tokens), perplexity(candidate, ROWS.tokens)
    moved = divergence(baseline, candidate, ROWS.tokens)
    assert found.baseline_perplexity == pytest.approx(ours.value)
    assert found.candidate_perplexity == pytest.approx(theirs.value)
    assert found.baseline_standard_error == pytest.approx(ours.standard_error)
    assert found.candidate_standard_error == pytest.approx(theirs.standard_error)
    assert found.baseline_window_nll == pytest.approx(ours.window_nll)
    assert found.candidate_window_nll == pytest.approx(theirs.window_nll)
    assert (found.kl, found.top1_agreement) == pytest.approx((moved.kl, moved.top1_agreement))
    assert found.kl_standard_error == pytest.approx(moved.kl_standard_error)
    assert (found.tokens, found.text_sha256) == (5 * 8, "hash")


def test_the_ratio_lies_in_its_interval_which_pairing_makes_narrow() -> None:
    found = quality(baseline, candidate, ROWS)
    assert found.ratio_interval is not None
    assert found.candidate_interval is not None
    assert found.perplexity_ratio == pytest.approx(found.candidate_perplexity / found.baseline_perplexity)
    assert found.ratio_interval.low < found.perplexity_ratio < found.ratio_interval.high
    of_ratio = found.ratio_interval.high / found.ratio_interval.low
    assert of_ratio < found.candidate_interval.high / found.candidate_interval.low


def test_a_model_against_itself_has_ratio_one_and_no_divergence() -> None:
    found = quality(baseline, baseline, ROWS)
    assert (found.perplexity_ratio, found.kl, found.top1_agreement) == (1.0, 0.0, 1.0)
    assert found.ratio_interval is not None
    assert (found.ratio_interval.low, found.ratio_interval.high) == (1.0, 1.0)


def test_every_window_is_asked_of_both_sides_once_and_in_turn() -> None:
    asked: list[str] = []

    def logits_as(name: str) -> Tensor:
        asked.append(name)
        return TABLE

    quality(lambda t: logits_as("a")[t], lambda t: logits_as("b")[t], ROWS)
    assert asked == ["a", "b"] * 5


def test_a_candidate_that_computes_nan_is_measured_as_nan() -> None:
    found = quality(baseline, lambda tokens: baseline(tokens) * math.nan, ROWS)
    assert math.isnan(found.candidate_perplexity)
    assert math.isnan(found.perplexity_ratio)
