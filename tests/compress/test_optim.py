"""AdamR: against the slow reference, against torch's Adam, and one step by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import ConfigError
from compress.optim import AdamR
from tests.reference import darex as reference

SHAPES = [(3, 4), (5,)]


def parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def gradients(steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(steps)]


def walk(optimizer: torch.optim.Optimizer, thetas: list[Tensor], steps: list[list[Tensor]]) -> None:
    for grads in steps:
        for theta, gradient in zip(thetas, grads, strict=True):
            theta.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_steps_are_those_of_the_reference(norm: Any) -> None:
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
    thetas, steps = parameters(), gradients(6)
    anchors = [theta.detach().numpy().copy() for theta in thetas]
    expected = [anchor.copy() for anchor in anchors]
    m, v = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    optimizer = AdamR(thetas, strength=0.7, norm=norm, **options)
    for t, grads in enumerate(steps, start=1):
        walk(optimizer, thetas, [grads])
        arrays = [gradient.numpy() for gradient in grads]
        expected, m, v = reference.adamr_step(expected, arrays, m, v, t, anchors, lam=0.7, l1=norm == "l1", **options)
        for ours, theirs in zip(thetas, expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("norm", "pulls"), [("l2", (0.2, -0.1)), ("l1", (1.0, -1.0))])
def test_two_steps_are_those_computed_by_hand(norm: Any, pulls: tuple[float, float]) -> None:
    """Two parameters of one element, gradients 3 and -4, lr 0.1, lambda 0.5, no memory (both betas 0), eps 0.

    m is g, v is g^2, and Adam moves each parameter by lr against the sign of its gradient. In the first step nothing
    is away from its anchor. z is sqrt((9 + 16) / 2). For the second step the first parameter has been put 0.2 above
    its anchor, and the other one 0.1 below.
    """
    a, b = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    optimizer = AdamR([a, b], lr=0.1, betas=(0.0, 0.0), eps=0.0, strength=0.5, norm=norm)
    walk(optimizer, [a, b], [[torch.tensor([3.0]), torch.tensor([-4.0])]])
    assert (a.item(), b.item()) == pytest.approx((0.9, 2.1))
    with torch.no_grad():
        a.fill_(1.2)
        b.fill_(1.9)
    walk(optimizer, [a, b], [[torch.tensor([3.0]), torch.tensor([-4.0])]])
    z = math.sqrt(12.5)
    expected = (1.2 - 0.05 / z * pulls[0] - 0.1, 1.9 - 0.05 / z * pulls[1] + 0.1)
    assert (a.item(), b.item()) == pytest.approx(expected, rel=1e-6)


def test_without_strength_it_is_adam() -> None:
    ours, theirs = parameters(), parameters()
    walk(AdamR(ours, lr=0.01, strength=0.0), ours, gradients(20))
    walk(torch.optim.Adam(theirs, lr=0.01), theirs, gradients(20))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_a_strong_pull_holds_the_weights_at_their_anchor() -> None:
    """With gradients of 1, z is 1: where lr * strength is 1 all of the way back is gone at every step."""
    steps = [[torch.ones(shape, dtype=torch.float64) for shape in SHAPES]] * 100
    away = {}
    for strength in (0.0, 10.0, 1000.0):
        thetas = parameters()
        anchors = [theta.detach().clone() for theta in thetas]
        walk(AdamR(thetas, lr=1e-3, strength=strength), thetas, steps)
        away[strength] = max(float((a - b).detach().abs().max()) for a, b in zip(thetas, anchors, strict=True))
    assert away[0.0] == pytest.approx(0.1, rel=1e-3)
    assert away[10.0] < 0.7 * away[0.0]
    assert away[1000.0] == pytest.approx(1e-3, rel=1e-3)


def test_a_group_without_anchors_has_weight_decay_in_place_of_the_pull() -> None:
    old, new = parameters()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99)}
    groups = [{"params": [old]}, {"params": [new], "anchored": False}]
    optimizer = AdamR(groups, strength=0.3, weight_decay=0.2, **options)
    twins = parameters()
    decayed = torch.optim.AdamW([twins[1]], weight_decay=0.2, **options)
    pulled = AdamR(twins, strength=0.3, **options)
    for grads in gradients(5):
        walk(optimizer, [old, new], [grads])
        before = twins[1].detach().clone()
        walk(pulled, twins, [grads])
        with torch.no_grad():
            twins[1].copy_(before)
        walk(decayed, [twins[1]], [[grads[1]]])
    assert torch.allclose(new, twins[1], rtol=1e-9)
    assert torch.allclose(old, twins[0], rtol=1e-9), "z counts all parameters, anchored or not"


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    thetas = parameters()
    before = thetas[1].detach().clone()
    thetas[0].grad = torch.ones_like(thetas[0])
    AdamR(thetas, strength=0.5).step()
    assert torch.equal(thetas[1], before)
    assert not torch.equal(thetas[0], parameters()[0])


def test_gradients_of_zero_move_nothing() -> None:
    thetas = parameters()
    walk(AdamR(thetas, strength=0.5), thetas, [[torch.zeros_like(theta) for theta in thetas]])
    for ours, before in zip(thetas, parameters(), strict=True):
        assert torch.equal(ours, before)


def test_a_closure_is_called_and_its_loss_returned() -> None:
    (theta, _) = parameters()
    optimizer = AdamR([theta], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return float(loss.detach())

    first = optimizer.step(closure)
    assert first is not None
    assert float(theta.detach().square().sum()) < first


def test_a_saved_optimizer_goes_on_as_if_nothing_had_been() -> None:
    steps = gradients(8)
    through, broken = parameters(), parameters()
    walk(AdamR(through, lr=0.05, strength=0.5), through, steps)
    optimizer = AdamR(broken, lr=0.05, strength=0.5)
    walk(optimizer, broken, steps[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = AdamR(broken, lr=0.7)
    fresh.load_state_dict(saved)
    walk(fresh, broken, steps[4:])
    for a, b in zip(through, broken, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1e-3},
        {"eps": -1e-8},
        {"strength": -0.1},
        {"weight_decay": -0.1},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"norm": "l3"},
    ],
)
def test_values_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdamR(parameters(), **wrong)
