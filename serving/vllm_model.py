"""Ragged and shared models in vLLM, over its own layers: the class that `vllm_plugin` registers.

It is vLLM's Llama with another decoder layer. What that gives stays: tensor and pipeline parallelism, quantised
linears, LoRA, compilation. The layer differs in three ways:

* a block may have no attention, an FFN of its own width, or none; the first block too;
* blocks that share compute with the weights of the first of them in the same pipeline stage, which holds them once.
  Each has norms, biases if they are its own, and an `Attention` with a KV cache of its own;
* attention may normalise queries and keys (Qwen3).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.models.interfaces import HasNoOps
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index

from compress.arch import ARCHITECTURES

LINEAR = re.compile(
    r"(?P<before>.*\.layers\.)(?P<block>\d+)(?P<linear>\.\w+\.[qkvo]_proj|\.mlp\.\w+_proj)\.(?P<leaf>\w+)"
)
"""The name of a tensor of a linear."""


class NormedAttention(LlamaAttention):  # type: ignore[misc]
    """Attention that normalises each head of queries and keys before they are rotated."""

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config=config, **options)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend: (tokens, D) to (tokens, D)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output: torch.Tensor = self.o_proj(self.attn(q, k, v))[0]
        return output


class FoldedLayer(nn.Module):
    """One block.

    Args:
        vllm_config: of the engine.
        prefix: ends in the block's index.
        holders: set of weights, named by the block that has them in the checkpoint -> the layer that holds them in this
            pipeline stage; a layer that is the first of its set enters itself.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, holders: dict[int, FoldedLayer]) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.index = extract_layer_index(prefix)
        shape = config.block_configs[self.index]
        self.self_attn = self.mlp = None
        if not shape.attention.no_op:
            self.self_attn = _attention(config, shape, vllm_config, f"{prefix}.self_attn")
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not shape.ffn.no_op:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=shape.ffn.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=getattr(config, "mlp_bias", False),
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.own_biases = bool(shape.get("own_biases"))
        holder = holders.setdefault(self.index if shape.shares_with is None else shape.shares_with, self)
        if holder is not self:
            if self.own_biases and vllm_config.quant_config is not None:
                raise ValueError(
                    f"block {self.index} has biases of its own beside weights that it shares, which kernels for "
                    "quantised weights rearrange together: export it with --no-plugin"
                )
            _follow(self, holder)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Give (tokens, D), and the residual stream that it is still to be added to; None where nothing came before."""
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class FoldawayForCausalLM(LlamaForCausalLM, HasNoOps):  # type: ignore[misc]
    """A ragged or shared model of a Llama-like architecture."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self._holders: dict[int, FoldedLayer] = {}
        layer: Any = functools.partial(FoldedLayer, holders=self._holders)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Read a checkpoint, in which each set of weights has the name of one block."""
        loaded: set[str] = super().load_weights(self._placed(weights))
        return loaded

    def _placed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Rename, in a later pipeline stage, what is stored under a block of an earlier one."""
        for name, tensor in weights:
            found = LINEAR.fullmatch(name)
            holder = self._holders.get(int(found["block"])) if found else None
            if found and holder is not None and not (found["leaf"] == "bias" and holder.own_biases):
                yield f"{found['before']}{holder.index}{found['linear']}.{found['leaf']}", tensor
            else:
                yield name, tensor


class _Following(QuantizeMethodBase):  # type: ignore[misc]
    """The method of a linear without weights until another's are loaded, and packed or quantised; then it has those.

    Two linears that are one module would do as well, but for LoRA, which wraps each of them in an adapter of its own.
    """

    def __init__(self, holder: LinearBase) -> None:
        self._holder = holder

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        """There are none."""

    def apply(self, layer: nn.Module, *inputs: Any, **options: Any) -> torch.Tensor:
        """Not before the weights are loaded."""
        raise RuntimeError("a linear that shares its weights was asked before they were loaded")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Take over all that the holder has, whose turn was earlier, but for a bias of one's own."""
        own = {name: value for name, value in layer._parameters.items() if value is not None}
        theirs = self._holder
        for name, value in own.items():
            value.data = value.data.to(getattr(theirs, name).dtype)
        kept = {"prefix": layer.prefix, "_parameters": {**theirs._parameters, **own}}
        layer.__dict__.update({**theirs.__dict__, **kept})


def _follow(layer: FoldedLayer, holder: FoldedLayer) -> None:
    """Let the linears of a layer compute with the weights of another's."""
    theirs = dict(_linears(holder))
    for name, linear in _linears(layer):
        for parameter in list(linear._parameters):
            if not (parameter == "bias" and layer.own_biases):
                linear.register_parameter(parameter, None)
        linear.quant_method = _Following(theirs[name])


def _linears(layer: nn.Module) -> Iterator[tuple[str, LinearBase]]:
    """The linears of a layer, by their paths."""
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, LinearBase))


def _attention(config: Any, shape: Any, vllm_config: VllmConfig, prefix: str) -> LlamaAttention:
    kind = ARCHITECTURES[config.base_model_type].llama
    assert kind is not None  # FoldawayConfig takes no other
    attention = NormedAttention if kind.head_norms else LlamaAttention
    biases = getattr(config, "attention_bias", False)
    return attention(
        config=config,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=shape.attention.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        quant_config=vllm_config.quant_config,
        bias=kind.qkv_bias or biases,
        bias_o_proj=biases and not kind.qkv_bias,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )


def _normed(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add what is pending, and normalise; what comes first has nothing pending."""
    if residual is None:
        return norm(hidden_states), hidden_states
    hidden_states, residual = norm(hidden_states, residual)
    return hidden_states, residual
