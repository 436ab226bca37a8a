"""Run calibration rows through a model once, and keep running statistics at chosen points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from compress.decoder import Decoder
from compress.result import Run

Statistic = Callable[[Tensor], Tensor]
"""From the activations of one row, (T, X), to what is averaged over rows."""


class _Enough(Exception):
    """Every chosen point has been seen; the rest of the forward pass is not needed."""


@torch.no_grad()
def mean_over_rows(
    decoder: Decoder, points: Sequence[nn.Module], statistic: Statistic, rows: Tensor, run: Run, what: str
) -> list[Tensor]:
    """Average a statistic of the inputs of some modules over calibration rows.

    Args:
        decoder: the model; run without cache, one row at a time.
        points: modules in order of execution; the pass stops after the last one.
        statistic: maps the input of a point for one row, (T, X), to a tensor; summed in float64.
        rows: tokens (N, T).
        run: progress and device.
        what: the name under which progress is told.

    Returns:
        One mean per point, float64.
    """
    sums: list[Tensor | float] = [0.0] * len(points)

    def watch(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Some architectures flatten (1, T, X) to (T, X) before their FFN.
            activations = args[0].reshape(-1, args[0].shape[-1])
            sums[place] = sums[place] + statistic(activations).double().cpu()
            if place == len(points) - 1:
                raise _Enough

        return hook

    hooks = [point.register_forward_pre_hook(watch(place)) for place, point in enumerate(points)]
    try:
        for done, row in enumerate(rows):
            with suppress(_Enough):
                decoder.model(input_ids=row[None].to(run.device), use_cache=False)
            run.progress(what, done + 1, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.as_tensor(total) / len(rows) for total in sums]


@torch.no_grad()
def block_similarity(decoder: Decoder, rows: Tensor, run: Run, *, last_token_only: bool) -> list[float]:
    """Cosine between what enters a block and what leaves it, averaged over tokens, then over rows.

    Args:
        decoder: the model.
        rows: tokens (N, T).
        run: progress and device.
        last_token_only: look at the last token of each row only.

    Returns:
        One similarity per block, in [-1, 1].
    """
    sums = [0.0] * len(decoder)

    def watch(place: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = args[0][0].float(), output[0].float()
            if last_token_only:
                before, after = before[-1:], after[-1:]
            sums[place] += torch.nn.functional.cosine_similarity(before, after, dim=-1).double().mean().item()

        return hook

    hooks = [block.module.register_forward_hook(watch(block.index)) for block in decoder]
    try:
        for done, row in enumerate(rows):
            decoder.model(input_ids=row[None].to(run.device), use_cache=False)
            run.progress("block influence", done + 1, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    return [total / len(rows) for total in sums]


@torch.no_grad()
def block_inputs(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """What enters each block for one batch of tokens.

    Args:
        decoder: the model.
        tokens: (B, T), on the model's device.

    Returns:
        One tensor (B, T, D) per block.
    """
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        if len(seen) == len(decoder):
            raise _Enough

    hooks = [block.module.register_forward_pre_hook(hook) for block in decoder]
    try:
        with suppress(_Enough):
            decoder.model(input_ids=tokens, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return seen
