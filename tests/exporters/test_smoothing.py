"""Smoothing: what a model computes stays as it is, and a rounded one loses less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import ConfigError
from compress.evaluate import logits_of
from compress.result import no_progress
from exporters import ExportOptions, read_export
from exporters.smoothing import smooth
from tests.conftest import tiny, token_rows
from tests.exporters.test_onnx import BUILDABLE, TOKENS, exported, ragged
from tests.exporters.test_onnx_shared import shared

ROWS = token_rows(rows=3, length=24)


def uneven(model: PreTrainedModel, factor: float = 8.0) -> PreTrainedModel:
    """The same model with channels of norms, and neurons, that are far larger than the rest where they are read."""
    for block in Decoder(model):
        if block.attention is not None:
            getattr(block.module, block.arch.attention_norms[0]).weight[::7] *= factor
            for reader in block.attention_in:
                reader.matrix[:, ::7] /= factor
            decoder, heads = Decoder(model), block.attention_out.matrix.unflatten(1, (-1, Decoder(model).head_dim))
            block.attention_in[-1].matrix[-2:] *= factor  # of the last KV head
            heads[:, -decoder.heads // decoder.kv_heads :, -2:] /= factor
        if block.has_ffn:
            block.ffn_in[-1].matrix[-5:] *= factor
            block.ffn_out.matrix[:, -5:] /= factor
    return model


def largest_ratio(model: PreTrainedModel, rows: TokenRows) -> float:
    """How far the largest activation that a linear reads is above the typical one, mean over blocks."""
    found: list[float] = []
    hooks = [
        block.ffn_out.module.register_forward_pre_hook(
            lambda module, args: found.append(float(args[0].abs().amax() / args[0].abs().mean()))
        )
        for block in Decoder(model)
        if block.has_ffn
    ]
    logits_of(model)(rows.tokens)
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("model_type", BUILDABLE)
def test_the_model_computes_the_same(model_type: str, strength: float) -> None:
    model = uneven(ragged(tiny(model_type), (0, 3) if model_type == "gemma3_text" else (1, 3)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    smoothed = smooth(model, ROWS, strength, no_progress)
    ours, theirs = logits_of(smoothed)(TOKENS), logits_of(model)(TOKENS)
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    changed = {name for name, parameter in smoothed.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("norm" in name for name in changed)
    assert any("down_proj" in name for name in changed)
    assert any("o_proj" in name for name in changed)
    assert not any("embed" in name or "model.norm" in name for name in changed)


@pytest.mark.parametrize("model_type", BUILDABLE)
@pytest.mark.parametrize(
    "options", [{}, {"adapter_rank": 3}, {"own_biases": True}], ids=["plain", "adapters", "biases"]
)
def test_blocks_that_share_go_on_sharing(model_type: str, options: dict[str, int]) -> None:
    model = uneven(shared(model_type, **options))
    smoothed = smooth(model, ROWS, 0.5, no_progress)
    torch.testing.assert_close(logits_of(smoothed)(TOKENS), logits_of(model)(TOKENS), atol=5e-4, rtol=0)
    assert len(list(smoothed.parameters())) == len(list(model.parameters()))
    ours, theirs = ([id(block.ffn_out.module.weight) for block in Decoder(each)] for each in (smoothed, model))
    assert [ours.index(each) for each in ours] == [theirs.index(each) for each in theirs]


def test_channels_are_evened_out() -> None:
    model = uneven(tiny("llama"))
    plain = largest_ratio(model, ROWS)
    assert largest_ratio(smooth(model, ROWS, 0.5, no_progress), ROWS) < 0.5 * plain
    assert largest_ratio(smooth(model, ROWS, 1.0, no_progress), ROWS) < 0.5 * plain


def test_an_export_says_how_far_it_was_smoothed_and_loses_less(tmp_path: Path) -> None:
    model = uneven(tiny("llama"), factor=4.0)
    plain = exported(model, tmp_path / "plain", "int4")
    done = exported(model, tmp_path / "smooth", "int4", smooth=0.5)
    assert done.parity.kl is not None
    assert plain.parity.kl is not None
    assert done.parity.kl < 0.9 * plain.parity.kl
    assert (read_export(plain.path).options.smooth, read_export(done.path).options.smooth) == (0.0, 0.5)
    assert "smoothed by 0.5" in (done.path / "README.md").read_text()
    assert exported(model, tmp_path / "zero", "int4", smooth=0.0).parity == plain.parity
    again = exported(model, tmp_path / "again", "int4", smooth=0.5).path
    assert (again / "model.onnx_data").read_bytes() == (done.path / "model.onnx_data").read_bytes()


@pytest.mark.parametrize("ep", ["cpu", "webgpu"])
@pytest.mark.parametrize("model_type", BUILDABLE)
def test_a_smoothed_export_of_blocks_that_share_decodes_as_its_weights_say(
    model_type: str, ep: str, tmp_path: Path
) -> None:
    model = shared(model_type, adapter_rank=3)
    parity = exported(model, tmp_path / "x", "int4", smooth=0.5, ep=ep).parity
    assert parity.decode_max_abs_difference < (1e-4 if ep == "cpu" else 0.2)
    plain = exported(model, tmp_path / "y", "int4", ep=ep)
    assert (
        plain.bytes
        == (tmp_path / "x" / "model.onnx").stat().st_size + (tmp_path / "x" / "model.onnx_data").stat().st_size
    )


def test_a_channel_that_the_text_never_used_is_not_scaled_without_bound() -> None:
    model = tiny("llama")
    block = Decoder(model).blocks[0]
    block.ffn_in[0].matrix[7] = 0.0  # its gate is closed
    smoothed = Decoder(smooth(model, ROWS, 1.0, no_progress)).blocks[0]
    ratio = smoothed.ffn_in[1].matrix[7].abs().amax() / block.ffn_in[1].matrix[7].abs().amax()
    assert 16 < ratio <= 64 * 8  # of this joint, and of the columns, which the joint before scales


def test_what_cannot_be_smoothed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smooth=1\.5: give a strength from 0, which is off, to 1"):
        ExportOptions(dtype="int8", smooth=1.5)
    with pytest.raises(ConfigError, match=r"smooth=0\.5: the fp16 onnx export has no use for it"):
        exported(tiny("llama"), tmp_path / "x", "fp16", smooth=0.5)
