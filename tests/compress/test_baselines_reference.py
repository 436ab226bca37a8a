"""The methods that 2SSP is compared with, against the slow reference, which shares no code with them."""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.calibration import TokenRows
from compress.decoder import Decoder, Projection
from compress.errors import BudgetError
from compress.evaluate import logits_of
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.result import CompressedModel, Run
from tests.conftest import _COMMON, ARCHITECTURES, covering, tiny, token_rows
from tests.reference import baselines as reference
from tests.reference.two_ssp import Infeasible, balance

ROWS = token_rows(3, 24)
HELD_OUT = token_rows(2, 40, seed=1).tokens  # beyond gemma3's window of 8

WINDOW = [(0.2, "last"), (0.2, "all"), (0.5, "last"), (0.5, "all"), (0.8, "last")]
# (sparsity, rows): a weaker target with as many rows takes the first of the same parts.
SLEB = [(0.3, 2), (0.8, 1)]
BLOCKPRUNER = [(0.4, 2), (0.8, 1)]
NEURONS = [0.1, 0.3]
RANDOM = [(0.3, 0.7), (0.4, 1.5), (0.5, 1.0)]  # (sparsity, alpha)


@functools.cache
def stock(model_type: str) -> PreTrainedModel:
    """One model for all tests that do not change it: methods and references copy what they are given."""
    return tiny(model_type)


def compress(method: str, model: PreTrainedModel, calibration: TokenRows = ROWS, **options: Any) -> CompressedModel:
    return METHODS[method].compress(model, calibration, method_config(method, options), Run())


def with_tokens(tokens: torch.Tensor) -> TokenRows:
    return TokenRows(tokens, "random", "0" * 64, 0)


def numbers_of(method: str, model: PreTrainedModel, calibration: TokenRows = ROWS, **options: Any) -> dict[str, Any]:
    return dict(compress(method, model, calibration, **options).report.numbers)


def assert_logits(model: PreTrainedModel, masked: reference.Masked, tolerance: float = 1e-4) -> None:
    ours, theirs = logits_of(model)(HELD_OUT).double().numpy(), masked.logits(HELD_OUT)
    assert np.abs(ours - theirs).max() < tolerance


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """All attentions and FFNs add nothing, so that no removal changes anything and every choice is a tie."""
    masked = reference.Masked(model)
    for block in Decoder(model):
        for path in (masked.names.attention_out, masked.names.last):
            for parameter in block.module.get_submodule(path).parameters():
                torch.nn.init.zeros_(parameter)
    return model


def projections(model: PreTrainedModel) -> Iterator[tuple[list[Projection], Projection]]:
    for block in Decoder(model):
        yield block.ffn_in, block.ffn_out


def neurons_left(dense: PreTrainedModel, pruned: PreTrainedModel) -> list[list[int]]:
    """Which neurons each block still has, in their order there, told by the weights that feed them."""
    found = []
    for (before, _), (after, _) in zip(projections(dense), projections(pruned), strict=True):
        old, new = before[0].matrix[: before[0].outputs], after[0].matrix[: after[0].outputs]
        same = (old[None] == new[:, None]).all(2)  # (kept, I)
        assert (same.sum(1) == 1).all()
        found.append(same.int().argmax(1).tolist())
    return found


def assert_cut(dense: PreTrainedModel, pruned: PreTrainedModel, kept: list[list[int]]) -> None:
    """Every weight of every FFN is that of the kept neurons, in their order."""
    for b, ((in_before, out_before), (in_after, out_after)) in enumerate(
        zip(projections(dense), projections(pruned), strict=True)
    ):
        index = torch.tensor(kept[b])
        out_before.keep_inputs(index)
        assert torch.equal(out_after.matrix, out_before.matrix)
        for ours, projection in zip(in_after, in_before, strict=True):
            projection.keep_outputs(index)
            assert all(torch.equal(*pair) for pair in zip(*map(_parameters, (ours, projection)), strict=True))


def _parameters(projection: Projection) -> list[torch.Tensor]:
    return list(projection.module.parameters())


# A window of blocks


@covering("setting", WINDOW)
def test_a_window_agrees_on_similarities_blocks_and_logits(architecture: str, setting: tuple[float, str]) -> None:
    sparsity, tokens = setting
    theirs = reference.window(stock(architecture), ROWS.tokens, sparsity, all_tokens=tokens == "all")
    ours = compress("window", stock(architecture), sparsity=sparsity, tokens=tokens)
    np.testing.assert_allclose(ours.report.numbers["window_similarity"], theirs.similarity, atol=1e-6)
    assert list(ours.report.numbers["blocks_removed"]) == theirs.removed
    assert len(layout_of(ours.model).blocks) == theirs.masked.B - len(theirs.removed)
    assert_logits(ours.model, theirs.masked)


def test_of_equal_windows_the_first_goes(architecture: str) -> None:
    for sparsity in (0.2, 0.4, 0.6):
        numbers = numbers_of("window", silenced(tiny(architecture)), sparsity=sparsity)
        n = len(numbers["blocks_removed"])
        assert numbers["window_similarity"] == pytest.approx([1] * (len(Decoder(stock(architecture))) - n))
        assert list(numbers["blocks_removed"]) == list(range(1, n + 1))
        assert reference.window(silenced(tiny(architecture)), ROWS.tokens, sparsity).removed == list(range(1, n + 1))


def test_a_window_is_rounded_up_to_whole_blocks_but_not_for_the_sake_of_a_rounding_error() -> None:
    config = {**_COMMON, "num_hidden_layers": 10, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval().requires_grad_(False)
    few = with_tokens(ROWS.tokens[:1, :4])
    assert math.ceil((0.1 + 0.2) * 10) == 4  # the trap
    for sparsity, count in ((0.3, 3), (0.1 + 0.2, 3), (0.31, 4), (0.7, 7), (0.01, 1)):
        assert reference.blocks_for(sparsity, 10) == count
        assert len(numbers_of("window", model, few, sparsity=sparsity)["blocks_removed"]) == count
    assert len(numbers_of("sleb", model, few, sparsity=0.1 + 0.2)["blocks_removed"]) == 3
    assert reference.blocks_for(0.3, 30) == 9


@covering("method", ["window", "sleb"])
def test_a_target_that_takes_all_blocks_is_refused(architecture: str, method: str) -> None:
    with pytest.raises(Infeasible):
        reference.blocks_for(0.9, reference.Masked(stock(architecture)).B)
    with pytest.raises(BudgetError):
        compress(method, stock(architecture), sparsity=0.9)


# SLEB


@functools.cache
def expected_blocks(model_type: str, sparsity: float, rows: int = 1) -> reference.Greedy:
    return reference.sleb(stock(model_type), ROWS.tokens, sparsity, first=rows)


@covering("setting", SLEB)
def test_sleb_takes_the_same_blocks_in_the_same_order(architecture: str, setting: tuple[float, int]) -> None:
    sparsity, rows = setting
    theirs = expected_blocks(architecture, sparsity, rows)
    ours = compress("sleb", stock(architecture), sparsity=sparsity, rows=rows)
    assert list(ours.report.numbers["blocks_removed"]) == [b for _, b in theirs.parts]
    assert ours.report.numbers["perplexity_after_removal"] == pytest.approx(theirs.perplexities, rel=1e-4)
    assert len(layout_of(ours.model).blocks) == theirs.masked.B - len(theirs.parts)
    assert_logits(ours.model, theirs.masked)


def test_sleb_may_take_block_0() -> None:
    assert any(("block", 0) in expected_blocks(model_type, 0.8).parts for model_type in ARCHITECTURES)


def test_of_blocks_that_nothing_misses_sleb_takes_the_first(architecture: str) -> None:
    numbers = numbers_of("sleb", silenced(tiny(architecture)), sparsity=0.5)
    assert list(numbers["blocks_removed"]) == [0, 1, 2]
    theirs = reference.sleb(silenced(tiny(architecture)), ROWS.tokens, 0.5)
    assert theirs.parts == [("block", 0), ("block", 1), ("block", 2)]
    assert len(set(numbers["perplexity_after_removal"])) == 1


# BlockPruner


@functools.cache
def expected_parts(model_type: str, sparsity: float, rows: int = 1) -> reference.Greedy:
    return reference.blockpruner(stock(model_type), ROWS.tokens, sparsity, first=rows)


def emptied(parts: list[reference.Part]) -> set[int]:
    return {b for kind, b in parts if kind == "attention"} & {b for kind, b in parts if kind == "ffn"}


def assert_same_parts(ours: CompressedModel, theirs: reference.Greedy, dense: PreTrainedModel) -> None:
    numbers, parts = ours.report.numbers, theirs.parts
    assert [tuple(part) for part in numbers["removed"]] == parts
    assert numbers["perplexity_after_removal"] == pytest.approx(theirs.perplexities, rel=1e-4)
    left = [b for b in range(theirs.masked.B) if b not in emptied(parts)]
    blocks = layout_of(ours.model).blocks
    assert [block.attention for block in blocks] == [("attention", b) not in parts for b in left]
    assert [block.intermediate_size > 0 for block in blocks] == [("ffn", b) not in parts for b in left]
    counter = reference.Masked(dense)
    gone = sum(counter.size(part) for part in parts)
    assert numbers["parameters_before"] - numbers["parameters_after"] == gone
    assert_logits(ours.model, theirs.masked)


@covering("setting", BLOCKPRUNER)
def test_blockpruner_takes_the_same_parts_in_the_same_order(architecture: str, setting: tuple[float, int]) -> None:
    sparsity, rows = setting
    ours = compress("blockpruner", stock(architecture), sparsity=sparsity, rows=rows)
    assert_same_parts(ours, expected_parts(architecture, sparsity, rows), stock(architecture))


def test_blockpruner_settings_are_strong_enough_to_empty_whole_blocks(architecture: str) -> None:
    assert emptied(expected_parts(architecture, 0.8).parts)
    gone = [emptied(expected_parts(model_type, 0.8).parts) for model_type in ARCHITECTURES]
    assert any(0 in blocks for blocks in gone)  # the first block, a middle one, and two at once
    assert any(len(blocks) > 1 for blocks in gone)


@pytest.mark.parametrize("model_type", ["gemma3_text", "opt", "phi3", "qwen3"])
def test_blockpruner_can_take_all_but_one_attention(model_type: str) -> None:
    counter = reference.Masked(stock(model_type))
    most = 1 - counter.size(("attention", 0)) / counter.P_blk
    theirs = expected_parts(model_type, most - 1e-9)
    assert [kind for kind, _ in theirs.parts].count("attention") == counter.B - 1
    ours = compress("blockpruner", stock(model_type), sparsity=most - 1e-9)
    assert_same_parts(ours, theirs, stock(model_type))
    assert len(layout_of(ours.model).blocks) == 1
    with pytest.raises(Infeasible):
        expected_parts(model_type, most + 1e-4)
    with pytest.raises(BudgetError):
        compress("blockpruner", stock(model_type), sparsity=most + 1e-4)


def test_of_parts_that_nothing_misses_blockpruner_takes_the_first_and_attention_before_ffn(architecture: str) -> None:
    numbers = numbers_of("blockpruner", silenced(tiny(architecture)), sparsity=0.6)
    removed = [tuple(part) for part in numbers["removed"]]
    assert len(removed) >= 6
    assert removed == reference.blockpruner(silenced(tiny(architecture)), ROWS.tokens, 0.6).parts
    assert removed == [(kind, b) for b in range(5) for kind in ("attention", "ffn")][: len(removed)]


@covering("sparsity", [0.1, 0.55])
def test_blockpruner_stops_at_the_removal_that_reaches_the_target(architecture: str, sparsity: float) -> None:
    counter = reference.Masked(stock(architecture))
    removed = numbers_of("blockpruner", stock(architecture), sparsity=sparsity)["removed"]
    sizes = [counter.size((kind, b)) for kind, b in removed]
    assert sum(sizes[:-1]) < sparsity * counter.P_blk <= sum(sizes)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["sleb", "blockpruner"])
def test_trials_run_on_as_many_rows_as_asked_for(model_type: str, method: str) -> None:
    def perplexities(tokens: torch.Tensor, rows: int) -> list[float]:
        numbers = numbers_of(method, stock(model_type), with_tokens(tokens), sparsity=0.2, rows=rows)
        return list(numbers["perplexity_after_removal"])

    one = perplexities(ROWS.tokens, 1)
    assert perplexities(ROWS.tokens[:1], 1) == one  # the first row, and no other
    assert perplexities(ROWS.tokens[:1].expand(2, -1), 2) == pytest.approx(one, rel=1e-6)
    assert perplexities(ROWS.tokens, 2) != pytest.approx(one, rel=1e-3)
    assert perplexities(ROWS.tokens, 2) == pytest.approx(perplexities(ROWS.tokens[[1, 0, 2]], 2), rel=1e-6)


# Neurons by weight, by Wanda, and by chance


def expected_neurons(method: str, model: PreTrainedModel, sparsity: float) -> reference.Neurons:
    if method == "magnitude":
        return reference.magnitude(model, sparsity)
    return reference.wanda(model, ROWS.tokens, sparsity)


@covering("sparsity", NEURONS)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_same_neurons_stay_in_their_order(architecture: str, method: str, sparsity: float) -> None:
    theirs = expected_neurons(method, stock(architecture), sparsity)
    ours = compress(method, stock(architecture), sparsity=sparsity)
    assert neurons_left(stock(architecture), ours.model) == theirs.kept
    assert_cut(tiny(architecture), ours.model, theirs.kept)
    assert list(ours.report.numbers["ffn_widths"]) == [len(kept) for kept in theirs.kept]
    assert layout_of(ours.model).attention_blocks == tuple(range(theirs.masked.B))
    assert_logits(ours.model, theirs.masked)


def replace_matrix(projection: Projection, matrix: torch.Tensor) -> None:
    """Put other numbers, given as (outputs, inputs), into a weight of either orientation."""
    transposed = type(projection.module).__name__ == "Conv1D"
    stored = (matrix.T if transposed else matrix).contiguous()
    projection.module.weight = torch.nn.Parameter(stored, requires_grad=False)


def test_magnitude_counts_every_weight_of_a_neuron_no_bias_and_keeps_the_first_of_equals(architecture: str) -> None:
    """All weights are 1 or -1, so that all scores are equal; then one weight of three neurons grows."""
    model = tiny(architecture)
    generator = torch.Generator().manual_seed(0)
    for into, out in projections(model):
        for projection in (*into, out):
            signs = torch.randint(0, 2, projection.matrix.shape, generator=generator).float() * 2 - 1
            replace_matrix(projection, signs)
    I_keep = reference.neurons_to_keep(reference.Masked(model), 0.2)
    for kept in neurons_left(model, compress("magnitude", model, sparsity=0.2).model):
        assert kept == list(range(I_keep))
    for into, out in projections(model):
        for projection, row, column in ((into[0], 79, 5), (into[-1], into[-1].matrix.shape[0] - 2, 1), (out, 3, 77)):
            matrix = projection.matrix.clone()
            matrix[row, column] *= 2
            replace_matrix(projection, matrix)
    grown = [*range(I_keep - 3), 77, 78, 79]
    assert reference.magnitude(model, 0.2).kept == [grown] * len(Decoder(model))
    assert neurons_left(model, compress("magnitude", model, sparsity=0.2).model) == [grown] * len(Decoder(model))


def test_wanda_keeps_the_first_of_equals(architecture: str) -> None:
    model = tiny(architecture)
    for _, out in projections(model):
        replace_matrix(out, torch.zeros_like(out.matrix))
    I_keep = reference.neurons_to_keep(reference.Masked(model), 0.2)
    assert neurons_left(model, compress("wanda", model, sparsity=0.2).model) == [[*range(I_keep)]] * len(Decoder(model))


def test_wanda_looks_at_all_rows_and_magnitude_at_none() -> None:
    def kept(method: str, rows: TokenRows) -> list[list[list[int]]]:
        return [
            neurons_left(stock(model_type), compress(method, stock(model_type), rows, sparsity=0.2).model)
            for model_type in ("llama", "opt")
        ]

    first = with_tokens(ROWS.tokens[:1])
    assert kept("magnitude", first) == kept("magnitude", ROWS)
    assert kept("wanda", first) != kept("wanda", ROWS)
    assert kept("wanda", with_tokens(ROWS.tokens[:2])) != kept("wanda", ROWS)


@covering("method", ["magnitude", "wanda"])
def test_a_share_that_the_ffns_cannot_bear_is_refused(architecture: str, method: str) -> None:
    with pytest.raises(Infeasible):
        expected_neurons(method, stock(architecture), 0.7)
    with pytest.raises(BudgetError):
        compress(method, stock(architecture), sparsity=0.7)


@pytest.mark.parametrize(("sparsity", "alpha"), RANDOM)
def test_random_fills_the_shape_of_2ssp_by_chance(architecture: str, sparsity: float, alpha: float) -> None:
    dense, masked = stock(architecture), reference.Masked(stock(architecture))
    N_attn, I_keep = balance(masked.B, masked.I, masked.a, masked.f, masked.P_blk, sparsity, alpha)
    result = compress("random", dense, sparsity=sparsity, alpha=alpha)
    numbers, kept = result.report.numbers, neurons_left(dense, result.model)
    assert list(numbers["ffn_widths"]) == [I_keep] * masked.B == [len(neurons) for neurons in kept]
    assert all(neurons == sorted(set(neurons)) for neurons in kept)
    assert len({tuple(neurons) for neurons in kept}) == masked.B  # each block draws for itself
    gone = list(numbers["attentions_removed"])
    assert len(gone) == N_attn == len(set(gone))
    assert sorted(gone) == sorted(set(range(masked.B)) - set(layout_of(result.model).attention_blocks))
    for b in range(masked.B):
        masked.keep_neurons(b, kept[b])
        if b in gone:
            masked.zero(("attention", b))
    assert_logits(result.model, masked)


def test_random_depends_on_its_seed_and_on_nothing_else(architecture: str) -> None:
    def choice(rows: TokenRows = ROWS, **options: Any) -> tuple[list[list[int]], list[int]]:
        result = compress("random", stock(architecture), rows, sparsity=0.5, alpha=1.0, **options)
        return neurons_left(stock(architecture), result.model), sorted(result.report.numbers["attentions_removed"])

    first = choice()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert choice() == choice(seed=0) == choice(with_tokens(HELD_OUT)) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    others = [choice(seed=seed) for seed in range(1, 5)]
    assert all(neurons != first[0] for neurons, _ in others)
    assert any(attentions != first[1] for _, attentions in others)


# Nothing to remove


@covering("method", sorted(set(METHODS) - {"shortgpt", "foldgpt", "distill"}))
def test_a_sparsity_of_zero_removes_nothing(architecture: str, method: str) -> None:
    result = compress(method, stock(architecture), sparsity=0)
    assert torch.equal(logits_of(result.model)(HELD_OUT), logits_of(stock(architecture))(HELD_OUT))
    lists = ("blocks_removed", "removed", "attentions_removed", "perplexity_after_removal")
    assert not any(result.report.numbers.get(name) for name in lists)


# The reference stands on its own


def test_every_parameter_of_a_block_belongs_to_its_attention_or_its_ffn(architecture: str) -> None:
    masked = reference.Masked(stock(architecture))
    sizes = [masked.size((kind, b)) for kind in ("attention", "ffn") for b in range(masked.B)]
    assert sum(sizes) == masked.P_blk
    norms = [masked.blocks[0].get_submodule(path) for paths in masked.norms.values() for path in paths]
    norm_parameters = sum(p.numel() for norm in norms for p in norm.parameters())
    assert masked.size(("attention", 0)) + masked.size(("ffn", 0)) == masked.a + masked.f + norm_parameters


def test_a_block_without_both_its_parts_hands_on_what_it_gets_and_can_be_restored(architecture: str) -> None:
    emptied, skipped = reference.Masked(stock(architecture)), reference.Masked(stock(architecture))
    dense = emptied.logits(HELD_OUT)
    saved = emptied.zero(("block", 2))
    skipped.skip_block(2)
    np.testing.assert_allclose(emptied.logits(HELD_OUT), skipped.logits(HELD_OUT), atol=1e-9)
    emptied.restore(saved)
    np.testing.assert_array_equal(emptied.logits(HELD_OUT), dense)


def test_the_perplexity_of_rows_is_the_geometric_mean_of_theirs() -> None:
    masked = reference.Masked(tiny("llama"))
    alone = [masked.perplexity(row) for row in ROWS.tokens]
    assert masked.perplexity_of_rows(ROWS.tokens) == pytest.approx(math.prod(alone) ** (1 / 3))


def test_the_reference_knows_every_architecture_and_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    library = ("compress", "exporters", "serving", "benchmarks", "deploy")
    assert not {name for name in imported if name.split(".")[0] in library}
    assert {name for name in imported if name.startswith("tests")} == {"tests.reference.two_ssp"}
    assert set(reference.NORMS) == set(ARCHITECTURES)
