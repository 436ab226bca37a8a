"""Parameter counts, and splitting a target. Every distinct tensor counts once, so tied embeddings are one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress.decoder import Block, Decoder
from compress.errors import BudgetError
from compress.remote_code import linears, submodule


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


@dataclass(frozen=True)
class Costs:
    """What running a model costs, as far as its shape says. Sharing weights changes none of it, removing blocks does.

    Attributes:
        flops_per_token: two for each weight of a linear that a token passes, the head included, without the products
            of queries and keys, which grow with the context.
        kv_per_token: numbers that the KV cache keeps of each token.
    """

    flops_per_token: int
    kv_per_token: int


def costs(model: PreTrainedModel) -> Costs:
    """Count what is executed, block after block, whatever is shared."""
    decoder = Decoder(model)
    weights = [block_weights(block) for block in decoder]
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_head = 0 if head is None else head.weight.numel()
    attending = sum(block.attention is not None for block in decoder)
    return Costs(2 * (sum(weights) + of_head), 2 * attending * decoder.kv_heads * decoder.head_dim)


def block_weights(block: Block) -> int:
    """Weights of the linears that a token passes in a block, adapters included."""
    biases = {id(module.bias) for _, module in linears(block.module)}
    of_linears = (p for _, module in linears(block.module) for p in module.parameters())
    return sum(p.numel() for p in of_linears if id(p) not in biases)


def parameters_at(block: Block, paths: Iterable[str]) -> int:
    """Parameters of the modules at some paths of a block."""
    return _parameters(submodule(block.module, path) for path in paths)


def _parameters(modules: Iterable[nn.Module]) -> int:
    distinct = {id(p): p.numel() for module in modules for p in module.parameters()}
    return sum(distinct.values())


def neurons_to_keep(target: float, ffn: Sequence[int], widths: Sequence[int], unit: int = 1) -> tuple[int, ...]:
    """FFN widths that free ``target`` parameters, the same share of every FFN.

    Args:
        target: parameters to free over all blocks.
        ffn: parameters of each block's FFN; 0 where it was removed.
        widths: neurons of each block's FFN; 0 where it was removed.
        unit: widths become multiples of it.

    Raises:
        BudgetError: an FFN would keep no neuron.
    """
    present = [size for size in ffn if size]
    share = round(target / len(present)) * len(present) / sum(present) if present else 1.0
    kept = tuple(min(width, round(width * (1 - share) / unit) * unit) for width in widths)
    if not present or any(width and keep < 1 for width, keep in zip(widths, kept, strict=True)):
        raise BudgetError(f"the target needs {share:.0%} of every FFN, and none can go whole; lower the sparsity")
    return kept


def blocks_to_remove(share: float, blocks: int) -> int:
    """How many of so many blocks a share is, rounded up to whole blocks.

    Raises:
        BudgetError: it is all of them.
    """
    # The tolerance keeps 0.3 * 30 at 9 blocks, although the product is a hair above 9 in floating point.
    goes = math.ceil(share * blocks - 1e-9)
    if goes >= blocks:
        raise BudgetError(f"sparsity {share} would remove all {blocks} blocks; lower the sparsity")
    return goes


def change(dense: Counts, now: Counts, wanted: float) -> dict[str, Any]:
    """What every method reports of the sizes before and after."""
    return {
        "parameters_before": dense.total,
        "parameters_after": now.total,
        "sparsity_wanted": wanted,
        "sparsity_of_blocks": 1 - now.blocks / dense.blocks,
        "sparsity_of_model": 1 - now.total / dense.total,
    }
