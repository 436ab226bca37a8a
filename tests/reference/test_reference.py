"""The reference stands on its own: published vectors, and models small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.conftest import ARCHITECTURES, tiny, token_rows
from tests.reference.two_ssp import Infeasible, Reference, Shape, balance, influence, scores, shortgpt, two_ssp

SPARSITIES = (0.125, 0.25, 0.30, 0.375, 0.50)
# Shape, and f / a.
SHAPES = {
    "Llama-2-7B": (Shape(32, 4096, 11008, 32, 32, 128), 2.0156),
    "Llama-2-13B": (Shape(40, 5120, 13824, 40, 40, 128), 2.0250),
    "Mistral-7B-v0.3": (Shape(32, 4096, 14336, 32, 8, 128), 4.2000),
    "Qwen2.5-7B": (Shape(28, 3584, 18944, 28, 4, 128, qkv_bias=True), 6.9364),
    "Phi-3-medium": (Shape(40, 5120, 17920, 40, 10, 128), 4.2000),
    "Llama-3.2-1B": (Shape(16, 2048, 8192, 32, 8, 64), 4.8000),
    "Llama-3.2-3B": (Shape(28, 3072, 8192, 24, 8, 128), 3.0000),
    "Qwen2.5-0.5B": (Shape(24, 896, 4864, 14, 2, 64, qkv_bias=True), 7.1205),
    "Qwen2.5-1.5B": (Shape(28, 1536, 8960, 12, 2, 128, qkv_bias=True), 7.4972),
    "Qwen3-0.6B": (Shape(28, 1024, 3072, 16, 8, 128, qk_norm=True), 1.4999),
    "Qwen3-8B": (Shape(36, 4096, 12288, 32, 8, 128, qk_norm=True), 3.6000),
    "SmolLM2-135M": (Shape(30, 576, 1536, 9, 3, 64), 3.0000),
    "SmolLM2-360M": (Shape(32, 960, 2560, 15, 5, 64), 3.0000),
    "TinyLlama-1.1B": (Shape(22, 2048, 5632, 32, 4, 64), 3.6667),
}
# (N_attn, I_keep) at each of the sparsities.
VECTORS = {
    "Llama-2-7B": [(2, 9291), (5, 7744), (6, 7091), (9, 6368), (13, 4992)],
    "Llama-2-13B": [(2, 11584), (6, 9685), (8, 8994), (11, 7957), (16, 6229)],
    "Mistral-7B-v0.3": [(0, 12117), (1, 10005), (1, 9118), (2, 7893), (5, 5994)],
    "Qwen2.5-7B": [(0, 16235), (0, 13525), (0, 12441), (0, 10816), (1, 8204)],
    "Phi-3-medium": [(0, 15147), (1, 12480), (1, 11370), (3, 9920), (6, 7466)],
    "Llama-3.2-1B": [(0, 6955), (0, 5717), (0, 5222), (1, 4586), (2, 3456)],
    "Llama-3.2-3B": [(0, 6827), (2, 5656), (3, 5208), (4, 4486), (7, 3413)],
    "Qwen2.5-0.5B": [(0, 4171), (0, 3477), (0, 3200), (0, 2784), (1, 2119)],
    "Qwen2.5-1.5B": [(0, 7691), (0, 6421), (0, 5913), (0, 5152), (1, 3925)],
    "Qwen3-0.6B": [(4, 2724), (7, 2304), (8, 2121), (11, 1956), (14, 1536)],
    "Qwen3-8B": [(0, 10325), (1, 8457), (2, 7767), (3, 6684), (7, 5101)],
    "SmolLM2-135M": [(0, 1280), (2, 1058), (3, 973), (4, 836), (8, 648)],
    "SmolLM2-360M": [(0, 2133), (2, 1760), (3, 1616), (4, 1386), (8, 1066)],
    "TinyLlama-1.1B": [(0, 4736), (1, 3910), (1, 3551), (2, 3083), (4, 2327)],
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_balance_formula_gives_the_published_vectors(name: str) -> None:
    (shape, ratio), expected = SHAPES[name], VECTORS[name]
    assert shape.f / shape.a == pytest.approx(ratio, abs=6e-5)
    assert [balance(shape.B, shape.I, shape.a, shape.f, shape.P_blk, s) for s in SPARSITIES] == expected
    for s, (N_attn, I_keep) in zip(SPARSITIES, expected, strict=True):
        reached = (N_attn * shape.a + shape.B * (shape.I - I_keep) * shape.f / shape.I) / shape.P_blk
        assert abs(reached - s) < 0.0002


def test_the_balance_formula_refuses_what_cannot_be_reached() -> None:
    with pytest.raises(Infeasible, match="attention alone"):
        balance(B=5, I=80, a=30_000, f=10_000, P_blk=5 * 40_000, s=0.2)
    with pytest.raises(Infeasible, match="do not reach"):
        balance(B=5, I=80, a=10_000, f=30_000, P_blk=5 * 60_000, s=0.9)


def test_counts_of_a_live_model_agree_with_its_shape() -> None:
    reference, shape = Reference(tiny("qwen3")), Shape(5, 64, 80, 4, 2, 16, qk_norm=True)
    for count in ("B", "I", "a", "f", "P_blk"):
        assert getattr(reference, count) == getattr(shape, count)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_equations_give_the_hidden_neurons_that_the_model_itself_computes(model_type: str) -> None:
    """z worked out from the FFN's input, put through the last linear by hand, is the FFN's output."""
    reference, row = Reference(tiny(model_type)), token_rows(1).tokens[0]
    outputs: list[torch.Tensor] = []
    last = [block.get_submodule(reference.names.last) for block in reference.blocks]
    for linear in last:
        linear.register_forward_hook(lambda module, args, output: outputs.append(output.reshape(len(row), -1)))
    z = reference.hidden_neurons(row)
    for b, linear in enumerate(last):
        weight = linear.weight.numpy() if type(linear).__name__ == "Conv1D" else linear.weight.numpy().T
        expected = z[b] @ weight + (0 if linear.bias is None else linear.bias.numpy())
        np.testing.assert_allclose(expected, outputs[b].detach().numpy(), atol=1e-9)


def test_a_masked_neuron_attention_or_block_no_longer_matters() -> None:
    tokens = token_rows(1).tokens
    changed, plain = Reference(tiny("llama")), Reference(tiny("llama"))
    changed.model.model.layers[2].mlp.up_proj.weight[7] += 1
    changed.model.model.layers[1].self_attn.q_proj.weight[:] += torch.randn(64, 64)
    changed.model.model.layers[3].mlp.down_proj.weight[:] *= 3
    assert np.abs(changed.logits(tokens) - plain.logits(tokens)).max() > 0.1
    for reference in (changed, plain):
        reference.zero_neurons(2, [7])
        reference.zero_attention(1)
        reference.skip_block(3)
    np.testing.assert_array_equal(changed.logits(tokens), plain.logits(tokens))


def test_scores_are_means_of_norms_over_sequences() -> None:
    reference, rows = Reference(tiny("llama")), token_rows(2, 6).tokens
    z = [np.stack(reference.hidden_neurons(row)) for row in rows]  # (B, T, I) each
    expected = (np.linalg.norm(z[0], axis=1) + np.linalg.norm(z[1], axis=1)) / 2
    np.testing.assert_allclose(np.stack(scores(reference, rows)), expected)
    l1 = (np.abs(z[0]).sum(1) + np.abs(z[1]).sum(1)) / 2
    np.testing.assert_allclose(np.stack(scores(reference, rows, norm="l1")), l1)


def test_perplexity_of_a_model_without_opinion_is_the_size_of_its_vocabulary() -> None:
    model = tiny("opt")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert Reference(model).perplexity(token_rows(1).tokens[0]) == pytest.approx(259)


def test_each_trial_starts_from_what_was_removed_before_and_takes_the_lowest_perplexity() -> None:
    rows = token_rows().tokens
    found = two_ssp(tiny("llama"), rows, s=0.4)
    assert [len(trial) for trial in found.trials] == [5 - k for k in range(found.N_attn)]
    for k, (trial, removed) in enumerate(zip(found.trials, found.removed, strict=True)):
        assert trial[removed] == min(trial.values())
        assert not set(found.removed[:k]) & set(trial)
    assert found.masked.perplexity(rows[0]) == pytest.approx(found.trials[-1][found.removed[-1]], rel=1e-12)
    assert all(len(kept) == found.I_keep for kept in found.kept)


def test_influence_is_one_minus_the_cosine_and_zero_for_a_block_that_adds_nothing() -> None:
    model = tiny("llama")
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        linear.weight = torch.nn.Parameter(torch.zeros_like(linear.weight))
    rows = token_rows().tokens
    for all_tokens in (False, True):
        found = influence(Reference(model), rows, all_tokens=all_tokens)
        assert found[2] == pytest.approx(0, abs=1e-12)
        assert all(0 <= value <= 2 for value in found)
        assert min(found[:2] + found[3:]) > 1e-3
    assert shortgpt(model, rows, s=0.2).removed == [2]


def test_block_influence_removes_whole_blocks_rounded_up_and_never_the_first() -> None:
    rows = token_rows().tokens
    assert [len(shortgpt(tiny("llama"), rows, s=s).removed) for s in (0, 0.01, 0.2, 0.21, 0.6)] == [0, 1, 1, 2, 3]
    assert 0 not in shortgpt(tiny("llama"), rows, s=0.8).removed


def test_a_skipped_block_hands_its_input_on_in_every_architecture() -> None:
    tokens = token_rows(1).tokens
    for model_type in ARCHITECTURES:
        skipped, emptied = Reference(tiny(model_type)), Reference(tiny(model_type))
        skipped.skip_block(2)
        emptied.zero_attention(2)
        emptied.zero_neurons(2, range(emptied.I))
        bias = emptied.blocks[2].get_submodule(emptied.names.last).bias
        if bias is not None:
            torch.nn.init.zeros_(bias)
        np.testing.assert_allclose(skipped.logits(tokens), emptied.logits(tokens), atol=1e-9)
        assert math.isfinite(skipped.perplexity(tokens[0]))
