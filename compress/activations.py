"""Run calibration rows through a model once, and keep running statistics at chosen points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.gating import starting_at
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


def neuron_means(decoder: Decoder, statistic: Statistic, rows: Tensor, run: Run, what: str) -> dict[int, Tensor]:
    """Average a statistic of the hidden neurons (T, F) of every FFN over calibration rows; see `mean_over_rows`.

    Returns:
        Block index -> float64 mean; blocks without an FFN are left out.
    """
    blocks = [block for block in decoder if block.has_ffn]
    means = mean_over_rows(decoder, [block.ffn_out.module for block in blocks], statistic, rows, run, what)
    return {block.index: mean for block, mean in zip(blocks, means, strict=True)}


@torch.no_grad()
def block_similarity(
    decoder: Decoder, rows: TokenRows, run: Run, *, last_token_only: bool, size: int = 1
) -> list[float]:
    """Cosine between what enters a block and what leaves it, averaged over tokens, then over rows.

    Args:
        decoder: the model.
        rows: N calibration rows.
        run: progress and device.
        last_token_only: look at the last token of each row only.
        size: blocks a run.

    Returns:
        One similarity for each run of ``size`` consecutive blocks, by its first one, in [-1, 1].
    """
    pairs = [(b, b + size) for b in range(len(decoder) - size + 1)]
    return _similarity(decoder, rows, pairs, run, "block influence", last_token_only)


@torch.no_grad()
def window_similarity(decoder: Decoder, rows: TokenRows, size: int, run: Run, *, last_token_only: bool) -> list[float]:
    """Cosine between what leaves block l and what leaves block l + size, averaged as in `block_similarity`.

    Returns:
        One similarity for each l with l + size among the blocks, in [-1, 1].
    """
    pairs = [(b + 1, b + 1 + size) for b in range(len(decoder) - size)]
    return _similarity(decoder, rows, pairs, run, "similarity of windows", last_token_only)


def _similarity(
    decoder: Decoder, rows: TokenRows, pairs: Sequence[tuple[int, int]], run: Run, what: str, last_token_only: bool
) -> list[float]:
    """Mean cosine between two states of the residual stream; state b enters block b, state B leaves the last."""
    sums = [0.0] * len(pairs)
    count = len(rows.tokens)
    for row in range(count):
        states = block_states(decoder, rows.batch(slice(row, row + 1), run.device))
        chosen = [state[0, -1:] if last_token_only else state[0] for state in states]
        for place, (before, after) in enumerate(pairs):
            ours, theirs = chosen[before].float(), chosen[after].float()  # on two devices where the model is spread
            cosine = nn.functional.cosine_similarity(ours.to(theirs.device), theirs, dim=-1)
            sums[place] += cosine.double().mean().item()
        run.progress(what, row + 1, count)
    return [total / count for total in sums]


@torch.no_grad()
def block_states(decoder: Decoder, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What enters each block, and what leaves the last one: L + 1 tensors (B, T, D)."""
    with inputs_seen(decoder.block_list) as states:
        last = through(decoder, inputs, None, 0, len(decoder))
    return [*states, last]


@contextmanager
def inputs_seen(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Write down what enters some modules, one after the other, while forward passes run inside a ``with``."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def output_seen(module: nn.Module) -> Iterator[list[Tensor]]:
    """Write down what leaves a module while forward passes run inside a ``with``."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def block_inputs(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """What enters each block for one batch of tokens.

    Args:
        decoder: the model.
        tokens: (B, T), on the model's device.

    Returns:
        One tensor (B, T, D) per block.
    """
    with inputs_seen(decoder.block_list) as seen, stopping_before(decoder.blocks[-1].module):
        decoder.model(input_ids=tokens, use_cache=False)
    return seen


def through(
    decoder: Decoder,
    inputs: Mapping[str, Tensor],
    hidden: Tensor | None,
    start: int,
    stop: int,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """What leaves block ``stop - 1`` when some hidden states enter block ``start``.

    Masks and position embeddings are the model's own. Gradients flow where they are asked for.

    Args:
        decoder: the model.
        inputs: keyword inputs of the model's forward pass for B rows of T tokens.
        hidden: (B, T, D), what enters block ``start``; None: what the model itself lets in.
        start: the first block to run; without ``hidden`` all blocks below it run as well.
        stop: the block behind the last one to run, above ``start``.
        weights: values, by their names in the model, to compute with in place of its parameters.
    """
    given = nullcontext() if hidden is None else starting_at(decoder, start, hidden)
    with given, output_seen(decoder.block_list[stop - 1]) as outputs, _stopping_after(decoder.block_list[stop - 1]):
        functional_call(decoder.model, dict(weights or {}), (), {**inputs, "use_cache": False})
    return outputs[0]


def logits_from(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Logits (B, T, V) of what leaves the last block, (B, T, D), by the model's own final norm and head."""
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with starting_at(decoder, len(decoder), hidden):
        logits: Tensor = decoder.model(input_ids=tokens, use_cache=False).logits
    return logits


def stopping_before(module: nn.Module) -> AbstractContextManager[None]:
    """End a forward pass inside a ``with`` when it gets to a module; hooks of that module set before this one run."""
    return _stopping(module.register_forward_pre_hook)


def _stopping_after(module: nn.Module) -> AbstractContextManager[None]:
    """End a forward pass inside a ``with`` when a module is done; hooks of that module set before this one run."""
    return _stopping(module.register_forward_hook)


@contextmanager
def _stopping(register: Callable[..., RemovableHandle]) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise _Enough

    hook = register(stop)
    try:
        with suppress(_Enough):
            yield
    finally:
        hook.remove()
