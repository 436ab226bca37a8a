"""The sizes of a model whose blocks are alike: four numbers, what they make of its parameters, and cutting to them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from compress import budget
from compress.arch import composite_of
from compress.decoder import Decoder
from compress.errors import UnsupportedArchitecture
from compress.layout import layout_of
from compress.surgery import (
    check_words,
    conform,
    drop_blocks,
    keep_neurons,
    settle,
    slice_channels,
    slice_heads,
    without_weights,
)


@dataclass(frozen=True, order=True)
class Shape:
    """The sizes that can be cut, under the names that transformers gives them.

    Attributes:
        num_hidden_layers: L, decoder blocks.
        hidden_size: D, channels of the residual stream.
        intermediate_size: F, neurons of each FFN.
        num_attention_heads: H, query heads of each attention.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int

    def __str__(self) -> str:
        return (
            f"{self.num_hidden_layers} blocks, {self.hidden_size} channels, {self.intermediate_size} neurons, "
            f"{self.num_attention_heads} heads"
        )


NAMES = tuple(field.name for field in dataclasses.fields(Shape))


def shape_of(model: PreTrainedModel) -> Shape:
    """Read the sizes off a model.

    Raises:
        UnsupportedArchitecture: its blocks differ or share weights.
    """
    layout, decoder = layout_of(model), Decoder(model)
    if layout.kind != "plain":
        raise UnsupportedArchitecture(
            f"the sizes of this model are not four numbers: its blocks {_WHY[layout.kind]}. Cut sizes first, and apply "
            "other methods to the result"
        )
    width = layout.blocks[0].intermediate_size
    return Shape(len(decoder), decoder.config.hidden_size, width, decoder.heads)


_WHY = {"ragged": "differ", "shared": "share weights"}


def heads_follow(decoder: Decoder) -> bool:
    """Whether the number of heads follows from that of hidden channels, because the config has no width of a head."""
    return not decoder.arch.has_head_dim


def has_words(decoder: Decoder, shape: Shape) -> bool:
    """Whether the architecture's config can say so many channels and heads."""
    if heads_follow(decoder) and shape.hidden_size != shape.num_attention_heads * decoder.head_dim:
        return False
    config = copy.deepcopy(decoder.config)
    for key in decoder.arch.hidden_keys:
        setattr(config, key, shape.hidden_size)
    config.num_attention_heads = shape.num_attention_heads
    if decoder.arch.has_head_dim:
        config.head_dim = decoder.head_dim
    try:
        config.validate()
    except (StrictDataclassError, ValueError):  # such as llama's, which wants a multiple of the heads
        return False
    return True


def first_heads(decoder: Decoder, count: int) -> torch.Tensor:
    """So many query heads, the first ones of each KV group."""
    if decoder.heads_are_alone:
        return torch.arange(count)
    group = torch.arange(decoder.heads).view(decoder.kv_heads, -1)
    return group[:, : count // decoder.kv_heads].flatten()


def resize(model: PreTrainedModel, shape: Shape) -> None:
    """Cut a model to a shape in place, keeping what comes first: for shapes alone.

    Raises:
        UnsupportedArchitecture: the architecture has no words for the shape.
    """
    _resize(model, shape)
    conform(model)
    check_words(model)


def _resize(model: PreTrainedModel, shape: Shape) -> None:
    now = shape_of(model)
    decoder = Decoder(model)
    drop_blocks(model, range(shape.num_hidden_layers, now.num_hidden_layers))
    blocks = range(shape.num_hidden_layers)
    keep_neurons(model, dict.fromkeys(blocks, torch.arange(shape.intermediate_size)))
    if shape.num_attention_heads != now.num_attention_heads:
        slice_heads(model, dict.fromkeys(blocks, first_heads(decoder, shape.num_attention_heads)))
    if shape.hidden_size != now.hidden_size:
        slice_channels(model, torch.arange(shape.hidden_size))
    settle(model)


class Counter:
    """Parameters of a model cut to any shape, by arithmetic alone.

    Every tensor is as large as a product of sizes, each of which occurs in it at most once, so the parameters of a
    block are a multilinear function of D, F and H: its values where each is whole or small give all others.

    Args:
        model: of a plain layout, on any device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.whole, decoder = shape_of(model), Decoder(model)
        small = without_weights(model)
        drop_blocks(small, range(1, self.whole.num_hidden_layers))
        self._alone = decoder.heads_are_alone
        self._kv_per_head = 2 * decoder.head_dim
        self._kv_heads = decoder.kv_heads
        heads = 1 if self._alone else decoder.kv_heads
        self._sizes = ((1, self.whole.hidden_size), (1, self.whole.intermediate_size), (heads, decoder.heads))
        self._corners: dict[tuple[int, ...], tuple[int, int]] = {}
        hidden = (self.whole.hidden_size,) if composite_of(model.config) else self._sizes[0]
        for corner in itertools.product(hidden, *self._sizes[1:]):
            cut = without_weights(small)
            _resize(cut, Shape(1, *corner))
            counts = budget.count(cut)
            self._corners[corner] = counts.blocks, counts.total - counts.blocks

    def parameters(self, shape: Shape) -> int:
        """Of the whole model."""
        return shape.num_hidden_layers * self._value(shape, 0) + self._value(shape, 1)

    def of_blocks(self, shape: Shape) -> int:
        """Of all decoder blocks."""
        return shape.num_hidden_layers * self._value(shape, 0)

    def kv_per_token(self, shape: Shape) -> int:
        """Numbers that the KV cache keeps of each token."""
        heads = shape.num_attention_heads if self._alone else self._kv_heads
        return shape.num_hidden_layers * heads * self._kv_per_head

    def _value(self, shape: Shape, which: int) -> int:
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads)
        spans = [high - low or 1 for low, high in self._sizes]
        total = 0
        for corner, counts in self._corners.items():
            weights = [
                (size - low if end == high else high - size) if high > low else 1
                for size, end, (low, high) in zip(sizes, corner, self._sizes, strict=True)
            ]
            total += math.prod(weights) * counts[which]
        return total // math.prod(spans)
