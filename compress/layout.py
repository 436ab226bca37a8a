"""The shape that a model has now: read off the model, and written into configs and manifests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from compress.decoder import Block, Decoder
from compress.remote_code import adapter_rank, linears


@dataclass(frozen=True)
class BlockLayout:
    """The shape of one block.

    Attributes:
        attention: False where the attention was removed.
        num_key_value_heads: KV heads of the attention; 0 without one.
        intermediate_size: hidden neurons of the FFN; 0 where it was removed.
        shares_with: the earlier block that has the same weights; None where they are its own.
        own_biases: whether a block that shares has biases of its own.
        adapter_rank: of what a block adds to its weights; 0: nothing.
    """

    attention: bool
    num_key_value_heads: int
    intermediate_size: int
    shares_with: int | None = None
    own_biases: bool = False
    adapter_rank: int = 0

    def entry(self) -> dict[str, Any]:
        """This block in the vocabulary of ``block_configs``."""
        own = {"own_biases": self.own_biases, "adapter_rank": self.adapter_rank}
        return {
            "attention": {"no_op": not self.attention, "num_key_value_heads": self.num_key_value_heads or None},
            "ffn": {"no_op": not self.intermediate_size, "intermediate_size": self.intermediate_size or None},
            "shares_with": self.shares_with,
            **{key: value for key, value in own.items() if value},
        }


@dataclass(frozen=True)
class Layout:
    """The shapes of all decoder blocks, in order of execution; of a composite, those of its language tower."""

    blocks: tuple[BlockLayout, ...]

    @property
    def kind(self) -> Literal["plain", "ragged", "shared"]:
        """What it takes to run the model.

        ``"plain"`` when all blocks are alike and whole, so that a stock config can say it; ``"shared"`` when several
        have one set of weights, whatever their shapes; else ``"ragged"``.
        """
        if any(block.shares_with is not None for block in self.blocks):
            return "shared"
        whole = self.blocks[0].attention and self.blocks[0].intermediate_size > 0
        return "plain" if whole and len(set(self.blocks)) == 1 else "ragged"

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that attend; the rank in this list is the block's layer in the KV cache."""
        return tuple(i for i, block in enumerate(self.blocks) if block.attention)

    @property
    def distinct(self) -> int:
        """How many blocks have weights of their own."""
        return sum(block.shares_with is None for block in self.blocks)

    def block_configs(self) -> list[dict[str, Any]]:
        """One entry per block, in the field names of ModelOpt and vLLM's AnyModel proposal."""
        return [block.entry() for block in self.blocks]


def layout_of(model: PreTrainedModel) -> Layout:
    """Read the layout off a live model."""
    decoder = Decoder(model)
    owners: dict[tuple[int, ...], Block] = {}
    return Layout(tuple(_observe(block, decoder.kv_heads, owners) for block in decoder))


def _observe(block: Block, heads: int, owners: dict[tuple[int, ...], Block]) -> BlockLayout:
    """One block; ``owners`` gathers the first block of each set of weights."""
    attends = block.attention is not None
    found = BlockLayout(attends, heads if attends else 0, block.width, adapter_rank=adapter_rank(block.module))
    weights = tuple(id(module.weight) for _, module in linears(block.module))
    owner = owners.setdefault(weights, block)
    if owner is block or not weights:
        return found
    biases = zip(_biases(block), _biases(owner), strict=True)
    return dataclasses.replace(found, shares_with=owner.index, own_biases=any(b is not o for b, o in biases))


def _biases(block: Block) -> list[Any]:
    return [module.bias for _, module in linears(block.module)]
