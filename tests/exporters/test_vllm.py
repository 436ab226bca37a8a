"""The vLLM export: which rule a model falls under, and that what is written computes the same; without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.arch import LLAMA_BLOCKS, VLLM_BLOCKS
from compress.errors import ConfigError, FoldawayError, LayoutNotSupported
from compress.evaluate import logits_of
from compress.layout import layout_of
from compress.nemotron_nas import CODE, Entry, NemotronNasConfig
from compress.remote_code import CODE as OUR_CODE
from compress.sources import Loaded, Origin, load
from compress.surgery import block_kinds, cut_ffn, drop_attention, drop_ffn, keep_heads, keep_neurons, share_blocks
from exporters import Exported, ExportOptions, export, read_export, to_vllm
from exporters.padding import padded, plain_layout, rounded_up
from tests.conftest import byte_tokenizer, tiny, token_rows

ORIGIN = Origin("tiny", "folder")
TOKENS = token_rows(rows=1, length=20).tokens


def ragged(model_type: str, *, first: bool = True) -> Any:
    """A tiny model with FFNs cut, an attention and an FFN gone; without ``first`` the attention of block 0 too."""
    model = tiny(model_type)
    keep_neurons(model, {2: torch.arange(0, 80, 3), 3: torch.arange(50)})
    drop_attention(model, (1,) if first else (0, 1))
    drop_ffn(model, (4,))
    return model


def shared(model_type: str) -> Any:
    """A tiny model of which two blocks, of the same kind, compute with the weights of one."""
    model = tiny(model_type)
    kinds = block_kinds(model)
    share_blocks(model, {1: [next(i for i in range(2, 5) if kinds[i] == kinds[1])]})
    return model


def exported(model: Any, path: Path, **options: Any) -> Exported:
    return export(
        Loaded(model, byte_tokenizer(), ORIGIN), path, to="vllm", options=ExportOptions(**options), check_tokens=TOKENS
    )


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_plain_model_is_stock(tmp_path: Path) -> None:
    done = exported(tiny("qwen3"), tmp_path / "x")
    assert config_in(done.path)["architectures"] == ["Qwen3ForCausalLM"]
    assert done.notes == ("vLLM loads it as it is",)
    assert done.parity.max_abs_difference == 0


@pytest.mark.parametrize("architecture", LLAMA_BLOCKS)
def test_a_ragged_llama_is_written_in_vllms_words(architecture: str, tmp_path: Path) -> None:
    model = ragged(architecture)
    done = exported(model, tmp_path / "x")
    config = config_in(done.path)
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas"
    assert config.get("qkv_bias", False) == (architecture == "qwen2")
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [80, 80, 27, 50, None]
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False, False, False]
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {2, None}
    assert done.parity.max_abs_difference < 1e-5
    assert done.parity.decode_max_abs_difference < 1e-4
    assert "trust-remote-code" in done.notes[0]
    assert not (done.path / OUR_CODE).exists()
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_a_qwen2_without_some_heads_is_written_in_words_that_tell_their_width(tmp_path: Path) -> None:
    """vLLM's own class divides the hidden size by the heads that are left."""
    model = tiny("qwen2")
    keep_heads(model, {block: torch.tensor([0, 2]) for block in range(5)})
    done = exported(model, tmp_path / "x")
    config = config_in(done.path)
    assert (config["architectures"], config["num_attention_heads"]) == (["DeciLMForCausalLM"], 2)
    assert config["head_dim"] == 16
    assert done.parity.max_abs_difference < 1e-5


def test_the_config_module_of_a_folder_gives_blocks_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(ragged("llama"), tmp_path / "x").path
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.block_configs[2].ffn.intermediate_size == 27
    assert not hasattr(config.block_configs[2].ffn, "ffn_mult")
    assert (folder / CODE).is_file()
    again = NemotronNasConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.block_configs == config.block_configs
    assert isinstance(again.block_configs[0], Entry)


@pytest.mark.parametrize(
    "make", [lambda: ragged("qwen3"), lambda: ragged("llama", first=False), lambda: shared("llama")]
)
def test_what_vllm_has_no_words_for_is_written_for_the_plugin(make: Any, tmp_path: Path) -> None:
    model = make()
    done = exported(model, tmp_path / "x")
    assert config_in(done.path)["architectures"] == ["FoldawayForCausalLM"]
    assert "foldaway must be installed beside" in done.notes[0]
    assert layout_of(load(str(done.path)).model) == layout_of(model)


def test_a_block_with_a_product_of_its_own_gets_weights_of_its_own(tmp_path: Path) -> None:
    model = tiny("llama")
    share_blocks(model, {1: [2]}, adapter_rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_left"):
            torch.nn.init.normal_(parameter, std=0.1)
    done = exported(model, tmp_path / "x")
    assert config_in(done.path)["architectures"] == ["LlamaForCausalLM"]
    assert any("5 blocks are stored in place of 4" in note for note in done.notes)


@pytest.mark.parametrize(
    ("make", "architecture", "cost"),
    [
        (lambda: ragged("qwen3"), "Qwen3ForCausalLM", "padded to the widest"),
        (lambda: ragged("gemma3_text"), "Gemma3ForCausalLM", "padded to the widest"),
        (lambda: ragged("phi3"), "Phi3ForCausalLM", "padded to the widest"),
        (lambda: ragged("gpt2", first=False), "GPT2LMHeadModel", "padded to the widest"),
        (lambda: ragged("opt"), "OPTForCausalLM", "padded to the widest"),
        (lambda: ragged("llama", first=False), "DeciLMForCausalLM", "block 0 has an attention that adds nothing"),
        (lambda: shared("mistral"), "MistralForCausalLM", "5 blocks are stored in place of 4"),
        (lambda: shared("gemma3_text"), "Gemma3ForCausalLM", "6 blocks are stored in place of 5"),
    ],
)
def test_without_the_plugin_it_is_padded_or_expanded(make: Any, architecture: str, cost: str, tmp_path: Path) -> None:
    model = make()
    done = exported(model, tmp_path / "x", plugin=False)
    assert config_in(done.path)["architectures"] == [architecture]
    assert any(cost in note for note in done.notes)
    assert any("M parameters, its source" in note for note in done.notes)
    assert done.parameters > sum(parameter.numel() for parameter in model.parameters())
    assert done.parity.max_abs_difference < 1e-5


def test_without_the_plugin_a_model_that_needs_none_is_as_before(tmp_path: Path) -> None:
    with_plugin, without = (
        exported(ragged("llama"), tmp_path / "a"),
        exported(ragged("llama"), tmp_path / "b", plugin=False),
    )
    assert with_plugin.notes == without.notes
    assert with_plugin.bytes == without.bytes


@pytest.mark.parametrize("make", [lambda: ragged("gemma3_text"), lambda: shared("phi3")])
def test_an_architecture_that_the_plugin_does_not_build_is_refused_with_the_way_out(make: Any, tmp_path: Path) -> None:
    with pytest.raises(LayoutNotSupported, match="--no-plugin"):
        exported(make(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("architecture", [*VLLM_BLOCKS, "phi3", "gpt2"])
def test_widths_become_multiples(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    cut_ffn(model, [70] * 5)
    done = exported(model, tmp_path / "x", divisor=64)
    assert {block["ffn"]["intermediate_size"] for block in read_export(done.path).blocks} == {128}
    assert done.parity.max_abs_difference < 1e-5


def test_a_ragged_model_stays_ragged_when_its_widths_become_multiples(tmp_path: Path) -> None:
    done = exported(ragged("llama"), tmp_path / "x", divisor=64)
    widths = [block["ffn"]["intermediate_size"] for block in config_in(done.path)["block_configs"]]
    assert widths == [128, 128, 64, 64, None]


def test_padding_keeps_the_tensors_that_need_none(architecture: str) -> None:
    model = ragged(architecture)
    before = logits_of(model)(TOKENS)
    larger = padded(model, plain_layout(layout_of(model), layout_of(model).blocks[0].num_key_value_heads))
    assert layout_of(larger).kind == "plain"
    torch.testing.assert_close(logits_of(larger)(TOKENS), before, atol=1e-5, rtol=0)
    ours = {id(parameter) for parameter in model.parameters()}
    kept = sum(id(parameter) in ours for parameter in larger.parameters())
    assert kept > len(ours) / 2
    torch.testing.assert_close(logits_of(model)(TOKENS), before, atol=0, rtol=0)


def test_padding_keeps_what_is_shared_shared() -> None:
    model = shared("qwen2")
    larger = padded(model, rounded_up(layout_of(model), 64))
    assert layout_of(larger).distinct == 4
    assert {block.intermediate_size for block in layout_of(larger).blocks} == {128}
    torch.testing.assert_close(logits_of(larger)(TOKENS), logits_of(model)(TOKENS), atol=1e-5, rtol=0)


def test_a_layout_that_is_there_already_changes_nothing() -> None:
    model = tiny("llama")
    assert padded(model, layout_of(model)) is model


@pytest.mark.parametrize("spoil", ["widths", "names"])
def test_a_folder_in_vllms_words_that_says_something_else_is_discarded(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = to_vllm._block_configs

    def wrong(model: Any) -> list[dict[str, Any]]:
        blocks = usual(model)
        if spoil == "names":
            blocks[1]["attention"] = dict(blocks[0]["attention"])
        else:
            blocks[2]["ffn"]["intermediate_size"] = 26
        return blocks

    monkeypatch.setattr(to_vllm, "_block_configs", wrong)
    with pytest.raises(FoldawayError, match=r"cannot be read|missing or misshapen"):
        exported(ragged("llama"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_rounded_weights_are_compared_with_those_stored(tmp_path: Path) -> None:
    done = exported(ragged("llama"), tmp_path / "x", dtype="bf16")
    assert done.dtype == "bf16"
    assert done.parity.decode_against == "export"
    model = AutoModelForCausalLM.from_pretrained(exported(tiny("llama"), tmp_path / "y", dtype="bf16").path)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"dtype": "int4"}, {"divisor": 100}, {"expand": True}, {"block_size": 32}])
def test_options_without_a_meaning_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        exported(tiny("llama"), tmp_path / "x", **options)


def test_the_card_says_how_to_load_it(tmp_path: Path) -> None:
    deci = (exported(ragged("llama"), tmp_path / "a").path / "README.md").read_text()
    ours = (exported(shared("llama"), tmp_path / "b").path / "README.md").read_text()
    assert "vllm serve PATH --trust-remote-code" in deci
    assert "foldaway serve PATH --backend vllm" in ours
