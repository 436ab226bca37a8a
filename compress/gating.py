"""Temporary edits of a model: inside a ``with``, a part is gone or changed; after it, everything is as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.decoder import Block, Decoder
from compress.lowrank import LowRank
from compress.remote_code import linears, set_submodule, share_weights, submodule


@contextmanager
def without_attention(block: Block) -> Iterator[None]:
    """Try a block without its attention: the residual stream passes unchanged to the FFN."""
    with _restored(block, [block.arch.attention, *block.arch.attention_norms]):
        block.remove_attention()
        yield


@contextmanager
def without_ffn(block: Block) -> Iterator[None]:
    """Try a block without its FFN: the residual stream passes unchanged to the next block."""
    with _restored(block, [*block.arch.ffn, *block.arch.ffn_norms]):
        block.remove_ffn()
        yield


@contextmanager
def _restored(block: Block, paths: list[str]) -> Iterator[None]:
    """Put the modules at some paths back, whatever took their places."""
    parts = [submodule(block.module, path) for path in paths]
    try:
        yield
    finally:
        for path, part in zip(paths, parts, strict=True):
            set_submodule(block.module, path, part)


class _Given(nn.Module):
    """Stands for the blocks whose outcome is already known."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden_states


@contextmanager
def starting_at(decoder: Decoder, index: int, hidden_states: Tensor) -> Iterator[None]:
    """Let the model's forward pass begin at block ``index`` with what is known to enter it, (B, T, D).

    Everything around the blocks (masks, position embeddings, final norm, head, soft caps) stays the model's own.
    """
    blocks = decoder.block_list
    replaced = [blocks[i] for i in range(index)]
    for i in range(index):
        blocks[i] = _Given(hidden_states)
    hook = None
    if index == 0:  # there is no block to stand in for: what the embeddings say is put aside
        hook = blocks[0].register_forward_pre_hook(lambda module, args: (hidden_states, *args[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for i, module in enumerate(replaced):
            blocks[i] = module


@contextmanager
def scaled(decoder: Decoder, gates: Tensor) -> Iterator[None]:
    """Scale what each block adds to the residual stream: h + g (Block(h) - h).

    A gate of 1 is the block and one of 0 its absence, both exactly; gradients flow to the gates.

    Args:
        decoder: the model.
        gates: (L,), in fp32 or wider.
    """

    def scale(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            gate = gates[place].to(output.device)
            return torch.lerp(args[0].to(gate.dtype), output.to(gate.dtype), gate).to(output.dtype)

        return hook

    with _hooked((module, scale(i)) for i, module in enumerate(decoder.block_list)):
        yield


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Let functions of what enters and leaves some modules take the place of what leaves them."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def sharing(blocks: Sequence[Block], owner: Block, *, own_biases: bool = False) -> Iterator[None]:
    """Let some blocks compute with the weights of another of their kind; each keeps its norms."""
    kept = [(module, module.weight, module.bias) for block in blocks for _, module in linears(block.module)]
    try:
        for block in blocks:
            share_weights(block.module, owner.module, own_biases=own_biases)
        yield
    finally:
        for module, weight, bias in kept:
            module.weight, module.bias = weight, bias


@contextmanager
def added(pairs: Mapping[nn.Module, LowRank]) -> Iterator[None]:
    """Add the product of a low-rank pair to what each linear computes; linears may have a pair in common."""

    def add(pair: LowRank) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs = args[0]
            low = nn.functional.linear(inputs, pair.right.to(inputs.dtype))
            return output + nn.functional.linear(low, pair.left.to(inputs.dtype))

        return hook

    with _hooked((module, add(pair)) for module, pair in pairs.items()):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch everything that only happens in training off, dropout above all."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class BlockForwards:
    """Counts how many blocks of the model run to their end, inside a ``with``. A block with nothing in it is none."""

    def __init__(self, decoder: Decoder) -> None:
        self.count = 0
        self._blocks = decoder.blocks
        self._hooks: list[Any] = []

    def _watch(self, block: Block) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.count += not block.is_empty

        return block.module.register_forward_hook(seen)

    def __enter__(self) -> BlockForwards:
        self._hooks = [self._watch(block) for block in self._blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
