"""Temporary edits of a model: inside a ``with``, a part is gone; after it, everything is as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compress.decoder import Block, Decoder
from compress.remote_code import set_submodule, submodule


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
