"""The Hugging Face export: it loads where foldaway is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, dynamic_module_utils

from compress import budget
from compress.artifact import OriginEntry, save
from compress.errors import ConfigError, ParityError
from compress.evaluate import logits_of
from compress.layout import layout_of
from compress.sources import Loaded, Origin, load
from compress.surgery import drop_attention, keep_neurons, share_blocks
from exporters import ExportOptions, export, read_export, to_hf
from exporters.base import in_dtype
from tests.conftest import byte_tokenizer, tiny, token_rows

ORIGIN = Origin("tiny", "folder")
TOKENS = token_rows(rows=1, length=20).tokens


def test_a_plain_model_becomes_a_stock_folder(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    done = export(Loaded(model, byte_tokenizer(), ORIGIN), tmp_path / "x", to="hf", check_tokens=TOKENS)
    config = json.loads((done.path / "config.json").read_text())
    assert config["model_type"] == model.config.model_type
    assert "auto_map" not in config
    assert done.parity.max_abs_difference < 1e-5
    assert done.parity.decode_max_abs_difference < 1e-4
    assert AutoTokenizer.from_pretrained(done.path).chat_template == byte_tokenizer().chat_template


def test_a_ragged_model_brings_its_code(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    keep_neurons(model, {2: torch.arange(0, 80, 3)})
    drop_attention(model, (0, 3))
    done = export(Loaded(model, byte_tokenizer(), ORIGIN), tmp_path / "x", to="hf", check_tokens=TOKENS)
    assert done.parity.max_abs_difference < 1e-5
    assert done.parity.decode_max_abs_difference < 1e-4
    assert read_export(done.path).blocks == layout_of(model).block_configs()
    assert read_export(done.path).model_type == architecture


def test_a_ragged_folder_loads_where_foldaway_is_not(tmp_path: Path) -> None:
    model = tiny("qwen3")
    drop_attention(model, (1,))
    done = export(Loaded(model, byte_tokenizer(), ORIGIN), tmp_path / "x", to="hf", check_tokens=TOKENS)
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(done.path)!r}, trust_remote_code=True)\n"
        f"print(model(torch.tensor({TOKENS.tolist()})).logits.argmax(-1).tolist())\n"
        "assert 'compress' not in sys.modules\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == logits_of(model)(TOKENS).argmax(-1).tolist()


def test_checking_a_ragged_model_leaves_no_code_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    model = tiny("llama")
    drop_attention(model, (1,))
    export(Loaded(model, byte_tokenizer(), ORIGIN), tmp_path / "x", to="hf", check_tokens=TOKENS)
    assert not cache.exists()
    assert str(cache) == dynamic_module_utils.HF_MODULES_CACHE


def test_the_export_of_an_artifact_names_it(tmp_path: Path) -> None:
    model = tiny("llama")
    drop_attention(model, (4,))
    origin = OriginEntry(name="tiny", kind="folder")
    manifest = save(model, byte_tokenizer(), tmp_path / "artifact", origin=origin, steps=[])
    artifact = load(str(tmp_path / "artifact"))
    done = export(artifact, tmp_path / "x", to="hf", check_tokens=TOKENS)
    assert read_export(done.path).artifact_id == manifest.id
    for name in ("model.safetensors", "foldaway_model.py", "tokenizer.json"):
        assert (done.path / name).read_bytes() == (tmp_path / "artifact" / name).read_bytes()


def test_weights_are_stored_as_asked(tmp_path: Path) -> None:
    model = tiny("llama")
    source = Loaded(model, byte_tokenizer(), ORIGIN)
    half = export(source, tmp_path / "a", to="hf", options=ExportOptions(dtype="bf16"), check_tokens=TOKENS)
    kept = export(source, tmp_path / "b", to="hf", check_tokens=TOKENS)
    assert (half.dtype, kept.dtype) == ("bf16", "fp32")
    assert half.bytes < 0.55 * kept.bytes
    assert load(str(half.path)).model.dtype == torch.bfloat16
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounded_weights_are_compared_with_the_source_and_exactly_with_themselves(dtype: str, tmp_path: Path) -> None:
    model = tiny("llama")
    drop_attention(model, (1,))
    source = Loaded(model, byte_tokenizer(), ORIGIN)
    done = export(source, tmp_path / "x", to="hf", options=ExportOptions(dtype=dtype), check_tokens=TOKENS)
    rounded = in_dtype(in_dtype(model, to_hf.DTYPES[dtype]), torch.float32)
    expected = float((logits_of(model)(TOKENS) - logits_of(rounded)(TOKENS)).abs().max())
    assert done.parity.max_abs_difference == pytest.approx(expected, rel=0.01)
    assert done.parity.max_abs_difference > 1e-4
    assert (done.parity.decode_against, done.parity.min_argmax_agreement) == ("export", 0.8)
    assert done.parity.decode_max_abs_difference < 1e-4
    assert "against the stored weights in memory" in (done.path / "README.md").read_text()


def test_a_dtype_that_holds_every_weight_is_checked_exactly(tmp_path: Path) -> None:
    model = in_dtype(tiny("llama"), torch.bfloat16)
    source = Loaded(model, byte_tokenizer(), ORIGIN)
    done = export(source, tmp_path / "x", to="hf", options=ExportOptions(dtype="fp32"), check_tokens=TOKENS)
    assert (done.parity.decode_against, done.parity.min_argmax_agreement) == ("source", 0.99)
    assert done.parity.max_abs_difference < 1e-5


def test_int4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the hf export stores fp32 or fp16 or bf16"):
        export(
            Loaded(tiny("llama"), byte_tokenizer(), ORIGIN),
            tmp_path / "x", to="hf", options=ExportOptions(dtype="int4"), check_tokens=TOKENS,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_folder_that_lost_a_weight_leaves_nothing_behind(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = to_hf.write_model

    def wrong(model: object, tokenizer: object, folder: Path, processor: object) -> None:
        other = tiny("llama")
        other.model.layers[2].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(64, 80))
        right(other, byte_tokenizer(), folder)

    monkeypatch.setattr(to_hf, "write_model", wrong)
    source = Loaded(tiny("llama"), byte_tokenizer(), ORIGIN)
    with pytest.raises(ParityError):
        export(source, tmp_path / "x", to="hf", options=ExportOptions(dtype=dtype), check_tokens=TOKENS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shared_weights_are_written_once_or_expanded_to_a_stock_folder(dtype: str, rank: int, tmp_path: Path) -> None:
    model = tiny("llama")
    share_blocks(model, {1: [2], 3: [4]}, adapter_rank=rank, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_left"):
            parameter.normal_(std=0.2, generator=generator)
    loaded = Loaded(model, byte_tokenizer(), ORIGIN)
    folded, expanded = (
        export(loaded, tmp_path / name, to="hf", options=options, check_tokens=TOKENS)
        for name, options in (("x", ExportOptions(dtype)), ("y", ExportOptions(dtype, expand=True)))
    )
    assert [b["shares_with"] for b in read_export(folded.path).blocks] == [None, None, 1, None, 3]
    assert json.loads((expanded.path / "config.json").read_text())["model_type"] == "llama"
    assert [b["shares_with"] for b in read_export(expanded.path).blocks] == [None] * 5
    assert read_export(expanded.path).options.expand
    assert (folded.parameters, expanded.parameters) == (budget.count(model).total, budget.count(tiny("llama")).total)
    assert "5 blocks are stored in place of 3" in (expanded.path / "README.md").read_text()
    stock = load(str(expanded.path), dtype=torch.float32).model
    same = torch.allclose(logits_of(stock)(TOKENS), logits_of(model)(TOKENS), atol=1e-4)
    assert same or dtype == "bf16"
    assert layout_of(model).kind == "shared"


def test_expanding_what_is_not_shared_changes_nothing(tmp_path: Path) -> None:
    loaded = Loaded(tiny("llama"), byte_tokenizer(), ORIGIN)
    made = [
        export(loaded, tmp_path / str(flag), to="hf", options=ExportOptions(expand=flag), check_tokens=TOKENS)
        for flag in (False, True)
    ]
    assert made[0].files["model.safetensors"] == made[1].files["model.safetensors"]
