"""Where each Hugging Face architecture keeps its parts: one record per ``model_type``, data and no code.

A new architecture is one row here and its name in the parameter list of the tests. No other file asks which
architecture a model is. Paths of parts are dotted and start at the block, the others at the model.

A vision-language model is a composite: a second table says where its language tower lies, which is a text model of the
first table. Only that tower is ever cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UnsupportedArchitecture


@dataclass(frozen=True)
class LlamaBlock:
    """A block that is Llama's but for this.

    Attributes:
        qkv_bias: queries, keys and values have biases, and the output has none; else the config's ``attention_bias``
            speaks for all four.
        head_norms: queries and keys are normalised per head.
        head_dim_is_read: whether vLLM's own class takes the width of a head from the config, and not from the number
            of heads, which is wrong once heads have gone.
    """

    qkv_bias: bool = False
    head_norms: bool = False
    head_dim_is_read: bool = True


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers.

    Attributes:
        blocks: the ``ModuleList`` of decoder blocks, from the model.
        attention: the attention module, from the block.
        attention_in: linears that produce queries, keys and values; one path where the three lie stacked in it.
        attention_out: the linear that consumes what the heads give.
        attention_norms: norms that only the attention needs (before it, and after it where there is one).
        ffn_in: linears that produce the hidden neurons.
        ffn_in_fused: how many matrices lie stacked in each of ``ffn_in`` (2 for a fused gate|up).
        ffn_out: the linear that consumes the hidden neurons.
        ffn: modules that make up the FFN, in order of execution.
        ffn_norms: norms that only the FFN needs (before it, and after it where there is one).
        ffn_width: config key of the number of hidden neurons.
        num_key_value_heads: config key of the number of KV heads.
        per_block_keys: config keys that hold one entry per block.
        final_norm: the norm before the head, from the model.
        position_embeddings: learnt ones, from the model.
        norm_offset: what every norm over hidden channels adds to its weight before it multiplies with it.
        hidden_keys: config keys of the number of hidden channels.
        has_head_dim: whether the config may say how wide a head is; where not, it is hidden channels over heads.
        requires: config values without which this record is wrong.
        llama: how its block differs from Llama's; None where it is of another kind.
    """

    blocks: str = "model.layers"
    attention: str = "self_attn"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_in_fused: int = 1
    ffn_out: str = "mlp.down_proj"
    ffn: tuple[str, ...] = ("mlp",)
    ffn_norms: tuple[str, ...] = ("post_attention_layernorm",)
    ffn_width: str = "intermediate_size"
    num_key_value_heads: str = "num_key_value_heads"
    per_block_keys: tuple[str, ...] = ("layer_types",)
    final_norm: str = "model.norm"
    position_embeddings: tuple[str, ...] = ()
    norm_offset: float = 0.0
    hidden_keys: tuple[str, ...] = ("hidden_size",)
    has_head_dim: bool = True
    requires: Mapping[str, Any] = field(default_factory=dict)
    llama: LlamaBlock | None = None

    def block_parts(self) -> dict[str, Any]:
        """The part of this record that a ragged or shared artifact carries in its config (see remote_code)."""
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
    "llama": Architecture(llama=LlamaBlock()),
    "mistral": Architecture(llama=LlamaBlock()),
    "qwen2": Architecture(llama=LlamaBlock(qkv_bias=True, head_dim_is_read=False)),
    "qwen3": Architecture(llama=LlamaBlock(head_norms=True)),
    "gemma3_text": Architecture(
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
    ),
    "phi3": Architecture(attention_in=("self_attn.qkv_proj",), ffn_in=("mlp.gate_up_proj",), ffn_in_fused=2),
    "opt": Architecture(
        blocks="model.decoder.layers",
        attention_out="self_attn.out_proj",
        attention_norms=("self_attn_layer_norm",),
        ffn_in=("fc1",),
        ffn_out="fc2",
        ffn=("fc1", "fc2"),
        ffn_norms=("final_layer_norm",),
        ffn_width="ffn_dim",
        num_key_value_heads="num_attention_heads",
        final_norm="model.decoder.final_layer_norm",
        position_embeddings=("model.decoder.embed_positions",),
        hidden_keys=("hidden_size", "word_embed_proj_dim"),
        has_head_dim=False,
        requires={"do_layer_norm_before": True},
    ),
    "gpt2": Architecture(
        blocks="transformer.h",
        attention="attn",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        attention_norms=("ln_1",),
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        ffn_norms=("ln_2",),
        ffn_width="n_inner",
        num_key_value_heads="num_attention_heads",
        final_norm="transformer.ln_f",
        position_embeddings=("transformer.wpe",),
        has_head_dim=False,
        requires={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    # Language towers that come inside a composite only.
    "qwen2_vl_text": Architecture(has_head_dim=False),
    "qwen2_5_vl_text": Architecture(has_head_dim=False),
}


VLLM_BLOCKS = tuple(name for name, arch in ARCHITECTURES.items() if arch.llama)
"""Architectures that our plugin for vLLM builds from blocks that differ or share."""
LLAMA_BLOCKS = tuple(name for name, arch in ARCHITECTURES.items() if arch.llama and not arch.llama.head_norms)
"""Architectures whose blocks vLLM's own class for blocks that differ can say."""


@dataclass(frozen=True)
class Composite:
    """A vision-language model of transformers.

    Attributes:
        tower: the language tower, from the model: the body of a text model, without its head.
        text_config: config key of the tower's own config.
    """

    tower: str = "model.language_model"
    text_config: str = "text_config"


COMPOSITES: dict[str, Composite] = {
    "llava": Composite(),
    "qwen2_vl": Composite(),
    "qwen2_5_vl": Composite(),
    "idefics3": Composite(tower="model.text_model"),
    "smolvlm": Composite(tower="model.text_model"),
}

DEEPSTACK = (
    "its image features enter the first blocks by their index (deepstack), so that a block that goes would shift them"
)
NOT_SUPPORTED = {"qwen3_vl": DEEPSTACK, "qwen3_vl_moe": DEEPSTACK}
"""model_type -> why it has no record."""


def known_architectures() -> str:
    """The names of all models that can be compressed, for messages."""
    towers = {name for name in ARCHITECTURES if name.removesuffix("_text") in COMPOSITES}
    return ", ".join(sorted({*ARCHITECTURES, *COMPOSITES} - towers))


def composite_of(config: Any) -> Composite | None:
    """The record of a vision-language model's config; None for a text model's."""
    return COMPOSITES.get(config.model_type)


def text_config_of(config: Any) -> Any:
    """The config that describes the decoder blocks: a composite's text config, a text model's own."""
    composite = composite_of(config)
    return config if composite is None else getattr(config, composite.text_config)


def check_text_model(config: Any, what: str) -> None:
    """Refuse a composite where only text models are taken.

    Args:
        config: of the model.
        what: who takes no other, as the subject of a sentence.

    Raises:
        UnsupportedArchitecture: naming what is possible.
    """
    if composite_of(config) is not None:
        raise UnsupportedArchitecture(
            f"{what} takes text models only, and {config.model_type} is a vision-language model: compress it, measure "
            "it on text, or export it `--to hf`, and run it with transformers (AutoModelForImageTextToText)"
        )


def architecture_of(config: Any) -> Architecture:
    """Find the record of a config, stock or ragged; for a composite, that of its language tower, found from the model.

    Raises:
        UnsupportedArchitecture: no record, or a variant of the architecture that the record does not fit.
    """
    composite = composite_of(config)
    if composite is not None:
        text = architecture_of(text_config_of(config))

        def below(path: str) -> str:
            """Of the tower, which is the body that a path begins with in a text model."""
            return f"{composite.tower}.{path.partition('.')[2]}"

        positions = tuple(map(below, text.position_embeddings))
        return dataclasses.replace(
            text, blocks=below(text.blocks), final_norm=below(text.final_norm), position_embeddings=positions
        )
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type in NOT_SUPPORTED:
        raise UnsupportedArchitecture(f"architecture {model_type!r} is not supported: {NOT_SUPPORTED[model_type]}")
    if model_type not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"architecture {model_type!r} is not known; known are {known_architectures()}. "
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
