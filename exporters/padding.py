"""Give a model another layout by putting zeros where it has nothing: it computes the same, and is larger.

For runtimes that can say less than a model is: a neuron whose weights are zero adds nothing, nor does an attention
whose output projection is.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.decoder import Decoder
from compress.layout import BlockLayout, Layout, layout_of
from compress.remote_code import base_config, model_class, ragged_config_class, remember_ties


def plain_layout(layout: Layout, kv_heads: int) -> Layout:
    """The smallest layout of equal blocks that holds all that a model has.

    Args:
        layout: without shared blocks.
        kv_heads: K of each attention.
    """
    width = max(block.intermediate_size for block in layout.blocks)
    return Layout((BlockLayout(True, kv_heads, width),) * len(layout.blocks))


def rounded_up(layout: Layout, divisor: int) -> Layout:
    """The layout with every FFN as wide as the next multiple of ``divisor``; an FFN that was removed stays away."""
    blocks = (
        dataclasses.replace(b, intermediate_size=-(-b.intermediate_size // divisor) * divisor) for b in layout.blocks
    )
    return Layout(tuple(blocks))


def padded(model: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """Copy a model into a larger layout; tensors that keep their shapes are those of the model.

    Args:
        model: of any layout, on any device; not changed.
        layout: of as many blocks; each has the parts of the model's, and an FFN at least as wide.
    """
    if layout == layout_of(model):
        return model
    larger = _skeleton(model, layout)
    parts = Decoder(model).arch.block_parts()
    fused = {f".{path}." for path in parts["ffn_in"]} if parts["ffn_in_fused"] > 1 else set()
    stored = dict(model.named_parameters(remove_duplicate=False))
    device = next(model.parameters()).device
    made: dict[int, nn.Parameter] = {}
    for name, empty in list(larger.named_parameters(remove_duplicate=False)):
        old = stored.get(name)
        if old is None:
            new = nn.Parameter(torch.zeros_like(empty, device=device), requires_grad=False)
        elif old.shape == empty.shape:
            new = old
        else:
            stacked = parts["ffn_in_fused"] if any(path in name for path in fused) else 1
            if id(old) not in made:
                made[id(old)] = _with_zeros(old, empty.shape, stacked)
            new = made[id(old)]
        _put(larger, name, new)
    for name, buffer in list(larger.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        larger.get_submodule(owner)._buffers[leaf] = model.get_buffer(name).to(buffer.dtype)
    remember_ties(larger)
    larger.generation_config = model.generation_config
    larger.train(False)
    return larger


def _skeleton(model: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """An empty model of a layout, on the meta device."""
    arch = Decoder(model).arch
    config: Any = copy.deepcopy(base_config(model.config))
    setattr(config, arch.ffn_width, max(block.intermediate_size for block in layout.blocks))
    config.dtype = model.dtype
    if layout.kind == "plain":
        build: Any = AutoModelForCausalLM.from_config
    else:
        config.base_model_type = config.model_type
        stock: Any = type(config)
        config.__class__ = ragged_config_class(stock)
        config.block_configs, config.block_parts = layout.block_configs(), arch.block_parts()
        build = model_class(config)._from_config
    with torch.device("meta"):
        empty: PreTrainedModel = build(config)
    return empty


def _with_zeros(old: nn.Parameter, shape: torch.Size, stacked: int) -> nn.Parameter:
    """A parameter with zeros behind what it has, along each dimension and in each of the stacked matrices."""
    new = old.new_zeros(shape)
    for source, target in zip(old.detach().chunk(stacked), new.chunk(stacked), strict=True):
        target[tuple(slice(size) for size in source.shape)] = source
    return nn.Parameter(new, requires_grad=False)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
