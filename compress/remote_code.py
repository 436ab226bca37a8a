"""Models whose blocks differ or share: the one module that such artifacts carry, and that foldaway loads them with.

A ragged model is a stock transformers model of which some blocks have lost their attention or their FFN, or have an FFN
of another width than their neighbours. In a shared one several blocks compute with one set of weights: each has norms,
a place and a KV cache of its own, but the matrices of another. This file turns the stock classes into such a model,
from data in ``config.json``:

* ``base_model_type``: the stock architecture, for example ``"llama"``;
* ``block_configs``: one entry per block,
  ``{"attention": {"no_op", "num_key_value_heads"}, "ffn": {"no_op", "intermediate_size"}, "shares_with"}``, and where a
  block keeps something of its own beside shared weights, ``"own_biases"`` and ``"adapter_rank"``;
* ``block_parts``: where a block of this architecture keeps its parts, as dotted paths.

It needs torch and transformers only, so that ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)``
works where foldaway is not installed.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "foldaway"
CODE = "foldaway_model.py"
"""The name that this module has in a saved folder."""
RAGGED_KEYS = ("base_model_type", "block_configs", "block_parts")


class NoAttention(nn.Module):
    """Stands where an attention was removed: adds nothing to the residual stream, and keeps no cache."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return a zero that broadcasts against (B, T, D), in the place of the attention's output."""
        return hidden_states.new_zeros((1,) * hidden_states.dim()), None


class NoFeedForward(nn.Module):
    """Stands where an FFN was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a zero that broadcasts against (B, T, D), in the place of the FFN's output."""
        return hidden_states.new_zeros((1,) * hidden_states.dim())


class _Adapted:
    """What a linear has that adds a low-rank product of its own to a weight that it may share with others.

    ``lora_right`` is (rank, in), ``lora_left`` (out, rank) and zero at first.
    """

    lora_left: nn.Parameter
    lora_right: nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the weight and the bias, and add the product."""
        low = nn.functional.linear(hidden_states, self.lora_right)
        output: torch.Tensor = super().forward(hidden_states)  # type: ignore[misc]
        return output + nn.functional.linear(low, self.lora_left)


class AdaptedLinear(_Adapted, nn.Linear):
    """A linear with an adapter."""


class AdaptedConv1D(_Adapted, Conv1D):
    """A transposed linear with an adapter."""


class _RaggedConfig:
    """What a ragged config adds to the stock config of its architecture."""

    base_model_type: str
    block_configs: list[dict[str, Any]]
    block_parts: dict[str, Any]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Describe the blocks that attend, which is what transformers builds its KV caches from.

        Every cache of transformers is made from ``config.get_text_config(decoder=True)``, one layer per entry of
        ``layer_types``; a block without attention must have none there, or sliding and full layers change places.
        """
        if not decoder:
            return self
        text = base_config(self)
        attending = [i for i, block in enumerate(self.block_configs) if not block["attention"]["no_op"]]
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = [text.layer_types[i] for i in attending]
        text.num_hidden_layers = len(attending)
        return text


@functools.cache
def ragged_config_class(stock: Any) -> Any:
    """Make the ragged twin of a stock config class; its ``model_type`` is ``"foldaway"``."""
    return type("FoldawayConfig", (_RaggedConfig, stock), {"model_type": MODEL_TYPE, "__module__": __name__})


def base_config(config: Any) -> Any:
    """Return the stock config behind a ragged one (a copy), or a stock config as it is."""
    if not isinstance(config, _RaggedConfig):
        return config
    stock = copy.deepcopy(config)
    stock.__class__ = _stock(type(config), _RaggedConfig)
    _forget(stock)
    return stock


def _forget(config: Any) -> None:
    """Drop what only a ragged config says; one that was loaded has even its model_type as an attribute of its own."""
    for key in (*RAGGED_KEYS, "auto_map", "model_type"):
        config.__dict__.pop(key, None)


def _stock(cls: type, ragged: type) -> type:
    """The stock class under a ragged one."""
    return next(base for base in cls.__mro__ if not issubclass(base, ragged))


class _RaggedModel:
    """Builds the stock skeleton, then cuts it to ``config.block_configs``."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_blocks(config.block_configs)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        fold_skeleton(self, config)
        remember_ties(self)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Name what is the same tensor, for transformers to tie after loading: the stock ties and ours."""
        stock: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]
        return {**stock, **shared_names(self)}

    def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
        """Pad the bias of a tied head, as transformers does; it would cut that of a transposed linear."""
        if not isinstance(output_embeddings, Conv1D):
            super()._adjust_bias(output_embeddings, input_embeddings)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as any model of transformers, each distinct tensor once, and let the folder carry this module."""
        state = kwargs.pop("state_dict", None) or self.state_dict()  # type: ignore[attr-defined]
        shared = shared_names(self)
        kwargs["state_dict"] = {name: tensor for name, tensor in state.items() if name not in shared}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        carry_code(Path(save_directory))


def carry_code(folder: Path) -> None:
    """Put this module beside a saved ragged model, and name it in its ``config.json``."""
    module = CODE.removesuffix(".py")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["FoldawayForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{module}.FoldawayConfig",
        "AutoModelForCausalLM": f"{module}.FoldawayForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CODE).write_bytes(Path(__file__).read_bytes())


@functools.cache
def ragged_model_class(stock: Any) -> Any:
    """Make the ragged twin of a stock causal LM class."""
    config_class = ragged_config_class(stock.config_class)
    # transformers looks into the class's module for what the architecture can do, so it stays the stock one.
    members = {"config_class": config_class, "__module__": stock.__module__, "_auto_class": None}
    return type(f"Ragged{stock.__name__}", (_RaggedModel, stock), members)


def make_ragged(model: Any, block_configs: list[dict[str, Any]], block_parts: dict[str, Any]) -> None:
    """Turn a live stock model, whose blocks were already cut, into its ragged twin: class and config, no weights."""
    if not isinstance(model, _RaggedModel):
        base_type = model.config.model_type
        stock_config: Any = type(model.config)
        stock_model: Any = type(model)
        model.config.__class__ = ragged_config_class(stock_config)
        model.__class__ = ragged_model_class(stock_model)
        model.config.base_model_type = base_type
    model.config.block_configs = block_configs
    model.config.block_parts = block_parts
    remember_ties(model)


def make_plain(model: Any) -> None:
    """Turn a ragged model, whose blocks have become alike, back into its stock class and config."""
    if isinstance(model, _RaggedModel):
        config = model.config
        config.__class__ = _stock(type(config), _RaggedConfig)
        model.__class__ = _stock(type(model), _RaggedModel)
        _forget(config)
        remember_ties(model)


def submodule(module: nn.Module, path: str) -> Any:
    """Follow a dotted path."""
    return functools.reduce(getattr, path.split("."), module)


def set_submodule(module: nn.Module, path: str, new: nn.Module) -> None:
    """Put ``new`` at a dotted path."""
    *parents, name = path.split(".")
    setattr(submodule(module, ".".join(parents)) if parents else module, name, new)


def linears(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The linears of a block, by their paths, in the order of its modules."""
    return ((path, each) for path, each in block.named_modules() if isinstance(each, (nn.Linear, Conv1D)))


def share_weights(block: nn.Module, owner: nn.Module, *, own_biases: bool = False) -> None:
    """Let a block compute with the weights of another; its norms stay its own, and its biases if they are to."""
    theirs = dict(linears(owner))
    for path, module in linears(block):
        module.weight = theirs[path].weight
        if not own_biases and module.bias is not None:
            module.bias = theirs[path].bias


def adapt(block: nn.Module, rank: int) -> None:
    """Give every linear of a block an adapter: ``lora_left`` is zero, ``lora_right`` is left empty."""
    for _, module in list(linears(block)):
        transposed = isinstance(module, Conv1D)
        weight = module.weight
        inputs, outputs = weight.shape if transposed else weight.shape[::-1]
        _become(module, AdaptedConv1D if transposed else AdaptedLinear)
        module.lora_left = nn.Parameter(weight.new_zeros((outputs, rank)), requires_grad=weight.requires_grad)
        module.lora_right = nn.Parameter(weight.new_empty((rank, inputs)), requires_grad=weight.requires_grad)


def merge_adapters(block: nn.Module) -> None:
    """Put the products of a block's adapters into its weights, which must be its own."""
    for _, module in linears(block):
        if hasattr(module, "lora_left"):
            module.weight = merged(module, module.lora_left, module.lora_right)
            del module.lora_left, module.lora_right
            _become(module, Conv1D if isinstance(module, Conv1D) else nn.Linear)


def merged(module: Any, left: torch.Tensor, right: torch.Tensor) -> nn.Parameter:
    """The weight of a linear with ``left @ right``, (out, rank) by (rank, in), added in fp32 or wider."""
    weight = module.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = left.to(wide) @ right.to(wide)
    value = weight.to(wide) + (product.T if isinstance(module, Conv1D) else product)
    return nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)


def _become(module: Any, cls: Any) -> None:
    """Give a live module another class."""
    module.__class__ = cls
    if hasattr(module, "_old_forward"):  # hooks of accelerate hold on to the method of the class that it had
        module._old_forward = cls.forward.__get__(module)


def adapter_rank(block: nn.Module) -> int:
    """The rank of a block's adapters; 0 where it has none."""
    return next((len(module.lora_right) for _, module in linears(block) if hasattr(module, "lora_right")), 0)


def shared_names(model: Any) -> dict[str, str]:
    """Names of parameters in blocks that share -> names, in the blocks that own them, of those that they are."""
    parts, configs = model.config.block_parts, model.config.block_configs
    names = {}
    for i, (block, shape) in enumerate(zip(submodule(model, parts["blocks"]), configs, strict=True)):
        if shape["shares_with"] is None:
            continue
        for path, module in linears(block):
            own = [] if shape.get("own_biases") or module.bias is None else ["bias"]
            for leaf in ("weight", *own):
                name = f"{path}.{leaf}"
                names[f"{parts['blocks']}.{i}.{name}"] = f"{parts['blocks']}.{shape['shares_with']}.{name}"
    return names


def remember_ties(model: Any) -> None:
    """Tell transformers which parameters of a model are one, after its blocks have changed."""
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def remove_attention(block: nn.Module, parts: dict[str, Any]) -> None:
    """Take the attention out of a block, with the norms that only it needs."""
    set_submodule(block, parts["attention"], NoAttention())
    for norm in parts["attention_norms"]:
        set_submodule(block, norm, nn.Identity())


def remove_ffn(block: nn.Module, parts: dict[str, Any]) -> None:
    """Take the FFN out of a block, with the norms that only it needs."""
    *first, last = parts["ffn"]
    for path in (*first, *parts["ffn_norms"]):
        set_submodule(block, path, nn.Identity())
    set_submodule(block, last, NoFeedForward())


def number_caches(blocks: nn.ModuleList, parts: dict[str, Any]) -> None:
    """Give each attention its rank among those that remain: its layer in the KV cache, of which layer 0 must exist."""
    rank = 0
    for block in blocks:
        attention = submodule(block, parts["attention"])
        if not isinstance(attention, NoAttention):
            attention.layer_idx = rank
            rank += 1


def check_blocks(configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse, before anything is built, what blocks cannot share.

    Raises:
        ValueError: a block shares with one that has no weights of its own, or others than it needs; or the rank of its
            adapters is none.
    """
    for i, shape in enumerate(configs):
        owner, rank = shape["shares_with"], shape.get("adapter_rank", 0)
        if owner is not None:
            earlier = type(owner) is int and 0 <= owner < i
            alike = earlier and all(shape[part] == configs[owner][part] for part in ("attention", "ffn"))
            if not alike or configs[owner]["shares_with"] is not None:
                raise ValueError(f"block {i} cannot share with block {owner}, only with an earlier one of its shape")
        if type(rank) is not int or rank < 0:
            raise ValueError(f"block {i} cannot have adapters of rank {rank!r}, which is no whole number from 0 up")


def fold_skeleton(model: Any, config: Any) -> None:
    """Cut a freshly built stock skeleton to ``config.block_configs``, and tie what is shared; weights are not kept."""
    parts = config.block_parts
    blocks = submodule(model, parts["blocks"])
    for block, shape in zip(blocks, config.block_configs, strict=True):
        if shape["attention"]["no_op"]:
            remove_attention(block, parts)
        if shape["ffn"]["no_op"]:
            remove_ffn(block, parts)
            continue
        width = shape["ffn"]["intermediate_size"]
        for path in parts["ffn_in"]:
            _resize(block, path, outputs=width * parts["ffn_in_fused"])
        _resize(block, parts["ffn_out"], inputs=width)
    for i, shape in enumerate(config.block_configs):
        _attach(blocks, i, shape)
    number_caches(blocks, parts)


def _attach(blocks: Any, i: int, shape: Mapping[str, Any]) -> None:
    """Give a block its adapters and the weights that it shares."""
    owner = shape["shares_with"]
    if owner is not None:
        share_weights(blocks[i], blocks[owner], own_biases=bool(shape.get("own_biases")))
    if rank := shape.get("adapter_rank"):
        adapt(blocks[i], rank)


def _resize(block: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """Replace a linear by an empty one of another size, when it has another size."""
    old = submodule(block, path)
    transposed = isinstance(old, Conv1D)
    old_inputs, old_outputs = old.weight.shape if transposed else old.weight.shape[::-1]
    inputs, outputs = inputs or old_inputs, outputs or old_outputs
    if (inputs, outputs) == (old_inputs, old_outputs):
        return
    with torch.device(old.weight.device):
        new: Any = type(old)(outputs, inputs) if transposed else nn.Linear(inputs, outputs, bias=old.bias is not None)
    set_submodule(block, path, new.to(old.weight.dtype))


class FoldawayConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The name under which ``AutoConfig`` finds a ragged config; the class it returns is the twin of a stock one."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the ragged twin of ``base_model_type``."""
        stock: Any = CONFIG_MAPPING[config_dict["base_model_type"]]
        return ragged_config_class(stock).from_dict(config_dict, **kwargs)


class FoldawayForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The name under which ``AutoModelForCausalLM`` finds a ragged model."""

    config_class = FoldawayConfig

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load the ragged twin of the stock model."""
        if not isinstance(config, _RaggedConfig):
            config = FoldawayConfig.from_pretrained(path)
        return model_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class(config)._from_config(config, **kwargs)


def model_class(config: Any) -> Any:
    """The ragged model class that belongs to a ragged config."""
    stock = type(base_config(config))
    return ragged_model_class(AutoModelForCausalLM._model_mapping[stock])
