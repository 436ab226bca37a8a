"""The shape that a model has now: read off the model, and written into configs and manifests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from compress.decoder import Block, Decoder


@dataclass(frozen=True)
class BlockLayout:
    """The shape of one block.

    Attributes:
        attention: False where the attention was removed.
        num_key_value_heads: KV heads of the attention; 0 without one.
        intermediate_size: hidden neurons of the FFN; 0 where it was removed.
    """

    attention: bool
    num_key_value_heads: int
    intermediate_size: int

    def entry(self) -> dict[str, Any]:
        """This block in the vocabulary of ``block_configs``."""
        return {
            "attention": {"no_op": not self.attention, "num_key_value_heads": self.num_key_value_heads or None},
            "ffn": {"no_op": not self.intermediate_size, "intermediate_size": self.intermediate_size or None},
            "shares_with": None,
        }


@dataclass(frozen=True)
class Layout:
    """The shapes of all decoder blocks, in order of execution; of a composite, those of its language tower."""

    blocks: tuple[BlockLayout, ...]

    @property
    def kind(self) -> Literal["plain", "ragged"]:
        """``"plain"`` when all blocks are alike and whole, so that a stock config can say it; else ``"ragged"``."""
        whole = self.blocks[0].attention and self.blocks[0].intermediate_size > 0
        return "plain" if whole and len(set(self.blocks)) == 1 else "ragged"

    @property
    def attention_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that attend; the rank in this list is the block's layer in the KV cache."""
        return tuple(i for i, block in enumerate(self.blocks) if block.attention)

    def block_configs(self) -> list[dict[str, Any]]:
        """One entry per block, in the field names of ModelOpt and vLLM's AnyModel proposal."""
        return [block.entry() for block in self.blocks]


def layout_of(model: PreTrainedModel) -> Layout:
    """Read the layout off a live model."""
    decoder = Decoder(model)
    heads = int(getattr(decoder.config, decoder.arch.num_key_value_heads))
    return Layout(tuple(_observe(block, heads) for block in decoder))


def _observe(block: Block, heads: int) -> BlockLayout:
    attends = block.attention is not None
    return BlockLayout(attends, heads if attends else 0, block.width)
