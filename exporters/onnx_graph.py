"""The graph of a decoder, made from a live model by the model builder of onnxruntime-genai (MIT).

The builder's classes are meant to be subclassed. Ours reads the live model, gives each block its own FFN width, leaves
out attentions that are gone, and numbers the caches densely: K attentions among L blocks are caches 0..K-1, and
``num_hidden_layers`` in genai_config.json is K, for that is what the runtimes count caches with.

Weights that blocks share are written, and quantised, once: what counts is that they are the same tensor in memory, not
that their values are equal. Each block that uses them has norms and a cache of its own, and its adapters, if it has
any, are products of their own in full precision.

Where we differ from what the builder's command line writes:

* matrices are quantised one by one while the graph is made (`nbits`), so that the graph is never held in fp32; the
  embedding is quantised as the LM head is, in int8 too, and tied ones are the same bytes, read as they are stored;
* fp16 for the CPU means weights stored in fp16 and computed in fp32, which is all that its kernels can; so are the
  scales of quantised ones, and tables of rotary positions in all exports but those to fp32;
* the head size of the caches is a number (transformers.js and onnxruntime-genai read it from the graph);
* layers with a sliding window keep a cache of full length (``windowed_kv_cache=false``): the builder's short caches
  need a runtime that evicts, which of the runtimes above only onnxruntime-genai does;
* a window is applied wherever the config has one, also for architectures whose config lists no ``layer_types``;
* Gemma's embedding scale is not rounded to two decimals, and RoPE scaling stays out of its local layers;
* a model with LongRoPE keeps its original context, where its short factors hold: the graph would choose between short
  and long ones by the length of each run, but the keys of earlier runs lie in the cache with the factors of theirs;
* nothing is stamped into the graph but the builder's version, so that the same model gives the same bytes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.decoder import Decoder
from compress.errors import ExportError, require
from compress.layout import Layout, layout_of
from compress.remote_code import base_config
from compress.result import Progress
from exporters import onnx_file
from exporters.base import ExportOptions
from exporters.nbits import join, quantise
from exporters.onnx_session import LOGITS_FROM

logger = logging.getLogger(__name__)

BUILDERS = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "QwenModel",
    "qwen3": "Qwen3Model",
    "gemma3_text": "Gemma3Model",
    "phi3": "Phi3MiniModel",
}
"""model_type -> class of the builder."""

LONG_ROPE_BUILDERS = {"phi3": "Phi3MiniLongRoPEModel"}
"""The same, for models whose RoPE switches between short and long factors."""

BITS = {"int4": 4, "int8": 8}
EMBEDDINGS_BY = "rtn"
"""How embedding and LM head are quantised: rows are looked up without zero points."""
HEAD = "/lm_head/MatMul"
"""Name of the node that makes logits."""
ROTARY = ("cos_cache", "sin_cache")
"""How the names of tables of rotary positions begin."""
EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding, and of the LM head's matrix where they are one."""


def rope_types(config: Any) -> list[str]:
    """The kinds of RoPE in a stock config; Gemma has one per kind of attention."""
    rope = config.rope_parameters
    return [each["rope_type"] for each in ([rope] if "rope_type" in rope else rope.values())]


def context_of(config: Any) -> int:
    """The context that an export gets: the model's, or with LongRoPE its original one."""
    context = int(config.max_position_embeddings)
    if "longrope" not in rope_types(config):
        return context
    return min(context, int(config.rope_parameters["original_max_position_embeddings"]))


def shorten(config: Any) -> None:
    """Give a stock config the context of the export. What LongRoPE derives from the old one is written out."""
    context = context_of(config)
    if "longrope" in rope_types(config):
        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        config.rope_parameters["attention_factor"] = factor
        config.rope_parameters["original_max_position_embeddings"] = context
        config.original_max_position_embeddings = context
    config.max_position_embeddings = context


def write_graph(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    options: ExportOptions,
    progress: Progress,
    *,
    weights: bool = True,
) -> None:
    """Write the graph, its data file and genai_config.json.

    Args:
        model: in fp32.
        tokenizer: whose special tokens the runtime's config names.
        folder: where, as ``options.graph`` says.
        options: complete ones.
        progress: told of blocks written.
        weights: False writes genai_config.json alone.

    Raises:
        ExportError: the builder cannot express the model, for example its RoPE.
    """
    builder = import_builder()
    with tempfile.TemporaryDirectory() as scratch, _undisturbed():
        source = Path(scratch) / "source"
        _write_source(model, tokenizer, source)
        computed = "fp16" if computes_in_half(options) else "fp32"
        extra = ["windowed_kv_cache=false", "hf_token=false", "fuse_qk_norm_gqa=false"]
        try:
            given = builder.parse_extra_options(None, str(source), str(folder), computed, options.ep, scratch, extra)
            config = builder_config(given["hf_details"]["hf_config"], layout_of(model))
            dtypes = builder.set_io_dtype(computed, options.ep, given), builder.set_onnx_dtype(computed, given)
            live = builder_class(builder, config)(model, options, progress, config, *dtypes, scratch, given)
            if weights:
                live.make_model(str(source))
                live.save_model(str(folder))
            live.make_genai_config(config, {}, str(folder))
        except (NotImplementedError, ValueError, ArithmeticError, AssertionError, KeyError) as error:
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ExportError(f"onnxruntime-genai's builder cannot express this model ({said})") from error


def computes_in_half(options: ExportOptions) -> bool:
    """Whether activations and caches are fp16: not on the CPU, which has no kernels for it."""
    return options.ep != "cpu" and options.dtype != "fp32"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the builder's habits from the process: it prints, and draws random weights only to replace them."""
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.debug("onnxruntime-genai's builder said:\n%s", chatter.getvalue())


def import_builder() -> ModuleType:
    """Import the builder, and take back what its import does to the process's logging.

    Raises:
        MissingExtra: onnxruntime-genai is not installed.
    """
    require("onnx_ir", "onnx")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return require("onnxruntime_genai.models.builder", "onnx")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _write_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what the builder reads beside the weights: config, generation config, tokenizer."""
    folder.mkdir()
    config = copy.deepcopy(base_config(model.config))
    config.architectures = [stock_class_name(config)]
    config.save_pretrained(folder)
    write_generation_config(model, folder)
    tokenizer.save_pretrained(folder)


def stock_class_name(config: Any) -> str:
    """The transformers class of a stock config's causal LM."""
    classes: Any = AutoModelForCausalLM._model_mapping
    return str(classes[type(config)].__name__)


def write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")


def builder_config(config: Any, layout: Layout) -> Any:
    """Put a stock config into the words that the builder reads.

    One entry of ``layer_types`` per block, of a kind that the builder does not know where there is no attention, so
    that it makes no cache there; one flat ``rope_parameters``; and the context of the export.
    """
    shorten(config)
    windowed = getattr(config, "sliding_window", None) is not None
    default = "sliding_attention" if windowed else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * len(layout.blocks)
    attending = set(layout.attention_blocks)
    config.layer_types = [kind if i in attending else "no_attention" for i, kind in enumerate(types)]
    rope = config.rope_parameters
    if "full_attention" in rope:
        config.rope_parameters = dict(rope["full_attention"])
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
    config.rope_parameters.setdefault("type", config.rope_parameters["rope_type"])
    if config.rope_parameters["rope_type"] == "longrope":
        factor = config.rope_parameters["attention_factor"]
        config.rope_parameters |= {"short_mscale": factor, "long_mscale": factor}
    return config


def builder_class(builder: ModuleType, config: Any) -> Any:
    """Our subclass of the builder's class for this architecture."""
    long_rope = config.rope_parameters["rope_type"] == "longrope"
    name = (LONG_ROPE_BUILDERS if long_rope else BUILDERS)[config.model_type]
    return type(f"Live{name}", (LiveModel, getattr(builder, name)), {"base_class": builder.Model})


class LiveModel:
    """What a live model, whose blocks may differ or share, changes in any class of the builder."""

    base_class: Any

    def __init__(
        self: Any,
        live: PreTrainedModel,
        options: ExportOptions,
        progress: Progress,
        config: Any,
        io_dtype: Any,
        onnx_dtype: Any,
        cache_folder: str,
        extra_options: dict[str, Any],
    ) -> None:
        self.live = live
        self.options = options
        self.progress = progress
        self.onnx_ir = require("onnx_ir", "onnx")
        self.live_blocks = Decoder(live).blocks
        head: Any = live.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.is_tied = live.get_input_embeddings().weight is head.weight
        self.written: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        self.packed: dict[tuple[int, ...], Any] = {}
        self.quantised: dict[tuple[object, ...], tuple[list[str], Sequence[Tensor]]] = {}
        super().__init__(config, io_dtype, onnx_dtype, options.ep, cache_folder, extra_options)  # type: ignore[call-arg]
        for shapes in (self.input_shapes, self.output_shapes):
            for name, shape in shapes.items():
                shapes[name] = [self.head_size if size == "kv_cache_dim" else size for size in shape]
        if config.model_type.startswith("gemma"):
            self.model_type = config.model_type
            self.embed_attrs["scale"] = self.hidden_size**0.5

    def load_weights(self: Any, input_path: str) -> PreTrainedModel:
        model: PreTrainedModel = self.live
        return model

    def make_cache_names(self: Any, valid_layer_types: list[str], input_format_name: str) -> dict[int, str]:
        """Number the caches by rank among the blocks that have one."""
        names = super().make_cache_names(valid_layer_types, input_format_name)  # type: ignore[misc]
        prefix, kind = input_format_name.rsplit(".", 1)
        return {block: f"{prefix}.{rank}.{kind}" for rank, block in enumerate(names)}

    def make_rope_init(self: Any, config: Any) -> None:
        """Let each class read the RoPE that it alone knows; some forget the kinds that the base class reads."""
        if config.rope_parameters["rope_type"] in ("llama3", "longrope"):
            super().make_rope_init(config)  # type: ignore[misc]
        else:
            self.base_class.make_rope_init(self, config)

    def make_rotary_embedding_caches_from_scratch(self: Any) -> tuple[Tensor, Tensor]:
        if "cos_cache_global" in self.values:  # now come Gemma's local layers
            self.rope_attrs["rescale_factors"] = 1
        caches: tuple[Tensor, Tensor] = super().make_rotary_embedding_caches_from_scratch()  # type: ignore[misc]
        return caches

    def is_layer(self: Any, module: nn.Module) -> bool:
        return any(module is block.module for block in self.live_blocks)

    def has_lm_head(self: Any, module: nn.Module) -> bool:
        return module is self.live.get_output_embeddings()

    def make_layer(self: Any, layer_id: int, layer: nn.Module) -> None:
        block = self.live_blocks[layer_id]
        self.intermediate_size = block.width
        if block.attention is None:
            self.make_ffn_layer(layer_id, layer)
        elif not block.has_ffn:
            self.make_attention_layer(layer_id, layer)
        else:
            super().make_layer(layer_id, layer)  # type: ignore[misc]
        self.progress("write graph", layer_id + 1, self.num_layers)

    def make_ffn_layer(self: Any, layer_id: int, layer: Any) -> None:
        """A block without attention: the norm before its FFN adds what the block before left in ``skip_input``."""
        state = self.layernorm_attrs
        before = "pre_feedforward" if hasattr(layer, "pre_feedforward_layernorm") else "post_attention"
        norm = getattr(layer, f"{before}_layernorm")
        self.make_layernorm(layer_id, norm, skip=not state["first_layernorm"], simple=state["simple"], location=before)
        self.make_mlp(layer_id, self.get_mlp_module(layer_id, layer), root_input=state["output_0"])
        if hasattr(layer, "post_feedforward_layernorm"):  # Gemma norms what the FFN gives, too
            self.make_norm_of_part(layer_id, layer.post_feedforward_layernorm, "post_feedforward")
        self.end_layer(layer_id)

    def make_attention_layer(self: Any, layer_id: int, layer: Any) -> None:
        """A block without FFN: the first norm of the next block adds what the attention leaves in ``skip_input``."""
        state = self.layernorm_attrs
        first = state["first_layernorm"]
        self.make_layernorm(layer_id, layer.input_layernorm, skip=not first, simple=state["simple"], location="input")
        self.make_attention(layer_id, self.get_attn_module(layer_id, layer), root_input=state["output_0"])
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma norms what the attention gives, too
            self.make_norm_of_part(layer_id, layer.post_attention_layernorm, "post_attention")
        self.end_layer(layer_id)

    def make_norm_of_part(self: Any, layer_id: int, norm: nn.Module, location: str) -> None:
        """Norm what an attention or an FFN gives, before it is added to the residual stream."""
        state = self.layernorm_attrs
        residual, state["root_input"] = state["root_input"], state["skip_input"]
        self.make_layernorm(layer_id, norm, skip=False, simple=state["simple"], location=location)
        state["root_input"], state["skip_input"] = residual, state["output_0"]

    def end_layer(self: Any, layer_id: int) -> None:
        """What the builder's own ``make_layer`` notes at its end."""
        self.layernorm_attrs["first_layernorm"] = False
        self.layernorm_attrs["last_layernorm"] = layer_id == self.num_layers - 1

    def get_attn_module(self: Any, layer_id: int, layer: Any) -> nn.Module:
        return _view(layer.self_attn)

    def get_mlp_module(self: Any, layer_id: int, layer: Any) -> nn.Module:
        return _view(layer.mlp)

    def make_initializer(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
        """Write a tensor once: when it comes again, its name there stands for what was written.

        The tensor is held, so that no other one can come to lie where it lies.
        """
        if isinstance(tensor, Tensor):
            first, _ = self.written.setdefault(_place(tensor), (name, tensor))
            if first != name:
                self.values[name] = self.values[first]
                return
            is_matrix = tensor.dim() == 2 and name.endswith(".weight")
            if (is_matrix and self.stores_half) or (name.startswith(ROTARY) and self.casts_half):
                self.make_half(tensor, f"{name}_fp16", name)
                return
        super().make_initializer(tensor, name, **options)  # type: ignore[misc]

    @property
    def casts_half(self: Any) -> bool:
        """Whether what is stored in fp16 is computed in fp32, into which runtimes cast it while loading."""
        return bool(self.options.dtype != "fp32" and self.io_dtype == self.onnx_ir.DataType.FLOAT)

    @property
    def stores_half(self: Any) -> bool:
        """The same, of matrices."""
        return bool(self.options.dtype == "fp16" and self.casts_half)

    def make_half(self: Any, tensor: Any, stored: str, name: str) -> None:
        """Store numbers in fp16 under one name; the other is what they are cast to."""
        super().make_initializer(tensor, stored, to=self.onnx_ir.DataType.FLOAT16)  # type: ignore[misc]
        self.make_cast_of(stored, name, tensor.shape)

    def make_cast_of(self: Any, stored: str, name: str, shape: Any) -> None:
        """Cast what is stored in fp16, once."""
        self.make_node("Cast", [stored], [name], name=f"/{name}/Cast", to=self.onnx_ir.DataType.FLOAT)
        self.make_value(name, self.onnx_ir.DataType.FLOAT, shape)

    def make_packed_matmul_float_class(self: Any, *matmuls: Any, **kwargs: Any) -> Any:
        """q|k|v as one matrix; of the same three it is the same one. Quantised ones are joined when they are."""
        if self.options.dtype in BITS:
            return SimpleNamespace(parts=[each.weight for each in matmuls])
        key = tuple(each.weight.data_ptr() for each in matmuls)
        if key not in self.packed:
            self.packed[key] = super().make_packed_matmul_float_class(*matmuls, **kwargs)  # type: ignore[misc]
        return self.packed[key]

    def make_packed_add_tensor(self: Any, *biases: Tensor) -> Any:
        """The same, of biases."""
        key = tuple(each.data_ptr() for each in biases)
        if key not in self.packed:
            self.packed[key] = super().make_packed_add_tensor(*biases)  # type: ignore[misc]
        return self.packed[key]

    def make_matmul_float(self: Any, matmul: Any, name: str, root_input: str, **kwargs: Any) -> str:
        """A product, with a quantised matrix where one is wanted, or with the embedding's where the two are tied."""
        if "/lora_" in name:
            return str(super().make_matmul_float(matmul, name, root_input, **kwargs))  # type: ignore[misc]
        weight = f"{name[1:].replace('/', '.')}.weight"
        is_head = name == HEAD
        bits = self.bits_of(name)
        if bits:
            parts = getattr(matmul, "parts", None) or [matmul.weight]
            algorithm = EMBEDDINGS_BY if is_head else self.options.algorithm
            width, inputs = sum(map(len, parts)), self.make_blocks(parts, weight, bits, algorithm)
            if self.casts_half:
                stored, inputs[1] = inputs[1], f"{inputs[1]}_fp32"
                self.make_cast_of(stored, inputs[1], self.values[stored].shape)
            settings = {"K": parts[0].shape[1], "N": width, "bits": bits, "block_size": self.options.block_size}
            if self.options.accuracy_level:
                settings["accuracy_level"] = self.options.accuracy_level
            made = ("MatMulNBits", inputs, settings)
        elif is_head and self.reads_table:
            width, made = len(matmul.weight), ("FusedMatMul", [EMBEDDING], {"transB": 1})
        else:
            return str(super().make_matmul_float(matmul, name, root_input, **kwargs))  # type: ignore[misc]
        operator, inputs, settings = made
        output = "logits" if kwargs.get("logits", False) else f"{name}/output_0"
        self.make_node(operator, [root_input, *inputs], [output], name=name, domain="com.microsoft", **settings)
        shape = self.make_hidden_state_shape(seq_dim=kwargs.get("seq_dim", "sequence_length"), last_dim=width)
        self.make_value(output, self.io_dtype, shape)
        return name

    def bits_of(self: Any, name: str) -> int | None:
        """Of the matrix that a node multiplies with; None: it is not quantised."""
        if name == HEAD:
            return BITS.get(self.options.embeddings)
        part = name.split("/")[-2].removesuffix("_proj")
        if ("qkv" if part in ("q", "k", "v") else part) in self.options.int8:
            return BITS["int8"]
        return BITS.get(self.options.dtype)

    def make_blocks(self: Any, parts: Sequence[Tensor], name: str, bits: int, algorithm: str) -> list[str]:
        """Quantise matrices and join their outputs, once. Returns the names of codes, scales and zero points."""
        key = (bits, *map(_place, parts))
        if key not in self.quantised:
            found = [quantise(part, bits, self.options.block_size, algorithm) for part in parts]
            blocks = join(found)
            names = [f"{name}_Q{bits}", f"{name}_scales", f"{name}_zero_points"]
            super().make_initializer(blocks.codes, names[0])  # type: ignore[misc]
            super().make_initializer(torch.from_numpy(blocks.scales), names[1])  # type: ignore[misc]
            if blocks.zero_points is None:
                names.pop()
            else:
                super().make_initializer(blocks.zero_points, names[2])  # type: ignore[misc]
            self.quantised[key] = names, parts
        return list(self.quantised[key][0])

    def make_lm_head(self: Any, lm_head: Any) -> None:
        """Logits from a chosen position on: ``logits_from``, 0 unless a caller gives another, -1 for the last alone.

        It is an initialiser that is an input too, which runtimes take for an input with a default.
        """
        if self.ep == "cpu":
            hidden = self.layernorm_attrs["output_0"]
            super().make_initializer(np.array([0], np.int64), LOGITS_FROM)  # type: ignore[misc]
            self.model.graph.inputs.append(self.values[LOGITS_FROM])
            ends = [LOGITS_FROM, _numbers(2**62), _numbers(1)]
            shape = self.make_hidden_state_shape(seq_dim="logits_length")
            self.make_slice("/lm_head/Slice", [hidden, *ends], self.io_dtype, shape)
            self.layernorm_attrs["output_0"] = "/lm_head/Slice/output_0"
            self.output_shapes["logits"][1] = "logits_length"
        super().make_lm_head(lm_head)  # type: ignore[misc]

    @property
    def reads_table(self: Any) -> bool:
        """Whether a tied LM head multiplies with the embedding as it is stored: other providers lack the operator."""
        return bool(self.is_tied and self.options.ep == "cpu" and self.options.embeddings not in BITS)

    def make_embedding_lookup(self: Any, embedding: Tensor, basename: str, lm_head: Any) -> str:
        """Rows of the embedding, which is stored as the LM head is."""
        bits = BITS.get(self.options.embeddings)
        if bits:
            return str(self.make_quantised_lookup(embedding, basename, bits))
        if not self.reads_table:
            return str(super().make_embedding_lookup(embedding, basename, lm_head))  # type: ignore[misc]
        self.make_initializer(embedding, EMBEDDING)
        stored, kind = EMBEDDING, self.io_dtype
        if self.stores_half:
            stored, kind = f"{EMBEDDING}_fp16", self.onnx_ir.DataType.FLOAT16
        shape = self.make_hidden_state_shape()
        self.make_gather(f"{basename}/Gather", [stored, self.input_names["input_ids"]], kind, shape, axis=0)
        if not self.stores_half:
            return f"{basename}/Gather/output_0"
        self.make_cast(f"{basename}/Cast_rows", f"{basename}/Gather/output_0", self.io_dtype, shape)
        return f"{basename}/Cast_rows/output_0"

    def make_quantised_lookup(self: Any, embedding: Tensor, basename: str, bits: int) -> str:
        """Rows of a quantised embedding, which may be the LM head's: in standard operators, on codes as they lie.

        GatherBlockQuantized would be one operator, but the runtime of transformers.js lacks it, and it wants codes of
        another shape: to reshape them in the graph costs a copy in memory.
        """
        size, kind = self.options.block_size, self.io_dtype
        codes, scales = self.make_blocks([embedding], EMBEDDING, bits, EMBEDDINGS_BY)
        count = -(-self.hidden_size // size)
        tokens = self.input_names["input_ids"]
        zero = f"/model/constants/{self.to_str_dtype(kind)}/{2.0 ** (bits - 1)}"
        bytes_each = size * bits // 8
        found = self.make_rows("Gather", f"{basename}/Gather", [codes, tokens], [count, bytes_each], axis=0)
        if bits == 4:
            found = self.make_unpacked(found, basename, count, bytes_each)
        found = self.make_rows("Cast", f"{basename}/Cast_codes", [found], [count, size], kind, to=kind)
        found = self.make_rows("Sub", f"{basename}/Sub", [found, zero], [count, size], kind)
        half = self.onnx_ir.DataType.FLOAT16
        scale = self.make_rows("Gather", f"{basename}/scales", [scales, tokens], [count], half, axis=0)
        if self.casts_half:
            scale = self.make_rows("Cast", f"{basename}/scales_fp32", [scale], [count], kind, to=kind)
        scale = self.make_rows("Unsqueeze", f"{basename}/scale", [scale, _numbers(-1)], [count, 1], kind)
        found = self.make_rows("Mul", f"{basename}/scaled", [found, scale], [count, size], kind)
        found = self.make_rows(
            "Reshape", f"{basename}/rows", [found, _numbers(0, 0, count * size)], [count * size], kind
        )
        if count * size > self.hidden_size:
            ends = [_numbers(0), _numbers(self.hidden_size), _numbers(-1)]
            found = self.make_rows("Slice", f"{basename}/Slice", [found, *ends], [self.hidden_size], kind)
        return str(found)

    def make_unpacked(self: Any, packed: str, basename: str, count: int, width: int) -> str:
        """Bytes (..., count, width) to the two codes in each, (..., count, 2 * width)."""
        pairs = []
        for part, operator, by, settings in (
            ("low", "BitwiseAnd", 15, {}),
            ("high", "BitShift", 4, {"direction": "RIGHT"}),
        ):
            inputs = [packed, f"/model/constants/UINT8/{by}"]
            half = self.make_rows(operator, f"{basename}/{part}", inputs, [count, width], **settings)
            pairs.append(self.make_rows("Unsqueeze", f"{basename}/{part}s", [half, _numbers(-1)], [count, width, 1]))
        both = self.make_rows("Concat", f"{basename}/pairs", pairs, [count, width, 2], axis=-1)
        inputs = [both, _numbers(0, 0, count, 2 * width)]
        return str(self.make_rows("Reshape", f"{basename}/unpacked", inputs, [count, 2 * width]))

    def make_rows(
        self: Any, operator: str, name: str, inputs: list[str], shape: list[int], kind: Any = None, **settings: Any
    ) -> str:
        """Something of `shape` for each token, bytes unless `kind` says otherwise. Returns the name of the output."""
        self.make_node(operator, inputs, [f"{name}/output_0"], name=name, **settings)
        kind = self.onnx_ir.DataType.UINT8 if kind is None else kind
        self.make_value(f"{name}/output_0", kind, ["batch_size", "sequence_length", *shape])
        return f"{name}/output_0"

    def make_matmul(self: Any, matmul: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        """A product, and beside it that of the adapter."""
        name: str = super().make_matmul(matmul, basename, root_input, **kwargs)  # type: ignore[misc]
        if not hasattr(matmul, "lora_left"):
            return name
        path = basename.rpartition("/")[0]
        return str(self.add_to(name, self.make_adapter(matmul, path, root_input), path, len(matmul.weight)))

    def make_packed_matmul(self: Any, q: Any, k: Any, v: Any, basename: str, root_input: str, **kwargs: Any) -> str:
        """The product of q|k|v, and beside it those of their adapters, which are not packed."""
        name: str = super().make_packed_matmul(q, k, v, basename, root_input, **kwargs)  # type: ignore[misc]
        if not hasattr(q, "lora_left"):
            return name
        path = basename.rpartition("/")[0]
        products = [
            self.make_adapter(each, f"{path}/{part}", root_input) for each, part in zip((q, k, v), "qkv", strict=True)
        ]
        width = sum(len(each.weight) for each in (q, k, v))
        self.make_concat(f"{path}/Concat", products, self.io_dtype, self.make_hidden_state_shape(last_dim=width), -1)
        return str(self.add_to(name, f"{path}/Concat/output_0", path, width))

    def make_adapter(self: Any, matmul: Any, path: str, root_input: str) -> str:
        """The product of an adapter, whose matrices are too small to be quantised. Returns the name of the output."""
        for part in ("lora_right", "lora_left"):
            name = f"{path}/{part}/MatMul"
            self.make_matmul_float(SimpleNamespace(weight=getattr(matmul, part)), name, root_input)
            root_input = f"{name}/output_0"
        return root_input

    def add_to(self: Any, name: str, product: str, path: str, width: int) -> str:
        """Add the product of an adapter to what node `name` gives. Returns the name of the node that does."""
        shape = self.make_hidden_state_shape(last_dim=width)
        self.make_add(f"{path}/lora/Add", [f"{name}/output_0", product], dtype=self.io_dtype, shape=shape)
        return f"{path}/lora/Add"

    def make_attention_unpacked_regular(
        self: Any, layer_id: int, attention: Any, qkv_linear: nn.Module, root_input: str, **kwargs: Any
    ) -> None:
        super().make_attention_unpacked_regular(layer_id, attention, qkv_linear, root_input, **kwargs)  # type: ignore[misc]
        _split_adapter(qkv_linear, attention.q_proj, attention.k_proj, attention.v_proj)

    def make_mlp_unpacked_regular(
        self: Any, layer_id: int, mlp: Any, gate_up_linear: nn.Module, root_input: str
    ) -> None:
        super().make_mlp_unpacked_regular(layer_id, mlp, gate_up_linear, root_input)  # type: ignore[misc]
        _split_adapter(gate_up_linear, mlp.gate_proj, mlp.up_proj)

    def save_model(self: Any, out_dir: str) -> None:
        """Save, without the builder's bar on stderr and without its guess at a git commit."""
        self.model.producer_version = self.get_genai_version()
        file = Path(out_dir) / self.options.graph
        file.parent.mkdir(exist_ok=True)
        onnx_file.save(self.model, file)

    def update_genai_config(self: Any, genai_config: dict[str, Any]) -> None:
        super().update_genai_config(genai_config)  # type: ignore[misc]
        decoder = genai_config["model"]["decoder"]
        decoder["num_hidden_layers"] = len(self.input_names["past_key_values.key"])
        decoder["filename"] = self.options.graph


def _numbers(*numbers: int) -> str:
    """Name of a constant: whole numbers in a row."""
    return f"/model/constants/INT64/{list(numbers)}"


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor lies in memory, and how."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _view(module: nn.Module) -> nn.Module:
    """A shallow copy: the builder splits fused matrices by adding submodules, which must not reach the live model."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _split_adapter(fused: Any, *parts: Any) -> None:
    """Give the parts of a fused linear their rows of its adapter, if it has one."""
    if hasattr(fused, "lora_left"):
        rows = fused.lora_left.split([len(part.weight) for part in parts])
        for part, left in zip(parts, rows, strict=True):
            part.lora_left, part.lora_right = left, fused.lora_right
