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
    paths = [block.arch.attention, *block.arch.attention_norms]
    parts = [submodule(block.module, path) for path in paths]
    block.remove_attention()
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
    try:
        yield
    finally:
        for i, module in enumerate(replaced):
            blocks[i] = module


class BlockForwards:
    """Counts how many times a block of the model really runs, inside a ``with``."""

    def __init__(self, decoder: Decoder) -> None:
        self.count = 0
        self._modules = [block.module for block in decoder]
        self._hooks: list[Any] = []

    def _seen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.count += 1

    def __enter__(self) -> BlockForwards:
        self._hooks = [module.register_forward_hook(self._seen) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
