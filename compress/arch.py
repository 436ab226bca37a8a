"""Where each Hugging Face architecture keeps its parts: one record per ``model_type``, data and no code.

A new architecture is one row here and its name in the parameter list of the tests. No other file asks which
architecture a model is. Paths of parts are dotted and start at the block, the others at the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Attributes:
        blocks: the ``ModuleList`` of decoder blocks, from the model.
        attention: the attention module, from the block.
        attention_norms: norms that only the attention needs (before it, and after it where there is one).
        ffn_in: linears that produce the hidden neurons.
        ffn_in_fused: how many matrices lie stacked in each of ``ffn_in`` (2 for a fused gate|up).
        ffn_out: the linear that consumes the hidden neurons.
        ffn: modules that make up the FFN, in order of execution.
        ffn_norms: norms that only the FFN needs (before it, and after it where there is one).
        ffn_width: config key of the number of hidden neurons.
        num_key_value_heads: config key of the number of KV heads.
        per_block_keys: config keys that hold one entry per block.
        requires: config values without which this record is wrong.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_in_fused: int = 1
    ffn_out: str = "mlp.down_proj"
    ffn: tuple[str, ...] = ("mlp",)
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_width: str = "intermediate_size"
    num_key_value_heads: str = "num_key_value_heads"
    per_block_keys: tuple[str, ...] = ("layer_types",)
    requires: Mapping[str, Any] = field(default_factory=dict)

    def block_parts(self) -> dict[str, Any]:
        """The part of this record that a ragged artifact carries in its config (see remote_code)."""
        return {
            "blocks": self.blocks,
            "attention": self.attention,
            "attention_norms": list(self.attention_norms),
            "ffn_in": list(self.ffn_in),
            "ffn_in_fused": self.ffn_in_fused,
            "ffn_out": self.ffn_out,
            "ffn": list(self.ffn),
            "ffn_norms": list(self.ffn_norms),
        }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma3_text": Architecture(
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    "phi3": Architecture(ffn_in=("mlp.gate_up_proj",), ffn_in_fused=2),
    "opt": Architecture(
        blocks="model.decoder.layers",
        attention_norms=("self_attn_layer_norm",),
        ffn_in=("fc1",),
        ffn_out="fc2",
        ffn=("fc1", "fc2"),
        ffn_norms=("final_layer_norm",),
        ffn_width="ffn_dim",
        num_key_value_heads="num_attention_heads",
        requires={"do_layer_norm_before": True},
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        attention="attn",
        attention_norms=("ln_1",),
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        ffn_norms=("ln_2",),
        ffn_width="n_inner",
        num_key_value_heads="num_attention_heads",
        requires={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
}


def architecture_of(config: Any) -> Architecture:
    """Find the record of a config, stock or ragged.

    Raises:
        UnsupportedArchitecture: no record, or a variant of the architecture that the record does not fit.
    """
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedArchitecture(
            f"architecture {model_type!r} is not known; known are {known}. "
            "To add one, write its record in compress/arch.py and its name in the tests"
        )
    arch = ARCHITECTURES[model_type]
    for key, wanted in arch.requires.items():
        found = getattr(config, key, wanted)
        if found != wanted:
            raise UnsupportedArchitecture(
                f"a {model_type} model with {key}={found} is not supported, only {key}={wanted}"
            )
    return arch
