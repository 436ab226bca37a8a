"""2SSP and ShortGPT against the slow reference, which shares no code with them."""

from __future__ import annotations

import ast
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from compress import budget
from compress.decoder import Decoder
from compress.errors import BudgetError
from compress.evaluate import logits_of
from compress.methods import METHODS, baselines, method_config, two_ssp
from compress.ranking import top_indices
from compress.result import CompressedModel, Run
from compress.surgery import clone, keep_neurons
from compress.trials import Part
from tests.conftest import ARCHITECTURES, covering, tiny, token_rows
from tests.reference import two_ssp as reference
from tests.reference.test_reference import SHAPES, SPARSITIES

# (sparsity, alpha): feasible for every tiny model, with one to three attentions removed.
SETTINGS = [(0.3, 0.7), (0.4, 1.5), (0.5, 1.0)]
ROWS = token_rows(3, 24)
HELD_OUT = token_rows(2, 20, seed=1).tokens


@functools.cache
def expected(model_type: str, setting: tuple[float, float], norm: str = "l2") -> reference.TwoSSP:
    return reference.two_ssp(tiny(model_type), ROWS.tokens, *setting, norm=norm)


@functools.cache
def found(model_type: str, setting: tuple[float, float], norm: str = "l2") -> CompressedModel:
    options = {"sparsity": setting[0], "alpha": setting[1], "neuron_norm": norm}
    return METHODS["2ssp"].compress(tiny(model_type), ROWS, method_config("2ssp", options))


def dense_counts(shape: reference.Shape) -> budget.Counts:
    return budget.Counts(shape.P_blk, shape.P_blk, (shape.a,) * shape.B, (shape.f,) * shape.B)


def assert_close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    assert np.abs(ours.double().numpy() - theirs).max() < tolerance


@pytest.mark.parametrize("name", SHAPES)
def test_the_budget_is_split_as_the_formula_says(name: str) -> None:
    shape = SHAPES[name][0]
    for alpha in (0.7, 1.5, 3.0):
        for s in (*SPARSITIES, 0.05, 0.2, 0.45, 0.6, 0.7, 0.8, 0.9):
            config = two_ssp.TwoSSPConfig(sparsity=s, alpha=alpha)
            try:
                N_attn, I_keep = reference.balance(shape.B, shape.I, shape.a, shape.f, shape.P_blk, s, alpha)
            except reference.Infeasible:
                with pytest.raises(BudgetError):
                    two_ssp.balance(dense_counts(shape), [shape.I] * shape.B, config)
            else:
                plan = two_ssp.balance(dense_counts(shape), [shape.I] * shape.B, config)
                assert plan == two_ssp.Plan(N_attn, (I_keep,) * shape.B)


@covering("norm", ["l2", "l1"])
def test_neuron_scores_are_those_of_the_reference(architecture: str, norm: str) -> None:
    ours = two_ssp.neuron_scores(tiny(architecture), ROWS.tokens, norm, Run())
    theirs = reference.scores(reference.Reference(tiny(architecture)), ROWS.tokens, norm)
    for b, scores in enumerate(theirs):
        np.testing.assert_allclose(ours[b].numpy(), scores, rtol=1e-5)


@covering("setting", SETTINGS)
def test_the_same_neurons_are_kept_in_their_order(architecture: str, setting: tuple[float, float]) -> None:
    dense, theirs = Decoder(tiny(architecture)), expected(architecture, setting)
    for before, after, kept in zip(dense, Decoder(found(architecture, setting).model), theirs.kept, strict=True):
        index = torch.tensor(kept)
        before.ffn_out.keep_inputs(index)
        assert torch.equal(after.ffn_out.module.weight, before.ffn_out.module.weight)
        for ours, projection in zip(after.ffn_in, before.ffn_in, strict=True):
            projection.keep_outputs(index)
            assert torch.equal(ours.module.weight, projection.module.weight)


@covering("setting", SETTINGS)
def test_the_same_attentions_go_in_the_same_order(architecture: str, setting: tuple[float, float]) -> None:
    numbers, theirs = found(architecture, setting).report.numbers, expected(architecture, setting)
    assert numbers["attentions_removed"] == theirs.removed
    assert list(numbers["ffn_widths"]) == [theirs.I_keep] * len(theirs.kept)
    perplexities = [trial[b] for trial, b in zip(theirs.trials, theirs.removed, strict=True)]
    assert numbers["perplexity_after_removal"] == pytest.approx(perplexities, rel=1e-4)


def test_every_trial_has_the_perplexity_of_a_full_pass(architecture: str) -> None:
    theirs = expected(architecture, SETTINGS[2])
    model = clone(tiny(architecture))
    scores = two_ssp.neuron_scores(model, ROWS.tokens, "l2", Run())
    keep_neurons(model, {b: top_indices(scores[b], theirs.I_keep) for b in range(len(scores))})
    removals = two_ssp.remove_attentions(model, ROWS.tokens[:1], theirs.N_attn, Run())
    assert len(removals.rounds) == len(theirs.trials)
    for ours, trial in zip(removals.rounds, theirs.trials, strict=True):
        expected_costs = {Part(b, "attention"): perplexity for b, perplexity in trial.items()}
        assert ours.costs == pytest.approx(expected_costs, rel=1e-4)


@covering("setting", SETTINGS)
def test_the_sliced_model_has_the_logits_of_the_masked_one(architecture: str, setting: tuple[float, float]) -> None:
    ours = logits_of(found(architecture, setting).model)(HELD_OUT)
    assert_close(ours, expected(architecture, setting).masked.logits(HELD_OUT))


def test_the_l1_ablation_agrees_too(architecture: str) -> None:
    setting = SETTINGS[0]
    assert_close(
        logits_of(found(architecture, setting, "l1").model)(HELD_OUT),
        expected(architecture, setting, "l1").masked.logits(HELD_OUT),
    )


def test_stage_2_looks_at_the_first_row_only_and_stage_1_at_all() -> None:
    def run(rows: torch.Tensor) -> tuple[Any, ...]:
        calibration = token_rows()
        calibration = type(calibration)(rows, "", "", 0)
        report = METHODS["2ssp"].compress(tiny("llama"), calibration, two_ssp.TwoSSPConfig(0.4)).report
        return tuple(report.numbers["perplexity_after_removal"])

    one, three = ROWS.tokens[:1], ROWS.tokens
    repeated = one.expand(3, -1)
    assert run(repeated) == pytest.approx(run(one), rel=1e-9)
    assert run(three) != pytest.approx(run(one), rel=1e-6)


@pytest.mark.parametrize("tokens", ["last", "all"])
@covering("sparsity", [0.2, 0.3, 0.6])
def test_block_influence_agrees_on_values_blocks_and_logits(architecture: str, sparsity: float, tokens: str) -> None:
    theirs = reference.shortgpt(tiny(architecture), ROWS.tokens, sparsity, all_tokens=tokens == "all")
    ours = baselines.shortgpt(tiny(architecture), ROWS, baselines.SimilarityConfig(sparsity, tokens))
    np.testing.assert_allclose(ours.report.numbers["block_influence"], theirs.influence, atol=1e-6)
    assert ours.report.numbers["blocks_removed"] == sorted(theirs.removed)
    assert_close(logits_of(ours.model)(HELD_OUT), theirs.masked.logits(HELD_OUT))


def test_the_reference_knows_every_architecture_and_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.split(".")[0] in ("compress", "exporters", "tests")}
    assert set(reference.NAMES) == set(ARCHITECTURES)
