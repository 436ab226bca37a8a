"""Export to ONNX, for onnxruntime, onnxruntime-genai, optimum and transformers.js; any layout, fp32 and int4.

The graph is made by the model builder of onnxruntime-genai (MIT), whose classes are meant to be subclassed. Ours reads
the live model, gives each block its own FFN width, leaves out attentions that are gone, and numbers the caches densely:
K attentions among L blocks are caches 0..K-1, and ``num_hidden_layers`` in genai_config.json and config.json is K, for
that is what the runtimes count caches with. The true blocks are in export.json.

Weights that blocks share are written, and quantised, once: what counts is that they are the same tensor in memory, not
that their values are equal. Each block that uses them has norms and a cache of its own, and its adapters, if it has
any, are products of their own in fp32.

Where we differ from what the builder's command line writes:

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
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress.decoder import Decoder
from compress.errors import ConfigError, ExportError, LayoutNotSupported, require
from compress.evaluate import logits_of
from compress.files import new_folder
from compress.layout import Layout, layout_of
from compress.remote_code import base_config
from compress.result import Progress, no_progress
from compress.sources import Loaded
from exporters.base import Exported, ExportOptions, choose_dtype, exported, in_dtype, seal
from exporters.onnx_session import MODEL_FILE, OnnxSession
from exporters.parity import Parity, Side, check

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

ROPES = ("default", "linear", "llama3")
"""What the builder can say of RoPE for every architecture, as ``rope_type``; longrope for those above."""

TOLERANCE = 1e-3
FP32_MIN_AGREEMENT = 0.99
INT4_MIN_AGREEMENT = 0.1
"""Only to catch garbage: chance is one in V, and what quantisation costs is for a quality gate to judge. Random models
whose weights were made to shake agree at 25 %, trained ones at 70 to 90 %."""


def export(
    loaded: Loaded, path: Path, options: ExportOptions, check_tokens: Tensor, progress: Progress = no_progress
) -> Exported:
    """Write an ONNX export folder and check it.

    Args:
        loaded: a model of any layout; not changed.
        path: the folder to write; it appears whole, or not at all.
        options: dtype ``"fp32"`` (default) or ``"int4"``.
        check_tokens: int64 (B, T), tokens to compare source and export on.
        progress: told of blocks written and tokens checked.

    Raises:
        ConfigError: `path` is not empty, the dtype is not one of ONNX, or tokens that exceed the export's context.
        LayoutNotSupported: the builder has no words for the architecture, its RoPE or the shape of a block.
        ExportError: the builder refuses the model.
        ParityError: the export does not compute what its source does.
        MissingExtra: onnxruntime-genai is not installed.
    """
    dtype = choose_dtype("onnx", options, ("fp32", "int4"), default="fp32")
    check_options(options)
    check_layout(loaded.model)
    context = context_of(base_config(loaded.model.config))
    if check_tokens.shape[1] > context:
        raise ConfigError(
            f"the ONNX export keeps the model's original context of {context} tokens: it cannot be checked on "
            f"{check_tokens.shape[1]}"
        )
    source = in_dtype(loaded.model, torch.float32)
    with new_folder(path) as folder:
        write_graph(source, loaded.tokenizer, folder, dtype, options, progress)
        write_companions(source, loaded.tokenizer, folder)
        parity = check_parity(source, folder, dtype, check_tokens, progress)
        (folder / "README.md").write_text(_card(loaded, dtype, options, parity), encoding="utf-8")
        record = seal(folder, loaded, "onnx", dtype, options, parity)
    return exported(path, record)


def check_options(options: ExportOptions) -> None:
    """Raise ConfigError for an option that this format has no use for."""
    if options.expand:
        raise ConfigError("the onnx export stores shared weights once, and nothing is to be expanded: leave it out")


def check_layout(model: PreTrainedModel) -> None:
    """Refuse early what the builder cannot say. The weights are not looked at: the model may be on the meta device.

    Raises:
        LayoutNotSupported: naming what is in the way and what to do.
    """
    config = base_config(model.config)
    model_type = config.model_type
    if model_type not in BUILDERS:
        raise LayoutNotSupported(
            f"the ONNX export cannot take a {model_type} model: onnxruntime-genai's builder knows only "
            f"{', '.join(BUILDERS)} of our architectures; `--to hf` takes it"
        )
    possible = (*ROPES, "longrope") if model_type in LONG_ROPE_BUILDERS else ROPES
    for rope_type in _rope_types(config):
        if rope_type not in possible:
            raise LayoutNotSupported(
                f"the ONNX export cannot take RoPE of type {rope_type} in a {model_type} model, only "
                f"{', '.join(possible)}; `--to hf` takes it"
            )
    heads = {block.num_key_value_heads for block in layout_of(model).blocks if block.attention}
    if len(heads) != 1:
        raise LayoutNotSupported(
            f"the ONNX export needs the same number of KV heads in every attention, not {sorted(heads)}; "
            "`--to hf` takes such a model"
        )


def _rope_types(config: Any) -> list[str]:
    """The kinds of RoPE in a stock config; Gemma has one per kind of attention."""
    rope = config.rope_parameters
    return [each["rope_type"] for each in ([rope] if "rope_type" in rope else rope.values())]


def context_of(config: Any) -> int:
    """The context that an export gets: the model's, or with LongRoPE its original one."""
    context = int(config.max_position_embeddings)
    if "longrope" not in _rope_types(config):
        return context
    return min(context, int(config.rope_parameters["original_max_position_embeddings"]))


def _shorten(config: Any) -> None:
    """Give a stock config the context of the export. What LongRoPE derives from the old one is written out."""
    context = context_of(config)
    if "longrope" in _rope_types(config):
        _, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        config.rope_parameters["attention_factor"] = factor
        config.rope_parameters["original_max_position_embeddings"] = context
        config.original_max_position_embeddings = context
    config.max_position_embeddings = context


def check_parity(source: PreTrainedModel, folder: Path, dtype: str, tokens: Tensor, progress: Progress) -> Parity:
    """Compare a graph with its source.

    Raises:
        ParityError: they differ by more than their dtype explains.
    """
    session = OnnxSession(folder)
    exact = _session_in_full_precision(folder) if dtype == "int4" else None
    return check(
        logits_of(source),
        _side(session),
        tokens,
        tolerance=TOLERANCE,
        min_argmax_agreement=FP32_MIN_AGREEMENT if exact is None else INT4_MIN_AGREEMENT,
        full_precision=_side(exact) if exact else None,
        progress=progress,
    )


def _side(session: OnnxSession) -> Side:
    """All ways in which a graph is used; prompts are read in runs, as the server does."""
    return Side(session.logits, session.decode, lambda row: torch.from_numpy(session.prefill(row[None].numpy())[0]))


def _session_in_full_precision(folder: Path) -> OnnxSession:
    """The same graph over the same weights, told to compute its products in fp32."""
    import onnx

    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    file = folder / f"exact-{MODEL_FILE}"
    onnx.save(model, str(file))
    try:
        return OnnxSession(folder, graph=file.name)
    finally:
        file.unlink()


# --- The graph


def write_graph(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str,
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Write model.onnx, model.onnx.data and genai_config.json of a model in fp32.

    Raises:
        ExportError: the builder cannot express the model, for example its RoPE.
    """
    builder = import_builder()
    with tempfile.TemporaryDirectory() as scratch, _undisturbed():
        source = Path(scratch) / "source"
        _write_source(model, tokenizer, source)
        extra = [f"block_size={options.block_size}", f"accuracy_level={options.accuracy_level}"]
        extra += ["windowed_kv_cache=false", "hf_token=false"]
        try:
            prepared = builder.parse_extra_options(None, str(source), str(folder), dtype, "cpu", scratch, extra)
            config = builder_config(prepared["hf_details"]["hf_config"], layout_of(model))
            dtypes = builder.set_io_dtype(dtype, "cpu", prepared), builder.set_onnx_dtype(dtype, prepared)
            onnx_model = builder_class(builder, config)(model, progress, config, *dtypes, scratch, prepared)
            onnx_model.make_model(str(source))
            onnx_model.save_model(str(folder))
            onnx_model.make_genai_config(config, {}, str(folder))
        except (NotImplementedError, ValueError, ArithmeticError, AssertionError, KeyError) as error:
            said = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ExportError(f"onnxruntime-genai's builder cannot express this model ({said})") from error


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
    config.architectures = [_stock_class_name(config)]
    config.save_pretrained(folder)
    _write_generation_config(model, folder)
    tokenizer.save_pretrained(folder)


def _stock_class_name(config: Any) -> str:
    """The transformers class of a stock config's causal LM."""
    classes: Any = AutoModelForCausalLM._model_mapping
    return str(classes[type(config)].__name__)


def _write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    if model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")


def builder_config(config: Any, layout: Layout) -> Any:
    """Put a stock config into the words that the builder reads.

    One entry of ``layer_types`` per block, of a kind that the builder does not know where there is no attention, so
    that it makes no cache there; one flat ``rope_parameters``; and the context of the export.
    """
    _shorten(config)
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
    return type(f"Live{name}", (_LiveModel, getattr(builder, name)), {"base_class": builder.Model})


class _LiveModel:
    """What a live model, whose blocks may differ or share, changes in any class of the builder."""

    base_class: Any

    def __init__(
        self: Any,
        live: PreTrainedModel,
        progress: Progress,
        config: Any,
        io_dtype: Any,
        onnx_dtype: Any,
        cache_folder: str,
        extra_options: dict[str, Any],
    ) -> None:
        self.live = live
        self.progress = progress
        self.live_blocks = Decoder(live).blocks
        self.written: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        self.packed: dict[tuple[int, ...], Any] = {}
        super().__init__(config, io_dtype, onnx_dtype, "cpu", cache_folder, extra_options)  # type: ignore[call-arg]
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
        if "cos_cache_global" in self.model.graph.initializers:  # now come Gemma's local layers
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
            place = (tensor.data_ptr(), tensor.shape, tensor.stride())
            first, _ = self.written.setdefault(place, (name, tensor))
            if first != name:
                self.values[name] = self.values[first]
                return
        super().make_initializer(tensor, name, **options)  # type: ignore[misc]

    def make_packed_matmul_float_class(self: Any, *matmuls: Any, **kwargs: Any) -> Any:
        """q|k|v as one matrix; of the same three it is the same one."""
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

    def to_nbits(self: Any) -> Any:
        """Quantise each matrix where it is used first; its other uses follow."""
        first: dict[Any, Any] = {}
        followers: dict[str, str] = {}
        for node in self.model.graph:
            if node.op_type == "MatMul" and node.inputs[1].is_initializer():
                leader = first.setdefault(node.inputs[1], node)
                if leader is not node:
                    followers[node.name] = leader.outputs[0].name
                    self.exclude_node_from_quantization(node.name)
        model = super().to_nbits()  # type: ignore[misc]
        made = {value.name: node for node in model.graph for value in node.outputs}
        for node in model.graph:
            if node.name in followers:
                _follow(node, made[followers[node.name]])
        return model

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
            self.exclude_node_from_quantization(name)
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
        """Quantise and save, without the builder's bar on stderr and without its guess at a git commit."""
        import onnx_ir

        model = self.to_nbits() if self.onnx_dtype.name == "INT4" else self.model
        model.graph.sort()
        model.producer_version = self.get_genai_version()
        onnx_ir.save(model, Path(out_dir) / MODEL_FILE, external_data=f"{MODEL_FILE}.data", size_threshold_bytes=0)

    def update_genai_config(self: Any, genai_config: dict[str, Any]) -> None:
        super().update_genai_config(genai_config)  # type: ignore[misc]
        genai_config["model"]["decoder"]["num_hidden_layers"] = len(self.input_names["past_key_values.key"])


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


def _follow(node: Any, leader: Any) -> None:
    """Let a MatMul multiply as another does that had the same matrix, and drop that matrix when nobody reads it."""
    matrix = node.inputs[1]
    node.op_type, node.domain = leader.op_type, leader.domain
    node.attributes.update(leader.attributes)
    node.resize_inputs(len(leader.inputs))
    for i, value in enumerate(leader.inputs[1:], start=1):
        node.replace_input_with(i, value)
    if not matrix.uses():
        del matrix.graph.initializers[matrix.name]


# --- What lies beside the graph


def write_companions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer, as consumers of ONNX folders read them."""
    config = _attending_config(model)
    config.save_pretrained(folder)
    _write_generation_config(model, folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = config.max_position_embeddings
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _attending_config(model: PreTrainedModel) -> Any:
    """The stock config with one layer per cache in the graph."""
    config = copy.deepcopy(base_config(model.config))
    kept = layout_of(model).attention_blocks
    for key in Decoder(model).arch.per_block_keys:
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[i] for i in kept])
    _shorten(config)
    config.num_hidden_layers = len(kept)
    config.architectures = [_stock_class_name(config)]
    config.dtype = torch.float32
    return config


def _card(loaded: Loaded, dtype: str, options: ExportOptions, parity: Parity) -> str:
    """README.md of the export folder."""
    origin, layout = loaded.origin, layout_of(loaded.model)
    weights = f"int4 in blocks of {options.block_size}" if dtype == "int4" else "fp32"
    header = ["---", *([f"license: {origin.licence.lower()}"] if origin.licence else [])]
    header += [
        "library_name: onnxruntime-genai",
        "pipeline_tag: text-generation",
        "tags:",
        "- foldaway",
        "- onnx",
        "---",
    ]
    against = "the source" if parity.decode_against == "source" else "its own whole forward in fp32"
    made_from = f"`{Path(origin.name).name}`" + (f" (artifact {origin.artifact_id})" if origin.artifact_id else "")
    lines = [
        "",
        f"# {Path(origin.name).name}, ONNX {dtype}",
        "",
        f"Made by foldaway from {made_from}; weights in {weights}; licence of the weights: "
        f"{origin.licence or 'not stated by the source'}.",
        "",
        f"{len(layout.blocks)} blocks, of which {len(layout.attention_blocks)} attend. `num_hidden_layers` in "
        "config.json and genai_config.json counts the caches of the graph, one per attention; export.json describes "
        "every block.",
        *_about_sharing(layout),
        "",
        f"Compared with its PyTorch source on {parity.tokens} tokens: worst logit difference "
        f"{parity.max_abs_difference:.3g}, same preferred token at {parity.argmax_agreement:.1%} of them. Decoding "
        f"token by token with a cache, and reading prompts, against {against}: {parity.decode_max_abs_difference:.3g}.",
        *_about_context(loaded.model),
        "",
        "Run it with `foldaway serve`, onnxruntime-genai, optimum (`ORTModelForCausalLM`) or transformers.js.",
    ]
    return "\n".join([*header, *lines]) + "\n"


def _about_sharing(layout: Layout) -> list[str]:
    """What the card says where blocks share weights."""
    if layout.kind != "shared":
        return []
    return [
        "",
        f"{layout.distinct} sets of weights serve these {len(layout.blocks)} blocks; each is stored and held in memory "
        "once. All blocks are computed, and each has norms and a cache of its own.",
    ]


def _about_context(model: PreTrainedModel) -> list[str]:
    """What the card says where the export's context is not the model's."""
    config = base_config(model.config)
    context = context_of(config)
    if context == config.max_position_embeddings:
        return []
    return [
        "",
        f"The context is {context} tokens, the model's original one, not its {config.max_position_embeddings}: beyond "
        "it LongRoPE needs other factors for all keys, also for those that lie in the cache already.",
    ]
