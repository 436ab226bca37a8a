"""FoldGPT against the slow reference, which shares no code with it, and what must hold of it besides."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from compress import artifact, teacher, training
from compress.artifact import OriginEntry
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError, UnsupportedArchitecture
from compress.evaluate import logits_of
from compress.gating import scaled
from compress.grouping import fixed_runs, greedy_runs, stretches
from compress.healing import Healing
from compress.layout import layout_of
from compress.methods import METHODS, foldgpt
from compress.methods.foldgpt import FoldGPTConfig
from compress.result import CompressedModel, Run
from compress.schema import configured
from compress.surgery import clone, drop_attention, drop_blocks, expand, keep_neurons
from tests.conftest import ARCHITECTURES, Killed, byte_tokenizer, covering, killer, tiny, token_rows
from tests.reference import foldgpt as reference

# Biases, Conv1D, attentions of two kinds, fused matrices, norms of heads; mistral has nothing that llama has not.
CHOSEN = ["gemma3_text", "gpt2", "llama", "opt", "phi3", "qwen2", "qwen3"]
ROWS = token_rows(8, 12)
LOOKED_AT = token_rows(2, 20, seed=1).tokens  # beyond gemma3's window of 8
SMALL: dict[str, Any] = {
    "sparsity": 0.2,  # one block of five, two of gemma3's six
    "protect": (0, 1),  # which are alike in all models, so that there is always a group
    "gate_steps": 6,
    "gate_lr": 0.2,
    "flops_weight": 10.0,
    "keep_ends": 0,
    "epochs": 2,
    "batch": 3,
    "lora_rank": 3,
    "lora_lr": 1e-2,
    "norm_lr": 1e-2,
    "held_out": 2,
}
ONLY: dict[str, dict[str, Any]] = {
    "removal": {"group": 1, "epochs": 0},
    "sharing": {"sparsity": 0, "epochs": 0},
    "healing": {"sparsity": 0, "group": 1},
}
NOTHING: dict[str, Any] = {"sparsity": 0, "group": 1, "epochs": 0}


@functools.cache
def stock(model_type: str) -> PreTrainedModel:
    """One float64 model for all tests that do not change it."""
    return tiny(model_type).double()


def compress(
    model: PreTrainedModel, calibration: TokenRows = ROWS, run: Run | None = None, **options: Any
) -> CompressedModel:
    return foldgpt.compress(model, calibration, FoldGPTConfig(**{**SMALL, **options}), run)


def expected(model: PreTrainedModel, original: PreTrainedModel | None = None, **options: Any) -> reference.FoldGPT:
    return reference.foldgpt(model, ROWS.tokens, reference.Settings(**{**SMALL, **options}), original)


@functools.cache
def ours_of(model_type: str) -> CompressedModel:
    return compress(stock(model_type))


@functools.cache
def theirs_of(model_type: str) -> reference.FoldGPT:
    return expected(stock(model_type))


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


def named(model: PreTrainedModel) -> list[dict[str, torch.nn.Parameter]]:
    """The parameters of each block, shared ones in each that uses them."""
    return [dict(block.module.named_parameters()) for block in Decoder(model)]


def assert_weights(model: PreTrainedModel, survivors: Sequence[reference.Place], tolerance: float = 1e-8) -> None:
    """All values, and which of them are one and the same tensor."""
    found, wanted = named(model), [place.stored() for place in survivors]
    assert [set(each) for each in found] == [set(each) for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name].detach().numpy(), value.numpy(), rtol=0, atol=tolerance)
    for i, j in itertools.combinations(range(len(found)), 2):
        for name, linear in survivors[i].linears.items():
            twin = survivors[j].linears[name]
            weight, bias = f"{name}.weight", f"{name}.bias"
            assert (found[i][weight] is found[j][weight]) == (linear.matrix is twin.matrix)
            if linear.bias is not None:
                assert (found[i][bias] is found[j][bias]) == (linear.bias is twin.bias)
        assert all(found[i][name] is not found[j][name] for name in survivors[i].others)


def epoch_means(losses: Sequence[float], per_epoch: int) -> list[float]:
    """What is reported of steps: the mean of each epoch, of the last one as far as it went."""
    starts = range(0, len(losses), per_epoch)
    return [float(np.mean(losses[start : start + per_epoch])) for start in starts]


def assert_agree(ours: CompressedModel, theirs: reference.FoldGPT) -> None:
    """Everything that is reported, every weight, and the logits."""
    numbers, options = ours.report.numbers, ours.report.config
    learnt = len(ROWS.tokens) - options["held_out"]
    assert numbers["blocks_removed"] == theirs.removed
    assert ("gates" in numbers) == (theirs.gates is not None)
    if theirs.gates is not None:
        assert numbers["gates"] == pytest.approx(theirs.gates, rel=0, abs=1e-8)
        assert numbers["unpolarised"] == theirs.unpolarised
        assert numbers["gate_losses"] == pytest.approx(
            epoch_means(theirs.gate_losses, learnt // options["batch"]), rel=1e-8
        )
    if theirs.scores is not None:
        assert numbers["scores"] == pytest.approx(theirs.scores, rel=1e-6, abs=1e-7)
    assert ("removal_divergence" in numbers) == (theirs.removal_divergence is not None)
    if theirs.removal_divergence is not None:
        assert numbers["removal_divergence"] == pytest.approx(theirs.removal_divergence, rel=1e-8)
        assert numbers["removal_kept"] == theirs.removal_kept
    assert numbers.get("groups", []) == theirs.sharing.groups
    assert numbers.get("parents", []) == theirs.sharing.parents
    assert len(numbers.get("sharing_divergence", [])) == len(theirs.sharing.trials)
    for found, wanted in zip(numbers.get("sharing_divergence", []), theirs.sharing.trials, strict=True):
        assert found == pytest.approx(wanted, rel=1e-8)
    assert numbers["divergence"] == pytest.approx(theirs.divergence, rel=1e-7)
    assert numbers.get("healing_losses", []) == pytest.approx(theirs.losses, rel=1e-8)
    assert_weights(ours.model, theirs.survivors)
    np.testing.assert_allclose(logits_of(ours.model)(LOOKED_AT).numpy(), theirs.logits(LOOKED_AT).numpy(), atol=1e-6)


# Against the reference


@pytest.mark.parametrize("model_type", CHOSEN)
def test_gates_choices_divergences_and_weights_are_those_of_the_reference(model_type: str) -> None:
    assert_agree(ours_of(model_type), theirs_of(model_type))


@pytest.mark.parametrize("model_type", CHOSEN)
def test_the_setting_is_strong_enough_that_a_mistake_would_show(model_type: str) -> None:
    theirs = theirs_of(model_type)
    assert theirs.gates is not None
    assert max(theirs.gates) - min(theirs.gates) > 1e-6
    assert len(theirs.sharing.groups) >= 1
    assert theirs.divergence["removed"] < theirs.divergence["shared"]
    assert theirs.divergence["healed"] < theirs.divergence["shared"]
    untouched = [place.weights() for place in reference.Stock(stock(model_type)).places]
    survivors = [i for i in range(len(untouched)) if i not in theirs.removed]
    for i, place in zip(survivors, theirs.survivors, strict=True):
        for name, value in place.weights().items():
            if model_type == "opt" and name.endswith("k_proj.bias"):
                continue  # which adds the same to all scores of a query: it learns nothing
            assert (value - untouched[i][name]).abs().max() > 1e-4, name


# What comes before healing, without learning and trials.
QUIET: dict[str, Any] = {"blocks": (3,), "sparsity": 0.2, "parent": "first"}
# Each on a model, and with other options than the small setting.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a block that is named": ("qwen2", {"blocks": (2,), "epochs": 0}),
    "blocks that are named": ("gemma3_text", {"blocks": (3, 2), "epochs": 0}),
    "none is protected": ("gpt2", {"protect": (), "epochs": 0}),
    "the ends are protected": ("llama", {"protect": (-1, 0), "epochs": 0}),
    "by block influence": ("opt", {"ranking": "block_influence", "sparsity": 0.4, "epochs": 0}),
    "by macro influence": ("qwen2", {"ranking": "macro_influence", "sparsity": 0.4, "epochs": 0}),
    "by the loss": ("gemma3_text", {"ranking": "loss", "epochs": 0}),
    "gates are not checked": ("gpt2", {"check": False, "protect": (), "epochs": 0}),
    "one step": ("opt", {"gate_steps": 1, "check": False, **ONLY["removal"]}),
    "many steps": ("llama", {"gate_steps": 20, "gate_lr": 0.05, **ONLY["removal"]}),
    "every loss of gates": ("qwen2", {"batch": 6, "gate_steps": 8, "protect": (), **ONLY["removal"]}),
    "no constraint": ("gpt2", {"flops_weight": 0.0, "protect": (), "check": False, **ONLY["removal"]}),
    "a hard constraint": ("opt", {"flops_weight": 100.0, "sparsity": 0.6, "group": 1, "epochs": 0}),
    "strong polarisation": ("gemma3_text", {"polarisation_weight": 5.0, "protect": (), **ONLY["removal"]}),
    "four of five go": ("qwen2", {"sparsity": 0.8, "protect": (), "group": 1}),
    "another seed": ("gpt2", {"seed": 7}),
    "three share": ("llama", {"group": 3}),
    "all share": ("opt", {"group": 4}),
    "ends are kept": ("qwen2", {"keep_ends": 1, "epochs": 0}),
    "one is left over": ("gpt2", {**ONLY["sharing"], "sparsity": 0}),
    "sliding ones share": ("gemma3_text", {**ONLY["sharing"]}),
    "greedy": ("gpt2", {"boundaries": "greedy", "sparsity": 0}),
    "greedy, after a removal": ("llama", {"boundaries": "greedy", "groups": 1, "epochs": 0}),
    "greedy, all that fit": ("opt", {**ONLY["sharing"], "boundaries": "greedy"}),
    "greedy, with one group": ("qwen2", {**ONLY["sharing"], "boundaries": "greedy", "groups": 1, "keep_ends": 1}),
    "greedy, of three": ("phi3", {**ONLY["sharing"], "boundaries": "greedy", "group": 3}),
    "greedy, of two kinds": ("gemma3_text", {**ONLY["sharing"], "boundaries": "greedy"}),
    "the first is the parent": ("qwen3", {"parent": "first"}),
    "the mean is the parent": ("gpt2", {"parent": "mean"}),
    "the mean is the parent of biases, too": ("opt", {"parent": "mean", "keep_ends": 1}),
    "the mean, with own biases": ("qwen2", {"parent": "mean", "own_biases": True}),
    "own biases": ("gpt2", {"own_biases": True}),
    "own biases of some linears": ("qwen2", {"own_biases": True, "boundaries": "greedy"}),
    "adapters": ("gpt2", {"adapter_rank": 2}),
    "adapters of three": ("llama", {"adapter_rank": 2, "group": 3}),
    "adapters beside the mean": ("qwen2", {"adapter_rank": 2, "parent": "mean"}),
    "adapters that do not learn": ("phi3", {"adapter_rank": 2, "epochs": 0}),
    "a tail of one": ("gemma3_text", {**QUIET, "blocks": (3, 5), "tail": 1, "tail_weight": 3.0}),
    "a tail of all": ("gpt2", {"tail": 9, "sparsity": 0.4}),
    "the tail alone": ("qwen2", {**QUIET, "tail": 3, "next_token": 0.0, "distil": 0.0, "keep_ends": 1}),
    "the next token alone": ("opt", {**QUIET, "tail": 0, "distil": 0.0}),
    "distillation alone": ("qwen3", {**QUIET, "next_token": 0.0, "tail_weight": 0.0, "temperature": 1.0}),
    "other weights": ("gpt2", {**QUIET, "next_token": 0.3, "distil": 2.5, "temperature": 3.0, "tail_weight": 0.2}),
    "no clipping": ("llama", {**QUIET, "clip": 1e9}),
    "hard clipping": ("qwen2", {**QUIET, "clip": 1e-3}),
    "a long warm-up": ("opt", {**QUIET, "warmup": 0.7, "batch": 2}),
    "no warm-up": ("gpt2", {**QUIET, "warmup": 0.0}),
    "single rows": ("llama", {**QUIET, "batch": 1, "epochs": 1}),
    "norms alone": ("gemma3_text", {**QUIET, "blocks": (3, 5), "lora_rank": 0}),
    "only removal": ("gemma3_text", ONLY["removal"]),
    "only sharing": ("qwen2", ONLY["sharing"]),
    "only healing": ("gpt2", ONLY["healing"]),
    "sharing and healing": ("llama", {"sparsity": 0}),
    "removal and sharing": ("gpt2", {"epochs": 0}),
    "nothing": ("opt", NOTHING),
}


# Of these another in the default tier has the same options with other values, or alone what they combine.
SLOW_VARIANTS = {
    "blocks that are named",
    "the ends are protected",
    "many steps",
    "no constraint",
    "four of five go",
    "all share",
    "one is left over",
    "sliding ones share",
    "greedy, all that fit",
    "greedy, of three",
    "the mean is the parent",
    "the mean, with own biases",
    "own biases",
    "adapters",
    "adapters that do not learn",
    "a tail of all",
    "the next token alone",
    "no clipping",
    "no warm-up",
    "sharing and healing",
    "removal and sharing",
}


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW_VARIANTS else each for each in VARIANTS]
)
def test_with_other_options_it_is_still_that_of_the_reference(variant: str) -> None:
    model_type, options = VARIANTS[variant]
    ours = compress(stock(model_type), **options)
    assert_agree(ours, expected(stock(model_type), **options))
    assert digest(ours) != digest(ours_of(model_type))


def test_blocks_of_unequal_size_weigh_what_they_have() -> None:
    """The constraint counts weights: with FFNs of other widths it pulls harder at the larger blocks."""
    model = tiny("llama").double()
    keep_neurons(model, {1: torch.arange(7), 3: torch.arange(30)})
    for options in (
        {"check": False, "flops_weight": 50.0, "group": 1},
        {"boundaries": "greedy", "blocks": (1,), "protect": ()},
    ):
        assert_agree(compress(model, **options), expected(model, **options))


@pytest.mark.parametrize("variant", ["of the same depth", "deeper"])
def test_another_teacher_is_learnt_from(variant: str) -> None:
    original, model = tiny("llama").double(), tiny("llama").double()
    options: dict[str, Any] = {"ranking": "loss"}
    if variant == "deeper":
        drop_blocks(model, [3])
        options = {"tail": 1, "blocks": (2,), "sparsity": 0.25}
    else:
        with torch.no_grad():
            for parameter in Decoder(model).blocks[2].module.parameters():
                parameter.mul_(1.2)
    ours = compress(model, run=Run(teacher=original), **options)
    assert_agree(ours, expected(model, original, **options))
    assert digest(ours) != digest(compress(model, **options))


@functools.cache
def expected_of(options: str) -> reference.FoldGPT:
    """The reference with options written as JSON, computed once."""
    return expected(stock("qwen2"), **json.loads(options))


# Weights of the next token, of distillation and of the tail.
LOSSES = {
    "all": (1.0, 1.0, 1.0),
    "next token": (1.0, 0.0, 0.0),
    "distillation": (0.0, 1.0, 0.0),
    "tail": (0.0, 0.0, 1.0),
}


@pytest.mark.parametrize("tokens_at_once", [1, 9, 33])
@pytest.mark.parametrize("losses", LOSSES)
def test_logits_made_of_a_few_tokens_at_a_time_give_the_same_losses(
    losses: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For three rows of twelve: one token of each, three, and eleven, behind which one is left that predicts none."""
    monkeypatch.setattr(teacher, "CHUNK_TOKENS", tokens_at_once)
    weights = dict(zip(("next_token", "distil", "tail_weight"), LOSSES[losses], strict=True))
    # Blocks are missing, for a model that is its own teacher would learn from rounding errors.
    options: dict[str, Any] = {"blocks": (3,), "group": 1, "epochs": 1, **weights}
    ours = compress(stock("qwen2"), **options)
    theirs = expected_of(json.dumps(options))
    assert ours.report.numbers["healing_losses"] == pytest.approx(theirs.losses, rel=1e-8, abs=1e-12)
    assert_weights(ours.model, theirs.survivors)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_single_precision_agrees_as_far_as_it_goes(model_type: str) -> None:
    numbers, theirs = compress(tiny(model_type)).report.numbers, theirs_of(model_type)
    assert numbers["gates"] == pytest.approx(theirs.gates, abs=1e-4)
    assert numbers["blocks_removed"] == theirs.removed
    assert numbers["parents"] == theirs.sharing.parents
    assert numbers["divergence"] == pytest.approx(theirs.divergence, rel=1e-2)
    assert numbers["healing_losses"] == pytest.approx(theirs.losses, rel=1e-2)


# Gates


@covering("dtype", [torch.float32, torch.bfloat16])
def test_gates_at_one_are_the_model_itself(architecture: str, dtype: torch.dtype) -> None:
    model: Any = tiny(architecture)
    model.to(dtype)
    wanted = logits_of(model)(LOOKED_AT)
    with scaled(Decoder(model), torch.ones(len(Decoder(model)))):
        assert torch.equal(logits_of(model)(LOOKED_AT), wanted)
    assert torch.equal(logits_of(model)(LOOKED_AT), wanted)


def test_a_gate_of_zero_is_the_model_without_the_block(architecture: str) -> None:
    model = tiny(architecture)
    for gone in ([0], [2], [len(Decoder(model)) - 1], [1, 3]):
        gates = torch.ones(len(Decoder(model)))
        gates[gone] = 0
        cut = clone(model)
        drop_blocks(cut, gone)
        with scaled(Decoder(model), gates):
            assert torch.equal(logits_of(model)(LOOKED_AT), logits_of(cut)(LOOKED_AT))


def test_a_gate_between_is_neither_and_has_a_gradient() -> None:
    model = stock("gpt2")
    gates = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)

    def value(gates: torch.Tensor) -> torch.Tensor:
        with scaled(Decoder(model), gates):
            logits: torch.Tensor = model(input_ids=LOOKED_AT[:1, :4], use_cache=False).logits
        return logits.square().mean()

    assert torch.autograd.gradcheck(value, (gates,))
    assert value(gates).item() != pytest.approx(value(torch.ones_like(gates)).item(), rel=1e-3)


def test_the_share_of_gates_that_are_neither_open_nor_shut_is_reported() -> None:
    """Where eps stays at 0.1 and gates learn nothing, all of them are at 1 / 1.1."""
    soft = compress(tiny("gpt2"), gate_eps=0.1, gate_lr=1e-6, **ONLY["removal"]).report.numbers
    assert soft["unpolarised"] == 1
    assert soft["gates"] == pytest.approx([1 / 1.1] * 5, rel=1e-4)
    hard = compress(tiny("gpt2"), gate_steps=1, gate_lr=1e-6, **ONLY["removal"]).report.numbers
    assert hard["unpolarised"] == 0


def test_the_constraint_shuts_gates_and_without_it_they_stay_open() -> None:
    options = {"gate_steps": 100, "gate_lr": 0.05, "sparsity": 0.4, "protect": (), "check": False, **ONLY["removal"]}
    found = compress(tiny("gpt2"), **options, flops_weight=100.0).report.numbers
    assert sum(found["gates"]) < 4
    assert found["blocks_removed"] == sorted(sorted(range(5), key=lambda i: found["gates"][i])[:2])
    assert found["unpolarised"] == sum(0.05 <= gate <= 0.95 for gate in found["gates"]) / 5
    free = compress(tiny("gpt2"), **options, flops_weight=0.0).report.numbers
    assert min(free["gates"]) > 0.9


def test_the_choice_that_harms_less_on_the_rows_held_out_is_kept() -> None:
    kept = set()
    for model_type in CHOSEN:
        numbers = compress(tiny(model_type), protect=(), **ONLY["removal"]).report.numbers
        harm = numbers["removal_divergence"]
        assert set(harm) == {"gates", "block_influence"}
        assert harm[numbers["removal_kept"]] == min(harm.values())
        assert numbers["divergence"]["removed"] == pytest.approx(min(harm.values()), rel=1e-5)
        kept.add(numbers["removal_kept"])
    assert "block_influence" in kept


def test_the_last_block_that_attends_stays() -> None:
    model = tiny("llama")
    drop_attention(model, [0, 1, 2, 4])
    for ranking in ("gates", "block_influence", "macro_influence", "loss"):
        result = compress(model, ranking=ranking, sparsity=0.8, protect=(), **ONLY["removal"])
        assert result.report.numbers["blocks_removed"] == [0, 1, 2, 4]
        assert torch.isfinite(logits_of(result.model)(LOOKED_AT)).all()


def test_rows_held_out_are_not_learnt_from_and_the_others_do_not_judge() -> None:
    options: dict[str, Any] = {**ONLY["healing"], "distil": 0.0, "tail": 0}
    wanted = compress(tiny("gpt2"), **options)
    for places, same_weights in ((slice(6, 8), True), (slice(0, 6), False)):
        tokens = ROWS.tokens.clone()
        tokens[places] = token_rows(8, 12, seed=5).tokens[places]
        found = compress(tiny("gpt2"), TokenRows(tokens, "random", "1" * 64, 0), **options)
        assert (digest(found.model) == digest(wanted.model)) == same_weights
        assert found.report.numbers["divergence"] != wanted.report.numbers["divergence"]
    options = {**ONLY["sharing"], "boundaries": "greedy"}
    tokens = ROWS.tokens.clone()
    tokens[:6] = token_rows(8, 12, seed=5).tokens[:6]
    found = compress(tiny("gpt2"), TokenRows(tokens, "random", "1" * 64, 0), **options)
    assert digest(found) == digest(compress(tiny("gpt2"), **options))


# Sharing


@pytest.mark.parametrize("model_type", CHOSEN)
def test_groups_of_one_share_nothing(model_type: str) -> None:
    """k = 1 changes no bit of what a removal alone leaves."""
    result = compress(tiny(model_type), group=1, epochs=0)
    cut = tiny(model_type)
    drop_blocks(cut, result.report.numbers["blocks_removed"])
    assert digest(result.model) == digest(cut)
    assert type(result.model) is type(cut)
    assert digest(compress(tiny(model_type), **NOTHING).model) == digest(tiny(model_type))


@covering("options", [{}, {"adapter_rank": 2}])
def test_folded_and_expanded_give_equal_logits(architecture: str, options: dict[str, Any]) -> None:
    folded = compress(tiny(architecture), **options, epochs=1).model
    expanded = clone(folded)
    expand(expanded)
    assert layout_of(folded).kind == "shared"
    assert layout_of(expanded).kind == "plain"
    wanted = logits_of(folded)(LOOKED_AT)
    if options.get("adapter_rank"):  # whose products are added to the weights
        torch.testing.assert_close(logits_of(expanded)(LOOKED_AT), wanted, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(logits_of(expanded)(LOOKED_AT), wanted)


@covering("options", [{}, {"group": 3, "sparsity": 0}])
def test_stored_bytes_are_those_of_the_accounting(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    """P_embed + P_head + n_unique P_block + (n_kept - n_unique) P_norms, in the file itself."""
    if architecture == "gemma3_text" and "group" in options:
        options = {**options, "group": 2}
    dense, result = tiny(architecture), compress(tiny(architecture), **options, epochs=0)
    block = Decoder(dense).blocks[0].module
    of_block = sum(p.numel() for p in block.parameters())
    of_linears = sum(
        p.numel()
        for module in block.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        for p in module.parameters()
    )
    of_norms = of_block - of_linears
    outside = sum(p.numel() for p in dense.parameters()) - sum(
        p.numel() for b in Decoder(dense) for p in b.module.parameters()
    )
    kept = len(Decoder(dense)) - len(result.report.numbers["blocks_removed"])
    unique = kept - sum(len(group) - 1 for group in result.report.numbers["groups"])
    wanted = outside + unique * of_block + (kept - unique) * of_norms
    assert result.report.numbers["parameters_after"] == wanted
    assert (result.report.numbers["blocks_executed"], result.report.numbers["blocks_stored"]) == (kept, unique)

    origin = OriginEntry(name="tiny", kind="folder")
    artifact.save(result.model, byte_tokenizer(), tmp_path / "a", origin=origin, steps=[])
    tensors = [t for file in (tmp_path / "a").glob("*.safetensors") for t in load_file(file).values()]
    buffers = {name: b for name, b in result.model.named_buffers() if name in result.model.state_dict()}
    stored = sum(t.numel() * t.element_size() for t in tensors)
    assert stored == 4 * wanted + sum(b.numel() * b.element_size() for b in buffers.values())


@covering("options", [{}, {"adapter_rank": 2, "own_biases": True, "boundaries": "greedy"}])
def test_generation_with_a_cache_equals_that_without(architecture: str, options: dict[str, Any]) -> None:
    model: Any = compress(tiny(architecture), **options, epochs=1).model
    new = [
        model.generate(LOOKED_AT, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=258)
        for cached in (True, False)
    ]
    assert torch.equal(*new)
    output = model(input_ids=LOOKED_AT, use_cache=True)
    keys = [layer.keys for layer in output.past_key_values.layers]
    assert len(keys) == len(Decoder(model))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(keys, 2) if a.shape == b.shape)


@pytest.mark.parametrize("boundaries", ["fixed", "greedy"])
@pytest.mark.parametrize("keep_ends", [0, 1])
def test_sliding_and_full_attention_never_share(boundaries: str, keep_ends: int) -> None:
    types = tiny("gemma3_text").config.layer_types
    for blocks in [(), (2,), (0,), (1,), (2, 5)]:
        options: dict[str, Any] = {"blocks": blocks or None, "sparsity": len(blocks) / 6, "protect": (), "epochs": 0}
        result = compress(tiny("gemma3_text"), boundaries=boundaries, keep_ends=keep_ends, **options)
        left = [kind for i, kind in enumerate(types) if i not in blocks]
        assert result.report.numbers["groups"]
        for group in result.report.numbers["groups"]:
            assert len({left[i] for i in group}) == 1
            assert all(keep_ends <= i < len(left) - keep_ends for i in group)
        assert result.model.config.layer_types == left


@pytest.mark.parametrize("boundaries", ["fixed", "greedy"])
def test_blocks_of_unequal_shapes_never_share(boundaries: str) -> None:
    model = tiny("gpt2")
    keep_neurons(model, {1: torch.arange(30), 2: torch.arange(30)})
    numbers = compress(model, boundaries=boundaries, sparsity=0, epochs=0).report.numbers
    assert numbers["groups"] == [[1, 2], [3, 4]]
    without = tiny("llama")
    drop_attention(without, [0, 1, 2])
    numbers = compress(without, boundaries=boundaries, sparsity=0, epochs=0).report.numbers
    assert [sorted(group) for group in numbers["groups"]] in ([[0, 1], [3, 4]], [[1, 2], [3, 4]])


def test_members_compute_with_the_parents_matrices_and_keep_their_norms() -> None:
    dense, result = tiny("gpt2"), compress(tiny("gpt2"), **ONLY["sharing"])
    before, after, numbers = named(dense), named(result.model), result.report.numbers
    for group, parent, harm in zip(numbers["groups"], numbers["parents"], numbers["sharing_divergence"], strict=True):
        assert parent == group[harm.index(min(harm))]
        for member in group:
            for name, value in after[member].items():
                source = member if name.startswith("ln_") else parent
                assert torch.equal(value, before[source][name])


@pytest.mark.parametrize("size", [2, 3])
def test_boundaries_are_those_of_trying_all_sets(size: int) -> None:
    """Random stretches of kinds and random harms, ties among them."""
    generator = np.random.default_rng(size)
    for _ in range(60):
        kinds = list(np.repeat(generator.permutation(3), generator.integers(0, 6, 3)))
        keep_ends = int(generator.integers(0, 2))
        room = stretches(kinds, keep_ends)
        possible = [
            list(range(i, i + size))
            for i in range(keep_ends, len(kinds) - keep_ends - size + 1)
            if len(set(kinds[i : i + size])) == 1
        ]
        harm = {run[0]: float(generator.integers(0, 4)) for run in possible}
        most = reference.most(possible, [])
        assert len(fixed_runs(room, size)) == most
        for count in range(1, most + 1):
            found = [list(run) for run in greedy_runs(harm, room, size, count)]
            assert found == reference.least_harmful(possible, harm, count)


# Healing


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 2}, {"own_biases": True}, {"group": 3}])
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_the_optimiser_sees_each_shared_parameter_once(model_type: str, options: dict[str, Any]) -> None:
    options = {**options, "blocks": (2,), "parent": "first"}
    model = compress(tiny(model_type), **options, epochs=0).model
    healing = Healing(Decoder(model), 3, torch.Generator().manual_seed(0))
    learning = [*healing.low_rank, *healing.direct]
    assert len({id(parameter) for parameter in learning}) == len(learning)
    assert len(learning) == expected(stock(model_type), **options, epochs=1).learning
    distinct = {id(p) for each in named(model) for name, p in each.items() if name.endswith("proj.weight")}
    assert len(distinct) < sum(name.endswith("proj.weight") for each in named(model) for name in each)


def test_healing_leaves_embeddings_final_norm_and_head(architecture: str) -> None:
    before = tiny(architecture)
    after = compress(tiny(architecture), **ONLY["healing"]).model
    of_blocks = {name for name, _ in before.named_parameters() if name.startswith(Decoder(before).arch.blocks)}
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(old, new) == (name not in of_blocks), name
        assert not new.requires_grad


def test_matrices_and_norms_of_rate_almost_nothing_stay_where_they_are() -> None:
    dense = compress(tiny("gpt2").double(), epochs=0).model
    healed = compress(tiny("gpt2").double(), lora_lr=1e-13, norm_lr=1e-13).model
    for old, new in zip(named(dense), named(healed), strict=True):
        for name, value in old.items():
            torch.testing.assert_close(new[name], value, rtol=0, atol=1e-10)


def test_stages_one_after_the_other_are_one_run() -> None:
    """With the original as the teacher of the later ones."""
    for model_type, adapters in (("gpt2", {}), ("llama", {"adapter_rank": 2}), ("gemma3_text", {"own_biases": True})):
        original = tiny(model_type)
        run = Run(teacher=original)
        options: dict[str, Any] = {"tail": 1, **adapters}  # a teacher with more blocks has only its last one in common
        whole = compress(original, **options)
        removed = compress(original, **{**options, **ONLY["removal"]})
        shared = compress(removed.model, run=run, **{**options, **ONLY["sharing"]})
        healed = compress(shared.model, run=run, **{**options, **ONLY["healing"]})
        assert digest(healed.model) == digest(whole.model)
        parts = (removed, shared, healed)
        found = {k: v for part in parts for k, v in part.report.numbers["divergence"].items()}
        assert found == whole.report.numbers["divergence"]
        assert shared.report.numbers["parents"] == whole.report.numbers["parents"]


def test_only_what_was_asked_for_is_reported() -> None:
    keys = {"removal": {"removed"}, "sharing": {"shared"}, "healing": {"healed"}}
    for stage, wanted in keys.items():
        numbers = compress(tiny("llama"), **ONLY[stage]).report.numbers
        assert set(numbers["divergence"]) == wanted
        assert ("gates" in numbers) == (stage == "removal")
        assert ("groups" in numbers) == (stage == "sharing")
        assert ("healing_losses" in numbers) == (stage == "healing")
        json.dumps(numbers)


def test_the_model_given_is_not_changed_unless_it_may_be_consumed() -> None:
    model, before = tiny("gpt2"), digest(tiny("gpt2"))
    wanted = compress(model)
    assert digest(model) == before
    assert layout_of(model).kind == "plain"
    consumed = compress(model, run=Run(consume=True))
    assert digest(consumed) == digest(wanted)
    assert consumed.model is model


def test_hidden_states_in_files_give_the_same_bytes(tmp_path: Path) -> None:
    wanted = digest(compress(tiny("gpt2")))
    assert digest(compress(tiny("gpt2"), run=Run(spill_bytes=0))) == wanted
    assert digest(compress(tiny("gpt2"), run=Run(spill_bytes=0, scratch=tmp_path))) == wanted


@pytest.mark.parametrize("options", [{}, {"boundaries": "greedy"}, {"ranking": "loss"}, *ONLY.values()])
def test_the_block_forwards_reported_are_those_counted(options: dict[str, Any]) -> None:
    model, counted = tiny("gpt2"), [0]

    def seen(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counted[0] += len(args[0]) * (3 if output.requires_grad else 1)  # a backward pass costs two more

    for block in Decoder(model):
        block.module.register_forward_hook(seen)  # copied along with the model
    reported = compress(model, **options).report.numbers["block_forwards"]
    assert reported == counted[0]


# What is refused

# What is asked for, and what the message says of it.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "all blocks go": ("all 5 blocks", {"sparsity": 0.9}),
    "all but those protected": ("protect", {"sparsity": 0.8}),
    "a group larger than the model": ("group=6", {"group": 6}),
    "a group larger than what is left": ("group=5", {"group": 5}),
    "a group larger than what is between the ends": ("group=3", {"keep_ends": 1, "group": 3}),
    "ends that are all": ("keep_ends|group=2", {"keep_ends": 2}),
    "rows that fill no whole batch": ("batches of 4", {"batch": 4}),
    "fewer rows than a batch": ("batches of 12", {"batch": 12}),
    "all rows are held out": ("batches", {"held_out": 8}),
    "more rows are held out than there are": ("held_out=9", {"held_out": 9}),
    "no rows to judge gates": ("held_out=0", {"held_out": 0, "batch": 4}),
    "no rows to judge parents": ("held_out=0", {"held_out": 0, "batch": 4, "sparsity": 0}),
    "no rows to judge boundaries": (
        "held_out=0",
        {
            "held_out": 0,
            "batch": 4,
            "sparsity": 0,
            "boundaries": "greedy",
        },
    ),
    "groups that are counted but not chosen": ("groups=1", {"groups": 1}),
    "a block that does not exist": ("no block 5", {"blocks": (5,)}),
    "a block that is protected": ("block 1", {"blocks": (1,)}),
    "more blocks than the share": ("names 2", {"blocks": (2, 3)}),
    "an eps that does not fall": ("gate_eps", {"gate_eps": 0.2}),
    "no loss": ("no loss", {"next_token": 0.0, "distil": 0.0, "tail": 0}),
    "a temperature of zero": ("temperature", {"temperature": 0.0}),
    "no group": ("group=0", {"group": 0}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_before_any_work(what: str) -> None:
    model = tiny("llama")

    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    model.register_forward_pre_hook(work)
    Decoder(model).blocks[0].module.register_forward_pre_hook(work)
    said, options = REFUSED[what]
    with pytest.raises((ConfigError, BudgetError), match=said):
        compress(model, run=Run(progress=work), **options)


@pytest.mark.parametrize("boundaries", ["fixed", "greedy"])
def test_groups_that_no_like_neighbours_fill_are_refused(boundaries: str) -> None:
    with pytest.raises(ConfigError, match="3 neighbours"):
        compress(tiny("gemma3_text"), group=3, boundaries=boundaries, **ONLY["sharing"] | {"protect": ()})
    with pytest.raises(ConfigError, match="2 neighbours"):
        compress(tiny("gemma3_text"), blocks=(0, 3), protect=(), boundaries=boundaries)
    with pytest.raises(ConfigError, match="groups=3"):
        compress(tiny("llama"), boundaries="greedy", groups=3)


def test_an_encoder_decoder_is_refused_with_a_reason() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=259)
    auto: Any = AutoModelForSeq2SeqLM
    with pytest.raises(UnsupportedArchitecture, match="t5"):
        compress(auto.from_config(config))


def test_what_shares_already_is_not_shared_again_nor_cut() -> None:
    shared = compress(tiny("llama"), epochs=0, sparsity=0).model
    with pytest.raises(UnsupportedArchitecture, match="share"):
        compress(shared, sparsity=0)
    for method, options in (
        ("2ssp", {"sparsity": 0.3, "alpha": 1.0}),
        ("fusegpt", {"sparsity": 0.25, "window": 2, "batch": 2}),
        ("wanda", {"sparsity": 0.3}),
    ):
        config = configured(METHODS[method].config, options, method)
        with pytest.raises(UnsupportedArchitecture, match="share"):
            METHODS[method].compress(shared, ROWS, config, Run())


# Going on after an interruption


QUICK: dict[str, Any] = {"gate_steps": 3, "epochs": 2, "lora_rank": 2, "boundaries": "greedy", "adapter_rank": 1}


def calls_of(**options: Any) -> int:
    seen: list[str] = []
    compress(tiny("gpt2"), run=Run(progress=lambda what, done, total: seen.append(what)), **options)
    return len(seen)


@pytest.mark.parametrize("moments", [4, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(
    seconds: float, moments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what learns written down after every step, and only at the end."""
    monkeypatch.setattr(training, "KEEP_SECONDS", seconds)
    wanted = digest(compress(tiny("gpt2"), **QUICK))
    assert digest(compress(tiny("gpt2"), run=Run(scratch=tmp_path / "unbroken"), **QUICK)) == wanted
    calls = calls_of(**QUICK)
    resumed = 0
    for after in np.linspace(0, calls - 1, moments, dtype=int).tolist():
        with pytest.raises(Killed):
            compress(tiny("gpt2"), run=Run(scratch=tmp_path / str(after), progress=killer(after)), **QUICK)
        again = compress(tiny("gpt2"), run=Run(scratch=tmp_path / str(after)), **QUICK)
        assert digest(again) == wanted
        resumed += again.report.resumed_seconds > 0
    assert resumed >= 3


def test_a_run_that_is_killed_again_and_again_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEEP_SECONDS", 0.0)
    wanted, calls = digest(compress(tiny("gpt2"), **QUICK)), calls_of(**QUICK)
    result, tries = None, 0
    while result is None and tries < 20:
        tries += 1
        try:
            result = compress(tiny("gpt2"), run=Run(scratch=tmp_path, progress=killer(2 * calls // 3)), **QUICK)
        except Killed:
            continue
    assert result is not None
    assert 1 < tries < 20
    assert digest(result) == wanted


# Options that a stage depends on, each with another value.
DEPENDS: dict[str, list[dict[str, Any]]] = {
    "removal": [
        {"seed": 1},
        {"gate_steps": 4},
        {"gate_lr": 0.1},
        {"gate_eps": 1e-3},
        {"flops_weight": 3.0},
        {"polarisation_weight": 2.0},
        {"check": False},
        {"sparsity": 0.4},
        {"protect": (0, 2)},
        {"ranking": "loss"},
        {"batch": 2},
        {"held_out": 5},
    ],
    "sharing": [
        {"group": 3},
        {"keep_ends": 1},
        {"boundaries": "fixed"},
        {"groups": 1},
        {"own_biases": True},
        {"held_out": 1},
    ],
    "healing": [
        {"seed": 1},
        {"epochs": 1},
        {"batch": 2},
        {"held_out": 5},
        {"lora_rank": 1},
        {"lora_lr": 2e-2},
        {"norm_lr": 2e-2},
        {"warmup": 0.5},
        {"clip": 0.1},
        {"next_token": 0.5},
        {"distil": 0.5},
        {"temperature": 1.0},
        {"tail": 1},
        {"tail_weight": 0.5},
    ],
}


@pytest.mark.parametrize("stage", ONLY)
def test_a_stage_with_other_options_takes_nothing_from_the_folder(stage: str, tmp_path: Path) -> None:
    run, small = Run(scratch=tmp_path), {**QUICK, **ONLY[stage]}
    compress(tiny("gpt2"), run=run, **small)
    assert compress(tiny("gpt2"), run=run, **small).report.resumed_seconds > 0
    for options in DEPENDS[stage]:
        assert compress(tiny("gpt2"), run=run, **{**small, **options}).report.resumed_seconds == 0, options
    flipped = TokenRows(ROWS.tokens.flip(0), "random", "1" * 64, 0)
    assert compress(tiny("gpt2"), flipped, run, **small).report.resumed_seconds == 0
    for index in range(5):
        other = tiny("gpt2")
        with torch.no_grad():
            Decoder(other).blocks[index].module.get_parameter("mlp.c_fc.bias")[7] += 0.01
        assert compress(other, run=run, **small).report.resumed_seconds == 0, index


def test_another_ablation_takes_over_the_stages_that_it_has_in_common(tmp_path: Path) -> None:
    """The same removal with other sharing, and the same sharing with other healing, give what they give alone."""
    run = Run(scratch=tmp_path)
    compress(tiny("gpt2"), run=run, **QUICK)
    for options in ({"group": 3}, {"lora_lr": 2e-2}, {"parent": "first", "boundaries": "fixed"}, {"own_biases": True}):
        again = compress(tiny("gpt2"), run=run, **{**QUICK, **options})
        assert again.report.resumed_seconds > 0
        assert digest(again) == digest(compress(tiny("gpt2"), **{**QUICK, **options}))


@pytest.mark.parametrize("held_out", [2, 0])
def test_a_run_with_another_teacher_takes_nothing_from_the_folder(held_out: int, tmp_path: Path) -> None:
    teachers = [tiny("gpt2"), tiny("gpt2")]
    with torch.no_grad():
        Decoder(teachers[1]).blocks[2].module.get_parameter("mlp.c_fc.weight").mul_(1.5)
    found = []
    for each in teachers:
        options = {**ONLY["healing"], "held_out": held_out, "batch": 2, "next_token": 0.0}
        wanted = digest(compress(tiny("gpt2"), run=Run(teacher=each), **options))
        assert digest(compress(tiny("gpt2"), run=Run(teacher=each, scratch=tmp_path), **options)) == wanted
        found.append(wanted)
    assert found[0] != found[1]


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_a_folder_that_was_damaged_costs_time_only(damage: str, tmp_path: Path) -> None:
    first = digest(compress(tiny("gpt2"), run=Run(scratch=tmp_path), **QUICK))
    for file in tmp_path.iterdir():
        content = {"cut": file.read_bytes()[:-100], "emptied": b"", "overwritten": b"x" * 1000}[damage]
        file.write_bytes(content)
    again = compress(tiny("gpt2"), run=Run(scratch=tmp_path), **QUICK)
    assert digest(again) == first
    assert again.report.resumed_seconds == 0


# The reference stands on its own


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_reference_runs_blocks_as_the_model_does(model_type: str) -> None:
    found = reference.Stock(tiny(model_type))
    wanted = logits_of(tiny(model_type).double())(LOOKED_AT)
    with torch.no_grad():
        torch.testing.assert_close(found.run(found.places, LOOKED_AT)[0], wanted, rtol=0, atol=1e-12)
        without = tiny(model_type).double()
        drop_blocks(without, [1, 2])
        logits = found.run(reference.without(found.places, [1, 2]), LOOKED_AT)[0]
        torch.testing.assert_close(logits, logits_of(without)(LOOKED_AT), rtol=0, atol=1e-12)


def test_the_adam_of_the_reference_is_that_of_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    start, goal = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    adam = reference.Adam([(ours, 1e-2)])
    stock_adam = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        adam.step(((ours - goal) ** 4).sum(), share=1 / (1 + step), clip=0.7)
        stock_adam.zero_grad()
        ((theirs - goal) ** 4).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([theirs], 0.7)
        stock_adam.param_groups[0]["lr"] = 1e-2 / (1 + step)
        stock_adam.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_the_reference_knows_every_architecture_and_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    library = ("compress", "exporters", "serving", "benchmarks", "deploy", "tests")
    assert not {name for name in imported if name.split(".")[0] in library}
    assert set(reference.PLACES) == set(ARCHITECTURES)
    fields = {field.name: field.default for field in dataclasses.fields(reference.Settings)}
    assert fields == {field.name: field.default for field in dataclasses.fields(FoldGPTConfig)}


def test_removals_are_rounded_up() -> None:
    assert [reference.removals(share, 30) for share in (0, 0.1, 0.3, 0.31)] == [0, 3, 9, 10]
    assert math.isnan(
        reference.divergence(reference.Stock(tiny("opt")), [], reference.Stock(tiny("opt")), ROWS.tokens[:0])
    )
