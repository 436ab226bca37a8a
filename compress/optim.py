"""AdamR: Adam whose regulariser pulls the weights towards where they began, so that a fine-tune stays a small delta.

Source: Deng et al. 2024 (DAREx), section 4.3: DAREx-L2 is this, then DARE. The update is that of "stable weight decay"
with the target moved from zero to the base weights: one scalar over all parameters scales the pull.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from compress.errors import ConfigError


class AdamR(Optimizer):
    """Adam with a decoupled pull of every parameter towards its value at the first step, its anchor.

    With gradient g, moments m and v, and z the root mean square of the bias-corrected v over all elements:

        L2: theta <- theta - (lr * strength / z) * (theta - anchor)
        L1: theta <- theta - (lr * strength / z) * sign(theta - anchor)
        theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: parameters, or groups of them. A group with ``anchored=False`` (a new head has no base value) gets
            ordinary decoupled weight decay in place of the pull.
        lr: step size.
        betas: decay of the two moments.
        eps: added to the denominator.
        strength: lambda, of the pull.
        norm: "l2" keeps all deltas small, which suits random pruning; "l1" makes them few, which suits pruning by
            importance.
        weight_decay: of groups that are not anchored.

    Raises:
        ConfigError: a value out of range.

    Source: DAREx, section 4.3, as the authors' optimiser computes it. The anchor is kept in the state, so that a
    checkpoint of the optimiser brings it along.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        strength: float = 1e-4,
        norm: Literal["l2", "l1"] = "l2",
        weight_decay: float = 0.0,
    ) -> None:
        positive = all(value >= 0 for value in (lr, eps, strength, weight_decay))
        if not positive or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError("AdamR takes lr, eps, strength and weight_decay from 0, and betas in [0, 1)")
        if norm not in ("l2", "l1"):
            raise ConfigError(f"AdamR pulls with l2 or l1, not with {norm!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "strength": strength, "norm": norm}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "anchored": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        total, elements = 0.0, 0
        for parameter, group in moving:
            total += self._moments(parameter, *group["betas"])
            elements += parameter.numel()
        z = math.sqrt(total / elements) if total > 0 else 1.0
        for parameter, group in moving:
            self._move(parameter, group, z)
        return loss

    def _moments(self, parameter: Tensor, beta1: float, beta2: float) -> float:
        """Update the moments of a parameter; the sum of its bias-corrected v."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(parameter)
            state["v"] = torch.zeros_like(parameter)
            state["anchor"] = parameter.detach().clone()
        state["step"] += 1
        gradient = parameter.grad
        assert gradient is not None
        state["m"].lerp_(gradient, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction: float = 1 - beta2 ** state["step"]
        return float(state["v"].sum(dtype=torch.float64)) / correction

    def _move(self, parameter: Tensor, group: dict[str, Any], z: float) -> None:
        state, lr, (beta1, beta2) = self.state[parameter], group["lr"], group["betas"]
        if group["anchored"]:
            away = parameter - state["anchor"]
            pull = away if group["norm"] == "l2" else away.sign_()
            parameter.sub_(pull, alpha=lr * group["strength"] / z)
        else:
            parameter.mul_(1 - lr * group["weight_decay"])
        denominator = (state["v"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["m"], denominator, value=-lr / (1 - beta1 ** state["step"]))
