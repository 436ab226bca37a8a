"""The ONNX export: plain and ragged models of every architecture that the builder knows."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from compress import sources
from compress.calibration import windows
from compress.decoder import Decoder
from compress.errors import ConfigError, ExportError, LayoutNotSupported, ParityError
from compress.evaluate import logits_of
from compress.methods import METHODS, method_config
from compress.result import CompressedModel
from compress.sources import Loaded, Origin
from compress.surgery import drop_attention, drop_ffn, keep_neurons
from exporters import Exported, ExportOptions, export, onnx_file, onnx_graph, onnx_session, read_export, to_onnx
from exporters.base import in_dtype
from exporters.nbits import quantise
from exporters.onnx_session import OnnxSession, load_tokenizer
from tests.conftest import CONTEXT, TINY, byte_tokenizer, tiny, token_rows

LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    },
}
BUILDABLE = sorted(onnx_graph.BUILDERS)
ORIGIN = Origin("tiny", "folder", licence="Apache-2.0", artifact_id="0123456789abcdef")
TOKENS = token_rows(rows=2, length=40).tokens


def loaded(model: PreTrainedModel) -> Loaded:
    return Loaded(model, byte_tokenizer(), ORIGIN)


def ragged(model: PreTrainedModel, without_attention: tuple[int, ...] = (1, 3)) -> PreTrainedModel:
    """Attentions gone, and FFN widths that differ and fit no int4 block."""
    keep_neurons(model, {0: torch.arange(70), 2: torch.arange(0, 80, 2)})
    drop_attention(model, without_attention)
    return model


def exported(model: PreTrainedModel, path: Path, dtype: str = "fp32", **options: Any) -> Exported:
    return export(loaded(model), path, to="onnx", options=ExportOptions(dtype=dtype, **options), check_tokens=TOKENS)


def variant(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose config differs from that of `tiny`."""
    config = AutoConfig.for_model(**{**tiny(model_type).config.to_dict(), "model_type": model_type, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # biases start at zero, and would not be missed
    return model


@pytest.mark.parametrize("model_type", BUILDABLE)
@pytest.mark.parametrize("without_attention", [None, (1, 3), (0, 3)], ids=["plain", "ragged", "block 0 without"])
def test_an_fp32_export_computes_what_its_source_does(
    model_type: str, without_attention: tuple[int, ...] | None, tmp_path: Path
) -> None:
    model = tiny(model_type) if without_attention is None else ragged(tiny(model_type), without_attention)
    parity = exported(model, tmp_path / "x").parity
    assert parity.max_abs_difference < 1e-4
    assert parity.decode_max_abs_difference < 1e-4
    assert parity.argmax_agreement == parity.decode_argmax_agreement == 1.0
    assert parity.tokens == parity.decode_tokens == TOKENS.numel()
    assert parity.decode_against == "source"


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_a_graph_in_fp16_stores_half_and_computes_in_fp32(model_type: str, tmp_path: Path) -> None:
    whole, half = (exported(ragged(tiny(model_type)), tmp_path / dtype, dtype) for dtype in ("fp32", "fp16"))
    assert half.parity.decode_max_abs_difference < 1e-4
    assert half.parity.argmax_agreement > 0.97
    assert half.parity.kl is not None
    assert 0 < half.parity.kl < 1e-4
    data = [(done.path / "model.onnx_data").stat().st_size for done in (whole, half)]
    assert data[1] < 0.58 * data[0]  # pages are filled up, which weighs in so small a model
    assert OnnxSession(half.path).kv_dtype == np.float32


@pytest.mark.parametrize(
    ("model_type", "ep"), [*((each, "cuda") for each in BUILDABLE), ("llama", "webgpu"), ("llama", "dml")]
)
def test_a_graph_for_other_providers_computes_in_fp16(model_type: str, ep: str, tmp_path: Path) -> None:
    done = exported(tiny(model_type), tmp_path / "x", "fp16", ep=ep)
    assert OnnxSession(done.path).kv_dtype == np.float16
    assert 0 < done.parity.decode_max_abs_difference < 0.1
    assert done.parity.argmax_agreement > 0.95
    assert json.loads((done.path / "config.json").read_text())["transformers.js_config"]["kv_cache_dtype"] == "float16"
    assert f"made for the {ep} execution provider, and was not run on it" in (done.path / "README.md").read_text()


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_an_int8_export_is_close_to_its_source(model_type: str, tmp_path: Path) -> None:
    done = exported(ragged(tiny(model_type), (0, 3)), tmp_path / "x", "int8")
    assert done.parity.decode_max_abs_difference < 1e-4
    assert done.parity.argmax_agreement > 0.8
    assert done.parity.kl is not None
    assert 0 < done.parity.kl < 0.02
    graph = onnx.load(str(done.path / "model.onnx"), load_external_data=False).graph
    assert not [node.name for node in graph.node if node.op_type == "MatMul"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings", ["int4", "int8", "fp32"])
@pytest.mark.parametrize("block_size", [16, 128])
def test_embeddings_are_stored_as_asked(embeddings: str, tied: bool, block_size: int, tmp_path: Path) -> None:
    model = variant("llama", tie_word_embeddings=tied)
    options = {"embeddings": embeddings, "block_size": block_size, "algorithm": "rtn", "accuracy_level": 1}
    path = exported(model, tmp_path / "x", "int8", **options).path
    bits = onnx_graph.BITS.get(embeddings)
    for part in {model.get_input_embeddings(), model.get_output_embeddings()}:
        if bits:
            rounded = quantise(part.weight, bits, block_size, "rtn").dequantised(64)
            part.weight = torch.nn.Parameter(rounded, requires_grad=False)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for layer in Decoder(model).blocks:
        for linear in (module for module in layer.module.modules() if isinstance(module, torch.nn.Linear)):
            rounded = quantise(linear.weight, 8, block_size, "rtn").dequantised(linear.in_features)
            linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
    model.model.rotary_emb.register_forward_hook(lambda *call: tuple(each.half().float() for each in call[-1]))
    torch.testing.assert_close(OnnxSession(path).logits(TOKENS), logits_of(model)(TOKENS), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_the_layout_of_transformers_js_has_the_graph_in_a_folder_of_its_own(dtype: str, tmp_path: Path) -> None:
    done = exported(tiny("llama"), tmp_path / "x", dtype, layout="transformersjs")
    name = f"onnx/model{'_q4' if dtype == 'int4' else ''}.onnx"
    assert {name, f"{name}_data", "config.json", "tokenizer.json", "genai_config.json"} < set(done.files)
    told = json.loads((done.path / "config.json").read_text())["transformers.js_config"]
    assert told["dtype"] == {"fp32": "fp32", "int4": "q4"}[dtype]
    assert told["use_external_data_format"] == {Path(name).name: 1}
    genai = json.loads((done.path / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == name
    flat = exported(tiny("llama"), tmp_path / "flat", dtype)
    assert torch.equal(OnnxSession(done.path).logits(TOKENS), OnnxSession(flat.path).logits(TOKENS))


def test_what_an_export_has_no_use_for_is_refused(tmp_path: Path) -> None:
    for dtype, options, complaint in (
        ("fp32", {"block_size": 32}, "block_size=32: the fp32 onnx export has no use for it"),
        ("fp16", {"algorithm": "rtn"}, "algorithm=rtn: the fp16 onnx"),
        ("int4", {"expand": True}, "expand=True: the int4 onnx"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            exported(tiny("llama"), tmp_path / "x", dtype, **options)
    for options, complaint in (
        ({"algorithm": "gguf"}, "algorithm=gguf: possible are rtn"),
        ({"ep": "tpu"}, "ep=tpu: possible are cpu, cuda"),
        ({"layout": "round"}, "layout=round: possible are flat"),
        ({"max_kl": 0.0}, r"max_kl=0\.0: give nats"),
        ({"int8": ("qkv", "head")}, "int8=head: possible are qkv, o, gate, up, down"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            ExportOptions(**options)


@pytest.mark.parametrize(
    ("dtype", "options", "complaint"),
    [
        ("int8", {"ep": "dml"}, "dml provider has no kernel for it; possible are fp32, fp16, int4"),
        ("fp16", {"ep": "cuda"}, "cannot compute a Gemma without some attentions"),
        ("bf16", {"ep": "cuda"}, "dtype=bf16: the onnx export stores fp32 or fp16"),
    ],
)
def test_what_a_provider_cannot_do_is_refused(
    dtype: str, options: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, LayoutNotSupported), match=complaint):
        exported(ragged(tiny("gemma3_text")), tmp_path / "x", dtype, **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(out: Any, tensor: Any) -> int:
        written.append(tensor.name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(out, tensor)

    right = onnx_file._append
    monkeypatch.setattr(onnx_file, "_append", full)
    with pytest.raises(OSError, match="No space left"):
        exported(tiny("llama"), tmp_path / "x", "int8")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_transformers_js_cannot_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ExportError, match=r"reads tokenizers from tokenizer\.json"):
        exported(tiny("llama"), tmp_path / "x", layout="transformersjs")
    assert not list(tmp_path.iterdir())


def test_an_export_that_diverges_by_more_than_is_let_pass_is_discarded(tmp_path: Path) -> None:
    kl = exported(tiny("llama"), tmp_path / "x", "int8").parity.kl
    assert kl is not None
    assert exported(tiny("llama"), tmp_path / "y", "int8", max_kl=1.01 * kl).parity.max_kl == 1.01 * kl
    with pytest.raises(ParityError, match=r"diverges from its source by .* nats per token, and max_kl="):
        exported(tiny("llama"), tmp_path / "z", "int8", max_kl=0.99 * kl)
    assert not (tmp_path / "z").exists()


def test_who_knows_of_it_gets_the_logits_of_the_last_token_alone(tmp_path: Path) -> None:
    session = OnnxSession(exported(tiny("llama"), tmp_path / "x").path)
    feeds = {"input_ids": TOKENS.numpy(), "attention_mask": np.ones(TOKENS.shape, np.int64)}
    feeds |= {name: np.zeros((2, 2, 0, 16), np.float32) for pair in session._past for name in pair}
    (whole,) = session._session.run(["logits"], feeds)
    (last,) = session._session.run(["logits"], feeds | {onnx_session.LOGITS_FROM: np.array([-1])})
    assert last.shape == (2, 1, 259)
    np.testing.assert_allclose(last, whole[:, -1:], atol=1e-5)
    assert onnx_session.LOGITS_FROM not in [value.name for value in session._session.get_inputs()]


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_an_int4_export_decodes_as_it_reads_and_resembles_its_source(model_type: str, tmp_path: Path) -> None:
    done = exported(ragged(tiny(model_type), (0, 3)), tmp_path / "x", "int4")
    assert done.parity.decode_max_abs_difference < 1e-4
    assert done.parity.decode_against == "export"
    assert done.parity.argmax_agreement > 0.2
    operators = {node.op_type for node in onnx.load(str(done.path / "model.onnx"), load_external_data=False).graph.node}
    assert "MatMulNBits" in operators
    assert "MatMul" not in operators


def without_ffn(model: PreTrainedModel, ffns: tuple[int, ...], attentions: tuple[int, ...] = ()) -> PreTrainedModel:
    """FFNs gone, attentions gone, and one FFN narrower than the others where it is left."""
    if 1 not in ffns:
        keep_neurons(model, {1: torch.arange(70)})
    drop_attention(model, attentions)
    drop_ffn(model, ffns)
    return model


def blockpruned(model_type: str, sparsity: float = 0.4) -> CompressedModel:
    """What BlockPruner leaves of a tiny model."""
    return METHODS["blockpruner"].compress(
        tiny(model_type), token_rows(), method_config("blockpruner", {"sparsity": sparsity})
    )


def assert_exact(parity: Any) -> None:
    assert parity.max_abs_difference < 1e-4
    assert parity.decode_max_abs_difference < 1e-4
    assert parity.argmax_agreement == parity.decode_argmax_agreement == 1.0


def ffns_missing(done: Exported) -> list[bool]:
    return [block["ffn"]["no_op"] for block in read_export(done.path).blocks]


@pytest.mark.parametrize("model_type", BUILDABLE)
@pytest.mark.parametrize(
    ("ffns", "attentions"),
    [
        ((0,), ()),
        ((4,), ()),
        ((0, 1), (3, 4)),
        ((1, 3, 4), (0, 2)),
        ((0, 1, 2, 3, 4), ()),
    ],
    ids=["the first", "the last", "the first two", "every other one", "all of five"],
)
def test_blocks_without_an_ffn_compute_what_their_source_does(
    model_type: str, ffns: tuple[int, ...], attentions: tuple[int, ...], tmp_path: Path
) -> None:
    model = without_ffn(tiny(model_type), ffns, attentions)
    done = exported(model, tmp_path / "x")
    assert_exact(done.parity)
    assert ffns_missing(done) == [b in ffns for b in range(len(Decoder(model)))]
    blocks = read_export(done.path).blocks
    assert [block["attention"]["no_op"] for block in blocks] == [b in attentions for b in range(len(blocks))]
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [b.width or None for b in Decoder(model)]


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_what_blockpruner_leaves_is_exported_exactly(model_type: str, tmp_path: Path) -> None:
    result = blockpruned(model_type)
    done = exported(result.model, tmp_path / "x")
    assert_exact(done.parity)
    assert len(read_export(done.path).blocks) == len(Decoder(result.model))
    assert ffns_missing(done) == [not block.has_ffn for block in Decoder(result.model)]
    assert done.parameters == result.report.numbers["parameters_after"]


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_a_model_cut_on_every_axis_is_exported_exactly(model_type: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 40, "intermediate_size": 48, "num_attention_heads": 2}
    cut = METHODS["minitron"].compress(tiny(model_type), token_rows(), method_config("minitron", sizes)).model
    done = exported(cut, tmp_path / "x")
    assert_exact(done.parity)
    config = json.loads((done.path / "config.json").read_text())
    assert {name: config[name] for name in sizes} == sizes
    assert config["head_dim"] == 16


def test_a_block_without_an_ffn_leaves_nothing_of_it_in_the_graph(tmp_path: Path) -> None:
    done = exported(without_ffn(tiny("llama"), (0, 3), (2,)), tmp_path / "x")
    graph = onnx.load(str(done.path / "model.onnx"), load_external_data=False).graph
    names = {node.name for node in graph.node} | {each.name for each in graph.initializer}
    found = {
        part: {b for b in range(5) if any(re.search(rf"layers\.{b}[./].*{part}", name) for name in names)}
        for part in ("mlp", "attn")
    }
    assert found == {"mlp": {1, 2, 4}, "attn": {0, 1, 3, 4}}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_an_int4_export_without_ffns_computes_what_one_with_zeroed_ffns_does(model_type: str, tmp_path: Path) -> None:
    gone = (0, 3, 4)
    zeroed = without_ffn(tiny(model_type), (), (2,))
    for b in gone:
        Decoder(zeroed).blocks[b].ffn_out.module.weight.zero_()
    done = exported(without_ffn(tiny(model_type), gone, (2,)), tmp_path / "x", "int4", embeddings="int4")
    twin = exported(zeroed, tmp_path / "y", "int4", embeddings="int4")
    ours, theirs = (OnnxSession(each.path).logits(TOKENS) for each in (done, twin))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert done.parity.decode_max_abs_difference < 1e-4
    assert ffns_missing(done) == [b in gone for b in range(len(Decoder(zeroed)))]
    assert done.bytes < 0.85 * twin.bytes
    operators = {node.op_type for node in onnx.load(str(done.path / "model.onnx"), load_external_data=False).graph.node}
    assert "MatMulNBits" in operators
    assert "MatMul" not in operators


def test_a_layout_without_ffns_is_checked_without_weights() -> None:
    to_onnx.check_layout(without_ffn(tiny("llama"), (0, 3), (2,)).to("meta"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 9}),
        ("phi3", {"sliding_window": 9}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "layer_types": None}),
        ("gemma3_text", {"hidden_size": 72}),  # sqrt(72) is not a short number
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("phi3", LONG_ROPE),
        ("phi3", {**LONG_ROPE, "rope_parameters": {**LONG_ROPE["rope_parameters"], "attention_factor": 1.3}}),
    ],
)
def test_windows_ropes_and_biases_reach_the_graph(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    parity = exported(ragged(variant(model_type, **changes)), tmp_path / "x").parity
    assert max(parity.max_abs_difference, parity.decode_max_abs_difference) < 1e-4


def test_a_longrope_model_is_exported_at_its_original_context(tmp_path: Path) -> None:
    model = variant("phi3", **LONG_ROPE)
    done = exported(model, tmp_path / "x")
    config = json.loads((done.path / "config.json").read_text())
    genai = json.loads((done.path / "genai_config.json").read_text())
    assert config["max_position_embeddings"] == genai["model"]["context_length"] == 48
    assert genai["search"]["max_length"] == 48
    assert "The context is 48 tokens" in (done.path / "README.md").read_text()
    assert model.config.max_position_embeddings == CONTEXT
    session = OnnxSession(done.path)
    with pytest.raises(ConfigError, match="positions for 48"):
        session.prefill(np.zeros((1, 49), np.int64))
    stock = AutoConfig.from_pretrained(done.path)  # the shorter context must not change how it scales attention
    assert type(model)(stock).model.rotary_emb.attention_scaling == model.model.rotary_emb.attention_scaling > 1


def test_a_longrope_export_is_not_checked_beyond_its_context(tmp_path: Path) -> None:
    tokens = token_rows(rows=1, length=49).tokens
    with pytest.raises(ConfigError, match="original context of 48 tokens"):
        export(loaded(variant("phi3", **LONG_ROPE)), tmp_path / "x", to="onnx", check_tokens=tokens)
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_is_read_wrongly_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OnnxSession._run

    def forgetful(self: OnnxSession, tokens: Any, mask: Any, kv: Any, **options: Any) -> Any:
        if 1 < tokens.shape[1] < mask.shape[1]:  # a later run of a prefill
            kv[0][0][:] = 0
        return right(self, tokens, mask, kv, **options)

    monkeypatch.setattr(OnnxSession, "_run", forgetful)
    with pytest.raises(ParityError, match="decoding with a cache"):
        exported(tiny("llama"), tmp_path / "x")


@pytest.mark.parametrize(("model_type", "rope_type"), [("llama", "yarn"), ("qwen2", "yarn"), ("qwen3", "dynamic")])
def test_rope_that_the_builder_cannot_say_is_refused_before_there_are_weights(model_type: str, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config = variant(model_type, rope_parameters=rope).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LayoutNotSupported, match=rf"RoPE of type {rope_type} in a {model_type} model.*--to hf"):
        to_onnx.check_layout(model)


@pytest.mark.parametrize("model_type", BUILDABLE)
def test_a_layout_is_checked_without_weights(model_type: str) -> None:
    to_onnx.check_layout(tiny(model_type).to("meta"))


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), AssertionError(), KeyError("x")])
def test_what_the_builder_raises_is_an_export_error(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(onnx_graph, "builder_class", fail)
    with pytest.raises(ExportError, match=f"cannot express this model \\({type(error).__name__}"):
        exported(tiny("llama"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_caches_are_numbered_densely_and_counted_alike_everywhere(dtype: str, tmp_path: Path) -> None:
    done = exported(ragged(tiny("gemma3_text"), (0, 3)), tmp_path / "x", dtype)
    graph = onnx.load(str(done.path / "model.onnx"), load_external_data=False).graph
    sizes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert [sizes.pop(onnx_session.LOGITS_FROM)] == [[1]]
    config = json.loads((done.path / "config.json").read_text())
    genai = json.loads((done.path / "genai_config.json").read_text())
    expected = [f"past_key_values.{i}.{kind}" for kind in ("key", "value") for i in range(4)]
    assert sorted(sizes) == sorted(["input_ids", "attention_mask", *expected])
    assert all(sizes[name][1] == 2 and sizes[name][3] == 16 for name in expected)
    assert genai["model"]["decoder"]["num_hidden_layers"] == config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert [b["attention"]["no_op"] for b in read_export(done.path).blocks] == [True, False, False, True, False, False]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_onnxruntime_genai_generates_the_tokens_that_pytorch_does(model_type: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = ragged(tiny(model_type), (0, 3))
    done = exported(model, tmp_path / "x")
    prompt = TOKENS[:1, :12]
    params = genai.GeneratorParams(genai.Model(str(done.path)))
    params.set_search_options(max_length=30, do_sample=False)
    generator = genai.Generator(genai.Model(str(done.path)), params)
    generator.append_tokens(prompt[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    ours = list(generator.get_sequence(0))
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=30, do_sample=False)[0].tolist()
    assert ours == theirs[: len(ours)]
    assert len(ours) > 12


def test_the_folder_holds_what_its_readers_look_for(tmp_path: Path) -> None:
    done = exported(tiny("llama"), tmp_path / "x", "int4")
    names = {file.name for file in done.path.iterdir()}
    assert names >= {
        "model.onnx", "model.onnx_data", "genai_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "export.json", "README.md",
    }  # fmt: skip
    assert set(done.files) == names - {"export.json"}
    assert done.bytes == sum((done.path / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    settings = json.loads((done.path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == CONTEXT
    text = "Fold it until it fits."
    tokenizer = load_tokenizer(done.path)
    assert tokenizer(text).input_ids == byte_tokenizer()(text).input_ids
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert OnnxSession(done.path).artifact_id == ORIGIN.artifact_id
    assert "license: apache-2.0" in (done.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("dtype", "bytes_each"), [("fp32", 4), ("fp16", 2), ("int8", 1 + 4 / 64), ("int4", 1 + 4 / 32)]
)
def test_tied_embeddings_are_stored_once(dtype: str, bytes_each: float, tmp_path: Path) -> None:
    sizes = {
        tied: exported(variant("llama", tie_word_embeddings=tied), tmp_path / str(tied), dtype).bytes
        for tied in (True, False)
    }
    table = 259 * 64 * bytes_each
    assert 0.9 * table < sizes[False] - sizes[True] < 1.1 * table + onnx_file.PAGE


def test_large_tensors_begin_a_page_and_small_ones_come_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MAPPED", 8192)
    path = exported(tiny("llama"), tmp_path / "x").path
    places = {}
    for tensor in onnx.load(str(path / "model.onnx"), load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            places[tensor.name] = int(where["offset"]), int(where["length"])
    large = [offset for offset, length in places.values() if length >= 8192]
    small = [offset for offset, length in places.values() if length < 8192]
    assert len(large) > 10 < len(small)
    assert all(offset % onnx_file.PAGE == 0 for offset in large)
    assert max(large) < min(small)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_the_same_model_gives_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    options = {"block_size": 64} if dtype == "int8" else {}
    first, second = (exported(ragged(tiny("phi3")), tmp_path / name, dtype, **options).path for name in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16},
        {"accuracy_level": 1},
        {"algorithm": "hqq"},
        {"algorithm": "k-quant"},
        {"embeddings": "int4"},
        {"embeddings": "fp32"},
        {"int8": ("qkv",)},
        {"int8": ("o", "gate", "up", "down")},
        {"smooth": 0.5},
        {"ep": "webgpu"},
    ],
    ids=str,
)
def test_every_option_of_int4_matters(options: dict[str, Any], tmp_path: Path) -> None:
    usual, other = (
        exported(tiny("llama"), tmp_path / "a", "int4"),
        exported(tiny("llama"), tmp_path / "b", "int4", **options),
    )
    written = [
        [(done.path / name).read_bytes() for name in ("model.onnx", "model.onnx_data")] for done in (usual, other)
    ]
    assert written[0] != written[1]
    assert dataclasses.asdict(read_export(other.path).options).items() >= options.items()


def test_exporting_leaves_no_trace_in_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an export used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = ragged(tiny("phi3"))  # its fused matrices are split by adding modules
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, random, level = model.config.to_dict(), torch.get_rng_state(), logging.getLogger().level
    exported(model, tmp_path / "x", "int4")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.getLogger().level == level
    assert capfd.readouterr() == ("", "")


def test_a_half_precision_model_is_checked_in_full_precision(tmp_path: Path) -> None:
    model = in_dtype(tiny("gemma3_text"), torch.bfloat16)
    done = exported(model, tmp_path / "x")
    assert done.parity.max_abs_difference < 1e-4
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", sorted(set(TINY) - set(BUILDABLE)))
def test_what_the_builder_does_not_know_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutNotSupported, match=rf"{model_type} model.*knows only llama.*--to hf"):
        exported(tiny(model_type), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_export_that_computes_something_else_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = onnx_graph.builder_config

    def wrong(config: Any, layout: Any) -> Any:
        config.rope_parameters["rope_theta"] *= 2
        return right(config, layout)

    monkeypatch.setattr(onnx_graph, "builder_config", wrong)
    with pytest.raises(ParityError, match="a logit is off by"):
        exported(tiny("llama"), tmp_path / "deep" / "x")
    assert not list((tmp_path / "deep").iterdir())


def test_a_wrong_cache_shows_in_int4_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = OnnxSession.step

    def late(self: OnnxSession, tokens: Any, kv: Any, lengths: Any) -> Any:
        return right(self, tokens, kv, np.minimum(lengths + (lengths > 10), lengths.max() + 1).clip(max=14))

    monkeypatch.setattr(OnnxSession, "step", late)
    with pytest.raises(ParityError, match="decoding with a cache"):
        exported(tiny("llama"), tmp_path / "x", "int4")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        exported(tiny("llama"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def demo() -> Loaded:
    """SmolLM2 with two attentions gone and 1058 of 1536 neurons, as 2SSP leaves it at 25 %."""
    try:
        source = sources.load("demo:smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
    keep_neurons(source.model, {i: torch.arange(1058) for i in range(30)})
    drop_attention(source.model, (11, 23))
    return source


def real_tokens(source: Loaded, length: int) -> torch.Tensor:
    return windows("builtin", source.tokenizer, length=length, count=1).tokens


@pytest.mark.model
def test_the_demo_model_cut_to_odd_widths_stays_small_in_int4(demo: Loaded, tmp_path: Path) -> None:
    options = ExportOptions(dtype="int4", embeddings="int4")  # as the builder's own: its head in four bits too
    cut = export(demo, tmp_path / "x", to="onnx", options=options, check_tokens=real_tokens(demo, 16))
    dense_bytes_per_parameter = 86_511_797 / 134_515_008  # the builder's own create_model, on the dense model
    assert cut.bytes / cut.parameters < 1.05 * dense_bytes_per_parameter


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_stays_exact_in_fp32_on_512_real_tokens(demo: Loaded, tmp_path: Path) -> None:
    parity = export(demo, tmp_path / "x", to="onnx", check_tokens=real_tokens(demo, 512)).parity
    assert max(parity.max_abs_difference, parity.decode_max_abs_difference) < 1e-3
    assert parity.argmax_agreement == parity.decode_argmax_agreement == 1.0


def test_whole_forwards_fit_the_evaluation(tmp_path: Path) -> None:
    model = tiny("qwen3")
    session = OnnxSession(exported(model, tmp_path / "x").path)
    torch.testing.assert_close(session.logits(TOKENS), logits_of(model)(TOKENS), atol=1e-4, rtol=0)
