"""Parameter counts. Every distinct tensor counts once, so tied embeddings are one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compress.decoder import Decoder


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        total: the whole model.
        blocks: all decoder blocks, norms included.
        attention: of each block's attention; 0 where it was removed.
        ffn: of each block's FFN.
    """

    total: int
    blocks: int
    attention: tuple[int, ...]
    ffn: tuple[int, ...]


def count(model: PreTrainedModel) -> Counts:
    """Count a live model."""
    decoder = Decoder(model)
    return Counts(
        total=_parameters([model]),
        blocks=_parameters(decoder.block_list),
        attention=tuple(_parameters([block.attention] if block.attention else []) for block in decoder),
        ffn=tuple(_parameters(block.ffn_modules) for block in decoder),
    )


def _parameters(modules: Iterable[nn.Module]) -> int:
    distinct = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(distinct.values())


def sparsity(dense: Counts, now: Counts) -> dict[str, float]:
    """The share of parameters gone: of the blocks (what methods target) and of the whole model."""
    return {"blocks": 1 - now.blocks / dense.blocks, "model": 1 - now.total / dense.total}
