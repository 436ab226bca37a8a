"""Export to a folder that vLLM serves, by the first of these rules that fits:

1. A plain model is written with its stock config, which needs nothing (a Qwen2 that lost heads falls under 2).
2. A ragged one whose blocks are Llama's (Llama, Mistral, Qwen2) is written in the words that vLLM has for models whose
   blocks differ: ``DeciLMForCausalLM``, config ``nemotron-nas``. Exact widths, no cache where there is no attention.
   vLLM ships no class for that config: the folder carries one (``--trust-remote-code``), and our plugin knows it.
3. Any other, ragged or shared, is written as it is, for our plugin: foldaway must be installed beside vLLM.

Without the plugin (``plugin=False``) the third rule is replaced: blocks that share get copies of their own, a first
block gets an attention that adds nothing, and what still cannot be said is padded with zeros to equal blocks. That is
correct, and what was saved is lost; the export says how much.

The folder is read back and compared with its source in transformers. For the second rule, where transformers has no
class, its tensors are put where its config says they belong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget, nemotron_nas, remote_code
from compress.arch import ARCHITECTURES, LLAMA_BLOCKS, VLLM_BLOCKS, architecture_of, check_text_model
from compress.artifact import write_model
from compress.decoder import Decoder
from compress.device import DTYPES
from compress.errors import LayoutNotSupported
from compress.files import new_folder
from compress.layout import Layout, layout_of
from compress.nemotron_nas import NemotronNasConfig
from compress.result import Progress, no_progress
from compress.sources import Loaded, load_weights
from compress.surgery import clone, expand
from exporters import to_hf
from exporters.base import Exported, ExportOptions, exported, in_dtype, seal
from exporters.padding import padded, plain_layout, rounded_up
from exporters.parity import Parity

Route = Literal["stock", "nemotron-nas", "plugin"]
NEEDS = {
    "stock": "vLLM loads it as it is",
    "nemotron-nas": "vLLM loads it as DeciLMForCausalLM: with foldaway installed beside it as it is, else with "
    "--trust-remote-code",
    "plugin": "vLLM loads it through foldaway's plugin: foldaway must be installed beside it",
}


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        model: with the layout of the export, and the weights of the source where it could keep them.
        route: by which rule.
        notes: what it takes to load it, and what was given up for the format, in sentences.
    """

    model: PreTrainedModel
    route: Route
    notes: tuple[str, ...]


def export(
    loaded: Loaded, path: Path, options: ExportOptions, check_tokens: Tensor, progress: Progress = no_progress
) -> Exported:
    """Write a folder that vLLM serves, and check it.

    Args:
        loaded: a text model of any layout; not changed.
        path: the folder to write; it appears whole, or not at all.
        options: dtype ``"fp32"``, ``"fp16"``, ``"bf16"``, or None to keep what the source has; ``divisor``; ``plugin``.
        check_tokens: int64 (B, T), tokens to compare source and export on.
        progress: told of tokens checked.

    Raises:
        ConfigError: `path` is not empty, or an option is not one of this format.
        LayoutNotSupported: vLLM cannot run the model in its layout.
        UnsupportedArchitecture: a vision-language model.
        ParityError: what was written does not compute what its source does.
    """
    options = complete(options, loaded.model.dtype)
    made = plan(in_dtype(loaded.model, DTYPES[str(options.dtype)]), options)
    with new_folder(path) as folder:
        write_model(made.model, loaded.tokenizer, folder)
        if made.route == "nemotron-nas":
            _rename(made.model, folder)
        parity = _check(loaded.model, made, folder, check_tokens, progress)
        command = (
            "foldaway serve PATH --backend vllm" if made.route == "plugin" else f"vllm serve PATH{_flag(made.route)}"
        )
        card = to_hf.card(loaded, str(options.dtype), parity, made.notes, ("bash", command))
        (folder / "README.md").write_text(card, encoding="utf-8")
        record = seal(folder, dataclasses.replace(loaded, model=made.model), "vllm", options, parity)
    return exported(path, record, made.notes)


def complete(options: ExportOptions, source: torch.dtype) -> ExportOptions:
    """Put the dtype of the source where none was asked for.

    Raises:
        ConfigError: an option that this format has no use for.
    """
    return to_hf.with_dtype(options, source, "vllm", ("dtype", "divisor", "plugin"))


def plan(model: PreTrainedModel, options: ExportOptions) -> Plan:
    """Choose the rule, and give the model the layout that it needs.

    Args:
        model: of any layout and on any device, meta too; not changed.
        options: ``divisor`` and ``plugin`` are looked at.

    Raises:
        LayoutNotSupported: our plugin does not run such a model.
        UnsupportedArchitecture: a vision-language model.
    """
    check_text_model(model.config, "the vllm export")
    model_type = remote_code.base_config(model.config).model_type
    before = budget.count(model).total
    notes: list[str] = []
    if _must_expand(model, plugin=options.plugin):
        layout = layout_of(model)
        model = clone(model)
        expand(model)
        notes.append(f"{len(layout.blocks)} blocks are stored in place of {layout.distinct}: sharing is given up")
    if options.divisor is not None:
        model = padded(model, rounded_up(layout_of(model), options.divisor))
        notes.append(f"Every FFN is as wide as the next multiple of {options.divisor}")
    route = _route(model, model_type)
    if route == "plugin" and not options.plugin:
        model, note = _without_plugin(model, model_type)
        notes.append(note)
        route = _route(model, model_type)
    if route == "plugin" and model_type not in VLLM_BLOCKS:
        raise LayoutNotSupported(
            f"vLLM runs blocks that differ or share for {', '.join(VLLM_BLOCKS)}, and not for {model_type}: add "
            "--no-plugin, which pads and copies them until they are alike (correct, but nothing is saved)"
        )
    after = budget.count(model).total
    if after > before:
        notes.append(f"It has {after / 1e6:,.1f} M parameters, its source {before / 1e6:,.1f} M")
    return Plan(model, route, (NEEDS[route], *notes))


def _must_expand(model: PreTrainedModel, *, plugin: bool) -> bool:
    """Whether sharing has to go: without our plugin, and where blocks add products of their own to what they share."""
    layout = layout_of(model)
    return layout.kind == "shared" and (not plugin or any(block.adapter_rank for block in layout.blocks))


def _route(model: PreTrainedModel, model_type: str) -> Route:
    layout = layout_of(model)
    if layout.kind == "plain" and not loses_head_dim(remote_code.base_config(model.config).to_dict()):
        return "stock"
    if layout.kind != "shared" and model_type in LLAMA_BLOCKS and layout.blocks[0].attention:
        return "nemotron-nas"
    return "plugin"


def loses_head_dim(config: Mapping[str, Any]) -> bool:
    """Whether vLLM's own class would get the width of the heads wrong.

    It divides the hidden size by the number of heads, which is no longer so once heads have gone.

    Args:
        config: the content of a stock config.json.
    """
    arch = ARCHITECTURES.get(str(config.get("model_type")))
    if arch is None or arch.llama is None or arch.llama.head_dim_is_read:
        return False
    width = config.get("head_dim")
    return bool(width) and width * config["num_attention_heads"] != config["hidden_size"]


def _without_plugin(model: PreTrainedModel, model_type: str) -> tuple[PreTrainedModel, str]:
    """Pad until vLLM's own classes can say it: the first attention if that is all it takes, else everything."""
    layout, heads = layout_of(model), Decoder(model).kv_heads
    if model_type in LLAMA_BLOCKS:
        first = dataclasses.replace(layout.blocks[0], attention=True, num_key_value_heads=heads)
        note = "Here block 0 has an attention that adds nothing, for vLLM cannot begin without one"
        return padded(model, Layout((first, *layout.blocks[1:]))), note
    note = "FFNs are padded to the widest, and attentions that were removed are there and add nothing"
    return padded(model, plain_layout(layout, heads)), note


def _rename(model: PreTrainedModel, folder: Path) -> None:
    """Put vLLM's words in place of ours into a folder that was just written: config and the module that reads it."""
    file = folder / "config.json"
    ours = json.loads(file.read_text(encoding="utf-8"))
    config = {key: value for key, value in ours.items() if key not in remote_code.RAGGED_KEYS}
    theirs: dict[str, Any] = {
        "model_type": nemotron_nas.MODEL_TYPE,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(nemotron_nas.CODE).stem}.{NemotronNasConfig.__name__}"},
        "block_configs": _block_configs(model),
    }
    kind = Decoder(model).arch.llama
    if kind is not None and kind.qkv_bias:
        theirs["qkv_bias"] = True
    file.write_text(json.dumps(config | theirs, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / remote_code.CODE).unlink(missing_ok=True)
    (folder / nemotron_nas.CODE).write_bytes(Path(nemotron_nas.__file__).read_bytes())


def _block_configs(model: PreTrainedModel) -> list[dict[str, Any]]:
    group = Decoder(model).heads // Decoder(model).kv_heads
    return [
        {
            "attention": {"no_op": not block.attention, "n_heads_in_group": group if block.attention else None},
            "ffn": {"no_op": not block.intermediate_size, "intermediate_size": block.intermediate_size or None},
        }
        for block in layout_of(model).blocks
    ]


def _check(source: PreTrainedModel, made: Plan, folder: Path, tokens: Tensor, progress: Progress) -> Parity:
    if made.route != "nemotron-nas":
        return to_hf.check_parity(source, made.model, folder, tokens, progress)
    return to_hf.compare(source, made.model, _reread(made.model, folder), tokens, progress)


def _reread(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model that a ``nemotron-nas`` folder describes, as transformers can run it, in fp32."""
    said = NemotronNasConfig.from_pretrained(folder)
    base: Any = type(remote_code.base_config(model.config))
    stored = {k: v for k, v in said.to_dict().items() if k not in ("model_type", "auto_map", "architectures")}
    config: Any = base.from_dict({**stored, "intermediate_size": said.intermediate_size})
    heads = config.num_attention_heads
    blocks = [
        {
            "attention": {
                "no_op": block.attention.no_op,
                "num_key_value_heads": None if block.attention.no_op else heads // block.attention.n_heads_in_group,
            },
            "ffn": dict(block.ffn),
            "shares_with": None,
        }
        for block in said.block_configs or []
    ]
    config.__class__ = remote_code.ragged_config_class(base)
    config.base_model_type, config.block_configs = base.model_type, blocks
    config.block_parts = architecture_of(config).block_parts()
    return load_weights(remote_code.model_class(config), str(folder), dtype=torch.float32, config=config)


def _flag(route: Route) -> str:
    return " --trust-remote-code" if route == "nemotron-nas" else ""
