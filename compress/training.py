"""Our one optimisation loop: Adam and a cosine over rows that a method learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import FoldawayError
from compress.result import Progress


@dataclass(frozen=True)
class Group:
    """Parameters that learn at one rate, at its highest."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float


def optimise(
    groups: Sequence[Group],
    loss: Callable[[Tensor], Tensor],
    *,
    rows: int,
    batch: int,
    epochs: int,
    generator: torch.Generator,
    progress: Progress,
    what: str,
    warmup: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[float]:
    """Minimise a loss with Adam, no weight decay and no clipping; rates fall along a cosine to zero over all steps.

    Args:
        groups: what learns; groups without parameters are left out.
        loss: from the places of a batch of rows, int64 (B,), to the loss.
        rows: how many there are; each epoch takes them in another order.
        batch: rows a step, a divisor of ``rows``.
        epochs: how often every row is taken.
        generator: of the orders.
        progress: told of each step.
        what: the name under which progress is told.
        warmup: share of the steps over which the rates rise to the cosine.
        betas: of Adam.

    Returns:
        The mean loss of each epoch.

    Raises:
        FoldawayError: the loss is not a finite number any more.
    """
    steps = epochs * (rows // batch)
    parameters: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": g.learning_rate} for g in groups if g.parameters
    ]
    learning = [parameter for group in parameters for parameter in group["params"]]
    optimiser = torch.optim.Adam(parameters, betas=betas, eps=1e-8)

    def share(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup * steps + 1)) if warmup else 1.0
        return rise * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    means, done = [], 0
    for _ in range(epochs):
        total = 0.0
        for places in torch.split(torch.randperm(rows, generator=generator), batch):
            optimiser.zero_grad(set_to_none=True)
            with torch.enable_grad():
                value = loss(places)
            value.backward(inputs=learning)  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            total += value.item()
            done += 1
            if not math.isfinite(total):
                raise FoldawayError(f"{what}: the loss is no finite number any more; lower the learning rates")
            progress(what, done, steps)
        means.append(total / (rows // batch))
    return means
