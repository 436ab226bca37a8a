"""Delta packages on ONNX exports: a base's export becomes its fine-tune, as a direct export would have it, or is
refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.artifact import write_model
from compress.delta.apply import apply
from compress.delta.checkpoint import Checkpoint
from compress.delta.pack import pack
from compress.delta.package import Package
from compress.errors import ConfigError, FoldawayError, ParityError
from compress.methods.darex import DarexConfig
from compress.sources import load
from compress.surgery import drop_attention, keep_neurons, share_blocks
from exporters import ExportOptions, export, read_export
from exporters.onnx_delta import attach, patch
from exporters.onnx_session import OnnxSession
from exporters.onnx_weights import Slot, slots
from tests.conftest import Killed, byte_tokenizer, killer, tiny, token_rows

TOKENS = token_rows(rows=2, length=40).tokens
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},  # tied
    "llama-untied": {"tie_word_embeddings": False},
    "qwen2": {},  # untied, biases
    "qwen3": {},  # tied, norms of queries and keys
    "gemma3_text": {},  # norms with an offset
    "phi3": {},  # fused q|k|v and gate|up
}
DARE = DarexConfig(p="3/4", rescale="dare")
CASES = [(variant, dtype) for variant in VARIANTS for dtype in ("fp32", "int4")]
CASES += [(variant, dtype) for variant in ("llama", "gemma3_text") for dtype in ("fp16", "int8")]


def model_of(variant: str) -> PreTrainedModel:
    model_type, _, untied = variant.partition("-")
    if not untied:
        return tiny(model_type)
    config = AutoConfig.for_model(**{**tiny(model_type).config.to_dict(), **VARIANTS[variant]})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def noisy(model: PreTrainedModel, seed: int = 1, embeddings: bool = True) -> PreTrainedModel:
    """A fine-tune: all changed but one block; of the embeddings a few rows, or none."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        if "embed" in name or "lm_head" in name:
            if embeddings:
                parameter[[3, 10, 40]] += noise[[3, 10, 40]]
        elif ".2." not in name:
            parameter += noise
    return model


def made(folder: Path, base: PreTrainedModel, tuned: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with a base, its fine-tune, the package, and what the package brings back."""
    for name, model in {"base": base, "tuned": tuned}.items():
        write_model(model.to(dtype), byte_tokenizer(), folder / name)
    ours, theirs = Checkpoint(folder / "base"), Checkpoint(folder / "tuned")
    pack(ours, theirs, folder / "delta", DARE, names=("base", "tuned"))
    apply(Package(folder / "delta"), ours, folder / "again")
    return folder


def exported(model: Path, path: Path, dtype: str, **options: Any) -> Path:
    """A direct export of a model folder."""
    if not path.exists():
        done = ExportOptions(dtype=dtype, **options)
        export(load(str(model)), path, to="onnx", options=done, check_tokens=TOKENS)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """variant -> folder as `made` gives it, made once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def of(variant: str) -> Path:
        return made(root / variant, model_of(variant), noisy(model_of(variant)))

    return of


def pair(folder: Path, dtype: str) -> tuple[Path, Path]:
    """The exports of the base and of what comes back."""
    return tuple(exported(folder / name, folder / f"{name}-{dtype}", dtype) for name in ("base", "again"))  # type: ignore[return-value]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- As a direct export would have it


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_a_patched_export_is_that_of_the_fine_tune_bit_for_bit(
    variant: str, dtype: str, models: Any, tmp_path: Path
) -> None:
    folder = models(variant)
    base, direct = pair(folder, dtype)
    done = patch(base, folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    ours, theirs = contents(tmp_path / "x"), contents(direct)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"README.md", "export.json"}
    assert ours["model.onnx_data"] != contents(base)["model.onnx_data"]
    assert done.parity == read_export(direct).parity


@pytest.mark.parametrize(("variant", "dtype"), [case for case in CASES if case[1] == "fp32" or case[0] == "llama"])
def test_an_attached_delta_computes_what_the_export_of_the_fine_tune_does(
    variant: str, dtype: str, models: Any
) -> None:
    folder = models(variant)
    base, direct = pair(folder, dtype)
    before = contents(base)
    session = attach(base, folder / "delta", base=None if dtype == "fp32" else str(folder / "base"), threads=1)
    wanted = OnnxSession(direct, threads=1)
    assert torch.equal(session.logits(TOKENS), wanted.logits(TOKENS))
    assert np.array_equal(session.prefill(TOKENS[:1].numpy())[0], wanted.prefill(TOKENS[:1].numpy())[0])
    assert not torch.allclose(session.logits(TOKENS), OnnxSession(base, threads=1).logits(TOKENS), atol=1e-2)
    assert session.artifact_id == Package(folder / "delta").description.id
    assert contents(base) == before


def test_every_parameter_has_its_place_in_the_graph(models: Any) -> None:
    for variant in VARIANTS:
        folder = models(variant)
        model = load(str(folder / "base")).model
        places = slots(pair(folder, "fp32")[0], model.config, read_export(pair(folder, "fp32")[0]).options)
        named = {part.name for slot in places for part in slot.source.parts}
        assert named == set(Checkpoint(folder / "base").names), variant
        for slot in places:
            assert all(stored.holds(array) for stored, array in zip(slot.stored, encoded(slot, model), strict=True))


def encoded(slot: Slot, model: PreTrainedModel) -> list[Any]:
    state = model.state_dict()
    return slot.encode({part.name: state[part.name] for part in slot.source.parts})


def ragged(model: PreTrainedModel) -> PreTrainedModel:
    keep_neurons(model, {0: torch.arange(70), 3: torch.arange(0, 80, 2)})
    drop_attention(model, (1, 4))
    return model


def shared(model: PreTrainedModel) -> PreTrainedModel:
    share_blocks(model, {1: (3, 4)})
    return model


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
@pytest.mark.parametrize("cut", [ragged, shared])
def test_models_of_other_layouts_are_patched_and_attached_to(cut: Any, dtype: str, tmp_path: Path) -> None:
    folder = made(tmp_path, cut(tiny("llama")), noisy(cut(tiny("llama"))))
    base, direct = pair(folder, dtype)
    session = attach(base, folder / "delta", base=str(folder / "base"), threads=1)
    assert torch.equal(session.logits(TOKENS), OnnxSession(direct, threads=1).logits(TOKENS))
    patch(base, folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    assert (tmp_path / "x" / "model.onnx_data").read_bytes() == (direct / "model.onnx_data").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_an_fp32_export_holds_bases_of_every_dtype(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = made(tmp_path, model_of(variant), noisy(model_of(variant)), dtype)
    base, direct = pair(folder, "fp32")
    session = attach(base, folder / "delta", threads=1)
    assert torch.equal(session.logits(TOKENS), OnnxSession(direct, threads=1).logits(TOKENS))


def test_an_fp16_export_of_an_fp16_base_needs_no_checkpoint(tmp_path: Path) -> None:
    folder = made(tmp_path, tiny("llama"), noisy(tiny("llama")), torch.float16)
    base, direct = pair(folder, "fp16")
    session = attach(base, folder / "delta", threads=1)
    assert torch.equal(session.logits(TOKENS), OnnxSession(direct, threads=1).logits(TOKENS))


@pytest.mark.parametrize("options", [{"algorithm": "hqq"}, {"embeddings": "int4"}, {"embeddings": "fp32"}])
def test_other_ways_to_quantise_are_patched_too(options: dict[str, str], models: Any, tmp_path: Path) -> None:
    folder = models("llama")
    base, direct = (
        exported(folder / name, tmp_path / name, "int4", block_size=16, **options) for name in ("base", "again")
    )
    patch(base, folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "x" / name).read_bytes() == (direct / name).read_bytes()


def test_the_folder_of_transformers_js_is_patched(models: Any, tmp_path: Path) -> None:
    folder = models("llama")
    base, direct = (
        exported(folder / name, tmp_path / name, "int4", layout="transformersjs") for name in ("base", "again")
    )
    patch(base, folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    ours, theirs = contents(tmp_path / "x"), contents(direct)
    assert ours.keys() == theirs.keys()
    assert ours["onnx/model_q4.onnx_data"] == theirs["onnx/model_q4.onnx_data"]
    session = attach(base, folder / "delta", base=str(folder / "base"), threads=1)
    assert torch.equal(session.logits(TOKENS), OnnxSession(direct, threads=1).logits(TOKENS))


def test_a_patched_export_says_what_it_was_made_of(models: Any, tmp_path: Path) -> None:
    folder = models("llama")
    patch(pair(folder, "fp32")[0], folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    record, description = read_export(tmp_path / "x"), Package(folder / "delta").description
    assert (record.source.kind, record.artifact_id) == ("delta", description.id)
    assert record.source.name == f"tuned (delta {description.id} of base)"
    assert description.id in (tmp_path / "x" / "README.md").read_text()
    assert OnnxSession(tmp_path / "x").artifact_id == description.id


def test_a_fine_tune_that_ends_otherwise_ends_so_in_every_runtime(tmp_path: Path) -> None:
    tuned = noisy(tiny("llama"))
    tuned.config.eos_token_id = tuned.generation_config.eos_token_id = [257, 65]
    folder = made(tmp_path, tiny("llama"), tuned)
    base, direct = pair(folder, "fp32")
    patch(base, folder / "delta", str(folder / "base"), tmp_path / "x", TOKENS)
    for name in ("genai_config.json", "generation_config.json", "config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (direct / name).read_bytes()
    assert json.loads((tmp_path / "x" / "genai_config.json").read_text())["model"]["eos_token_id"] == [257, 65]


# --- Mistakes


@pytest.fixture(scope="module")
def llama(models: Any) -> Path:
    """The folder of the llama, with exports of its base."""
    folder: Path = models("llama")
    for dtype in ("fp32", "fp16", "int4"):
        pair(folder, dtype)
    return folder


def refused(folder: Path, tmp_path: Path, match: str, dtype: str = "fp32", **changes: Path) -> None:
    """Expect `attach` with the checkpoint, and `patch`, to refuse, and to leave nothing."""
    names = {"export": folder / f"base-{dtype}", "delta": folder / "delta", "base": folder / "base"} | changes
    with pytest.raises(FoldawayError, match=match):
        attach(names["export"], names["delta"], base=str(names["base"]))
    with pytest.raises(FoldawayError, match=match):
        patch(names["export"], names["delta"], str(names["base"]), tmp_path / "deep" / "x", TOKENS)
    assert not list((tmp_path / "deep").iterdir())


def test_a_smoothed_export_is_refused(llama: Path, tmp_path: Path) -> None:
    base = exported(llama / "base", tmp_path / "smoothed", "int8", smooth=0.5)
    refused(llama, tmp_path, "was smoothed, by scales that only the base's own activations give", export=base)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int4"])
def test_the_export_of_another_model_is_refused(dtype: str, llama: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.mul_(0.9)
    write_model(model.to(torch.bfloat16), byte_tokenizer(), tmp_path / "other")
    other = exported(tmp_path / "other", tmp_path / "other-export", dtype)
    refused(llama, tmp_path, "export is not what base gives", export=other)
    if dtype == "fp32":
        with pytest.raises(ConfigError, match=r"this is not the base of delta: model\.embed_tokens"):
            attach(other, llama / "delta")


def test_an_export_that_differs_in_one_unchanged_matrix_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "base-fp32", tmp_path / "export")
    model = load(str(llama / "base")).model
    place = next(
        stored
        for slot in slots(tmp_path / "export", model.config, read_export(tmp_path / "export").options)
        for stored in slot.stored
        if stored.name == "model.layers.2.mlp.up_proj.MatMul.weight"
    )
    with place.file.open("r+b") as file:
        file.seek(place.offset or 0)
        file.write(bytes(4))
    refused(llama, tmp_path, "model.layers.2.mlp.up_proj", export=tmp_path / "export")
    with pytest.raises(ConfigError, match=r"not the base of delta: model\.layers\.2\.mlp\.up_proj"):
        attach(tmp_path / "export", llama / "delta")


def test_another_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path, "not the base of delta", base=llama / "tuned")


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
def test_an_export_that_rounds_needs_the_checkpoint(dtype: str, llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not hold the base's weights exactly .* from BF16\): give the base's"):
        attach(llama / f"base-{dtype}", llama / "delta")


def test_a_fine_tune_with_new_tokens_is_refused(llama: Path, tmp_path: Path) -> None:
    tuned = noisy(tiny("llama"))
    tuned.resize_token_embeddings(262, mean_resizing=False)
    made(tmp_path / "grown", tiny("llama"), tuned)
    match = r"another vocab_size than the export's \(262, not 259\): bring the fine-tune back with foldaway delta apply"
    refused(llama, tmp_path, match, delta=tmp_path / "grown" / "delta")


def test_new_rows_are_refused_whatever_the_config_says(llama: Path, tmp_path: Path) -> None:
    tuned = noisy(tiny("llama"))
    tuned.resize_token_embeddings(262, mean_resizing=False)
    tuned.config.vocab_size = 259
    write_model(tuned.to(torch.bfloat16), byte_tokenizer(), tmp_path / "tuned")
    pack(Checkpoint(llama / "base"), Checkpoint(tmp_path / "tuned"), tmp_path / "delta", DARE)
    match = r"changes the model's shape at model.embed_tokens.weight: the graph has 259 rows there, the fine-tune 262"
    refused(llama, tmp_path, match, delta=tmp_path / "delta")


def test_a_fine_tune_that_computes_otherwise_is_refused(llama: Path, tmp_path: Path) -> None:
    tuned = noisy(tiny("llama"))
    tuned.config.rope_parameters["rope_theta"] = 5e5
    made(tmp_path / "far", tiny("llama"), tuned)
    refused(llama, tmp_path, "another rope_parameters than the export's", delta=tmp_path / "far" / "delta")


def test_what_the_graph_has_no_place_for_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "tuned", tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(3, 64)}, tmp_path / "tuned" / "model.safetensors")
    pack(Checkpoint(llama / "base"), Checkpoint(tmp_path / "tuned"), tmp_path / "delta", DARE)
    refused(llama, tmp_path, "changes score.weight, for which the graph has no place", delta=tmp_path / "delta")


def test_another_architecture_or_format_is_refused(llama: Path, models: Any, tmp_path: Path) -> None:
    refused(llama, tmp_path, "of a qwen2 model, and the fine-tune is a llama", export=pair(models("qwen2"), "fp32")[0])
    export(load(str(llama / "base")), tmp_path / "hf", to="hf", check_tokens=TOKENS)
    refused(llama, tmp_path, "an export to hf", export=tmp_path / "hf")
    refused(llama, tmp_path, "is not an export", export=llama / "base")
    refused(llama, tmp_path, "not a delta package", delta=llama / "base")


def test_an_export_without_its_graph_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama / "base-fp32", tmp_path / "export")
    (tmp_path / "export" / "model.onnx").unlink()
    refused(llama, tmp_path, "holds no graph", export=tmp_path / "export")


@pytest.mark.parametrize("after", [0, 5, 30, 60, 90])
def test_killed_at_any_moment_a_patch_leaves_nothing(after: int, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        patch(llama / "base-int4", llama / "delta", str(llama / "base"), tmp_path / "x", TOKENS, progress=killer(after))
    assert not list(tmp_path.iterdir())


def test_a_patch_that_computes_something_else_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Slot.encode

    def wrong(self: Slot, parameters: Any) -> Any:
        arrays = right(self, parameters)
        if "layers.3.mlp.up_proj" in self.stored[0].name and not torch.equal(*seen(parameters)):
            return [array + 1 for array in arrays]
        return arrays

    base = load_file(llama / "base" / "model.safetensors")

    def seen(parameters: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (name,) = parameters
        return parameters[name], base[name]

    monkeypatch.setattr(Slot, "encode", wrong)
    with pytest.raises(ParityError, match="a logit is off by"):
        patch(llama / "base-fp32", llama / "delta", str(llama / "base"), tmp_path / "x", TOKENS)
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_not_empty_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        patch(llama / "base-fp32", llama / "delta", str(llama / "base"), tmp_path, TOKENS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
