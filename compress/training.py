"""Our one optimisation loop: AdamW over rows that a method learns from, resumable within an epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.errors import FoldawayError
from compress.files import new_file
from compress.result import Progress

KEEP_SECONDS = 60.0
"""An interrupted run loses at most so much work, and the end of a step; more where keeping takes long."""
KEEP_SHARE = 0.05
"""Of a run's time that may go into keeping its state."""


@dataclass(frozen=True)
class Group:
    """Parameters that learn at one rate, at its highest, and with one decoupled weight decay."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Learnt:
    """What came of it.

    Attributes:
        losses: the mean loss of each epoch; of the last one as far as it went.
        resumed_seconds: what steps taken over from ``kept`` had cost when they were done.
    """

    losses: tuple[float, ...]
    resumed_seconds: float = 0.0


@dataclass
class _Place:
    """Where a run stands between two steps."""

    done: int = 0
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    total: float = 0.0
    seconds: float = 0.0


def optimise(
    groups: Sequence[Group],
    loss: Callable[[Tensor, int], Tensor],
    *,
    rows: int,
    batch: int,
    epochs: int,
    generator: torch.Generator,
    progress: Progress,
    what: str,
    steps: int | None = None,
    warmup: float = 0.0,
    clip: float | None = None,
    accumulate: int = 1,
    betas: tuple[float, float] = (0.9, 0.95),
    kept: Path | None = None,
) -> Learnt:
    """Minimise a loss with AdamW; rates fall along a cosine to zero over all steps.

    Args:
        groups: what learns; groups without parameters are left out.
        loss: from the places of a batch of rows, int64 (B,), and the number of the step, from 0, to the loss.
        rows: how many there are; each epoch takes them in another order.
        batch: rows a step, a divisor of ``rows``.
        epochs: how often every row is taken.
        generator: of the orders.
        progress: told of each step.
        what: the name under which progress is told.
        steps: end after so many, in the middle of an epoch if need be; None takes all epochs.
        warmup: share of the steps over which the rates rise first.
        clip: the largest norm of all gradients together; None does not clip.
        accumulate: parts that the rows of a step are taken in, one after the other; a divisor of ``batch``.
        betas: of Adam.
        kept: a file for the state of a run that was stopped; the same call goes on from it. Its name says whose it is.

    Raises:
        FoldawayError: the loss is not a finite number any more.
        ValueError: rows do not fill batches.
    """
    if rows < batch or rows % batch or batch % accumulate:
        raise ValueError(f"{rows} rows do not fill batches of {batch} in {accumulate} parts")
    steps = epochs * (rows // batch) if steps is None else steps
    parameters: list[dict[str, Any]] = [
        {"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay}
        for g in groups
        if g.parameters
    ]
    learning = [parameter for group in parameters for parameter in group["params"]]
    optimiser = torch.optim.AdamW(parameters, betas=betas, eps=1e-8, fused=True)
    rates = [group["lr"] for group in parameters]

    def share(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup * steps + 1)) if warmup else 1.0
        return rise * (1 + math.cos(math.pi * step / steps)) / 2

    place = _Place() if kept is None else _go_on(kept, learning, optimiser, generator)
    resumed_seconds, begun, written = place.seconds, time.monotonic(), time.monotonic()
    pause = KEEP_SECONDS
    per_epoch = rows // batch
    while place.done < steps:
        if place.done % per_epoch == 0:
            place.order, place.total = torch.randperm(rows, generator=generator).tolist(), 0.0
        first = place.done % per_epoch * batch
        optimiser.zero_grad(set_to_none=True)
        for group, highest in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = highest * share(place.done)
        rows_of_step = torch.tensor(place.order[first : first + batch])
        for part in rows_of_step.chunk(accumulate):
            with torch.enable_grad():
                value = loss(part, place.done) / accumulate
            value.backward(inputs=learning)  # type: ignore[no-untyped-call]
            place.total += value.item()
        if clip is not None:
            nn.utils.clip_grad_norm_(learning, clip)
        optimiser.step()
        place.done += 1
        if not math.isfinite(place.total):
            raise FoldawayError(f"{what}: the loss is no finite number any more; lower the learning rates")
        progress(what, place.done, steps)
        if place.done % per_epoch == 0 or place.done == steps:
            place.losses.append(place.total / ((place.done - 1) % per_epoch + 1))
        place.seconds = resumed_seconds + time.monotonic() - begun
        if kept is not None and (place.done == steps or time.monotonic() - written > pause):
            start = time.monotonic()
            _keep(kept, place, learning, optimiser, generator)
            written = time.monotonic()
            pause = max(KEEP_SECONDS, (written - start) / KEEP_SHARE)
    return Learnt(tuple(place.losses), resumed_seconds)


MOMENTS = ("exp_avg", "exp_avg_sq")


def _keep(
    file: Path,
    place: _Place,
    learning: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """Write the state of a run; a kill leaves the old file or the new one."""
    tensors = {"generator": generator.get_state()}
    for i, parameter in enumerate(learning):
        tensors[f"{i}"] = parameter.detach()
        tensors |= {f"{i}.{moment}": optimiser.state[parameter][moment] for moment in MOMENTS}
    with new_file(file) as partial:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, {"place": json.dumps(vars(place))})


@torch.no_grad()
def _go_on(
    file: Path, learning: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer, generator: torch.Generator
) -> _Place:
    """Take over the state of a run that was stopped; where there is none that can be read, begin."""
    try:
        found = safe_open(file, "pt")
        place = _Place(**json.loads(found.metadata()["place"]))  # type: ignore[no-untyped-call]
        tensors: dict[str, Tensor] = load_file(file)
        for i, parameter in enumerate(learning):
            if tensors[f"{i}"].shape != parameter.shape:
                return _Place()
        states = [{moment: tensors[f"{i}.{moment}"] for moment in MOMENTS} for i in range(len(learning))]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return _Place()
    for i, (parameter, state) in enumerate(zip(learning, states, strict=True)):
        parameter.copy_(tensors[f"{i}"])
        moments = {name: moment.to(parameter.device) for name, moment in state.items()}
        step = torch.tensor(float(place.done), device=parameter.device)  # where the fused kernel wants it
        optimiser.state[parameter] = {"step": step, **moments}
    generator.set_state(tensors["generator"])
    return place
