"""Delta packages: from two folders to a package and back, bit for bit, or refused before anything is touched."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.delta import apply as applying
from compress.delta import indices, values
from compress.delta import pack as packing
from compress.delta.apply import apply
from compress.delta.checkpoint import Adapter, Checkpoint, open_base, open_finetuned
from compress.delta.indices import Coding
from compress.delta.masks import checksum, random_index
from compress.delta.pack import Storage, pack
from compress.delta.package import Description, Package, is_delta
from compress.delta.slot import DeltaSlot, attach
from compress.delta.values import ValueType
from compress.errors import ArtifactError, ConfigError, CorruptArtifact, FoldawayError, ManifestVersionError
from compress.evaluate import logits_of
from compress.methods.darex import DarexConfig, merge
from tests.conftest import _COMMON, D, V, byte_tokenizer, tiny, token_rows
from tests.reference import darex as reference

DARE = DarexConfig(p="9/10", rescale="dare")
EXACT = DarexConfig(p=0, rescale="none")
CHANGED_ROWS = [3, 10, 40]


# --- Bases and fine-tunes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "wpe", "lm_head"))


def finetuned(model: PreTrainedModel, seed: int = 1, untouched: Sequence[int] = (1,)) -> PreTrainedModel:
    """Weights and a little noise, but for some blocks; of embeddings a few rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = re.search(r"\.(\d+)\.", name)
            if block and int(block[1]) in untouched:
                continue
            noise = 0.03 * torch.randn(parameter.shape, generator=generator)
            if is_embedding(name):
                parameter[CHANGED_ROWS] += noise[CHANGED_ROWS]
            else:
                parameter += noise
    return model


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


def pair_of(architecture: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Path, Path]:
    base = saved(tiny(architecture), folder / "base", dtype)
    return base, saved(finetuned(tiny(architecture), **options), folder / "tuned", dtype)


def edited(folder: Path, copy: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and its fine-tune, in which two of five blocks changed."""
    return pair_of("llama", tmp_path_factory.mktemp("pair"), untouched=(1, 2, 4))


def some_inputs(name: str) -> Tensor | None:
    """Calibration of any matrix of the tiny llama."""
    cols = 80 if "down_proj" in name else D
    return normal(40, cols, seed=len(name)) + 0.2


def packed(pair: tuple[Path, Path], folder: Path, config: DarexConfig = DARE, *args: Any, **options: Any) -> Path:
    pack(Checkpoint(pair[0]), Checkpoint(pair[1]), folder, config, *args, **options)
    return folder


# --- Comparing


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digest(stored: reference.Stored) -> str:
    return hashlib.sha256(stored.bits.tobytes()).hexdigest()[:16]


def state_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return model.requires_grad_(False).eval()


def entries_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "delta.json").read_text())["tensors"]
    return found


def assert_comes_back(package: Path, base: Path, folder: Path) -> dict[str, reference.Stored]:
    """Apply a package: every tensor is what its entry says and what the slow decoder finds. Returns the tensors."""
    apply(Package(package), Checkpoint(base), folder)
    found = reference.read_folder(folder)
    expected = reference.decode(package, reference.read_folder(base))
    assert set(found) == set(expected) == set(entries_of(package))
    for name, entry in entries_of(package).items():
        assert found[name].dtype == expected[name].dtype == entry["dtype"]
        assert found[name].bits.shape == expected[name].bits.shape == tuple(entry["shape"])
        assert np.array_equal(found[name].bits, expected[name].bits), name
        assert digest(found[name]) == entry["result"], name
    return found


# --- Round trips


def test_every_architecture_comes_back_as_packed(architecture: str, tmp_path: Path) -> None:
    base, tuned = pair_of(architecture, tmp_path)
    description = pack(Checkpoint(base), Checkpoint(tuned), tmp_path / "delta", DARE)
    found = assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")
    before, wanted = reference.read_folder(base), reference.read_folder(tuned)
    assert set(found) == set(wanted)
    for name, entry in description.tensors.items():
        if is_embedding(name):
            assert (entry.kind, entry.nnz) == ("rows", len(CHANGED_ROWS))
            untouched = np.delete(np.arange(entry.shape[0]), CHANGED_ROWS)
            assert np.array_equal(found[name].bits[untouched], before[name].bits[untouched])
        elif np.array_equal(before[name].bits, wanted[name].bits):
            assert entry.kind == "same"
        elif len(entry.shape) == 1:
            assert entry.kind == "dense"
            assert np.array_equal(found[name].bits, wanted[name].bits)
        else:
            assert entry.kind == "seed"
            assert entry.transposed == (architecture == "gpt2")
    assert {entry.kind for entry in description.tensors.values()} == {"rows", "same", "dense", "seed"}
    model = loaded(tmp_path / "applied")
    for name, tensor in model.state_dict().items():
        if name in found:
            assert raw(tensor) == found[name].bits.tobytes()
    slot = attach(live := loaded(base), tmp_path / "delta")
    assert state_of(live) == state_of(model)
    slot.detach()
    assert state_of(live) == state_of(loaded(base))


KEEPS: dict[str, dict[str, Any]] = {
    "one-of-m": {"p": "9/10", "scheme": "one-of-m", "rescale": "dare", "seed": 5},
    "bernoulli": {"p": "17/20", "scheme": "bernoulli", "rescale": "fixed", "q": 0.4},
    "columns": {"p": "3/4", "scheme": "columns", "rescale": "none"},
    "magnitude": {"p": "9/10", "keep": "magnitude", "rescale": "none"},
    "wanda": {"p": "1/2", "keep": "wanda", "rescale": "least-squares"},
}


@pytest.mark.parametrize(
    ("keep", "kind", "scale"),
    [
        *[("one-of-m", kind, scale) for kind in values.VALUE_TYPES for scale in ("row", "tensor")],
        ("bernoulli", "int8", "row"),
        ("bernoulli", "sign", "tensor"),
        ("columns", "int4", "row"),
        ("columns", "bf16", "tensor"),
        ("magnitude", "int4", "tensor"),
        ("magnitude", "sign", "row"),
        ("wanda", "int8", "tensor"),
        ("wanda", "bf16", "row"),
    ],
)
def test_every_way_to_store_comes_back_as_packed(
    keep: str, kind: ValueType, scale: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    packed(pair, tmp_path / "delta", DarexConfig(**KEEPS[keep]), Storage(kind, scale), inputs=some_inputs)
    pruned = [e["kind"] for e in entries_of(tmp_path / "delta").values() if e["index"] is not None]
    assert set(pruned) <= {"seed"} if keep in ("one-of-m", "bernoulli", "columns") else {"u16", "gap8", "bitmap"}
    assert len(pruned) == 14
    assert_comes_back(tmp_path / "delta", pair[0], tmp_path / "applied")


def test_positions_are_written_in_whichever_way_is_smallest(wide: Mapping[str, Path]) -> None:
    for kind in ("u16", "gap8", "bitmap"):
        assert entries_of(wide[kind])[DOWN]["kind"] == kind


def test_every_way_to_write_positions_comes_back_as_packed(wide: Mapping[str, Path], tmp_path: Path) -> None:
    for kind in ("seed", "u16", "gap8", "bitmap", "exact"):
        assert_comes_back(wide[kind], wide["base"], tmp_path / kind)


def test_a_package_is_what_merging_in_memory_gives(pair: tuple[Path, Path], tmp_path: Path) -> None:
    config = DarexConfig(p="9/10", rescale="analytic-mse", seed=2)
    packed(pair, tmp_path / "delta", config, Storage("bf16", rows="exact"), inputs=some_inputs)
    apply(Package(tmp_path / "delta"), Checkpoint(pair[0]), tmp_path / "applied")
    base, tuned, found = (load_file(f / "model.safetensors") for f in (*pair, tmp_path / "applied"))
    matrices = {name for name, entry in entries_of(tmp_path / "delta").items() if entry["kind"] == "seed"}
    inputs = {name: some_inputs(name) for name in matrices}
    merged = merge(
        {name: base[name].float() for name in matrices},
        {name: tuned[name].float() for name in matrices},
        config,
        inputs,
    )
    for name in matrices:
        assert torch.allclose(found[name].float(), merged[name], rtol=2**-8, atol=1e-3)
    for name in set(found) - matrices:
        assert torch.equal(found[name], tuned[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpoints_of_other_types_come_back_as_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = pair_of("llama", tmp_path, dtype, untouched=(1, 2, 4))
    packed((base, tuned), tmp_path / "delta")
    assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")
    model = loaded(tmp_path / "applied")
    assert model.dtype == dtype
    assert state_of(attach(loaded(base), tmp_path / "delta").model) == state_of(model)


def test_a_fine_tune_of_another_type_than_its_base_comes_back_in_its_own(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base", torch.float32)
    tuned = saved(finetuned(tiny("llama"), untouched=(1, 2, 4)), tmp_path / "tuned")
    packed((base, tuned), tmp_path / "delta", DARE, Storage(rows="exact"))
    found = assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")
    assert {stored.dtype for stored in found.values()} == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_dropped_and_nothing_rounded_is_the_fine_tune_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = pair_of("llama", tmp_path, dtype, untouched=(1, 2, 4))
    packed((base, tuned), tmp_path / "delta", EXACT, Storage("bf16", rows="exact"))
    found = assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")
    for name, stored in reference.read_folder(tuned).items():
        assert np.array_equal(found[name].bits, stored.bits), name


def test_the_sign_of_a_zero_comes_back_as_well(pair: tuple[Path, Path], tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")

    def zero(sign: float) -> Callable[[dict[str, Tensor]], None]:
        def put(tensors: dict[str, Tensor]) -> None:
            for name in names:
                tensors[name][50, 0] = sign * 0.0
            tensors["model.norm.weight"][0] = sign * 0.0

        return put

    base, tuned = edited(pair[0], tmp_path / "base", zero(1)), edited(pair[1], tmp_path / "tuned", zero(-1))
    packed((base, tuned), tmp_path / "delta", EXACT, Storage("bf16", rows="exact"))
    found = assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")
    for name, stored in reference.read_folder(tuned).items():
        assert np.array_equal(found[name].bits, stored.bits), name
    live = attach(loaded(base), tmp_path / "delta").model
    assert state_of(live) == state_of(loaded(tuned))


def test_a_model_that_is_its_own_fine_tune_takes_no_room(pair: tuple[Path, Path], tmp_path: Path) -> None:
    description = pack(Checkpoint(pair[0]), Checkpoint(pair[0]), tmp_path / "delta", DARE)
    assert {entry.kind for entry in description.tensors.values()} == {"same"}
    sizes = description.sizes
    assert sizes.pruned + sizes.rows + sizes.dense == 0
    assert_comes_back(tmp_path / "delta", pair[0], tmp_path / "applied")
    assert attach(loaded(pair[0]), tmp_path / "delta").attached is not None


def test_tied_embeddings_are_stored_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    packed(pair, tmp_path / "delta")
    assert [name for name in entries_of(tmp_path / "delta") if is_embedding(name)] == ["model.embed_tokens.weight"]
    apply(Package(tmp_path / "delta"), Checkpoint(pair[0]), tmp_path / "applied")
    model = loaded(tmp_path / "applied")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    live = attach(loaded(pair[0]), tmp_path / "delta").model
    tokens = token_rows(1).tokens
    assert torch.equal(logits_of(live)(tokens), logits_of(model)(tokens))
    assert not torch.equal(logits_of(live)(tokens), logits_of(loaded(pair[0]))(tokens))


@pytest.mark.parametrize("more", [6, -9])
@pytest.mark.parametrize("rows", ["int8", "exact"])
def test_a_vocabulary_that_grew_or_shrank_comes_back(more: int, rows: Any, tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "base")
    model = finetuned(tiny("llama"), untouched=range(5))
    model.config.pad_token_id = 0
    model.resize_token_embeddings(V + more)
    tuned = saved(model, tmp_path / "tuned")
    packed((base, tuned), tmp_path / "delta", DARE, Storage(rows=rows))
    found = assert_comes_back(tmp_path / "delta", base, tmp_path / "applied")["model.embed_tokens.weight"].bits
    expected = reference.read_folder(tuned)["model.embed_tokens.weight"].bits
    exact = np.arange(V + more) if rows == "exact" else np.delete(np.arange(V + more), CHANGED_ROWS)
    assert np.array_equal(found[exact], expected[exact])
    assert loaded(tmp_path / "applied").config.vocab_size == V + more
    live = loaded(base)
    with pytest.raises(ConfigError, match="foldaway delta apply"):
        attach(live, tmp_path / "delta")
    assert state_of(live) == state_of(loaded(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool])
def test_a_tensor_that_the_base_lacks_comes_along(dtype: torch.dtype, pair: tuple[Path, Path], tmp_path: Path) -> None:
    extra = (100 * normal(3, 4)).abs().to(dtype)
    tuned = edited(pair[1], tmp_path / "tuned", lambda tensors: tensors.update({"score.weight": extra}))
    packed((pair[0], tuned), tmp_path / "delta")
    assert entries_of(tmp_path / "delta")["score.weight"]["kind"] == "dense"
    found = assert_comes_back(tmp_path / "delta", pair[0], tmp_path / "applied")
    assert found["score.weight"].bits.tobytes() == raw(extra)
    live = loaded(pair[0])
    with pytest.raises(ConfigError, match=r"score\.weight"):
        attach(live, tmp_path / "delta")


def test_a_tensor_that_the_fine_tune_lost_is_not_brought_back(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = edited(pair[1], tmp_path / "tuned", lambda tensors: tensors.pop("model.layers.4.mlp.up_proj.weight"))
    packed((pair[0], tuned), tmp_path / "delta")
    found = assert_comes_back(tmp_path / "delta", pair[0], tmp_path / "applied")
    assert "model.layers.4.mlp.up_proj.weight" not in found


def test_files_of_several_shards_come_back(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed(pair, tmp_path / "one")
    apply(Package(tmp_path / "one"), Checkpoint(pair[0]), tmp_path / "whole")
    monkeypatch.setattr(packing, "SHARD_BYTES", 1_000)
    monkeypatch.setattr(applying, "SHARD_BYTES", 60_000)
    packed(pair, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_comes_back(tmp_path / "many", pair[0], tmp_path / "parts")
    shards = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 3
    assert (
        sum(t.bits.nbytes for t in reference.read_folder(tmp_path / "parts").values())
        == json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    )
    assert state_of(loaded(tmp_path / "parts")) == state_of(loaded(tmp_path / "whole"))
    # A base in several files is as good as a base in one.
    packed((tmp_path / "parts", pair[0]), tmp_path / "back", EXACT, Storage("bf16", rows="exact"))
    apply(Package(tmp_path / "back"), Checkpoint(tmp_path / "parts"), tmp_path / "base")
    assert state_of(loaded(tmp_path / "base")) == state_of(loaded(pair[0]))


def test_config_and_tokenizer_of_the_fine_tune_travel_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(pair[1], tuned)
    byte_tokenizer().save_pretrained(tuned)
    (tuned / "training_args.json").write_text("{}")
    pack(
        Checkpoint(pair[0]), Checkpoint(tuned), tmp_path / "delta", DARE, names=("org/base", "me/tuned"), licence="MIT"
    )
    described = Package(tmp_path / "delta").description
    assert (described.base.name, described.finetuned.name, described.licence) == ("org/base", "me/tuned", "MIT")
    apply(Package(tmp_path / "delta"), Checkpoint(pair[0]), tmp_path / "applied")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "applied" / name).read_bytes() == (tuned / name).read_bytes()
    assert not (tmp_path / "delta" / "training_args.json").exists()
    assert "org/base" in (tmp_path / "delta" / "README.md").read_text()


def test_packing_twice_gives_the_same_package(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = packed(pair, tmp_path / "a"), packed(pair, tmp_path / "b")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    other = packed(pair, tmp_path / "c", DarexConfig(p="9/10", rescale="dare", seed=1))
    assert Package(first).description.id != Package(other).description.id


# --- LoRA


def adapter_of(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], **settings: Any) -> Path:
    """An adapter folder as peft writes it: module -> A (r, in) and B (out, r)."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none", "target_modules": list(factors)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(("settings", "scaling"), [({}, 4.0), ({"use_rslora": True}, 8 / math.sqrt(2))])
def test_an_adapter_is_packed_as_the_model_it_would_be_merged_into(
    settings: dict[str, Any], scaling: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    modules = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.3.mlp.down_proj": (80, 64)}
    factors = {name: (0.1 * normal(2, cols), 0.1 * normal(rows, 2, seed=1)) for name, (cols, rows) in modules.items()}
    adapter = open_finetuned(
        str(adapter_of(tmp_path / "adapter", factors, **settings)), base := open_base(str(pair[0]))
    )
    assert isinstance(adapter, Adapter)
    description = pack(base, adapter, tmp_path / "delta", EXACT, Storage("bf16"))
    assert {name for name, entry in description.tensors.items() if entry.kind != "same"} == {
        f"{name}.weight" for name in modules
    }
    found = assert_comes_back(tmp_path / "delta", pair[0], tmp_path / "applied")
    for name, (down, up) in factors.items():
        expected = base.get(f"{name}.weight").float().numpy() + reference.lora_delta(down, up, scaling)
        ours = reference.widen(found[f"{name}.weight"])
        np.testing.assert_allclose(ours, expected, rtol=2**-8, atol=1e-5)
    loaded(tmp_path / "applied")
    packed_adapter = pack(base, adapter, tmp_path / "pruned", DARE)
    assert packed_adapter.sizes.pruned_parameters == 64 * 64 + 80 * 64
    assert_comes_back(tmp_path / "pruned", pair[0], tmp_path / "merged")


@pytest.mark.parametrize(
    ("architecture", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc", "c_proj"])]
)
def test_an_adapter_is_what_peft_merges(architecture: str, targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = saved(tiny(architecture), tmp_path / "base", torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    model = peft.get_peft_model(tiny(architecture), config)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(normal(*parameter.shape, seed=seed))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    adapter = open_finetuned(str(tmp_path / "adapter"), open_base(str(base)))
    before = load_file(base / "model.safetensors")
    assert {name for name in adapter.names if not torch.equal(adapter.get(name), before[name])} == {
        name for name in before if any(f".{target}.weight" in name for target in targets)
    }
    wrong = [name for name in adapter.names if not torch.allclose(adapter.get(name), merged[name], atol=1e-5)]
    assert not wrong


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 4}},
        {"bias": "all"},
        {"peft_type": "IA3"},
    ],
)
def test_an_adapter_that_does_more_than_add_a_product_is_refused(
    settings: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    factors = {"model.layers.0.self_attn.q_proj": (normal(2, 64), normal(64, 2))}
    adapter = open_finetuned(str(adapter_of(tmp_path / "adapter", factors, **settings)), open_base(str(pair[0])))
    with pytest.raises(ConfigError, match="merge_and_unload"):
        pack(open_base(str(pair[0])), adapter, tmp_path / "delta", DARE)
    assert not (tmp_path / "delta").exists()


def test_an_adapter_of_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its products would be left out without a word, and the package be that of the base."""
    factors = {"transformer.h.0.attn.c_attn": (normal(2, 64), normal(64, 2))}
    adapter = open_finetuned(str(adapter_of(tmp_path / "adapter", factors)), open_base(str(pair[0])))
    with pytest.raises(ConfigError, match="c_attn"):
        pack(open_base(str(pair[0])), adapter, tmp_path / "delta", DARE)


# --- What is refused when packing


def test_models_that_are_no_pair_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = saved(tiny("gpt2"), tmp_path / "other")
    with pytest.raises(ConfigError, match="no tensor in common"):
        packed((other, pair[1]), tmp_path / "delta")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        packed(pair, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious.txt"]
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(
    name: str, number: float, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned = edited(pair[1], tmp_path / "tuned", lambda tensors: tensors[name].view(-1)[7:8].fill_(number))
    with pytest.raises(ConfigError, match="not finite"):
        packed((pair[0], tuned), tmp_path / "delta")
    assert [file.name for file in tmp_path.iterdir()] == ["tuned"]


@pytest.mark.parametrize("options", [{"values": "int3"}, {"scale": "column"}, {"rows": "bf16"}])
def test_a_way_to_store_that_is_not_known_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Storage(**options)


# --- Packages that were changed

DOWN = "model.layers.0.mlp.down_proj.weight"
WIDTH = 644
"""Of its rows, so that a bitmap has four bits to spare, and gaps of one element a row are long."""
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def wide_model() -> PreTrainedModel:
    options = {"num_hidden_layers": 2, "intermediate_size": WIDTH, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**_COMMON, **options}))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and a package of every kind."""
    folder = tmp_path_factory.mktemp("wide")
    base, tuned = saved(wide_model(), folder / "base"), saved(finetuned(wide_model()), folder / "tuned")

    def wide_inputs(name: str) -> Tensor:
        return normal(10, WIDTH if "down_proj" in name else D)

    made: dict[str, tuple[DarexConfig, Storage]] = {
        "seed": (DARE, Storage()),
        "sign": (DARE, Storage("sign", "tensor")),
        "exact": (DARE, Storage("bf16", "tensor", rows="exact")),
        "u16": (DarexConfig(p="643/644", keep="wanda", rescale="none"), Storage()),
        "gap8": (DarexConfig(p="19/20", keep="magnitude", rescale="none"), Storage("int4")),
        "bitmap": (DarexConfig(p="1/2", keep="magnitude", rescale="none"), Storage("int4")),
    }
    for name, (config, storage) in made.items():
        pack(Checkpoint(base), Checkpoint(tuned), folder / name, config, storage, inputs=wide_inputs)
    return {"base": base, "tuned": tuned, **{name: folder / name for name in made}}


@pytest.fixture(scope="module")
def resident(wide: Mapping[str, Path]) -> PreTrainedModel:
    """The base in memory, which no refused package may touch."""
    return loaded(wide["base"])


Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def rewritten(package: Path, copy: Path, edit: Edit) -> Path:
    """A copy of a package of one file, with other tensors or another description, consistent in hashes and id."""
    shutil.copytree(package, copy)
    described = json.loads((copy / "delta.json").read_text())
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors, described)
    save_file(tensors, file)
    content = file.read_bytes()
    described["files"][file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(copy, described)
    return copy


def reseal(package: Path, described: dict[str, Any]) -> None:
    rest = {key: value for key, value in described.items() if key != "id"}
    described["id"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
    (package / "delta.json").write_text(json.dumps(described))


def test_a_package_that_is_written_anew_without_a_change_is_accepted(wide: Mapping[str, Path], tmp_path: Path) -> None:
    for kind in ("seed", "sign", "exact", "u16", "gap8", "bitmap"):
        rewritten(wide[kind], tmp_path / kind, lambda tensors, described: None)
        assert Package(tmp_path / kind).description.id == Package(wide[kind]).description.id


def assert_refused(
    package: Path, base: Path, model: PreTrainedModel, folder: Path, word: str, error: type[FoldawayError]
) -> None:
    """Neither a live model nor a new folder is touched."""
    before = state_of(model)
    with pytest.raises(error, match=word):
        attach(model, package)
    assert state_of(model) == before
    files = {file.name for file in folder.iterdir()}
    with pytest.raises(error, match=word):
        apply(Package(package), Checkpoint(base), folder / "out")
    assert {file.name for file in folder.iterdir()} == files


def entry(**changes: Any) -> Edit:
    """Another entry of the down projection."""
    return lambda tensors, described: described["tensors"][DOWN].update(changes)


def description(**changes: Any) -> Edit:
    return lambda tensors, described: described.update(changes)


def tensor(name: str, place: Any, value: float) -> Edit:
    """Another number in a stored tensor."""

    def put(tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        tensors[name][place] = value

    return put


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def put(tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return put


def one_bit_moved(tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    bitmap = tensors[f"{DOWN}.bitmap"]
    first = int(bitmap[0, 0])
    (on, off) = (next(i for i in range(8) if first >> i & 1 == bit) for bit in (1, 0))
    bitmap[0, 0] = first ^ (1 << on) ^ (1 << off)


def a_seed_for_more(tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """A description of a few bytes that asks for a mask of 2^42 elements."""
    described["tensors"][DOWN].update(shape=[1 << 20, 1 << 22], nnz=len(tensors[f"{DOWN}.values"]))


def a_sparse_seed_for_more(tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """The same where hardly any of them would be kept."""
    described.update(density=f"1/{1 << 36}", scheme="bernoulli")
    described["tensors"][DOWN].update(shape=[1 << 20, 1 << 22])


SAY_ANOTHER = "not those that were packed"
SAY_SHAPE = "another shape or type"
SAY_RESULT = "does not come out"

CHANGES: dict[str, tuple[str, Edit, str]] = {
    # Other random masks.
    "another seed": ("seed", description(seed=1), SAY_ANOTHER),
    "another density": ("seed", description(density="1/9"), SAY_ANOTHER),
    "another scheme": ("seed", description(scheme="bernoulli"), SAY_ANOTHER),
    "no scheme": ("seed", description(scheme=None), "no scheme"),
    "one-of-m of a density that is none": ("sign", description(density="3/20"), "no scheme|cannot keep"),
    "a density above 1": ("sign", description(density="3"), "no scheme|cannot keep"),
    "a density of 0": ("seed", description(density="0"), "no scheme"),
    "a density that is no number": ("seed", description(density="1/0"), "density"),
    "a density that is no fraction": ("seed", description(density="0.1"), "density"),
    # Other entries.
    "one more value": ("seed", lambda t, d: entry(nnz=d["tensors"][DOWN]["nnz"] + 1)(t, d), SAY_SHAPE),
    "one more sign": (
        "sign",
        lambda t, d: entry(nnz=d["tensors"][DOWN]["nnz"] - 1)(t, d),
        f"{SAY_SHAPE}|{SAY_ANOTHER}",
    ),
    "less than no values": ("seed", entry(nnz=-1), "schema"),
    "an enormous mask": ("sign", a_seed_for_more, "cannot keep"),
    "an enormous mask that keeps nothing": ("sign", a_sparse_seed_for_more, "shape"),
    "a shape of the other way round": ("sign", entry(shape=[WIDTH, D]), "shape"),
    "a shape below nothing": ("sign", entry(shape=[-D, -WIDTH]), "."),
    "a shape of one dimension": ("seed", entry(shape=[D * WIDTH]), "kind"),
    "turned": ("sign", entry(transposed=True), f"{SAY_ANOTHER}|{SAY_RESULT}"),
    "another checksum": ("seed", entry(index="0" * 16), SAY_ANOTHER),
    "another result": ("seed", entry(result="0" * 16), SAY_RESULT),
    "another base": ("seed", entry(base="0" * 16), "not the base"),
    "another type of weight": ("seed", entry(dtype="F32"), f"F32|{SAY_RESULT}"),
    "no type of weight": ("seed", entry(dtype="I8"), "kind"),
    "written out instead of drawn": ("seed", entry(kind="bitmap"), "missing"),
    "dense instead of pruned": ("seed", entry(kind="dense", base=None, index=None), DOWN),
    "dense with a base": ("seed", entry(kind="dense"), "contradicts"),
    "the same instead of pruned": ("seed", entry(kind="same", index=None), r"not in delta\.json"),
    "pruned without a base": ("seed", entry(base=None), "contradicts"),
    "of no known kind": ("seed", entry(kind="magic"), "schema"),
    "a key that is not known": ("seed", entry(surprise=1), "surprise"),
    "a tensor forgotten": ("seed", lambda t, d: d["tensors"].pop(DOWN), r"not in delta\.json"),
    # Other words for the same bytes.
    "another type of value": ("seed", description(values="int4"), SAY_SHAPE),
    "another sharing of scales": ("seed", description(scale="tensor"), r"not in delta\.json"),
    "another type of rows": ("seed", description(rows="exact"), f"{SAY_SHAPE}|" + r"not in delta\.json"),
    # Other numbers.
    "an infinite scale": ("seed", tensor(f"{DOWN}.scale", 0, math.inf), "not finite"),
    "a scale that is no number": ("sign", tensor(f"{DOWN}.scale", 0, math.nan), "not finite"),
    "an infinite scale of a row": ("seed", tensor(f"{DOWN}.row_scale", 3, math.inf), "not finite"),
    "an infinite value": ("exact", tensor(f"{DOWN}.values", 5, math.inf), "not finite"),
    "a value that is no number": ("exact", tensor(f"{DOWN}.values", 5, math.nan), "not finite"),
    "a sum beyond the type": ("sign", tensor(f"{DOWN}.scale", 0, 3.4e38), f"not finite|{SAY_RESULT}"),
    "an infinite norm": ("seed", tensor(NORM, 5, math.inf), "not finite"),
    "an infinite row": ("exact", tensor(f"{EMBEDDING}.values", (1, 2), math.inf), "not finite"),
    "an infinite scale of a changed row": ("seed", tensor(f"{EMBEDDING}.scale", 1, math.inf), "not finite"),
    "another value": ("seed", tensor(f"{DOWN}.values", 5, 99), SAY_RESULT),
    "another scale": ("seed", tensor(f"{DOWN}.scale", 0, 0.5), SAY_RESULT),
    "another norm": ("seed", tensor(NORM, 5, 0.5), SAY_RESULT),
    "another row": ("seed", tensor(f"{EMBEDDING}.values", (1, 2), 99), SAY_RESULT),
    # Other positions.
    "a column beyond the row": ("u16", tensor(f"{DOWN}.cols", (0, 0), WIDTH), "out of range"),
    "another column": ("u16", replaced(f"{DOWN}.cols", lambda cols: cols.int().flip(0).to(torch.uint16)), SAY_ANOTHER),
    "gaps that lead outside": ("gap8", tensor(f"{DOWN}.gaps", -1, 254), "outside"),
    "another gap": ("gap8", tensor(f"{DOWN}.gaps", 0, 0), SAY_ANOTHER),
    "one gap less": ("gap8", replaced(f"{DOWN}.gaps", lambda gaps: gaps[:-1].clone()), "do not fit"),
    "blocks beyond the gaps": ("gap8", replaced(f"{DOWN}.blocks", lambda blocks: blocks + 1), "do not fit"),
    "blocks that go back": ("gap8", replaced(f"{DOWN}.blocks", lambda blocks: -blocks), "do not fit"),
    "a block too many": ("gap8", replaced(f"{DOWN}.blocks", lambda b: torch.cat([b, b[-1:]])), "do not fit"),
    "no blocks": ("gap8", replaced(f"{DOWN}.blocks", lambda blocks: blocks[:0].clone()), "do not fit"),
    "a bit beyond the row": ("bitmap", replaced(f"{DOWN}.bitmap", lambda bitmap: bitmap | 0x80), "beyond its rows"),
    "another bit": ("bitmap", one_bit_moved, SAY_ANOTHER),
    "a bitmap of fewer columns": ("bitmap", replaced(f"{DOWN}.bitmap", lambda b: b[:, :-1].clone()), SAY_SHAPE),
    "a row beyond the table": ("seed", tensor(f"{EMBEDDING}.row_ids", -1, V), "do not fit"),
    "a row before the table": ("seed", tensor(f"{EMBEDDING}.row_ids", 0, -1), "do not fit"),
    "a row twice": ("exact", tensor(f"{EMBEDDING}.row_ids", 1, CHANGED_ROWS[0]), "do not fit"),
    "rows in another order": ("exact", replaced(f"{EMBEDDING}.row_ids", lambda ids: ids.flip(0)), "do not fit"),
    "more new rows than rows": (
        "seed",
        replaced(f"{EMBEDDING}.new_rows", lambda rows: rows.new_zeros(V + 1, D)),
        "do not fit",
    ),
    "positions of another type": ("gap8", replaced(f"{DOWN}.blocks", lambda blocks: blocks.long()), SAY_SHAPE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_package_that_was_changed_is_refused_even_if_its_hashes_were_computed_anew(
    change: str, wide: Mapping[str, Path], resident: PreTrainedModel, tmp_path: Path
) -> None:
    kind, edit, word = CHANGES[change]
    rewritten(wide[kind], tmp_path / "delta", edit)
    assert_refused(tmp_path / "delta", wide["base"], resident, tmp_path, word, FoldawayError)


def truncate(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return "missing, cut or changed"


def flip_a_bit(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "missing, cut or changed"


def lose_the_weights(folder: Path) -> str:
    next(folder.glob("*.safetensors")).unlink()
    return "missing, cut or changed"


def change_the_config(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    return "missing, cut or changed"


def edit_the_description(folder: Path) -> str:
    text = (folder / "delta.json").read_text()
    (folder / "delta.json").write_text(text.replace('"seed":0', '"seed":1'))
    return "its id is another"


def cut_the_description(folder: Path) -> str:
    (folder / "delta.json").write_text((folder / "delta.json").read_text()[:-100])
    return "JSON"


def lose_the_description(folder: Path) -> str:
    (folder / "delta.json").unlink()
    return "not a delta package"


def add_weights(folder: Path) -> str:
    save_file({"evil": torch.zeros(1)}, folder / "evil.safetensors")
    return "does not belong"


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "delta.json").read_text())
    return found


def of_a_newer_foldaway(folder: Path) -> str:
    reseal(folder, {**described(folder), "version": 2, "novelty": True})
    return "upgrade"


def of_another_format(folder: Path) -> str:
    reseal(folder, {**described(folder), "format": "another"})
    return "schema"


def cut_and_reseal(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()[:-100]
    file.write_bytes(content)
    found = described(folder)
    found["files"][file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(folder, found)
    return "cannot be read"


def name_a_file(folder: Path, name: str, content: bytes = b"secret") -> None:
    found = described(folder)
    found["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    reseal(folder, found)


def name_a_file_above(folder: Path) -> str:
    (folder.parent / "secret.txt").write_bytes(b"secret")
    name_a_file(folder, "../secret.txt")
    return "outside the package"


def name_an_absolute_file(folder: Path) -> str:
    (folder.parent / "secret.txt").write_bytes(b"secret")
    name_a_file(folder, str((folder.parent / "secret.txt").absolute()))
    return "outside the package"


def link_to_a_file_above(folder: Path) -> str:
    (folder.parent / "secret.txt").write_bytes(b"secret")
    (folder / "vocab.txt").symlink_to("../secret.txt")
    name_a_file(folder, "vocab.txt")
    return "outside the package"


def name_the_folder(folder: Path) -> str:
    name_a_file(folder, ".")
    return "missing, cut or changed"


def list_a_tensor_twice(folder: Path) -> str:
    save_file({f"{DOWN}.scale": torch.ones(1)}, folder / "more.safetensors")
    name_a_file(folder, "more.safetensors", (folder / "more.safetensors").read_bytes())
    return re.escape(f"{DOWN}.scale")


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (truncate, CorruptArtifact),
        (flip_a_bit, CorruptArtifact),
        (lose_the_weights, CorruptArtifact),
        (change_the_config, CorruptArtifact),
        (edit_the_description, CorruptArtifact),
        (cut_the_description, CorruptArtifact),
        (lose_the_description, ArtifactError),
        (add_weights, CorruptArtifact),
        (of_a_newer_foldaway, ManifestVersionError),
        (of_another_format, CorruptArtifact),
        (cut_and_reseal, CorruptArtifact),
        (name_a_file_above, CorruptArtifact),
        (name_an_absolute_file, CorruptArtifact),
        (link_to_a_file_above, CorruptArtifact),
        (name_the_folder, CorruptArtifact),
        (list_a_tensor_twice, CorruptArtifact),
    ],
)
def test_a_package_whose_files_were_changed_is_refused(
    spoil: Callable[[Path], str],
    error: type[FoldawayError],
    wide: Mapping[str, Path],
    resident: PreTrainedModel,
    tmp_path: Path,
) -> None:
    shutil.copytree(wide["seed"], tmp_path / "delta")
    word = spoil(tmp_path / "delta")
    assert_refused(tmp_path / "delta", wide["base"], resident, tmp_path, word, error)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json"])
def test_a_file_that_no_package_needs_is_not_brought_along(name: str, wide: Mapping[str, Path], tmp_path: Path) -> None:
    """An index or a pickle of the package's own could take the place of the weights that were checked."""
    shutil.copytree(wide["seed"], tmp_path / "delta")
    (tmp_path / "delta" / name).write_bytes(b"secret")
    name_a_file(tmp_path / "delta", name)
    try:
        apply(Package(tmp_path / "delta"), Checkpoint(wide["base"]), tmp_path / "out")
    except CorruptArtifact:
        return
    assert not (tmp_path / "out" / name).exists()


def test_only_a_folder_with_a_description_is_a_package(wide: Mapping[str, Path], tmp_path: Path) -> None:
    assert is_delta(wide["seed"])
    assert not is_delta(wide["base"])
    assert not is_delta(tmp_path / "gone")
    with pytest.raises(ArtifactError, match="not a delta package"):
        Package(wide["base"])


# --- Other bases


@pytest.mark.parametrize("name", [DOWN, "model.layers.1.mlp.down_proj.weight", EMBEDDING])
def test_a_base_with_one_other_element_is_refused(name: str, wide: Mapping[str, Path], tmp_path: Path) -> None:
    """In a matrix that is pruned, in one that is the same, and in a row that did not change."""

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int16)[-1, -1] ^= 1

    base = edited(wide["base"], tmp_path / "base", nudge)
    assert_refused(wide["seed"], base, loaded(base), tmp_path, "not the base", ConfigError)


def test_a_base_that_differs_where_nothing_is_taken_from_it_is_accepted(
    wide: Mapping[str, Path], tmp_path: Path
) -> None:
    base = edited(wide["base"], tmp_path / "base", lambda tensors: tensors[NORM].zero_())
    apply(Package(wide["seed"]), Checkpoint(base), tmp_path / "out")
    apply(Package(wide["seed"]), Checkpoint(wide["base"]), tmp_path / "expected")
    assert state_of(loaded(tmp_path / "out")) == state_of(loaded(tmp_path / "expected"))
    live = loaded(base)
    attach(live, wide["seed"]).detach()
    assert state_of(live) == state_of(loaded(base))


def test_a_base_of_another_shape_or_without_a_tensor_is_refused(wide: Mapping[str, Path], tmp_path: Path) -> None:
    live = tiny("llama").to(torch.bfloat16)
    before = state_of(live)
    with pytest.raises(ConfigError, match=r"shape|not the base"):
        attach(live, wide["seed"])
    assert state_of(live) == before
    other = saved(tiny("llama"), tmp_path / "other")
    bare = edited(wide["base"], tmp_path / "bare", lambda tensors: tensors.pop(DOWN))
    for base, word in ((other, "shape"), (bare, "has no")):
        with pytest.raises(ConfigError, match=word):
            apply(Package(wide["seed"]), Checkpoint(base), tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"other", "bare"}


def test_an_output_folder_that_is_not_empty_is_refused(wide: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        apply(Package(wide["seed"]), Checkpoint(wide["base"]), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]


# --- Switching in a live model


@pytest.fixture(scope="module")
def deltas(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packages of one base that have nothing else in common."""
    folder = tmp_path_factory.mktemp("deltas")
    other = saved(finetuned(tiny("llama"), seed=2, untouched=(0, 4)), folder / "other")
    third = saved(finetuned(tiny("llama"), seed=3, untouched=(2, 3)), folder / "third")
    sparse = DarexConfig(p="1/2", keep="magnitude", rescale="none")
    columns = DarexConfig(p="3/4", scheme="columns", rescale="none")
    return {
        "a": packed(pair, folder / "a"),
        "b": packed((pair[0], other), folder / "b", sparse, Storage("sign", rows="exact")),
        "c": packed((pair[0], third), folder / "c", columns, Storage("bf16", "tensor")),
    }


def test_switching_restores_every_bit(pair: tuple[Path, Path], deltas: dict[str, Path], tmp_path: Path) -> None:
    expected = {None: state_of(loaded(pair[0]))}
    for name, package in deltas.items():
        apply(Package(package), Checkpoint(pair[0]), tmp_path / name)
        expected[name] = state_of(loaded(tmp_path / name))
    assert len({hashlib.sha256(b"".join(state.values())).digest() for state in expected.values()}) == 4
    model = loaded(pair[0])
    slot = DeltaSlot(model)
    prepared = {None: None, "a": slot.prepare(deltas["a"])}
    slot.switch(prepared["a"])
    # The others are prepared beside a delta that is attached.
    prepared |= {name: slot.prepare(deltas[name]) for name in ("b", "c")}
    for name in ("b", "a", None, "a", "a", "c", None, None):
        slot.switch(prepared[name])
        assert slot.attached is prepared[name]
        assert state_of(model) == expected[name]
    draw = random.Random(0)
    for _ in range(100):
        name = draw.choice([None, "a", "b", "c"])
        slot.switch(prepared[name])
        assert state_of(model) == expected[name]
    slot.detach()
    assert slot.attached is None
    assert state_of(model) == expected[None]


def test_a_delta_that_is_attached_can_be_prepared_again(pair: tuple[Path, Path], deltas: dict[str, Path]) -> None:
    model = loaded(pair[0])
    base, slot = state_of(model), attach(model, deltas["a"])
    with_a = state_of(model)
    again = slot.prepare(deltas["a"])
    assert state_of(model) == with_a
    slot.switch(again)
    assert state_of(model) == with_a
    slot.detach()
    assert state_of(model) == base


def test_a_prepared_delta_needs_its_files_no_longer(
    pair: tuple[Path, Path], deltas: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(deltas["b"], tmp_path / "delta")
    slot = DeltaSlot(loaded(pair[0]))
    prepared = slot.prepare(tmp_path / "delta")
    shutil.rmtree(tmp_path / "delta")
    slot.switch(prepared)
    assert state_of(slot.model) == state_of(attach(loaded(pair[0]), deltas["b"]).model)
    assert (prepared.name, prepared.id) == ("delta", Package(deltas["b"]).description.id)
    assert prepared.bytes > 0


def test_a_package_that_is_refused_leaves_the_one_that_is_attached(
    pair: tuple[Path, Path], deltas: dict[str, Path], tmp_path: Path
) -> None:
    slot = attach(loaded(pair[0]), deltas["a"])
    before, attached = state_of(slot.model), slot.attached
    rewritten(deltas["c"], tmp_path / "broken", description(seed=1))
    with pytest.raises(CorruptArtifact):
        slot.prepare(tmp_path / "broken")
    assert slot.attached is attached
    assert state_of(slot.model) == before


def test_a_delta_that_was_prepared_for_another_model_is_refused(
    pair: tuple[Path, Path], deltas: dict[str, Path]
) -> None:
    one, two = DeltaSlot(loaded(pair[0])), DeltaSlot(loaded(pair[0]))
    two.switch(two.prepare(deltas["b"]))
    before = state_of(two.model)
    with pytest.raises(ConfigError, match="another model"):
        two.switch(one.prepare(deltas["a"]))
    assert state_of(two.model) == before


def test_a_model_of_another_type_is_refused(pair: tuple[Path, Path], deltas: dict[str, Path]) -> None:
    model = loaded(pair[0]).float()
    before = state_of(model)
    with pytest.raises(ConfigError, match="float32"):
        attach(model, deltas["a"])
    assert state_of(model) == before


@pytest.mark.parametrize("elements", [1, D])
def test_a_norm_of_another_type_than_the_models_is_refused(
    elements: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        norm = load_file(pair[0] / "model.safetensors")[NORM].float()
        norm[:elements] += 0.1
        tensors[NORM] = norm

    tuned = edited(pair[1], tmp_path / "tuned", widen)
    packed((pair[0], tuned), tmp_path / "delta")
    model = loaded(pair[0])
    before = state_of(model)
    with pytest.raises(ConfigError, match="F32"):
        attach(model, tmp_path / "delta")
    assert state_of(model) == before


# --- Sizes


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of one block with a million parameters, in fp32 so that magnitudes have no ties."""
    folder = tmp_path_factory.mktemp("large")
    options = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**_COMMON, **options}))
    base = saved(model, folder / "base", torch.float32)
    return base, saved(finetuned(model), folder / "tuned", torch.float32)


@pytest.mark.parametrize(
    ("config", "kind", "index"),
    [
        (DarexConfig(p=0.9, rescale="dare"), "int8", "seed"),
        (DarexConfig(p=0.95, rescale="dare"), "bf16", "seed"),
        (DarexConfig(p=0.99, rescale="dare"), "int4", "seed"),
        (DarexConfig(p=0.9, rescale="dare", scheme="bernoulli"), "sign", "seed"),
        (DarexConfig(p=0.95, rescale="none", keep="magnitude"), "int4", "gap8"),
        (DarexConfig(p=0.8, rescale="none", keep="magnitude"), "int8", "bitmap"),
    ],
)
def test_sizes_on_disk_are_those_of_the_arithmetic(
    config: DarexConfig, kind: ValueType, index: str, large: tuple[Path, Path], tmp_path: Path
) -> None:
    found = Description.model_validate_json(
        (packed(large, tmp_path / "x", config, Storage(kind)) / "delta.json").read_text()
    )
    sizes, matrices = found.sizes, {n: e for n, e in found.tensors.items() if e.index is not None}
    assert {entry.kind for entry in matrices.values()} == {index}
    measured = dict.fromkeys(("values", "positions", "scales", "rows", "dense"), 0)
    for name, stored in reference.read_folder(tmp_path / "x").items():
        owner, _, piece = name.rpartition(".")
        entry = found.tensors.get(name) or found.tensors[owner]
        pieces = {"values": "values", "scale": "scales", "row_scale": "scales"}
        part = entry.kind if entry.kind in ("rows", "dense") else pieces.get(piece, "positions")
        measured[part] += stored.bits.nbytes
    assert measured == {part: getattr(sizes, part) for part in measured}
    on_disk = sum(file.stat().st_size for file in (tmp_path / "x").glob("*.safetensors"))
    assert 0 < on_disk - sum(measured.values()) < 10_000
    assert sizes.pruned_parameters == sum(math.prod(entry.shape) for entry in matrices.values()) > 900_000
    p, bits = float(config.p), values.BITS[kind]
    expected = reference.bytes_per_parameter(p, index, bits) * sizes.pruned_parameters
    assert sizes.values + sizes.positions == pytest.approx(expected, rel=0.01)
    scaled = sum(entry.matrix[0] for entry in matrices.values()) if found.scale == "row" else 0
    assert sizes.scales == 4 * len(matrices) + 2 * scaled


@pytest.mark.parametrize("p", ["4/5", "9/10", "19/20", "99/100", "999/1000"])
def test_positions_take_the_bytes_of_the_arithmetic(p: str) -> None:
    shape, density = (2000, 2000), 1 - Fraction(p)
    scattered = random_index("bernoulli", density, 0, "x", shape)
    even = random_index("one-of-m", density, 0, "x", shape)
    for coding, index in (("gap8", scattered), ("u16", even), ("bitmap", even)):
        _, stored = indices.encode(index, shape, coding)
        actual = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        dropped = 1 - len(index) / math.prod(shape)
        assert actual == pytest.approx(math.prod(shape) * reference.index_bits(dropped, coding) / 8, rel=0.01)


# --- Positions and values by themselves


def gaps_of(*gaps: int) -> Tensor:
    return torch.tensor(gaps).cumsum(0)


POSITIONS: dict[str, tuple[Tensor, tuple[int, int]]] = {
    "none": (torch.zeros(0, dtype=torch.int64), (3, 13)),
    "all": (torch.arange(39), (3, 13)),
    "the first and the last": (torch.tensor([0, 38]), (3, 13)),
    "long gaps": (gaps_of(254, 255, 256, 257, 509, 510, 511, 512, 1, 1), (50, 100)),
    "several blocks": (gaps_of(65535, 1, 65535, 1, 70000, 131072, 3), (11, 40000)),
    "the last of the last block": (torch.tensor([2 * 65536 - 1]), (2, 65536)),
    "one in every row": (torch.tensor([5, 13, 38]), (3, 13)),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_positions_come_back_from_every_coding(case: str) -> None:
    index, shape = POSITIONS[case]
    sizes = {}
    codings: list[Coding] = ["gap8", "bitmap"]
    if case in ("none", "all", "one in every row"):
        codings.append("u16")
    for coding in codings:
        found, stored = indices.encode(index, shape, coding)
        assert found == coding
        assert torch.equal(indices.decode(coding, stored, shape), index)
        sizes[coding] = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    smallest, stored = indices.encode(index, shape)
    assert sizes[smallest] == min(sizes.values())
    _, stored = indices.encode(index, shape, "gap8")
    assert reference.ungap(stored["gaps"].tolist(), stored["blocks"].tolist()) == index.tolist()


@pytest.mark.parametrize(
    ("coding", "stored"),
    [
        ("u16", {"cols": torch.tensor([[1, 1], [0, 2], [0, 1]], dtype=torch.uint16)}),
        ("u16", {"cols": torch.tensor([[2, 1], [0, 2], [0, 1]], dtype=torch.uint16)}),
        ("u16", {"cols": torch.tensor([[0, 5], [0, 2], [0, 1]], dtype=torch.uint16)}),
        ("u16", {"cols": torch.tensor([[0, 1], [0, 2]], dtype=torch.uint16)}),
        ("gap8", {"gaps": torch.tensor([5, 9], dtype=torch.uint8), "blocks": torch.tensor([0, 2])}),
        ("gap8", {"gaps": torch.tensor([255, 0], dtype=torch.uint8), "blocks": torch.tensor([0, 2])}),
        ("gap8", {"gaps": torch.tensor([5], dtype=torch.uint8), "blocks": torch.tensor([0])}),
        ("gap8", {"gaps": torch.tensor([5], dtype=torch.uint8), "blocks": torch.tensor([1, 1])}),
        ("gap8", {"gaps": torch.tensor([5], dtype=torch.uint8), "blocks": torch.tensor([0, 1, 1])}),
        ("bitmap", {"bitmap": torch.tensor([[0x20], [0], [0]], dtype=torch.uint8)}),
        ("bitmap", {"bitmap": torch.tensor([[1, 0], [0, 0], [0, 0]], dtype=torch.uint8)}),
    ],
)
def test_positions_outside_the_tensor_are_refused(coding: Coding, stored: dict[str, Tensor]) -> None:
    with pytest.raises(CorruptArtifact):
        indices.decode(coding, stored, (3, 5))


@pytest.mark.parametrize("by_row", [True, False])
def test_values_are_rounded_as_in_the_reference(by_row: bool) -> None:
    shape = (9, 31)
    index = random_index("bernoulli", Fraction(1, 5), 3, "x", shape)
    index = index[index // 31 != 4]  # a row that keeps nothing
    groups = reference.row_groups(index.tolist(), *shape) if by_row else [list(range(len(index)))]
    counts = torch.tensor([len(group) for group in groups])
    exact = normal(len(index), seed=7)
    exact[:3] = 0
    for kind, quantise in (
        ("int8", reference.quantise_int8),
        ("int4", reference.quantise_int4),
        ("sign", reference.quantise_sign),
    ):
        codes, scales = values.quantise(exact, counts, kind)
        expected, expected_scales = quantise(exact.numpy(), groups)
        np.testing.assert_allclose(scales.numpy(), expected_scales, rtol=1e-6)
        assert codes.tolist() == expected.tolist()
        stored = values.store(codes, kind)
        assert len(stored) == values.stored_length(kind, len(codes))
        assert torch.equal(values.restore(stored, kind, len(codes)), codes)
    codes, scales = values.quantise(exact, counts, "bf16")
    assert torch.equal(codes, exact.bfloat16().float())
    assert torch.equal(scales, torch.ones(len(groups)))


@pytest.mark.parametrize("kind", values.VALUE_TYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9])
def test_any_number_of_values_is_stored_and_restored(kind: ValueType, count: int) -> None:
    codes, _ = values.quantise(normal(count), torch.tensor([count]), kind)
    stored = values.store(codes, kind)
    assert stored.dtype == values.STORED_TYPE[kind]
    assert len(stored) == values.stored_length(kind, count)
    assert torch.equal(values.restore(stored, kind, count), codes)
    slow = reference.Stored(
        {"bf16": "BF16", "int8": "I8"}.get(kind, "U8"), np.frombuffer(raw(stored), f"u{stored.element_size()}")
    )
    assert reference.codes(slow, kind, count).tolist() == codes.tolist()


def test_the_checksum_of_positions_is_that_of_the_reference() -> None:
    for index, _ in POSITIONS.values():
        assert checksum(index) == reference.index_checksum(index.tolist())
