"""A live model seen through its architecture record: blocks, attentions, FFN projections.

Hides the real differences between architectures: transposed weights (Conv1D), matrices fused into one, and parts that
were removed. All edits replace Parameters and never write to their data, so that a clone can share every tensor
that is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.arch import Architecture, architecture_of, text_config_of
from compress.remote_code import NoAttention, NoFeedForward, remove_attention, remove_ffn, submodule


@dataclass(frozen=True)
class Projection:
    """A linear of a block.

    Attributes:
        module: ``nn.Linear`` (weight (out, in)) or ``Conv1D`` (weight (in, out)).
        fused: how many matrices of equal height lie stacked along the outputs.
    """

    module: nn.Module
    fused: int = 1

    @property
    def _output_dim(self) -> int:
        return 1 if isinstance(self.module, Conv1D) else 0

    @property
    def inputs(self) -> int:
        """Number of input features."""
        return int(self._weight.shape[1 - self._output_dim])

    @property
    def outputs(self) -> int:
        """Number of output features of each fused matrix."""
        return int(self._weight.shape[self._output_dim]) // self.fused

    @property
    def _weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (outputs, inputs), whichever way it is stored."""
        return self._weight if self._output_dim == 0 else self._weight.T

    def keep_outputs(self, index: torch.Tensor) -> None:
        """Keep the outputs at ``index`` (K,), in each fused matrix; the bias follows."""
        index = index.to(self._weight.device)
        rows = torch.cat([index + part * self.outputs for part in range(self.fused)])
        self._replace("weight", self._weight.index_select(self._output_dim, rows))
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            self._replace("bias", bias.index_select(0, rows))
        self._tell_shape()

    def keep_inputs(self, index: torch.Tensor) -> None:
        """Keep the inputs at ``index`` (K,); the bias stays."""
        self._replace("weight", self._weight.index_select(1 - self._output_dim, index.to(self._weight.device)))
        self._tell_shape()

    def change_outputs(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Let a function of the outputs, weight (outputs, inputs) and bias (outputs,) alike, give new ones."""
        value = change(self.matrix)
        self._replace("weight", (value if self._output_dim == 0 else value.T).contiguous())
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            self._replace("bias", change(bias))

    def _replace(self, name: str, value: torch.Tensor) -> None:
        old = getattr(self.module, name)
        setattr(self.module, name, nn.Parameter(value.detach(), requires_grad=old.requires_grad))

    def _tell_shape(self) -> None:
        inputs, outputs = self.inputs, self.outputs * self.fused
        names = ("nx", "nf") if isinstance(self.module, Conv1D) else ("in_features", "out_features")
        for name, size in zip(names, (inputs, outputs), strict=True):
            setattr(self.module, name, size)


@dataclass(frozen=True)
class Block:
    """One decoder block: where it stands, its module, and its parts."""

    index: int
    module: nn.Module
    arch: Architecture

    @property
    def attention(self) -> nn.Module | None:
        """The attention module, or None when it was removed."""
        module = submodule(self.module, self.arch.attention)
        return None if isinstance(module, NoAttention) else module

    @property
    def attention_in(self) -> list[Projection]:
        """The linears that produce queries, keys and values; one, where the three lie stacked in it."""
        return [Projection(submodule(self.module, path)) for path in self.arch.attention_in]

    @property
    def attention_out(self) -> Projection:
        """The linear that consumes what the H query heads give, H x head_dim numbers."""
        return Projection(submodule(self.module, self.arch.attention_out))

    @property
    def has_ffn(self) -> bool:
        """Whether the FFN is there; where it was removed, ``ffn_in`` and ``ffn_out`` must not be asked for."""
        return not isinstance(self.ffn_modules[-1], NoFeedForward)

    @property
    def is_empty(self) -> bool:
        """Whether neither attention nor FFN is there, so that what enters also leaves."""
        return self.attention is None and not self.has_ffn

    @property
    def width(self) -> int:
        """F, the hidden neurons of the FFN; 0 where it was removed."""
        return self.ffn_out.inputs if self.has_ffn else 0

    @property
    def ffn_in(self) -> list[Projection]:
        """The linears that produce the F hidden neurons."""
        return [Projection(submodule(self.module, path), self.arch.ffn_in_fused) for path in self.arch.ffn_in]

    @property
    def ffn_out(self) -> Projection:
        """The linear that consumes the F hidden neurons."""
        return Projection(submodule(self.module, self.arch.ffn_out))

    @property
    def ffn_modules(self) -> list[nn.Module]:
        """The modules that make up the FFN."""
        return [submodule(self.module, path) for path in self.arch.ffn]

    def remove_attention(self) -> None:
        """Take the attention out, with the norms that only it needs."""
        remove_attention(self.module, self.arch.block_parts())

    def remove_ffn(self) -> None:
        """Take the FFN out, with the norms that only it needs."""
        remove_ffn(self.module, self.arch.block_parts())


class Decoder:
    """A causal LM, or the language tower of a vision-language model, seen as a list of blocks.

    Raises:
        UnsupportedArchitecture: the model's architecture has no record.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.arch = architecture_of(model.config)

    @property
    def config(self) -> Any:
        """The config that describes the blocks: the model's own, or its language tower's."""
        return text_config_of(self.model.config)

    @property
    def heads(self) -> int:
        """H, the query heads of each attention."""
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """K, the KV heads of each attention."""
        return int(getattr(self.config, self.arch.num_key_value_heads))

    @property
    def heads_are_alone(self) -> bool:
        """Whether every query head has keys and values of its own (H = K)."""
        return self.heads == self.kv_heads

    @property
    def head_dim(self) -> int:
        """How wide a head is."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    @property
    def block_list(self) -> nn.ModuleList:
        """The live ``ModuleList`` of blocks."""
        blocks = submodule(self.model, self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in order of execution."""
        return [Block(i, module, self.arch) for i, module in enumerate(self.block_list)]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.block_list)
