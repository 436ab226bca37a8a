"""Models whose blocks differ or share, in a real vLLM in this process, against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compress.arch import VLLM_BLOCKS
from compress.evaluate import logits_of
from compress.sources import Loaded, Origin
from compress.surgery import clone, cut_ffn, drop_attention, drop_ffn, expand, share_blocks
from exporters import ExportOptions, export
from tests.conftest import byte_tokenizer
from tests.vllm.conftest import NEW_TOKENS, TEXT_TOKENS, cut, engine, greedy, logprobs, tiny

pytestmark = pytest.mark.vllm
TOKENS = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
PROMPT = TOKENS[0, :7].tolist()
TEXT = torch.randint(0, 256, (TEXT_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def exported(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    loaded = Loaded(model, byte_tokenizer(), Origin("tiny", "folder"))
    return export(loaded, path, to="vllm", options=ExportOptions(**options), check_tokens=TOKENS).path


def ragged(model_type: str, *, first: bool = True) -> PreTrainedModel:
    model = tiny(model_type)
    cut_ffn(model, [80, 64, 27, 50, 80])
    drop_attention(model, (1,) if first else (0, 1))
    drop_ffn(model, (4,))
    return model


def shared(model_type: str, **options: Any) -> PreTrainedModel:
    model = tiny(model_type)
    share_blocks(model, {1: [2, 4]}, **options)
    return model


MODELS = {
    **{f"{name}-ragged": lambda name=name: ragged(name) for name in VLLM_BLOCKS},
    **{f"{name}-shared": lambda name=name: shared(name) for name in VLLM_BLOCKS},
    "llama-first": lambda: ragged("llama", first=False),
    "qwen3-first": lambda: ragged("qwen3", first=False),
    "qwen2-own-biases": lambda: shared("qwen2", own_biases=True),
    "mistral-window": lambda: _with_window(),
    "llama-plain": lambda: tiny("llama"),
    "qwen2-heads": lambda: tiny("qwen2"),
}


def _with_window() -> PreTrainedModel:
    model = tiny("mistral", sliding_window=16)
    drop_attention(model, (2,))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_vllm_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    with engine(exported(model, tmp_path / "x")) as vllm:
        assert vllm.greedy(PROMPT, NEW_TOKENS) == greedy(model, PROMPT, NEW_TOKENS)
        torch.testing.assert_close(
            torch.tensor(vllm.logprobs(TEXT)), torch.tensor(logprobs(model, TEXT)), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "sizes"), [("gemma3_text", {}), ("phi3", {}), ("opt", {"hidden_size": 128, "word_embed_proj_dim": 128})]
)
def test_without_the_plugin_what_is_padded_computes_the_same(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    model = tiny(name, **sizes)
    cut_ffn(model, [64] * model.config.num_hidden_layers)
    drop_attention(model, (1,))
    with engine(exported(model, tmp_path / "x", plugin=False)) as vllm:
        torch.testing.assert_close(
            torch.tensor(vllm.logprobs(TEXT)), torch.tensor(logprobs(model, TEXT)), atol=1e-3, rtol=0
        )


def test_a_block_without_attention_keeps_no_cache(tmp_path: Path) -> None:
    with engine(exported(ragged("qwen3"), tmp_path / "x")) as vllm:
        layers = vllm.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert sorted(name for name in layers if name.endswith(".attn")) == [
            f"model.layers.{block}.self_attn.attn" for block in (0, 2, 3, 4)
        ]


def test_blocks_that_share_keep_caches_of_their_own_and_hold_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for CPUs pack weights where they cannot be counted, so they are left out here."""
    monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)
    model = shared("llama")
    with engine(exported(model, tmp_path / "x")) as vllm:
        layers = vllm.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert len([name for name in layers if name.endswith(".attn")]) == 5
        blocks = vllm.model.model.layers
        assert blocks[2].mlp.down_proj is not blocks[1].mlp.down_proj
        assert blocks[4].mlp.down_proj.weight is blocks[1].mlp.down_proj.weight
        assert vllm.greedy(PROMPT, 8) == greedy(model, PROMPT, 8)


def test_a_folded_smollm2_takes_the_memory_that_it_is_stored_in(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm._custom_ops._supports_onednn", False)
    folder = smollm2("folded")
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with engine(folder) as vllm:
        tensors = [*vllm.model.parameters(), *vllm.model.buffers()]
        held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    expanded = sum(parameter.numel() for parameter in _expanded(cut("folded").model).parameters()) * 4
    print(f"held {sum(held.values()):,} bytes, stored {stored:,}, expanded {expanded:,}")
    assert abs(sum(held.values()) / stored - 1) < 0.03
    assert expanded / stored > 1.1


def test_an_adapter_is_one_per_block_where_blocks_share(tmp_path: Path) -> None:
    """A LoRA that was learnt on the shared model changes each execution in its own way."""
    model = shared("llama")
    generator = torch.Generator().manual_seed(3)
    tensors, merged = {}, _expanded(model)
    for block in (1, 2):
        for path in ("self_attn.q_proj", "mlp.down_proj"):
            linear = merged.get_submodule(f"model.layers.{block}.{path}")
            A = torch.randn(8, linear.in_features, generator=generator) * 0.2
            B = torch.randn(linear.out_features, 8, generator=generator) * 0.2
            tensors[f"base_model.model.model.layers.{block}.{path}.lora_A.weight"] = A
            tensors[f"base_model.model.model.layers.{block}.{path}.lora_B.weight"] = B
            linear.weight = torch.nn.Parameter(linear.weight + B @ A, requires_grad=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    from vllm.lora.request import LoRARequest

    with engine(exported(model, tmp_path / "x"), enable_lora=True, max_lora_rank=8) as vllm:
        plain = vllm.greedy(PROMPT, 32)
        adapted = vllm.greedy(PROMPT, 32, lora_request=LoRARequest("mine", 1, str(adapter)))
    assert plain == greedy(model, PROMPT, 32)
    assert adapted == greedy(merged, PROMPT, 32)
    assert adapted != plain


def test_quantised_weights_are_shared_too(tmp_path: Path) -> None:
    """The same int8 checkpoint, once with blocks that share and once with a copy for each."""
    model = shared("llama")
    once = _in_int8(exported(model, tmp_path / "once"))
    copies = _in_int8(exported(model, tmp_path / "copies", plugin=False))
    assert len(load_file(once / "model.safetensors")) < len(load_file(copies / "model.safetensors"))
    found = []
    for folder in (once, copies):
        with engine(folder) as vllm:
            found.append((vllm.greedy(PROMPT, 32), vllm.logprobs(TEXT)))
            blocks = vllm.model.model.layers
            assert "Int8" in type(blocks[1].mlp.down_proj.scheme.kernel).__name__
            same = blocks[4].mlp.down_proj.quant_method is blocks[1].mlp.down_proj.quant_method
            assert same == (folder is once)
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(torch.tensor(found[0][1]), torch.tensor(found[1][1]), atol=1e-5, rtol=0)


def _in_int8(folder: Path) -> Path:
    """Quantise an export in place as llm-compressor would: a scale for each output, activations as they come."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name], tensors[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SCRIPT = """
import json, sys
from tests.vllm.conftest import Engine
if __name__ == "__main__":
    folder, prompt, options = map(json.loads, sys.argv[1:])
    print("found", Engine(folder, **options).greedy(prompt, 16), flush=True)
"""


def greedy_elsewhere(folder: Path, scratch: Path, environment: dict[str, str], **options: Any) -> list[int]:
    """What an engine in a process of its own continues the prompt with."""
    script = scratch / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(str(folder)), json.dumps(PROMPT), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (found,) = [
        line for line in run.stdout.splitlines() if line.startswith("found ")
    ]  # workers have words of their own
    tokens: list[int] = json.loads(found.removeprefix("found "))
    return tokens


@pytest.mark.parametrize(("make", "trust"), [(lambda: tiny("llama"), False), (lambda: ragged("qwen2"), True)])
def test_where_foldaway_is_not_installed_stock_and_ragged_exports_load(make: Any, trust: bool, tmp_path: Path) -> None:
    """vLLM is told to load no plugin; the ragged one brings the class of its config along."""
    model = make()
    folder = exported(model, tmp_path / "x")
    environment = {"VLLM_PLUGINS": "", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert greedy_elsewhere(folder, tmp_path, environment, trust_remote_code=trust) == greedy(model, PROMPT, 16)


PARALLEL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2, "enforce_eager": False},  # on CPUs vLLM 0.32 cannot do without the compiler there
    ],
)
def test_a_shared_model_is_spread_over_processes(options: dict[str, Any], tmp_path: Path) -> None:
    """Block 4 computes with the weights of block 1, which lies in the first of two pipeline stages."""
    model = shared("qwen2", own_biases=True)
    folder = exported(model, tmp_path / "x")
    assert greedy_elsewhere(folder, tmp_path, PARALLEL, **options) == greedy(model, PROMPT, 16)


def test_a_later_pipeline_stage_finds_the_weights_that_an_earlier_block_has_in_the_file() -> None:
    from serving.vllm_model import FoldawayForCausalLM

    class Stage:
        index, own_biases = 4, True

    stage = FoldawayForCausalLM.__new__(FoldawayForCausalLM)
    torch.nn.Module.__init__(stage)
    stage._holders = {1: Stage(), 3: type("First", (), {"index": 3, "own_biases": False})()}
    names = ["1.mlp.up_proj.weight", "1.self_attn.q_proj.bias", "1.input_layernorm.weight", "3.mlp.up_proj.weight"]
    given = [(f"model.layers.{name}", torch.zeros(1)) for name in names]
    found = [name for name, _ in stage._placed([*given, ("lm_head.weight", torch.zeros(1))])]
    assert found == [
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "lm_head.weight",
    ]


def _expanded(model: PreTrainedModel) -> PreTrainedModel:
    copy = clone(model)
    expand(copy)
    return copy


def test_another_version_of_vllm_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import vllm_plugin

    monkeypatch.setattr(vllm_plugin, "TESTED", ((0, 1),))
    with pytest.raises(ValueError, match=r"was run against vLLM 0\.1, and this is .*--no-plugin"):
        vllm_plugin.FoldawayConfig(base_model_type="llama")


def test_the_plugin_may_be_loaded_again(tmp_path: Path) -> None:
    from vllm import ModelRegistry

    from serving.vllm_plugin import register

    register()
    register()
    assert "FoldawayForCausalLM" in ModelRegistry.get_supported_archs()
    model = tiny("llama")
    assert logits_of(model)(TOKENS).isfinite().all()
