"""The optimisation loop: rates, what learns and what does not, and a loss that is lost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from compress.errors import FoldawayError
from compress.result import no_progress
from compress.training import Group, optimise


def steps(warmup: float, epochs: int = 4, rate: float = 0.1) -> list[float]:
    """How far Adam moves a parameter in each step along a constant gradient, which is the rate of the step."""
    parameter = nn.Parameter(torch.zeros(()))
    seen = [0.0]

    def loss(rows: Tensor, step: int) -> Tensor:
        seen.append(parameter.item())
        return parameter * 1.0

    optimise(
        [Group([parameter], rate), Group([], 1.0)],
        loss,
        rows=2,
        batch=2,
        epochs=epochs,
        generator=torch.Generator().manual_seed(0),
        progress=no_progress,
        what="test",
        warmup=warmup,
    )
    seen.append(parameter.item())
    return [before - after for before, after in itertools.pairwise(seen[1:])]


def test_rates_fall_along_a_cosine() -> None:
    assert steps(0.0) == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)], rel=1e-4)


def test_a_warm_up_rises_to_the_cosine() -> None:
    plain, warm = steps(0.0), steps(0.5)
    assert [after / before for before, after in zip(plain, warm, strict=True)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_only_what_learns_gets_gradients() -> None:
    learns, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    options = {"rows": 2, "batch": 1, "epochs": 1, "generator": torch.Generator(), "progress": no_progress}
    with torch.no_grad():
        learnt = optimise([Group([learns], 0.1)], lambda rows, step: (learns * other).sum(), what="test", **options)  # type: ignore[arg-type]
    assert other.grad is None
    assert learns.max() < 1
    assert learnt.losses[0] < 3


def test_a_loss_that_is_no_number_ends_it() -> None:
    parameter = nn.Parameter(torch.ones(()))
    options = {"rows": 2, "batch": 1, "epochs": 1, "generator": torch.Generator(), "progress": no_progress}
    with pytest.raises(FoldawayError, match="lower the learning rates"):
        optimise([Group([parameter], 0.1)], lambda rows, step: parameter * math.nan, what="test", **options)  # type: ignore[arg-type]
