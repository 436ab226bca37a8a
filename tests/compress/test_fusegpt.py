"""FuseGPT against the slow reference, which shares no code with it, and what must hold of it besides."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError
from compress.evaluate import logits_of, perplexity
from compress.influence import macro_influence
from compress.layout import layout_of
from compress.losses import LOSSES, batch_kl
from compress.lowrank import GraftedMatrix, GraftedVector, LowRank
from compress.methods import fusegpt
from compress.methods.fusegpt import FuseGPTConfig, window_of
from compress.result import CompressedModel, Run
from compress.surgery import clone, drop_attention, drop_blocks
from tests.conftest import _COMMON, ARCHITECTURES, Killed, covering, killer, tiny, token_rows
from tests.reference import fusegpt as reference

# Biases, Conv1D, masks of two kinds, fused matrices, norms of heads; mistral has nothing that llama has not.
CHOSEN = ["gemma3_text", "gpt2", "llama", "opt", "phi3", "qwen2", "qwen3"]
ROWS = token_rows(10, 12)
HELD_OUT = token_rows(2, 20, seed=1).tokens  # beyond gemma3's window of 8
SMALL: dict[str, Any] = {
    "sparsity": 0.4,  # two blocks of five; three of gemma3's six
    "window": 4,
    "coefficient_rank": 3,
    "lora_rank": 2,
    "batch": 4,
    "epochs": 2,
    "coefficient_lr": 1e-2,
    "base_lr": 1e-3,
    "held_out": 2,
    "scoring_rows": 4,
}
LETTERS = {
    "window": "S",
    "coefficient_rank": "r_coefficient",
    "lora_rank": "r_lora",
    "batch": "B",
    "coefficient_lr": "lr_coefficient",
    "base_lr": "lr_base",
}
RANKINGS = ["macro_influence", "block_influence", "loss"]
RANKS = {"nothing": (0, 0), "lora": (0, 2), "fusion": (3, 0), "both": (3, 2)}


@functools.cache
def stock(model_type: str) -> PreTrainedModel:
    """One float64 model for all tests that do not change it."""
    return tiny(model_type).double()


def compress(
    model: PreTrainedModel, calibration: TokenRows = ROWS, run: Run | None = None, **options: Any
) -> CompressedModel:
    return fusegpt.compress(model, calibration, FuseGPTConfig(**{**SMALL, **options}), run)


def expected(model: PreTrainedModel, tokens: torch.Tensor = ROWS.tokens, **options: Any) -> reference.FuseGPT:
    wanted = {**SMALL, **options}
    if wanted["scoring_rows"] is None:
        wanted["scoring_rows"] = 32
    named = {LETTERS.get(name, name): value for name, value in wanted.items()}
    return reference.fusegpt(model, tokens, reference.Settings(**named))


@functools.cache
def ours_of(model_type: str) -> CompressedModel:
    return compress(stock(model_type))


@functools.cache
def theirs_of(model_type: str) -> reference.FuseGPT:
    return expected(stock(model_type))


def with_tokens(tokens: torch.Tensor) -> TokenRows:
    return TokenRows(tokens, "random", "0" * 64, 0)


def digest(result: CompressedModel | PreTrainedModel) -> str:
    """All bytes of a model and all numbers of its report."""
    found = hashlib.sha256()
    model = result.model if isinstance(result, CompressedModel) else result
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(result, CompressedModel):
        found.update(json.dumps(result.report.numbers, sort_keys=True).encode())
    return found.hexdigest()


@functools.cache
def plain_digest(model_type: str) -> str:
    """Of the small setting in single precision, computed once."""
    return digest(compress(tiny(model_type)))


def assert_weights(model: PreTrainedModel, fused: reference.Fused, tolerance: float = 1e-8) -> None:
    blocks = Decoder(model).blocks
    assert len(blocks) == len(fused.blocks)
    for ours, theirs in zip(blocks, fused.blocks, strict=True):
        named = dict(ours.module.named_parameters())
        wanted = theirs.weights()
        assert set(named) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_allclose(named[name].detach().numpy(), value.numpy(), rtol=0, atol=tolerance)


def assert_agree(ours: CompressedModel, theirs: reference.FuseGPT, *, rtol: float = 1e-7) -> None:
    """Everything that is reported, every weight, and the logits."""
    numbers = ours.report.numbers
    assert list(numbers["blocks_removed"]) == theirs.removed
    assert [tuple(pair) for pair in numbers["windows"]] == theirs.windows
    assert set(numbers["not_grafted"]) == theirs.not_grafted
    scores = theirs.scores
    assert len(numbers["scores"]) == len(scores)
    for found, wanted in zip(numbers["scores"], scores, strict=True):
        assert list(found) == pytest.approx(wanted, rel=1e-6, abs=1e-7)
    assert [dict(zip(t["blocks"], t["change"], strict=True)) for t in numbers["trials"]] == [
        pytest.approx(trial, rel=1e-6, abs=1e-7) for trial in theirs.trials
    ]
    assert len(numbers["tuning"]) == len(theirs.tuning)
    for tuned, tuning in zip(numbers["tuning"], theirs.tuning, strict=True):
        for name, value in dataclasses.asdict(tuning).items():
            if value is None:
                assert tuned[name] is None
            else:
                assert tuned[name] == pytest.approx(value, rel=rtol, abs=1e-12), name
    assert_weights(ours.model, theirs.fused)
    np.testing.assert_allclose(logits_of(ours.model)(HELD_OUT).numpy(), theirs.fused.logits(HELD_OUT), atol=1e-6)


# Against the reference


@pytest.mark.parametrize("model_type", CHOSEN)
def test_scores_choices_windows_errors_and_weights_are_those_of_the_reference(model_type: str) -> None:
    assert_agree(ours_of(model_type), theirs_of(model_type))


@pytest.mark.parametrize("model_type", CHOSEN)
def test_the_setting_is_strong_enough_for_survivors_with_two_donors_and_donors_with_fusions(model_type: str) -> None:
    theirs = theirs_of(model_type)
    grafts = [x.grafts for block in theirs.fused.blocks for x in block.linears.values()]
    assert max(len(each) for each in grafts) >= 2
    untouched = [x.W for block in reference.Fused(stock(model_type)).blocks for x in block.linears.values()]
    # A donor that was tuned, and collapsed, is none of the matrices of the stock model.
    assert not all(any(torch.equal(g.D, W) for W in untouched) for each in grafts for g in each)


# Each on a model, and with other options than the small setting.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mse": ("qwen2", {"loss": "mse"}),
    "cosine": ("llama", {"loss": "cosine"}),
    "feature_kl": ("gpt2", {"loss": "feature_kl"}),
    "window of two": ("opt", {"window": 2}),
    "window of all, then of fewer": ("gemma3_text", {"window": 6, "sparsity": 0.5}),
    "first and third": ("opt", {"blocks": (0, 2)}),
    "third and first": ("opt", {"blocks": (2, 0)}),
    "neighbours": ("gpt2", {"blocks": (2, 1), "window": 2}),
    "far apart": ("qwen2", {"blocks": (4, 0), "window": 2}),
    "mixed masks": ("gemma3_text", {"blocks": (2, 0, 3)}),
    "protected": ("qwen3", {"protect": (3, -1)}),
    "all rows are scored": ("llama", {"scoring_rows": None}),
    "nothing held out": ("phi3", {"held_out": 0, "batch": 5}),
    "pairs of rows": ("opt", {"batch": 2, "epochs": 1}),
    "one batch": ("gpt2", {"batch": 8, "epochs": 3}),
    "single rows": ("gpt2", {"batch": 1, "loss": "mse", "epochs": 1}),
    "another seed": ("qwen2", {"seed": 7}),
    "wide ranks": ("gpt2", {"coefficient_rank": 9, "lora_rank": 7}),
    "one shot": ("llama", {"iterative": False, "sparsity": 0.6}),
    "one shot with biases": ("opt", {"iterative": False, "ranking": "block_influence", "sparsity": 0.6}),
    "one shot, protected": ("gemma3_text", {"iterative": False, "protect": (-1, 4)}),
    "one shot, from the front": ("opt", {"iterative": False, "ranking": "loss", "sparsity": 0.6}),
    "the best two are tried": ("llama", {"rerank": 2, "rerank_window": 2}),
    "all are tried": ("qwen2", {"rerank": 9, "rerank_epochs": 2, "ranking": "block_influence"}),
    "the best are tried with masks mixed": ("gemma3_text", {"rerank": 2, "iterative": False, "protect": (-1,)}),
    "tried by deletion": ("gpt2", {"rerank": 3, "coefficient_rank": 0, "lora_rank": 0, "ranking": "loss"}),
    "three go": ("qwen2", {"sparsity": 0.6}),
    "four go": ("gpt2", {"sparsity": 0.8}),
}


# Of these another in the default tier has the same options with other values.
SLOW_VARIANTS = {
    "third and first",
    "far apart",
    "pairs of rows",
    "one batch",
    "wide ranks",
    "one shot with biases",
    "one shot, from the front",
    "three go",
}


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW_VARIANTS else each for each in VARIANTS]
)
def test_with_other_options_it_is_still_that_of_the_reference(variant: str) -> None:
    model_type, options = VARIANTS[variant]
    ours = compress(stock(model_type), **options)
    assert_agree(ours, expected(stock(model_type), **options))
    assert digest(ours) != digest(ours_of(model_type))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_every_ranking_goes_with_every_way_to_recover(ranking: str, ranks: str) -> None:
    model_type = {"macro_influence": "qwen2", "block_influence": "gpt2", "loss": "opt"}[ranking]
    options: dict[str, Any] = {"ranking": ranking, "coefficient_rank": RANKS[ranks][0], "lora_rank": RANKS[ranks][1]}
    theirs = expected(stock(model_type), **options)
    ours = compress(stock(model_type), **options)
    assert_agree(ours, theirs, rtol=1e-6)
    plain = reference.deleted(stock(model_type), theirs.removed)
    if ranks == "nothing":
        for module, kept in zip(Decoder(ours.model), plain.blocks, strict=True):
            assert all(torch.equal(p, kept.weights()[n]) for n, p in module.module.named_parameters())
    else:
        assert np.abs(plain.logits(HELD_OUT) - theirs.fused.logits(HELD_OUT)).max() > 1e-4


@pytest.mark.parametrize("model_type", CHOSEN)
@pytest.mark.parametrize("rows", [1, 5])
def test_macro_influence_is_that_of_full_passes(model_type: str, rows: int) -> None:
    ours = macro_influence(Decoder(stock(model_type)), ROWS, rows, Run())
    theirs = reference.macro_influence(reference.Fused(stock(model_type)), ROWS.tokens[:rows])
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_single_precision_agrees_as_far_as_it_goes(model_type: str) -> None:
    ours, theirs = compress(tiny(model_type)), theirs_of(model_type)
    assert list(ours.report.numbers["blocks_removed"]) == theirs.removed
    for found, wanted in zip(ours.report.numbers["tuning"], theirs.tuning, strict=True):
        assert found["loss_last"] == pytest.approx(wanted.loss_last, rel=1e-2)
        assert found["held_out_after"] == pytest.approx(wanted.held_out_after, rel=1e-2)


def test_matrices_without_a_twin_are_tuned_but_not_grafted() -> None:
    model = tiny("llama").double()
    mlp = Decoder(model).blocks[3].module.mlp
    assert isinstance(mlp, torch.nn.Module)
    for name in ("gate_proj", "up_proj"):
        linear = mlp.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        linear.weight = torch.nn.Parameter(linear.weight[:50].clone(), requires_grad=False)
        linear.out_features = 50
    down = mlp.get_submodule("down_proj")
    assert isinstance(down, torch.nn.Linear)
    down.weight = torch.nn.Parameter(down.weight[:, :50].clone(), requires_grad=False)
    down.in_features = 50
    for blocks in ((3,), (2,)):
        options: dict[str, Any] = {"sparsity": 0.2, "blocks": blocks}
        ours, theirs = compress(model, **options), expected(model, **options)
        matrices = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        assert {name.partition(": ")[2] for name in theirs.not_grafted} == matrices
        assert_agree(ours, theirs)


# The losses


def states(B: int = 3, T: int = 4, D: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_plain_loops_give(name: str) -> None:
    student, teacher = states()
    wanted = reference.loss_by_loops(name, student.numpy(), teacher.numpy())
    assert LOSSES[name](student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    assert reference.LOSSES[name](student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    assert LOSSES[name](teacher, student).item() != pytest.approx(wanted, rel=1e-3) or name in ("mse", "cosine")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_equals_is_zero(name: str) -> None:
    _, teacher = states()
    assert LOSSES[name](teacher.clone(), teacher).item() == pytest.approx(0, abs=1e-15)
    assert LOSSES[name](*states()).item() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_gradient_of_its_values(name: str) -> None:
    student, teacher = states()
    assert torch.autograd.gradcheck(LOSSES[name], (student.requires_grad_(True), teacher))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_and_gradients_stay_finite(name: str, scale: float, dtype: torch.dtype) -> None:
    student, teacher = ((scale * x).to(dtype) for x in states())
    student.requires_grad_(True)
    loss = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_computed_in_single_precision_or_better(name: str) -> None:
    student, teacher = (x.bfloat16() for x in states())
    loss = LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LOSSES[name](student.double(), teacher.double()).item(), rel=1e-5)
    assert LOSSES[name](*states()).dtype == torch.float64


def test_the_gradient_of_the_kl_over_the_batch_is_the_difference_of_the_shares() -> None:
    student, teacher = states()
    (gradient,) = torch.autograd.grad(batch_kl(student.requires_grad_(True), teacher), student)
    torch.testing.assert_close(gradient, (student.softmax(0) - teacher.softmax(0)) / len(student))


def test_the_kl_over_the_batch_does_not_see_what_all_rows_share_and_refuses_a_single_row() -> None:
    student, teacher = states()
    shared = torch.randn(1, *student.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert batch_kl(teacher + shared, teacher).item() == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError):
        batch_kl(student[:1], teacher[:1])


# Low-rank pairs


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_low_rank_pair_is_zero_at_first_and_drawn_within_its_bound() -> None:
    pair = LowRank(
        7, 9, 40, dtype=torch.float64, device=torch.device("cpu"), generator=torch.Generator().manual_seed(3)
    )
    assert (pair.left.shape, pair.right.shape) == ((7, 40), (40, 9))
    assert not pair.left.any()
    assert not pair().any()
    assert 0.9 / 3 < pair.right.abs().max() <= 1 / 3
    wanted = torch.empty(40, 9).uniform_(-1 / 3, 1 / 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pair.right, wanted.double())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_with_two_donors_is_that_of_the_closed_formula(transposed: bool) -> None:
    W, D1, D2 = drawn(6, 8), drawn(6, 8, seed=1), drawn(6, 8, seed=2)
    matrix = GraftedMatrix(W.T.contiguous() if transposed else W, transposed=transposed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    matrix.add_lora(2, torch.device("cpu"), generator)
    matrix.add_donor(D1, 0, 3, torch.device("cpu"), generator)
    matrix.add_donor(D2, 1, 3, torch.device("cpu"), generator)
    assert torch.equal(matrix(), W.T if transposed else W)
    learning = list(matrix.parameters())
    assert len(learning) == 6
    with torch.no_grad():
        for seed, parameter in enumerate(learning):
            parameter.copy_(drawn(*parameter.shape, seed=10 + seed))
    assert matrix.lora is not None
    B, A = matrix.lora.left, matrix.lora.right
    U1, V1, U2, V2 = (getattr(pair, side) for pair in matrix.coefficients for side in ("left", "right"))
    wanted = torch.zeros(6, 8, dtype=torch.float64)
    for o in range(6):
        for i in range(8):
            wanted[o, i] = W[o, i] + B[o] @ A[:, i] + (U1[o] @ V1[:, i]) * D1[o, i] + (U2[o] @ V2[:, i]) * D2[o, i]
    torch.testing.assert_close(matrix(), wanted.T if transposed else wanted)


def test_a_bias_with_two_donors_is_that_of_the_closed_formula() -> None:
    b, d1, d2 = drawn(6), drawn(6, seed=1), drawn(6, seed=2)
    vector = GraftedVector(b, dtype=torch.float64, learns=True)
    vector.add_donor(d1, 0)
    vector.add_donor(d2, 1)
    assert torch.equal(vector(), b)
    c1, c2 = vector.coefficients
    with torch.no_grad():
        c1.copy_(drawn(6, seed=3))
        c2.copy_(drawn(6, seed=4))
    torch.testing.assert_close(vector(), b + drawn(6, seed=3) * d1 + drawn(6, seed=4) * d2)


# Windows


def test_windows_of_eight_shift_at_the_borders() -> None:
    L = 32
    wanted = {0: 0, 3: 0, 4: 0, 5: 1, L - 5: L - 9, L - 4: L - 8, L - 3: L - 8, L - 1: L - 8}
    for p, start in wanted.items():
        assert window_of(p, 8, L) == range(start, start + 8)


def test_windows_are_those_of_the_reference_while_the_model_shrinks() -> None:
    for L in range(1, 14):
        for size in (2, 4, 6, 8):
            for p in range(L):
                found = window_of(p, size, L)
                assert list(found) == reference.window(p, size, L)
                assert p in found
                assert len(found) == min(size, L)


# What the paper's algorithm must satisfy


@pytest.mark.parametrize("model_type", CHOSEN)
def test_before_tuning_the_window_is_the_model_without_the_block(model_type: str) -> None:
    options: dict[str, Any] = {"sparsity": 0.1, "blocks": (2,), "base_lr": 1e-30}
    model = tiny(model_type)
    ours = compress(model, **options, coefficient_lr=1e-30)
    without = clone(model)
    drop_blocks(without, [2])
    assert (logits_of(ours.model)(HELD_OUT) - logits_of(without)(HELD_OUT)).abs().max() < 1e-5
    tuned = compress(model, **options)
    before = [result.report.numbers["tuning"][0]["held_out_before"] for result in (ours, tuned)]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    assert ours.report.numbers["tuning"][0]["held_out_after"] == pytest.approx(before[0], rel=1e-5)


@pytest.mark.parametrize("model_type", CHOSEN)
def test_the_folded_model_is_a_stock_model_with_fewer_blocks(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    result = compress(model)
    removed = len(result.report.numbers["blocks_removed"])
    assert layout_of(result.model).kind == "plain"
    assert result.model.config.num_hidden_layers == len(Decoder(model)) - removed
    assert type(result.model) is type(model)
    kinds = {type(part) for part in Decoder(model).blocks[0].module.modules()}
    shapes = {name: tuple(p.shape) for name, p in Decoder(model).blocks[0].module.named_parameters()}
    for block in Decoder(result.model):
        assert {type(part) for part in block.module.modules()} == kinds
        assert {name: tuple(p.shape) for name, p in block.module.named_parameters()} == shapes
        assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in block.module.parameters())

    logits = logits_of(result.model)(HELD_OUT)
    result.model.save_pretrained(tmp_path / "model")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(again)(HELD_OUT), logits)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    cached, slow = (again.generate(HELD_OUT, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, slow)
    assert type(again) is type(model)


@covering("index", [0, 2, 4], "model_type", CHOSEN)
def test_a_block_that_does_nothing_has_no_influence_and_goes_first(model_type: str, index: int) -> None:
    model = tiny(model_type)
    block = Decoder(model).blocks[index]
    for name, part in block.module.named_modules():
        if name.endswith(("o_proj", "out_proj", "down_proj", "fc2", "c_proj")):
            for parameter in part.parameters():
                torch.nn.init.zeros_(parameter)
    scores = macro_influence(Decoder(model), ROWS, len(ROWS.tokens), Run())
    assert scores[index] == pytest.approx(0, abs=1e-6)
    assert min(s for i, s in enumerate(scores) if i != index) > 1e-3
    for ranking in ("macro_influence", "block_influence"):
        result = compress(model, ranking=ranking, sparsity=0.1, epochs=1)
        assert list(result.report.numbers["blocks_removed"]) == [index]


def test_of_blocks_that_nothing_misses_the_first_goes() -> None:
    model = tiny("llama")
    for block in Decoder(model):
        for name, part in block.module.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                for parameter in part.parameters():
                    torch.nn.init.zeros_(parameter)
    for ranking in RANKINGS:
        for iterative in (True, False):
            ours = compress(model, ranking=ranking, iterative=iterative, coefficient_rank=0, lora_rank=0)
            assert list(ours.report.numbers["blocks_removed"]) == [0, 1], ranking
    protected = compress(model, coefficient_rank=0, lora_rank=0, protect=(0, 2))
    assert list(protected.report.numbers["blocks_removed"]) == [1, 3]


@functools.cache
def own_text(model_type: str, rows: int = 72, length: int = 40) -> TokenRows:
    """Rows that the dense model itself has sampled, so that no other model predicts them better."""
    model, generator = tiny(model_type), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (rows, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            shares = logits_of(model)(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(shares, 1, generator=generator)], 1)
    return with_tokens(tokens)


@pytest.mark.parametrize(
    ("model_type", "loss"),
    [("llama", "mse"), ("qwen2", "cosine"), ("gpt2", "batch_kl"), ("opt", "feature_kl")],
)
def test_tuning_lowers_the_error_on_rows_it_never_saw_and_the_perplexity(model_type: str, loss: str) -> None:
    text = own_text(model_type)
    ranks: dict[str, Any] = {"coefficient_rank": 8, "lora_rank": 8}
    fused = compress(tiny(model_type), text, sparsity=0.2, loss=loss, held_out=8, epochs=4, base_lr=3e-3, **ranks)
    for tuning in fused.report.numbers["tuning"]:
        assert tuning["loss_last"] < tuning["loss_first"]
        assert tuning["held_out_after"] < 0.97 * tuning["held_out_before"]
    without = tiny(model_type)
    drop_blocks(without, list(fused.report.numbers["blocks_removed"]))
    models = (tiny(model_type), fused.model, without)
    dense, after, plain = (perplexity(logits_of(model), text.tokens[-8:]).value for model in models)
    assert dense < after < plain


def test_a_share_is_rounded_up_to_whole_blocks_but_not_for_the_sake_of_a_rounding_error() -> None:
    config = {**_COMMON, "num_hidden_layers": 20, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model("llama", **config)).eval().requires_grad_(False)
    assert math.ceil(20 * (0.1 + 0.2)) == 7  # what must not happen
    options: dict[str, Any] = {"coefficient_rank": 0, "lora_rank": 0, "window": 8, "ranking": "block_influence"}
    for sparsity, count in ((0.1 + 0.2, 6), (0.55, 11), (0.551, 12), (0.01, 1)):
        result = compress(model, with_tokens(ROWS.tokens[:4, :4]), held_out=0, sparsity=sparsity, **options)
        assert len(result.report.numbers["blocks_removed"]) == count == reference.removals(sparsity, 20)
        assert len(Decoder(result.model)) == 20 - count


def test_biases_survive_folding_with_those_of_every_donor(tmp_path: Path) -> None:
    for model_type in ("qwen2", "gpt2", "opt"):
        ours, fused = ours_of(model_type), theirs_of(model_type).fused
        ours.model.save_pretrained(tmp_path / model_type)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / model_type, dtype=torch.float64)
        for block, theirs in zip(Decoder(again), fused.blocks, strict=True):
            biased = {name: linear for name, linear in theirs.linears.items() if linear.b is not None}
            assert biased
            for name, linear in biased.items():
                wanted, grafted = linear.b, torch.zeros_like(block.module.get_parameter(f"{name}.bias"))
                assert wanted is not None
                for graft in linear.grafts:
                    assert graft.c is not None
                    assert graft.d is not None
                    grafted += graft.c * graft.d
                bias = block.module.get_parameter(f"{name}.bias").detach()
                torch.testing.assert_close(bias, wanted + grafted, rtol=0, atol=1e-8)
                # A bias of the keys changes no attention without rotation, and so it gets no gradient.
                assert "k_proj" in name or grafted.abs().max() > 1e-5


@pytest.mark.parametrize("model_type", CHOSEN)
def test_what_lies_outside_the_windows_keeps_its_bytes(model_type: str) -> None:
    model = stock(model_type)
    ours = compress(model, sparsity=0.1, window=2, blocks=(2,))  # blocks 1 and 2; 1 stays
    before, after = Decoder(model).blocks, Decoder(ours.model).blocks
    for old, new in zip([before[0], *before[3:]], [after[0], *after[2:]], strict=True):
        assert all(torch.equal(*pair) for pair in zip(old.module.parameters(), new.module.parameters(), strict=True))
    inside = {id(p) for block in before for p in block.module.parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    named = dict(ours.model.named_parameters())
    assert outside
    assert all(torch.equal(named[name], p) for name, p in outside.items())


# What the library promises besides


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"rerank": 2}, {"iterative": False}, {"precision": "bf16"}])
def test_the_model_given_is_not_changed(model_type: str, options: dict[str, Any]) -> None:
    model = tiny(model_type)
    before, modules = digest(model), [type(part) for part in model.modules()]
    compress(model, **options)
    assert digest(model) == before
    assert [type(part) for part in model.modules()] == modules
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.config.num_hidden_layers == len(Decoder(model)) == 5


def test_a_model_that_may_be_used_up_gives_the_same() -> None:
    assert digest(compress(tiny("gpt2"), run=Run(consume=True))) == plain_digest("gpt2")


def test_a_model_that_asks_for_gradients_gives_the_same_and_gets_none() -> None:
    model = tiny("gpt2").requires_grad_(True)
    result = compress(model)
    assert digest(result) == plain_digest("gpt2")
    assert not any(p.grad is not None for p in (*model.parameters(), *result.model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_is_off_also_for_a_model_in_training_mode() -> None:
    model = tiny("gpt2").train()
    assert model.config.resid_pdrop > 0
    assert digest(compress(model)) == plain_digest("gpt2")
    assert model.training  # the model given is not changed


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first = compress(tiny("llama"))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert digest(compress(tiny("llama"))) == digest(first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert digest(compress(tiny("llama"), seed=1)) != digest(first)


@pytest.mark.parametrize("options", [{}, {"iterative": False}, {"rerank": 2, "rerank_window": 2}])
def test_a_milder_run_is_the_beginning_of_a_stronger_one(options: dict[str, Any]) -> None:
    strong = compress(tiny("gpt2"), sparsity=0.6, **options).report.numbers
    for sparsity, count in ((0.2, 1), (0.4, 2)):
        mild = compress(tiny("gpt2"), sparsity=sparsity, **options).report.numbers
        for name in ("blocks_removed", "windows", "tuning"):
            assert len(mild[name]) == count
            assert list(mild[name]) == list(strong[name])[:count]
        assert list(mild["scores"]) == list(strong["scores"])[: len(mild["scores"])]


def test_nothing_to_remove_changes_nothing() -> None:
    result = compress(tiny("gemma3_text"), sparsity=0)
    assert digest(result.model) == digest(tiny("gemma3_text"))
    assert not any(result.report.numbers[name] for name in ("blocks_removed", "windows", "tuning", "scores"))


def test_protected_blocks_stay_by_their_first_numbers() -> None:
    free = list(compress(tiny("llama"), sparsity=0.6).report.numbers["blocks_removed"])
    for protect in ((free[0],), (free[0] - 5, free[1]), (0, -1)):
        gone = list(compress(tiny("llama"), sparsity=0.6, protect=protect).report.numbers["blocks_removed"])
        assert len(set(gone)) == 3
        assert not set(gone) & {p % 5 for p in protect}


def test_reranking_picks_among_the_best_and_may_pick_another() -> None:
    picks: list[int] = []
    for model_type in ("gpt2", "opt"):
        first = compress(tiny(model_type), rerank=3, rerank_window=2, ranking="loss")
        numbers = first.report.numbers
        left = list(range(5))
        for scores, block in zip(numbers["scores"], numbers["blocks_removed"], strict=True):
            best = sorted(range(len(left)), key=lambda i, scores=scores: scores[i])[:3]  # type: ignore[misc]
            assert block in [left[i] for i in best]
            left.remove(block)
        assert len(Decoder(first.model)) == 3
        assert torch.isfinite(logits_of(first.model)(HELD_OUT)).all()
        # The weights are those of a run that was told these blocks, for a trial leaves nothing behind.
        told = compress(tiny(model_type), blocks=tuple(numbers["blocks_removed"]))
        assert digest(told.model) == digest(first.model)
        gone = numbers["blocks_removed"]
        picks += [trial["blocks"].index(b) for trial, b in zip(numbers["trials"], gone, strict=True)]
    assert any(picks)  # not always the one that the ranking would take


def test_a_single_candidate_needs_no_trial() -> None:
    assert digest(compress(tiny("opt"), rerank=1).model) == digest(compress(tiny("opt")).model)


def test_reranking_keeps_off_protected_blocks() -> None:
    numbers = compress(tiny("llama"), rerank=3, protect=(4, 3), rerank_window=2).report.numbers
    assert not {3, 4} & set(numbers["blocks_removed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trainables_of_either_precision_go_with_models_of_either(dtype: torch.dtype, precision: str) -> None:
    model: Any = tiny("gpt2")
    model.to(dtype)
    result = compress(model, precision=precision)
    assert all(p.dtype == dtype for p in result.model.parameters())
    assert torch.isfinite(logits_of(result.model)(HELD_OUT)).all()
    for tuning in result.report.numbers["tuning"]:
        assert all(math.isfinite(value) for value in tuning.values())
    other = compress(model, precision={"fp32": "bf16", "bf16": "fp32"}[precision])
    assert digest(result.model) != digest(other.model)


@pytest.mark.parametrize("spill_bytes", [0, 20_000])
def test_hidden_states_in_files_give_the_same_bytes(spill_bytes: int, tmp_path: Path) -> None:
    wanted = digest(compress(tiny("gpt2"), rerank=2))
    assert digest(compress(tiny("gpt2"), rerank=2, run=Run(spill_bytes=spill_bytes))) == wanted
    assert digest(compress(tiny("gpt2"), rerank=2, run=Run(spill_bytes=spill_bytes, scratch=tmp_path))) == wanted
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]  # what a later run goes on from


def test_the_outline_has_the_shape_of_the_result() -> None:
    auto: Any = AutoModelForCausalLM
    for model_type in CHOSEN:
        config, stock = FuseGPTConfig(**SMALL), tiny(model_type).config
        with torch.device("meta"):
            skeleton = auto.from_config(stock)
        passes = fusegpt.outline(skeleton, len(ROWS.tokens), config)
        assert layout_of(skeleton) == layout_of(ours_of(model_type).model)
        assert passes > 0
        more = fusegpt.outline(clone(tiny(model_type)), len(ROWS.tokens), dataclasses.replace(config, epochs=9))
        assert more > passes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranking": "block_influence", "iterative": False},
        {"ranking": "loss", "rerank": 2, "rerank_window": 2, "rerank_epochs": 3},
        {"blocks": (0, 3)},
        {"coefficient_rank": 0, "lora_rank": 0},
    ],
)
def test_the_block_forwards_reported_are_those_counted(options: dict[str, Any]) -> None:
    model, counted = tiny("gpt2"), [0]

    def seen(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counted[0] += len(args[0]) * (3 if torch.is_grad_enabled() else 1)  # a backward pass costs two more

    for block in Decoder(model):
        block.module.register_forward_hook(seen)  # copied along with the model
    reported = compress(model, **options).report.numbers["block_forwards"]
    assert reported == counted[0]
    predicted = fusegpt.outline(tiny("gpt2"), len(ROWS.tokens), FuseGPTConfig(**{**SMALL, **options}))
    assert 5 * predicted == pytest.approx(reported, rel=0.25)


def test_a_block_without_attention_gives_and_receives_what_it_has() -> None:
    model = tiny("llama")
    drop_attention(model, [1])
    attention = [f"block 1: self_attn.{name}_proj.weight" for name in "qkvo"]
    receives = compress(model, blocks=(2,), sparsity=0.2, window=2)
    assert not receives.report.numbers["not_grafted"]  # every matrix that it has found a twin
    assert [block.attention for block in layout_of(receives.model).blocks] == [True, False, True, True]
    gives = compress(model, blocks=(1,), sparsity=0.2, window=2)
    assert gives.report.numbers["not_grafted"] == [name.replace("block 1", "block 0") for name in attention]
    assert layout_of(gives.model).kind == "plain"
    for result in (receives, gives):
        tuning = result.report.numbers["tuning"][0]
        assert tuning["held_out_after"] != tuning["held_out_before"]
        assert torch.isfinite(logits_of(result.model)(HELD_OUT)).all()


# What is refused

REFUSED: dict[str, dict[str, Any]] = {
    "a batch of one that is compared with itself": {"batch": 1},
    "no batch": {"batch": 0, "loss": "mse"},
    "an odd window": {"window": 3},
    "a window of none": {"window": 0},
    "a window larger than the model": {"window": 6},
    "fewer rows than a batch": {"batch": 16},
    "rows that fill no whole batch": {"batch": 3},
    "rows that fill no whole batch with those held out": {"held_out": 3},
    "all rows held out": {"held_out": 10},
    "more rows held out than there are": {"held_out": 14},
    "an unknown ranking": {"ranking": "chance"},
    "an unknown loss": {"loss": "kl"},
    "an unknown precision": {"precision": "fp16"},
    "a block that does not exist": {"blocks": (1, 5)},
    "a block that does not exist, from the end": {"blocks": (1, -6)},
    "a block that goes twice": {"blocks": (1, 1)},
    "a block that goes twice, also counted from the end": {"blocks": (4, -1)},
    "a block that is protected": {"blocks": (1, 2), "protect": (2,)},
    "a block that is protected, counted from the end": {"blocks": (1, 4), "protect": (-1,)},
    "fewer blocks than the share": {"blocks": (1,)},
    "more blocks than the share": {"blocks": (1, 2, 3)},
    "a protected block that does not exist": {"protect": (5,)},
    "a protected block that does not exist, from the end": {"protect": (-6,)},
    "too many protected": {"protect": (0, 1, 2, 3)},
    "all protected": {"protect": (0, 1, 2, 3, 4)},
    "more rows to score than there are": {"scoring_rows": 11},
    "no rows to score": {"scoring_rows": 0},
    "all blocks go": {"sparsity": 0.9},
    "no epochs": {"epochs": -1},
    "a negative rank": {"coefficient_rank": -1},
    "a negative rank of the additive pair": {"lora_rank": -1},
    "a negative rate": {"coefficient_lr": -1e-3},
    "a rate that is no number": {"base_lr": float("nan")},
    "a negative seed": {"seed": -1},
    "negative rows held out": {"held_out": -1},
    "a negative number of trials": {"rerank": -1},
    "an odd window of trials": {"rerank": 2, "rerank_window": 3},
    "trials without epochs": {"rerank": 2, "rerank_epochs": -1},
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_before_any_work(what: str) -> None:
    model = tiny("llama")

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(work)
    Decoder(model).blocks[0].module.register_forward_pre_hook(work)
    with pytest.raises((ConfigError, BudgetError)):
        compress(model, run=Run(progress=work), **REFUSED[what])


# Going on after an interruption


TINY_RUN: dict[str, Any] = {"epochs": 1, "batch": 8, "scoring_rows": 2, "sparsity": 0.6}


def calls_of(**options: Any) -> int:
    seen: list[str] = []
    compress(tiny("gpt2"), run=Run(progress=lambda what, done, total: seen.append(what)), **options)
    return len(seen)


@pytest.mark.parametrize("moments", [4, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"iterative": False}, {"rerank": 2, "rerank_window": 2, "sparsity": 0.4}])
def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(
    options: dict[str, Any], moments: int, tmp_path: Path
) -> None:
    options = {**TINY_RUN, **options}
    unbroken = compress(tiny("gpt2"), run=Run(scratch=tmp_path / "unbroken"), **options)
    wanted = digest(unbroken)
    assert digest(compress(tiny("gpt2"), **options)) == wanted
    for after in np.linspace(0, calls_of(**options) - 1, moments, dtype=int).tolist():
        run = Run(scratch=tmp_path / str(after), progress=killer(after))
        with pytest.raises(Killed):
            compress(tiny("gpt2"), run=run, **options)
        assert digest(compress(tiny("gpt2"), run=Run(scratch=tmp_path / str(after)), **options)) == wanted


def test_a_run_that_is_killed_again_and_again_arrives(tmp_path: Path) -> None:
    wanted, calls = digest(compress(tiny("gpt2"), **TINY_RUN)), calls_of(**TINY_RUN)
    result, tries = None, 0
    while result is None and tries < 20:
        tries += 1
        try:
            result = compress(tiny("gpt2"), run=Run(scratch=tmp_path, progress=killer(calls // 2)), **TINY_RUN)
        except Killed:
            continue
    assert result is not None
    assert 1 < tries < 20
    assert digest(result) == wanted
    assert result.report.resumed_seconds > 0


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_run_with_another_sparsity_goes_on_from_the_same_folder(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    run = Run(scratch=tmp_path)
    for sparsity in (0.2, 0.6, 0.4, 0.6):
        wanted = digest(compress(model, sparsity=sparsity))
        assert digest(compress(model, run=run, sparsity=sparsity)) == wanted


def test_another_run_takes_nothing_from_the_folder(tmp_path: Path) -> None:
    """Options, rows or weights that differ make another run, even where what was kept would fit."""
    run, small = Run(scratch=tmp_path), {**TINY_RUN, "sparsity": 0.2}
    compress(tiny("gpt2"), run=run, **small)
    assert compress(tiny("gpt2"), run=run, **small).report.resumed_seconds > 0
    for options in (
        {"seed": 1},
        {"epochs": 2},
        {"base_lr": 2e-3},
        {"coefficient_lr": 2e-2},
        {"loss": "mse"},
        {"ranking": "loss"},
        {"lora_rank": 1},
        {"coefficient_rank": 1},
        {"window": 2},
        {"batch": 4},
        {"iterative": False},
        {"precision": "bf16"},
        {"protect": (-1,)},
        {"blocks": (3,)},
        {"scoring_rows": 3},
        {"held_out": 0, "batch": 10},
        {"rerank": 2},
    ):
        assert compress(tiny("gpt2"), run=run, **{**small, **options}).report.resumed_seconds == 0, options
    assert compress(tiny("gpt2"), with_tokens(ROWS.tokens.flip(0)), run, **small).report.resumed_seconds == 0
    for index in range(5):
        other = tiny("gpt2")
        bias = Decoder(other).blocks[index].module.get_parameter("mlp.c_fc.bias")
        with torch.no_grad():
            bias[7] += 0.01
        assert compress(other, run=run, **small).report.resumed_seconds == 0, index


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_a_folder_that_was_damaged_costs_time_only(damage: str, tmp_path: Path) -> None:
    first = digest(compress(tiny("gpt2"), run=Run(scratch=tmp_path), **TINY_RUN))
    (file,) = tmp_path.iterdir()
    content = {"cut": file.read_bytes()[:-100], "emptied": b"", "overwritten": b"x" * 1000}[damage]
    file.write_bytes(content)
    again = compress(tiny("gpt2"), run=Run(scratch=tmp_path), **TINY_RUN)
    assert digest(again) == first
    assert again.report.resumed_seconds == 0
    assert compress(tiny("gpt2"), run=Run(scratch=tmp_path), **TINY_RUN).report.resumed_seconds > 0


# The reference stands on its own


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_reference_runs_blocks_as_the_model_does(model_type: str) -> None:
    fused = reference.Fused(tiny(model_type))
    wanted = logits_of(tiny(model_type).double())(HELD_OUT).numpy()
    np.testing.assert_allclose(fused.logits(HELD_OUT), wanted, atol=1e-12)
    without = tiny(model_type).double()
    drop_blocks(without, [1, 2])
    fused = reference.deleted(tiny(model_type), [1, 2])
    if model_type != "gemma3_text":  # whose survivors would change their masks in a cut list, if nobody moved them
        np.testing.assert_allclose(fused.logits(HELD_OUT), logits_of(without)(HELD_OUT).numpy(), atol=1e-12)


def test_the_reference_knows_every_architecture_and_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    library = ("compress", "exporters", "serving", "benchmarks", "deploy", "tests")
    assert not {name for name in imported if name.split(".")[0] in library}
    assert set(reference.PLACES) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"sparsity": 0.8}, 1),
        ({"sparsity": 0.8, "protect": (0,)}, 1),
        ({"sparsity": 0.8, "protect": (-1,)}, 1),
        ({"sparsity": 0.4, "blocks": (4, 0)}, 3),
    ],
)
def test_an_outline_leaves_what_has_to_stay(options: dict[str, Any], left: int) -> None:
    shape = tiny("llama").to("meta")
    fusegpt.outline(shape, 8, fusegpt.FuseGPTConfig(window=4, **options))
    assert len(Decoder(shape)) == left
