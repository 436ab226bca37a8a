"""The ONNX export of blocks that share weights: written once, with norms, caches and adapters of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from onnxruntime.quantization import matmul_nbits_quantizer
from torch import nn
from transformers import PreTrainedModel

from compress.decoder import Decoder
from compress.remote_code import linears
from compress.surgery import drop_attention, drop_ffn, expand, share_blocks
from exporters import onnx_file, onnx_graph
from exporters.base import in_dtype
from exporters.onnx_session import OnnxSession
from tests.conftest import CONTEXT, tiny
from tests.exporters.test_onnx import BUILDABLE, TOKENS, assert_exact, exported, ragged

GROUPS = {0: [1], 2: [4]}
"""Not all blocks, and not only neighbours."""
GROUPS_OF = {"gemma3_text": {0: [1], 2: [5]}}
RANK = 3


def shared(model_type: str, groups: dict[int, list[int]] | None = None, **options: Any) -> PreTrainedModel:
    """A tiny model in which some blocks share; adapters are not zero."""
    model = tiny(model_type)
    share_blocks(model, groups or groups_of(model_type), generator=torch.Generator().manual_seed(0), **options)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_left"):
            parameter.normal_(std=0.3)
    return model


def groups_of(model_type: str) -> dict[int, list[int]]:
    return GROUPS_OF.get(model_type, GROUPS)


def expanded(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a copy for each block."""
    expand(model)
    return model


def initialisers(path: Path) -> dict[str, bytes]:
    """What model.onnx_data holds, by name; nothing lies there twice or besides."""
    tensors = onnx.load(str(path / "model.onnx"), load_external_data=False).graph.initializer
    found, end = {}, 0
    places = {each.name: {entry.key: entry.value for entry in each.external_data} for each in tensors}
    stored = [tensor for tensor in tensors if places[tensor.name]]
    for tensor in sorted(stored, key=lambda each: int(places[each.name]["offset"])):
        place = places[tensor.name]
        assert 0 <= int(place["offset"]) - end < onnx_file.PAGE
        end = int(place["offset"]) + int(place["length"])
        load_external_data_for_tensor(tensor, str(path))
        found[tensor.name] = tensor.raw_data
    assert end == (path / "model.onnx_data").stat().st_size
    return found


def is_of_child(name: str, groups: dict[int, list[int]]) -> bool:
    """Whether a name is that of something a block would share, were it not shared."""
    block = re.search(r"layers\.(\d+)\.", name)
    children = {child for others in groups.values() for child in others}
    return block is not None and int(block[1]) in children and "norm" not in name


def operators(path: Path) -> list[str]:
    """What is computed: casts of what is stored, which come once for shared weights, are left out."""
    nodes = onnx.load(str(path / "model.onnx"), load_external_data=False).graph.node
    return [node.op_type for node in nodes if node.op_type != "Cast"]


class Forgets(dict[Any, Any]):
    """Knows nothing of what was put in."""

    def setdefault(self, key: Any, default: Any = None) -> Any:
        return default


def attentions(model: PreTrainedModel) -> int:
    return sum(block.attention is not None for block in Decoder(model))


def greedy(session: OnnxSession, prompt: torch.Tensor, count: int) -> list[int]:
    logits, kv = session.prefill(prompt.numpy(), capacity=CONTEXT)
    found = []
    for position in range(prompt.shape[1], prompt.shape[1] + count):
        found.append(int(logits.argmax()))
        logits, kv = session.step(np.array([[found[-1]]]), kv, np.array([position]))
    return found


@pytest.mark.parametrize("model_type", BUILDABLE)
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_shared_weights_are_written_once_and_compute_what_copies_do(
    model_type: str, dtype: str, tmp_path: Path
) -> None:
    model = shared(model_type)
    done = exported(model, tmp_path / "x", dtype)
    if dtype == "fp32":
        assert_exact(done.parity)
    session = OnnxSession(done.path, threads=1)
    assert session.num_layers == attentions(model) == len(Decoder(model))
    copies = exported(expanded(model), tmp_path / "y", dtype)
    ours, theirs = initialisers(done.path), initialisers(copies.path)
    children = {name for name in theirs if is_of_child(name, groups_of(model_type))}
    assert len(children) >= 10
    assert ours == {name: value for name, value in theirs.items() if name not in children}
    assert operators(done.path) == operators(copies.path)
    assert torch.equal(session.logits(TOKENS), OnnxSession(copies.path, threads=1).logits(TOKENS))
    assert done.parity.decode_max_abs_difference < 1e-4


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "qwen3"])
def test_greedy_tokens_with_a_cache_are_those_of_pytorch(model_type: str, tmp_path: Path) -> None:
    model = shared(model_type)
    done = exported(model, tmp_path / "x")
    prompt = TOKENS[:1, :12]
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=CONTEXT, do_sample=False, eos_token_id=None
    )
    assert greedy(OnnxSession(done.path, threads=1), prompt, CONTEXT - 12) == theirs[0, 12:].tolist()
    assert f"{len(Decoder(model)) - 2} sets of weights serve these" in (done.path / "README.md").read_text()


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3"])
def test_norms_of_blocks_that_share_are_their_own(model_type: str, tmp_path: Path) -> None:
    model = shared(model_type)
    before = exported(model, tmp_path / "x")
    names = []
    for name, module in Decoder(model).blocks[1].module.named_modules():
        if "norm" in name:
            module.weight = nn.Parameter(1.5 * module.weight + 0.1, requires_grad=False)
            names.append(name)
    after = exported(model, tmp_path / "y")
    assert_exact(after.parity)
    ours, theirs = initialisers(before.path), initialisers(after.path)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert len(changed) == len(names) >= 4
    assert all("layers.1." in name for name in changed)


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "phi3"])
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_adapters_are_products_of_their_own_in_full_precision(model_type: str, dtype: str, tmp_path: Path) -> None:
    model = shared(model_type, adapter_rank=RANK)
    done = exported(model, tmp_path / "x", dtype)
    if dtype == "fp32":
        assert_exact(done.parity)
    assert done.parity.decode_max_abs_difference < 1e-4
    ours = initialisers(done.path)
    theirs = initialisers(exported(shared(model_type), tmp_path / "y", dtype).path)
    added = ours.keys() - theirs.keys()
    assert theirs == {name: ours[name] for name in theirs}
    assert all(re.search(r"\.lora_(left|right)\.MatMul\.weight$", name) for name in added)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(len(ours[name]) for name in added) == 4 * parameters > 0


def test_biases_are_shared_or_own_as_they_are_in_the_model(tmp_path: Path) -> None:
    together, apart = (exported(shared("qwen2", own_biases=own), tmp_path / str(own)) for own in (False, True))
    assert_exact(apart.parity)
    ours, theirs = initialisers(together.path), initialisers(apart.path)
    added = theirs.keys() - ours.keys()
    assert added == {f"model.layers.{child}.attn.qkv_proj.Add.bias" for child in (1, 4)}


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_blocks_without_a_part_share_what_they_have(dtype: str, tmp_path: Path) -> None:
    model = tiny("llama")
    drop_attention(model, (1, 3))
    drop_ffn(model, (0, 4))
    share_blocks(model, {1: [3], 4: [0]})
    done = exported(model, tmp_path / "x", dtype)
    assert OnnxSession(done.path, threads=1).num_layers == attentions(model) == 3
    ours, theirs = initialisers(done.path), initialisers(exported(expanded(model), tmp_path / "y", dtype).path)
    gone = theirs.keys() - ours.keys()
    assert gone == {name for name in theirs if is_of_child(name, {1: [3], 0: [4]})}
    assert done.parity.decode_max_abs_difference < 1e-4


def test_each_matrix_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = matmul_nbits_quantizer.DefaultWeightOnlyQuantizer
    shapes = []
    right = quantizer.qbits_block_quant

    def counted(self: Any, weight: Any) -> Any:
        shapes.append(weight.shape)
        return right(self, weight)

    monkeypatch.setattr(quantizer, "qbits_block_quant", counted)
    model = shared("llama", {0: [1, 2, 3, 4]})
    exported(model, tmp_path / "x", "int4")
    assert len(shapes) == len(list(linears(Decoder(model).blocks[0].module))) + 1  # and the head


def test_a_half_precision_model_shares_too(tmp_path: Path) -> None:
    sizes = [
        exported(model, tmp_path / str(i), "int4").bytes
        for i, model in enumerate((shared("phi3"), in_dtype(shared("phi3"), torch.bfloat16)))
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "qwen2"])
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_a_model_that_shares_nothing_is_exported_as_if_there_were_no_sharing(
    model_type: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = exported(ragged(tiny(model_type)), tmp_path / "x", dtype).path
    for name in ("make_packed_matmul_float_class", "make_packed_add_tensor"):
        monkeypatch.delattr(onnx_graph.LiveModel, name)
    forgets = property(lambda self: Forgets(), lambda self, value: None)
    monkeypatch.setattr(onnx_graph.LiveModel, "written", forgets, raising=False)
    theirs = exported(ragged(tiny(model_type)), tmp_path / "y", dtype).path
    for name in ("model.onnx", "model.onnx_data"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
