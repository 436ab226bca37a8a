"""Export to ONNX, for onnxruntime, onnxruntime-genai, optimum and transformers.js; any layout, in four precisions.

`onnx_graph` makes the graph. Here are what a model must be like, the files that consumers read beside the graph, the
comparison with the source, and the card. ``num_hidden_layers`` in genai_config.json and config.json counts attentions,
for that is what the runtimes count caches with; the true blocks are in export.json.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.calibration import context_length_of, draw
from compress.decoder import Decoder
from compress.errors import ConfigError, ExportError, LayoutNotSupported
from compress.evaluate import logits_of
from compress.files import new_folder
from compress.layout import Layout, layout_of
from compress.remote_code import base_config
from compress.result import Progress, no_progress
from compress.sources import Loaded
from exporters.base import (
    QUANTISED,
    SUFFIXES,
    Exported,
    ExportOptions,
    ExportRecord,
    check_unused,
    choose_dtype,
    exported,
    in_dtype,
    seal,
)
from exporters.onnx_graph import (
    BUILDERS,
    LONG_ROPE_BUILDERS,
    computes_in_half,
    context_of,
    rope_types,
    shorten,
    stock_class_name,
    write_generation_config,
    write_graph,
)
from exporters.onnx_session import OnnxSession
from exporters.parity import Parity, Side, check
from exporters.smoothing import smooth

ROPES = ("default", "linear", "llama3")
"""What the builder can say of RoPE for every architecture, as ``rope_type``; longrope for those above."""

TOLERANCE = 1e-3
HALF_TOLERANCE = 1.0
"""Where activations are rounded to fp16: a wrong position is off by more."""

DECODED = 16
"""Tokens of a row that a quantised export decodes in full precision, for which 8-bit weights have no fast kernel."""

SMOOTHED_ROWS, SMOOTHED_TOKENS = 4, 512
"""Of the built-in text, on which activations are looked at for smoothing. No check uses this part of it."""

TRANSFORMERS_JS_DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}

MIN_AGREEMENT = {"fp32": 0.99, "fp16": 0.9, "int8": 0.8, "int4": 0.1}
MAX_KL = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.1, "int4": 2.0}
"""Only to catch garbage: what quantisation costs is for a quality gate to judge. Random models whose weights were made
to shake agree at 25 % in int4, trained ones at 70 to 95 %."""


def export(
    loaded: Loaded, path: Path, options: ExportOptions, check_tokens: Tensor, progress: Progress = no_progress
) -> Exported:
    """Write an ONNX export folder and check it.

    Args:
        loaded: a model of any layout; not changed.
        path: the folder to write; it appears whole, or not at all.
        options: how to store the weights.
        check_tokens: int64 (B, T), tokens to compare source and export on.
        progress: told of blocks written and tokens checked.

    Raises:
        ConfigError: `path` is not empty, an option that ONNX or its dtype has no use for, or tokens that exceed the
            export's context.
        LayoutNotSupported: the builder has no words for the architecture, its RoPE or the shape of a block.
        ExportError: the builder refuses the model, or the layout the tokenizer.
        ParityError: the export does not compute what its source does.
        MissingExtra: onnxruntime-genai is not installed.
    """
    options = complete(options)
    check_layout(loaded.model, options)
    check_tokenizer(loaded.tokenizer, options)
    context = context_of(base_config(loaded.model.config))
    if check_tokens.shape[1] > context:
        raise ConfigError(
            f"the ONNX export keeps the model's original context of {context} tokens: it cannot be checked on "
            f"{check_tokens.shape[1]}"
        )
    source = in_dtype(loaded.model, torch.float32)
    with new_folder(path) as folder:
        write_graph(_smoothed(source, loaded.tokenizer, options, progress), loaded.tokenizer, folder, options, progress)
        record = finish(folder, loaded, source, options, check_tokens, progress)
    return exported(path, record)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, options: ExportOptions) -> None:
    """Refuse a tokenizer that the runtime of a layout cannot read.

    Raises:
        ExportError: saying what to do.
    """
    if options.layout == "transformersjs" and not tokenizer.is_fast:
        raise ExportError(
            f"transformers.js reads tokenizers from tokenizer.json, and a {type(tokenizer).__name__} has none: convert "
            "it to a fast one first, or take --layout flat"
        )


def _smoothed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ExportOptions, progress: Progress
) -> PreTrainedModel:
    """The model whose weights are rounded: it computes the same as the one given, here in fp32."""
    if not options.smooth:
        return model
    length = min(SMOOTHED_TOKENS, context_length_of(model))
    rows = draw("builtin", tokenizer, rows=SMOOTHED_ROWS, length=length, model=model)
    return smooth(model, rows, options.smooth, progress)


def finish(
    folder: Path,
    loaded: Loaded,
    source: PreTrainedModel,
    options: ExportOptions,
    check_tokens: Tensor,
    progress: Progress,
) -> ExportRecord:
    """Write what lies beside a graph, check it, and seal the folder; `source` is the model in fp32.

    Raises:
        ParityError: the export does not compute what its source does.
    """
    write_companions(source, loaded.tokenizer, folder, options)
    parity = check_parity(source, folder, options, check_tokens, progress)
    (folder / "README.md").write_text(_card(loaded, options, parity), encoding="utf-8")
    return seal(folder, loaded, "onnx", options, parity)


def complete(options: ExportOptions) -> ExportOptions:
    """Put the choices of this format where nothing was asked.

    Raises:
        ConfigError: an option that this format or its dtype has no use for.
    """
    dtype = choose_dtype("onnx", options, tuple(SUFFIXES), default="fp32")
    if options.ep == "dml" and "int8" in (dtype, options.embeddings, *("int8" for _ in options.int8)):
        raise ConfigError("int8: onnxruntime's dml provider has no kernel for it; possible are fp32, fp16, int4")
    used = ["dtype", "ep", "layout", "max_kl"]
    choices: dict[str, Any] = {"dtype": dtype}
    if dtype in QUANTISED:
        choices |= {
            "block_size": 32,
            "algorithm": "rtn",
            "embeddings": "int4" if options.ep == "dml" else "int8",
            "accuracy_level": 4 if options.ep == "cpu" else 0,
            "smooth": 0.0,
        }
    if dtype == "int4":
        used.append("int8")
    choices["max_kl"] = MAX_KL[_coarsest(dtype, options)]
    check_unused(options, f"{dtype} onnx", (*used, *choices))
    given = {name: getattr(options, name) for name in choices}
    return dataclasses.replace(options, **{name: choices[name] for name, value in given.items() if value is None})


def check_layout(model: PreTrainedModel, options: ExportOptions | None = None) -> None:
    """Refuse early what the builder cannot say. The weights are not looked at: the model may be on the meta device.

    Args:
        model: of any layout.
        options: of the export; None are the default ones.

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
    for rope_type in rope_types(config):
        if rope_type not in possible:
            raise LayoutNotSupported(
                f"the ONNX export cannot take RoPE of type {rope_type} in a {model_type} model, only "
                f"{', '.join(possible)}; `--to hf` takes it"
            )
    blocks = layout_of(model).blocks
    whole = all(block.attention and block.intermediate_size for block in blocks)
    if model_type == "gemma3_text" and not whole and computes_in_half(options or ExportOptions()):
        raise LayoutNotSupported(
            "the ONNX export cannot compute a Gemma without some attentions or FFNs in fp16: take --ep cpu, or --dtype "
            "fp32"
        )
    heads = {block.num_key_value_heads for block in blocks if block.attention}
    if len(heads) != 1:
        raise LayoutNotSupported(
            f"the ONNX export needs the same number of KV heads in every attention, not {sorted(heads)}; "
            "`--to hf` takes such a model"
        )


def check_parity(
    source: PreTrainedModel, folder: Path, options: ExportOptions, tokens: Tensor, progress: Progress
) -> Parity:
    """Compare a graph with its source, on the CPU.

    Raises:
        ParityError: they differ by more than their dtype explains.
    """
    dtype = str(options.dtype)
    session = OnnxSession(folder, graph=options.graph, spin=False)
    exact = side = _side(session)
    if dtype in QUANTISED and (options.accuracy_level or 0) > 1:
        exact = _side(_session_in_full_precision(folder, options.graph))
    return check(
        logits_of(source),
        side,
        tokens,
        tolerance=TOLERANCE if session.kv_dtype == np.float32 else HALF_TOLERANCE,
        min_argmax_agreement=MIN_AGREEMENT[_coarsest(dtype, options)],
        max_kl=options.max_kl,
        full_precision=None if dtype == "fp32" else exact,
        decoded=DECODED if exact is not side else None,
        progress=progress,
    )


def _coarsest(dtype: str, options: ExportOptions) -> str:
    """Of the dtypes in an export, the one that its limits are taken from."""
    return "int4" if options.embeddings == "int4" else dtype


def _side(session: OnnxSession) -> Side:
    """All ways in which a graph is used; prompts are read in two runs, as the server reads long ones in several."""

    def read(row: Tensor) -> Tensor:
        logits, _ = session.prefill(row[None].numpy(), chunk=len(row) // 2 + 1)
        return torch.from_numpy(logits)

    return Side(session.logits, session.decode, read)


def _session_in_full_precision(folder: Path, graph: str) -> OnnxSession:
    """The same graph over the same weights, told to compute its products in fp32."""
    import onnx

    model = onnx.load(str(folder / graph), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    name = Path(graph)
    file = folder / name.with_name(f"exact-{name.name}")
    onnx.save(model, str(file))
    try:
        return OnnxSession(folder, graph=str(file.relative_to(folder)), spin=False)
    finally:
        file.unlink()


# --- What lies beside the graph


def write_companions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, options: ExportOptions
) -> None:
    """Write config.json, generation_config.json and the tokenizer, as consumers of ONNX folders read them."""
    config = _attending_config(model)
    config.save_pretrained(folder)
    _tell_transformers_js(folder / "config.json", options)
    write_generation_config(model, folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids
    settings["model_max_length"] = config.max_position_embeddings
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _attending_config(model: PreTrainedModel) -> Any:
    """The stock config with one layer per cache in the graph."""
    config = copy.deepcopy(base_config(model.config))
    kept = layout_of(model).attention_blocks
    for key in Decoder(model).arch.per_block_keys:
        if getattr(config, key, None) is not None:
            setattr(config, key, [getattr(config, key)[i] for i in kept])
    shorten(config)
    config.num_hidden_layers = len(kept)
    config.architectures = [stock_class_name(config)]
    config.dtype = torch.float32
    return config


def _tell_transformers_js(file: Path, options: ExportOptions) -> None:
    """Say in config.json what transformers.js would otherwise have to be told by each user."""
    config = json.loads(file.read_text(encoding="utf-8"))
    settings: dict[str, Any] = {"use_external_data_format": {Path(options.graph).name: 1}}
    if options.layout == "transformersjs":
        settings["dtype"] = TRANSFORMERS_JS_DTYPES[str(options.dtype)]
    if computes_in_half(options):
        settings["kv_cache_dtype"] = "float16"
    config["transformers.js_config"] = settings
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(loaded: Loaded, options: ExportOptions, parity: Parity) -> str:
    """README.md of the export folder."""
    origin, layout = loaded.origin, layout_of(loaded.model)
    library = "transformers.js" if options.layout == "transformersjs" else "onnxruntime-genai"
    header = ["---", *([f"license: {origin.licence.lower()}"] if origin.licence else [])]
    header += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- foldaway", "- onnx", "---"]
    against = "the source" if parity.decode_against == "source" else "its own whole forward"
    made_from = f"`{Path(origin.name).name}`" + (f" (artifact {origin.artifact_id})" if origin.artifact_id else "")
    lines = [
        "",
        f"# {Path(origin.name).name}, ONNX {options.dtype}",
        "",
        f"Made by foldaway from {made_from}; weights in {_weights(options)}; licence of the weights: "
        f"{origin.licence or 'not stated by the source'}.",
        "",
        f"{len(layout.blocks)} blocks, of which {len(layout.attention_blocks)} attend. `num_hidden_layers` in "
        "config.json and genai_config.json counts the caches of the graph, one per attention; export.json describes "
        "every block.",
        *_about_sharing(layout),
        "",
        f"Compared with its PyTorch source on {parity.tokens} tokens, on the CPU:",
        "",
        "| measure | found | limit |",
        "|---|---:|---:|",
        f"| same preferred token | {parity.argmax_agreement:.1%} | at least {parity.min_argmax_agreement:.0%} |",
        f"| divergence, KL | {parity.kl:.3g} nats per token | at most {parity.max_kl:g} |",
        *([f"| perplexity | {parity.perplexity_ratio:.4f} of the source's | |"] if parity.perplexity_ratio else []),
        f"| worst logit, token by token with a cache, against {against} | {parity.decode_max_abs_difference:.3g} | "
        f"at most {parity.tolerance:g} |",
        f"| worst logit, whole, against the source | {parity.max_abs_difference:.3g} | "
        f"{f'at most {parity.tolerance:g}' if options.dtype == 'fp32' else ''} |",
        *_about_context(loaded.model),
        *_about_provider(options),
        "",
        *_about_runtimes(options),
    ]
    return "\n".join([*header, *lines]) + "\n"


def _weights(options: ExportOptions) -> str:
    """How the weights are stored, in words."""
    if options.dtype not in QUANTISED:
        computed = " (computed in fp32)" if options.dtype == "fp16" and not computes_in_half(options) else ""
        return f"{options.dtype}{computed}"
    parts = f", {', '.join(options.int8)} in int8" if options.int8 else ""
    smoothed = f", smoothed by {options.smooth:g}" if options.smooth else ""
    return (
        f"{options.dtype} in blocks of {options.block_size} by {options.algorithm}{smoothed}{parts}, embedding and LM "
        f"head in {options.embeddings}"
    )


def _about_runtimes(options: ExportOptions) -> list[str]:
    """What the card says of how to run it."""
    if options.layout == "flat":
        return ["Run it with `foldaway serve`, onnxruntime-genai or optimum (`ORTModelForCausalLM`)."]
    return ["Run it with transformers.js: `await pipeline('text-generation', FOLDER)`, or with `foldaway serve`."]


def _about_provider(options: ExportOptions) -> list[str]:
    """What the card says of a graph that was made for another provider than it was checked on."""
    if options.ep == "cpu":
        return []
    return ["", f"The graph is made for the {options.ep} execution provider, and was not run on it."]


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
