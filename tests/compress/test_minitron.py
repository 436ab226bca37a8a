"""Minitron against the slow reference, which shares no code with it, and what must hold of it besides."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from compress import artifact
from compress.arch import ARCHITECTURES as RECORDS
from compress.artifact import OriginEntry
from compress.errors import ConfigError, FoldawayError, UnsupportedArchitecture
from compress.evaluate import logits_of
from compress.importance import Aggregate
from compress.methods import METHODS, method_config
from compress.methods.minitron import MinitronConfig
from compress.result import CompressedModel, Run
from compress.shape import Counter, Shape, resize, shape_of
from compress.surgery import clone, keep_channels, keep_heads, keep_neurons, share_blocks
from tests.conftest import (
    _COMMON,
    ARCHITECTURES,
    HEAD_DIM,
    TINY,
    D,
    F,
    H,
    K,
    L,
    byte_tokenizer,
    covering,
    tiny,
    token_rows,
)
from tests.reference import minitron as reference

ROWS = token_rows(3, 16)
LOOKED_AT = token_rows(2, 20, seed=1).tokens  # beyond gemma3's window of 8
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
MULTI_HEAD = ("gpt2", "opt")  # their hidden_size is heads * head_dim, always
AXES = ("ffn", "heads", "hidden", "depth", "all")
AGGREGATORS = list(itertools.product(["l2", "mean", "var"], repeat=2))
# How loud each block speaks, so that the least important ones are not the last ones.
LOUDNESS = (1.0, 0.15, 0.7, 0.1, 0.5, 0.3)


def built(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with other values in its config; None leaves a key out."""
    values = {k: v for k, v in {**_COMMON, **TINY[model_type], **changes}.items() if v is not None or k not in changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def dense(model_type: str, **changes: Any) -> PreTrainedModel:
    """A float64 model whose blocks matter differently; one for all tests, none changes it."""
    model = built(model_type, **changes).double()
    names = reference.NAMES[model_type]
    for block, loudness in zip(model.get_submodule(names.blocks), LOUDNESS, strict=False):
        if names.other_norms:
            for path in names.other_norms:
                weight = block.get_parameter(f"{path}.weight")
                weight.copy_(loudness * (1 + weight) - 1)
        else:
            for path in (names.attention_out, names.ffn_out):
                for parameter in block.get_submodule(path).parameters():
                    parameter.mul_(loudness)
    return model


def sizes(model_type: str, axis: str) -> dict[str, int]:
    """Target sizes for one axis; in gpt2 and opt, heads and hidden channels go together."""
    width = {"heads": {"num_attention_heads": 2}, "hidden": {"hidden_size": 48}}
    if model_type in MULTI_HEAD:
        width = {key: {"hidden_size": 48, "num_attention_heads": 3} for key in width}
    each = {"ffn": {"intermediate_size": 56}, **width, "depth": {"num_hidden_layers": 3}}
    return each[axis] if axis != "all" else {k: v for values in each.values() for k, v in values.items()}


def compress(model: PreTrainedModel, run: Run | None = None, **options: Any) -> CompressedModel:
    return METHODS["minitron"].compress(model, ROWS, method_config("minitron", options), run)


def expected(model: PreTrainedModel, **options: Any) -> reference.Masked:
    return reference.minitron(model, ROWS.tokens, reference.Settings(**options))


@functools.cache
def _ours(model_type: str, options: tuple[tuple[str, int], ...]) -> CompressedModel:
    return compress(dense(model_type), **dict(options))


@functools.cache
def _theirs(model_type: str, options: tuple[tuple[str, int], ...]) -> reference.Masked:
    return expected(dense(model_type), **dict(options))


def ours_of(model_type: str, axis: str) -> CompressedModel:
    return _ours(model_type, tuple(sizes(model_type, axis).items()))


def theirs_of(model_type: str, axis: str) -> reference.Masked:
    return _theirs(model_type, tuple(sizes(model_type, axis).items()))


def count(model: PreTrainedModel) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_blocks(model: PreTrainedModel) -> int:
    names = reference.NAMES[model.config.model_type]
    return sum(parameter.numel() for parameter in model.get_submodule(names.blocks).parameters())


def meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def matrix(linear: torch.nn.Module) -> torch.Tensor:
    """(outputs, inputs)."""
    weight = linear.get_parameter("weight")
    return weight.T if type(linear).__name__ == "Conv1D" else weight


def fingerprint(result: CompressedModel | PreTrainedModel) -> str:
    """All bytes of a model, its config, what its modules say of their sizes, and all numbers of its report."""
    model = result.model if isinstance(result, CompressedModel) else result
    found = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        numbers = {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str))}
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.update(repr((name, type(module), sorted(numbers.items()), hooks)).encode())
    if isinstance(result, CompressedModel):
        found.update(json.dumps(result.report.numbers, sort_keys=True).encode())
    return found.hexdigest()


def numbers_of(result: CompressedModel) -> dict[str, Any]:
    """A report's numbers, as a manifest has them."""
    found: dict[str, Any] = json.loads(json.dumps(result.report.numbers))
    return found


def assert_agree(ours: CompressedModel, theirs: reference.Masked, tolerance: float = 1e-5) -> None:
    """Everything that is kept, the report, the config, and the logits."""
    model, numbers, names, first = ours.model, numbers_of(ours), theirs.names, theirs.blocks[0]
    if ours.report.config["rounds"] == 1:  # the choices of several rounds are not told apart
        assert numbers["blocks_removed"] == reference.removed(theirs)
        assert numbers["channels_kept"] == (theirs.channels if len(theirs.channels) < theirs.D else [])
        if len(theirs.heads[first]) < theirs.H:
            assert [numbers["heads_kept"][b] for b in theirs.blocks] == [theirs.heads[b] for b in theirs.blocks]
            assert len(numbers["heads_kept"]) == theirs.L
        else:
            assert numbers["heads_kept"] == []
    blocks = list(model.get_submodule(names.blocks))
    assert len(blocks) == len(theirs.blocks)
    for block, b in zip(blocks, theirs.blocks, strict=True):
        last = matrix(block.get_submodule(names.ffn_out))
        before = matrix(theirs.modules[b].get_submodule(names.ffn_out))[theirs.channels]
        equal = [(before == column[:, None]).all(0).nonzero().flatten().tolist() for column in last.T]
        assert equal == [[j] for j in theirs.neurons[b]]
    before_sizes = [theirs.L, theirs.D, theirs.F, theirs.H]
    after_sizes = [len(blocks), len(theirs.channels), len(theirs.neurons[first]), len(theirs.heads[first])]
    assert numbers["shape_before"] == dict(zip(SIZES, before_sizes, strict=True))
    assert numbers["shape_after"] == dict(zip(SIZES, after_sizes, strict=True))
    assert numbers["parameters_before"] == count(theirs.model)
    assert numbers["parameters_after"] == count(model)
    share = 1 - count_blocks(model) / count_blocks(theirs.model)
    assert numbers["sparsity_of_blocks"] == pytest.approx(share, abs=1e-12)
    assert_config(model.config, theirs)
    np.testing.assert_allclose(logits_of(model)(LOOKED_AT).numpy(), theirs.logits(LOOKED_AT), rtol=0, atol=tolerance)


def assert_config(config: PreTrainedConfig, theirs: reference.Masked) -> None:
    first, given = theirs.blocks[0], theirs.model.config
    width = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(config.model_type, "intermediate_size")
    found = [config.num_hidden_layers, config.hidden_size, getattr(config, width), config.num_attention_heads]
    kept = [len(theirs.blocks), len(theirs.channels), len(theirs.neurons[first]), len(theirs.heads[first])]
    assert found == kept
    if config.model_type in MULTI_HEAD:
        assert config.hidden_size == config.num_attention_heads * theirs.head_dim
    else:
        assert config.head_dim == theirs.head_dim
        assert config.num_key_value_heads == (kept[3] if theirs.H == theirs.K else theirs.K)
    if config.model_type == "opt":
        assert config.word_embed_proj_dim == config.hidden_size
    if getattr(given, "layer_types", None) is not None:
        assert config.layer_types == [given.layer_types[b] for b in theirs.blocks]


# Against the reference


@covering("axis", list(AXES))
def test_what_is_kept_and_the_logits_are_those_of_the_reference(architecture: str, axis: str) -> None:
    assert_agree(ours_of(architecture, axis), theirs_of(architecture, axis))


def test_the_setting_is_strong_enough_that_a_mistake_would_show(architecture: str) -> None:
    theirs = theirs_of(architecture, "all")
    assert reference.removed(theirs) != list(range(3, theirs.L))
    assert len({tuple(each) for each in theirs.neurons}) == theirs.L
    assert len({tuple(each) for each in theirs.heads}) > 1
    assert theirs.channels != list(range(48))
    untouched = reference.Masked(dense(architecture)).logits(LOOKED_AT)
    for axis in AXES:
        assert np.abs(theirs_of(architecture, axis).logits(LOOKED_AT) - untouched).max() > 0.1


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "opt", "phi3"])
def test_in_single_precision_it_keeps_the_same(model_type: str) -> None:
    model = copy.deepcopy(dense(model_type)).float()
    assert_agree(compress(model, **sizes(model_type, "all")), expected(model, **sizes(model_type, "all")), 1e-4)


# Query heads in groups of four, whose length is not D / H; heads that each have K and V of their own.
GROUPS = {"num_attention_heads": 8, "head_dim": 24}
OWN = {"num_attention_heads": 4, "num_key_value_heads": 4}
ONE = {"num_attention_heads": 4, "num_key_value_heads": 1}
SOME: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 48}
THREE: dict[str, Any] = {"num_hidden_layers": 3}
RUN: dict[str, Any] = {"contiguous": True}
MULTI: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
# Each a model, changes of its config, and options.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "six of eight heads": ("mistral", GROUPS, {"num_attention_heads": 6}),
    "four of eight heads, fused": ("phi3", GROUPS, {"num_attention_heads": 4, **SOME}),
    "two of eight heads, with norms of their own": ("qwen3", GROUPS, {"num_attention_heads": 2}),
    "half of the heads, with biases": ("qwen2", GROUPS, {"num_attention_heads": 4}),
    "three heads with K and V of their own": ("llama", OWN, {**SOME, "num_attention_heads": 3, "hidden_size": 48}),
    "three heads with K and V of their own, fused": ("phi3", OWN, {"num_attention_heads": 3}),
    "one head with K and V of its own": ("gemma3_text", OWN, {"num_attention_heads": 1}),
    "heads of one group": ("mistral", ONE, {"num_attention_heads": 3}),
    "much goes": ("gpt2", {}, {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 8}),
    "one block stays": ("opt", {}, {"num_hidden_layers": 1}),
    "by macro influence": ("qwen2", {}, {**THREE, "depth_ranking": "macro_influence"}),
    "by the loss": ("gpt2", {}, {**THREE, "depth_ranking": "loss"}),
    "by the loss of two rows": ("gemma3_text", {}, {**THREE, "depth_ranking": "loss", "scoring_rows": 2}),
    "by the loss of one row": ("opt", {}, {**THREE, "depth_ranking": "loss", "scoring_rows": 1}),
    "by macro influence in one row": ("llama", {}, {**THREE, "depth_ranking": "macro_influence", "scoring_rows": 1}),
    "a run of two": ("llama", {}, {**THREE, **RUN}),
    "a run of three": ("gemma3_text", {}, {**THREE, **RUN}),
    "a run of one": ("opt", {}, {"num_hidden_layers": 4, **RUN}),
    "a run by macro influence": ("opt", {}, {**THREE, **RUN, "depth_ranking": "macro_influence"}),
    "a run by the loss": ("qwen3", {}, {**THREE, **RUN, "depth_ranking": "loss"}),
    "a run by the loss of two rows": ("mistral", {}, {**THREE, **RUN, "depth_ranking": "loss", "scoring_rows": 2}),
    "a run by the loss, with the rest": ("gpt2", {}, {**MULTI, **RUN, "depth_ranking": "loss"}),
    "two rounds": ("llama", {}, {**SOME, "num_attention_heads": 2, "rounds": 2}),
    "three rounds": ("gemma3_text", {}, {**SOME, "rounds": 3}),
    "four rounds of heads": ("qwen3", GROUPS, {"num_attention_heads": 2, "rounds": 4}),
    "three rounds of heads that are alone": ("phi3", OWN, {"num_attention_heads": 1, "rounds": 3}),
    "rounds of blocks by the loss": ("qwen2", {}, {"num_hidden_layers": 2, "rounds": 2, "depth_ranking": "loss"}),
    "rounds of runs": ("mistral", {}, {"num_hidden_layers": 1, "rounds": 2, **RUN}),
    "rounds of neurons": ("gpt2", {}, {"intermediate_size": 24, "rounds": 3}),
    "more rounds than blocks go": ("opt", {}, {**THREE, "intermediate_size": 72, "rounds": 5}),
    "residual of heads": ("mistral", GROUPS, {"num_attention_heads": 6, "head_residual": True}),
    "residual of half of the heads": ("qwen2", GROUPS, {"num_attention_heads": 4, "head_residual": True, **SOME}),
    "residual of heads, fused": ("phi3", GROUPS, {"num_attention_heads": 6, "head_residual": True}),
    "residual of heads, with norms": ("qwen3", GROUPS, {"num_attention_heads": 4, "head_residual": True}),
    "residual of heads, in gpt2": ("gpt2", {}, {**MULTI, "head_residual": True}),
    "residual of heads, in opt": ("opt", {}, {**MULTI, "head_residual": True}),
    "residual of heads with K and V": ("mistral", OWN, {"num_attention_heads": 3, "head_residual": True}),
    "residual of heads, in rounds": ("llama", GROUPS, {"num_attention_heads": 4, "head_residual": True, "rounds": 2}),
    "all heads stay": ("gpt2", {}, {"intermediate_size": 40, "head_residual": True}),
    "norms made up for": ("llama", {}, {"hidden_size": 40, "norm_compensation": True}),
    "norms made up for, in gemma3": ("gemma3_text", {}, {"hidden_size": 48, "norm_compensation": True}),
    "norms made up for, in gpt2": ("gpt2", {}, {**MULTI, "norm_compensation": True}),
    "norms made up for, in opt": ("opt", {}, {**MULTI, "norm_compensation": True}),
    "norms made up for, with the rest": ("phi3", {}, {**SOME, "num_attention_heads": 2, "norm_compensation": True}),
    "norms made up for, in rounds": ("qwen3", {}, {**SOME, "norm_compensation": True, "rounds": 2}),
    "all norms stay": ("opt", {}, {"intermediate_size": 40, "norm_compensation": True}),
    "everything": (
        "qwen2",
        GROUPS,
        {**SOME, "num_attention_heads": 4, "norm_compensation": True, "head_residual": True, **RUN},
    ),
    "nothing": ("llama", {}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_other_models_and_options_it_is_still_that_of_the_reference(variant: str) -> None:
    model_type, changes, options = VARIANTS[variant]
    model = dense(model_type, **changes)
    assert_agree(compress(model, **options), expected(model, **options))


@pytest.mark.parametrize(("batch", "sequence"), AGGREGATORS)
def test_every_pair_of_aggregators_is_that_of_the_reference(batch: str, sequence: str) -> None:
    options = {**sizes("qwen2", "all"), "batch_aggregator": batch, "sequence_aggregator": sequence}
    assert_agree(compress(dense("qwen2"), **options), expected(dense("qwen2"), **options))


def test_the_options_change_what_is_kept() -> None:
    """So that the comparisons above are of different things."""
    rankings = [
        {"depth_ranking": ranking, "contiguous": contiguous}
        for ranking in ("block_influence", "loss")
        for contiguous in (False, True)
    ]
    removed = {
        tuple(reference.removed(expected(dense(model_type), num_hidden_layers=3, **options)))
        for model_type in ("llama", "gpt2")
        for options in rankings
    }
    assert len(removed) >= 3
    masked = reference.Masked(dense("qwen2"))
    passes = [masked.run(row) for row in ROWS.tokens]
    scores = [reference.score(masked, passes, *pair) for pair in AGGREGATORS]
    assert len({tuple(sorted(reference.highest(each.neurons[2], 56))) for each in scores}) >= 7
    assert len({tuple(sorted(reference.highest(each.channels, 48))) for each in scores}) >= 7
    once, twice = (expected(dense("gemma3_text"), **SOME, rounds=rounds) for rounds in (1, 3))
    assert once.channels != twice.channels or once.neurons != twice.neurons


def test_ties_go_to_the_lowest_index() -> None:
    """With one row its variance over the batch is zero, and all scores with it."""
    model = dense("qwen2", **GROUPS)
    one = dataclasses.replace(ROWS, tokens=ROWS.tokens[:1])
    options = method_config("minitron", {**SOME, "num_attention_heads": 4, "batch_aggregator": "var"})
    result = METHODS["minitron"].compress(model, one, options, None)
    assert numbers_of(result)["channels_kept"] == list(range(40))
    assert all(heads == [0, 1, 4, 5] for heads in numbers_of(result)["heads_kept"] if heads)
    last = matrix(result.model.model.layers[0].mlp.down_proj)
    b = min(set(range(L)) - set(numbers_of(result)["blocks_removed"]))
    assert torch.equal(last, model.model.layers[b].mlp.down_proj.weight[:40, :48])


# Aggregators

# Three rows of two tokens, one channel.
BY_HAND = [[[1.0], [-3.0]], [[2.0], [2.0]], [[-5.0], [0.0]]]
# (batch, sequence) -> the value. Over tokens: means 2, 2, 2.5; norms sqrt(10), sqrt(8), 5; variances 4, 0, 6.25.
VALUES = {
    ("mean", "mean"): 6.5 / 3,
    ("l2", "mean"): math.sqrt(14.25),
    ("var", "mean"): 1 / 18,
    ("mean", "l2"): (math.sqrt(10) + math.sqrt(8) + 5) / 3,
    ("l2", "l2"): math.sqrt(43),
    ("var", "l2"): 43 / 3 - ((math.sqrt(10) + math.sqrt(8) + 5) / 3) ** 2,
    ("mean", "var"): 10.25 / 3,
    ("l2", "var"): math.sqrt(55.0625),
    ("var", "var"): 55.0625 / 3 - (10.25 / 3) ** 2,
}


def aggregated(rows: torch.Tensor, batch: str, sequence: str) -> torch.Tensor:
    """By the library; rows (B, T, X), given one at a time."""
    both = Aggregate(batch=batch, sequence=sequence)
    for row in rows:
        both.add(row)
    value = both.value()
    assert value.dtype == torch.float64
    assert value.shape == rows.shape[2:]
    return value


@pytest.mark.parametrize(("batch", "sequence"), AGGREGATORS)
def test_aggregators_have_the_values_worked_out_by_hand(batch: str, sequence: str) -> None:
    rows, wanted = torch.tensor(BY_HAND), VALUES[batch, sequence]
    assert reference.importance(list(rows.double().numpy()), batch, sequence)[0] == pytest.approx(wanted, rel=1e-12)
    assert aggregated(rows.double(), batch, sequence)[0].item() == pytest.approx(wanted, rel=1e-12)
    assert aggregated(rows, batch, sequence)[0].item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("batch", "sequence"), AGGREGATORS)
def test_aggregators_of_random_rows_are_those_of_the_reference(batch: str, sequence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(4, 5, 7, generator=generator, dtype=torch.float64) + 1
    wanted = reference.importance(list(rows.numpy()), batch, sequence)
    np.testing.assert_allclose(aggregated(rows, batch, sequence).numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(aggregated(rows.float(), batch, sequence).numpy(), wanted, rtol=1e-5)


def test_tokens_come_before_rows() -> None:
    """Swapped axes give something else, but for the two pairs for which no order exists."""
    rows = torch.tensor(BY_HAND, dtype=torch.float64)
    assert len({round(value, 9) for value in VALUES.values()}) == 9
    for batch, sequence in AGGREGATORS:
        right, swapped = (
            aggregated(rows, batch, sequence).item(),
            aggregated(rows.mT.mT.transpose(0, 1), batch, sequence),
        )
        same = (batch, sequence) in (("mean", "mean"), ("l2", "l2"))
        assert (abs(right - swapped) < 1e-9) == same


def test_rows_of_large_values_do_not_overflow_in_half_precision() -> None:
    rows = torch.full((2, 3, 1), 60000.0, dtype=torch.float16)
    assert aggregated(rows, "l2", "l2").item() == pytest.approx(60000 * math.sqrt(6), rel=1e-3)
    assert aggregated(rows, "var", "mean").item() == 0


# Edits


def with_random_norms(model_type: str) -> PreTrainedModel:
    model = tiny(model_type).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def permuted(groups: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
    """Indices that are shuffled within groups."""
    shuffle = random.Random(seed)
    return torch.tensor([i for group in groups for i in shuffle.sample(list(group), len(group))])


def head_groups(model_type: str) -> list[list[int]]:
    return [list(range(H))] if model_type in MULTI_HEAD else [[0, 1], [2, 3]]


def edit(model: PreTrainedModel, what: str, shuffled: bool) -> None:
    """Keep everything, in its order or in another."""
    blocks = range(model.config.num_hidden_layers)
    heads = head_groups(model.config.model_type)

    def index(groups: Sequence[Sequence[int]], seed: int) -> torch.Tensor:
        found = permuted(groups, seed)
        return found if shuffled else found.sort().values

    if what == "channels":
        keep_channels(model, index([range(D)], 0))
    elif what == "heads":
        keep_heads(model, {b: index(heads, b) for b in blocks})
    else:
        keep_neurons(model, {b: index([range(F)], b) for b in blocks})


@pytest.mark.parametrize("what", ["channels", "heads", "neurons"])
def test_another_order_of_the_same_parts_changes_no_logits(architecture: str, what: str) -> None:
    model = with_random_norms(architecture)
    before, weights = logits_of(model)(LOOKED_AT), clone(model).state_dict()
    edit(model, what, shuffled=True)
    after = model.state_dict()
    assert any(not torch.equal(after[name], weights[name]) for name in weights)
    torch.testing.assert_close(logits_of(model)(LOOKED_AT), before, rtol=0, atol=1e-4)  # norms are in fp32


@pytest.mark.parametrize("what", ["channels", "heads", "neurons"])
def test_keeping_everything_changes_nothing(architecture: str, what: str) -> None:
    model = with_random_norms(architecture)
    before = fingerprint(model)
    edit(model, what, shuffled=False)
    assert fingerprint(model) == before


def test_the_embeddings_that_are_kept_keep_their_size(architecture: str) -> None:
    """gemma3 multiplies them by the root of the hidden size, which is another one."""
    channels = theirs_of(architecture, "hidden").channels
    before, after = (
        model.get_submodule(reference.NAMES[architecture].embeddings[0])(LOOKED_AT)
        for model in (dense(architecture), ours_of(architecture, "hidden").model)
    )
    torch.testing.assert_close(after, before[..., channels], rtol=1e-6, atol=0)


# Numbers of parameters

LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False}
NEMOTRON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256000, "tie_word_embeddings": False}
NEMO = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "tie_word_embeddings": False}
KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], tuple[int, int, int, int]]] = {
    "llama": (LlamaConfig, LLAMA, (32, 4096, 14336, 32)),
    "nemotron": (NemotronConfig, NEMOTRON, (32, 6144, 24576, 48)),
    "mistral": (MistralConfig, NEMO, (40, 5120, 14336, 32)),
}
# Published: the kind of the parent, sizes in the order of SIZES, parameters.
PUBLISHED: dict[str, tuple[str, tuple[int, int, int, int], float]] = {
    "Minitron-8B": ("nemotron", (32, 4096, 16384, 48), 8.27e9),
    "Minitron-4B": ("nemotron", (32, 3072, 9216, 24), 4.19e9),
    "MN-Minitron-8B": ("mistral", (40, 4096, 11520, 32), 8.41e9),
    "Llama-3.1-Minitron-4B-Width": ("llama", (32, 3072, 9216, 32), 4.51e9),
    "Llama-3.1-Minitron-4B-Depth": ("llama", (16, 4096, 14336, 32), 4.54e9),
}


def large(kind: str, wanted: tuple[int, int, int, int]) -> PreTrainedModel:
    config, values, _ = KINDS[kind]
    return meta(config(**values, **dict(zip(SIZES, wanted, strict=True))))


def resized(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    resize(model, shape)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_have_the_published_parameters(name: str) -> None:
    kind, wanted, parameters = PUBLISHED[name]
    assert count(large(kind, wanted)) == pytest.approx(parameters, rel=5e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_cutting_the_parent_to_a_published_shape_gives_its_parameters(name: str) -> None:
    kind, wanted, _ = PUBLISHED[name]
    if kind not in RECORDS:
        pytest.skip(f"{kind} has no record")
    parent, shape = large(kind, KINDS[kind][2]), Shape(*wanted)
    assert shape_of(parent) == Shape(*KINDS[kind][2])
    counted = Counter(parent).parameters(shape)
    model = resized(parent, shape)
    assert shape_of(model) == shape
    assert count(model) == counted == count(large(kind, wanted))


def random_shapes(model_type: str, number: int, seed: int = 0) -> list[Shape]:
    draw, blocks = random.Random(seed), 6 if model_type == "gemma3_text" else L
    found = []
    for _ in range(number):
        heads = draw.randint(1, H) if model_type in MULTI_HEAD else draw.choice([K, H])
        # Multiples of the heads, which some configs want.
        hidden = heads * (HEAD_DIM if model_type in MULTI_HEAD else draw.randint(1, D // heads))
        found.append(Shape(draw.randint(1, blocks), hidden, draw.randint(1, F), heads))
    return found


def test_the_counter_says_what_a_recount_finds(architecture: str) -> None:
    counter, given = Counter(tiny(architecture)), shape_of(tiny(architecture))
    assert counter.parameters(given) == count(tiny(architecture))
    for shape in random_shapes(architecture, 3):
        model = resized(tiny(architecture), shape)
        assert shape_of(model) == shape
        assert counter.parameters(shape) == count(model)


def test_the_counter_knows_heads_with_k_and_v_of_their_own() -> None:
    for model_type in ("llama", "phi3", "qwen3"):
        model = built(model_type, **OWN)
        shape = Shape(3, 48, 24, 3)
        counted = Counter(model).parameters(shape)
        assert counted == count(resized(model, shape))
        wanted = {**dict(zip(SIZES, (3, 48, 24, 3), strict=True)), "num_key_value_heads": 3}
        assert counted == count(built(model_type, **wanted))


# Models that work


def decode(model: PreTrainedModel, tokens: torch.Tensor, prompt: int = 14) -> torch.Tensor:
    """Logits of a prefill and then of one token at a time."""
    cache, parts, start = None, [], 0
    with torch.no_grad():
        for end in range(prompt, tokens.shape[1] + 1):
            output = model(input_ids=tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, end
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("axis", AXES)
def test_decoding_with_a_cache_agrees_with_the_full_pass(architecture: str, axis: str) -> None:
    model = ours_of(architecture, axis).model
    torch.testing.assert_close(decode(model, LOOKED_AT), logits_of(model)(LOOKED_AT), rtol=0, atol=2e-5)


def test_the_model_given_stays_as_it_is_and_the_same_comes_out_twice(architecture: str) -> None:
    model = clone(dense(architecture))
    before = fingerprint(model)
    options = {**sizes(architecture, "all"), "norm_compensation": True, "head_residual": True}
    once = compress(model, **options)
    assert fingerprint(model) == before
    assert fingerprint(compress(copy.deepcopy(model), Run(consume=True), **options)) == fingerprint(once)


def test_options_that_change_nothing_give_the_same_model(architecture: str) -> None:
    model = dense(architecture)
    result = compress(model)
    assert numbers_of(result)["sparsity_of_blocks"] == 0
    assert numbers_of(result)["blocks_removed"] == []
    assert fingerprint(result.model) == fingerprint(model)


def save(result: CompressedModel, path: Path) -> None:
    artifact.save(result.model, byte_tokenizer(), path, origin=OriginEntry(name="tiny", kind="folder"), steps=[])


def assert_loads(result: CompressedModel, path: Path) -> dict[str, Any]:
    """With transformers alone; returns the config."""
    save(result, path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits_of(loaded.eval())(LOOKED_AT), logits_of(result.model)(LOOKED_AT))
    assert not list(path.glob("*.py"))
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    assert "auto_map" not in config
    return config


def test_a_saved_model_is_a_stock_one(architecture: str, tmp_path: Path) -> None:
    wanted = sizes(architecture, "all")
    config = assert_loads(compress(tiny(architecture), **wanted), tmp_path / "a")
    renamed = {
        "gpt2": dict(zip(SIZES, ("n_layer", "n_embd", "n_inner", "n_head"), strict=True)),
        "opt": {"intermediate_size": "ffn_dim"},
    }.get(architecture, {})
    for name, size in wanted.items():
        assert config.get(renamed.get(name, name), config.get(name)) == size
    assert config["model_type"] == architecture
    if architecture not in MULTI_HEAD:
        assert config["head_dim"] == HEAD_DIM
    if architecture == "opt":
        assert config["word_embed_proj_dim"] == 48
    if architecture == "gemma3_text":
        assert len(config["layer_types"]) == 3


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3"])
def test_a_config_that_left_head_dim_to_be_worked_out_says_it_now(model_type: str, tmp_path: Path) -> None:
    model = built(model_type, head_dim=None)
    result = compress(model, hidden_size=40, num_attention_heads=2)
    assert assert_loads(result, tmp_path / "a")["head_dim"] == HEAD_DIM
    assert_agree(result, expected(model, hidden_size=40, num_attention_heads=2), 1e-4)


# A share of the parameters


@pytest.mark.parametrize("cut", ["width", "ffn", "hidden", "depth"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3"])
def test_a_share_is_reached_by_what_is_to_be_cut(model_type: str, cut: str) -> None:
    model = dense(model_type)
    result = compress(model, sparsity=0.3, cut=cut, divisor=1)
    numbers = numbers_of(result)
    before, after = numbers["shape_before"], numbers["shape_after"]
    changed = {name for name in SIZES if before[name] != after[name]}
    assert (
        changed
        == {
            "width": {"hidden_size", "intermediate_size"},
            "ffn": {"intermediate_size"},
            "hidden": {"hidden_size"},
            "depth": {"num_hidden_layers"},
        }[cut]
    )
    share = 1 - count_blocks(result.model) / count_blocks(model)
    assert numbers["sparsity_of_blocks"] == pytest.approx(share, abs=1e-12)
    assert share == pytest.approx(0.3, abs=1 / len(LOUDNESS) if cut == "depth" else 0.02)
    if cut == "width":
        ratios = [after[name] / before[name] for name in ("hidden_size", "intermediate_size")]
        # Some configs want channels in multiples of the heads.
        assert abs(ratios[0] - ratios[1]) < (H if model_type in STRICT else 1) / D + 1 / F
    again = compress(model, **{name: after[name] for name in changed}, divisor=1)
    assert fingerprint(again.model) == fingerprint(result.model)


def test_derived_sizes_are_multiples_of_the_divisor() -> None:
    for divisor in (4, 8, 16):
        numbers = numbers_of(compress(dense("llama"), sparsity=0.4, divisor=divisor))
        for name in ("hidden_size", "intermediate_size"):
            assert numbers["shape_after"][name] % divisor == 0
            assert numbers["shape_after"][name] < numbers["shape_before"][name]


def test_a_share_counts_what_explicit_sizes_take() -> None:
    model = dense("qwen3")
    by_depth = numbers_of(compress(model, num_hidden_layers=4))["sparsity_of_blocks"]
    numbers = numbers_of(compress(model, num_hidden_layers=4, sparsity=0.4, cut="ffn", divisor=1))
    assert numbers["shape_after"]["num_hidden_layers"] == 4
    assert numbers["shape_after"]["intermediate_size"] < F
    assert numbers["sparsity_of_blocks"] == pytest.approx(0.4, abs=0.02)
    assert by_depth == pytest.approx(1 / L, abs=1e-9)


# What is refused


def refused(model: PreTrainedModel, error: type[Exception] | tuple[type[Exception], ...], **options: Any) -> str:
    """The message; the model stays as it is, though it may be consumed."""
    before = fingerprint(model)
    with pytest.raises(error) as found:
        compress(model, Run(consume=True), **options)
    assert fingerprint(model) == before
    return str(found.value)


def test_sizes_that_break_the_divisor_name_the_nearest_that_do_not() -> None:
    for name in ("hidden_size", "intermediate_size"):
        message = refused(tiny("llama"), ConfigError, **{name: 50})
        assert name in message
        assert "48" in message
        assert "56" in message
        message = refused(tiny("llama"), ConfigError, **{name: 40}, divisor=16)
        assert "32" in message
        assert "48" in message
    # Sizes that do not change are exempt.
    same = compress(tiny("llama"), intermediate_size=F, hidden_size=D, divisor=48)
    assert numbers_of(same)["channels_kept"] == []


def test_heads_that_break_groups_name_the_nearest_that_do_not() -> None:
    message = refused(tiny("llama"), ConfigError, num_attention_heads=3)
    assert "2" in message
    assert "4" in message
    message = refused(built("qwen3", **GROUPS), ConfigError, num_attention_heads=5)
    assert "4" in message
    assert "6" in message
    refused(tiny("gemma3_text"), ConfigError, num_attention_heads=1)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_beyond_the_models_own_and_what_is_no_size_are_refused(name: str) -> None:
    for wrong in (10_000, 0, -8, 8.5, "8", True):
        message = refused(tiny("qwen2"), FoldawayError, **{name: wrong})
        assert name in message, wrong


def test_a_share_that_the_sizes_already_exceed_is_refused() -> None:
    for cut in ("hidden", "depth"):
        assert "0.1" in refused(tiny("llama"), FoldawayError, sparsity=0.1, intermediate_size=8, cut=cut)
    refused(tiny("llama"), FoldawayError, sparsity=0.1, num_attention_heads=2, num_hidden_layers=2)
    for cut in ("ffn", "depth"):
        refused(tiny("llama"), FoldawayError, sparsity=0.99, cut=cut)


@pytest.mark.parametrize("model_type", MULTI_HEAD)
def test_hidden_channels_and_heads_go_together_where_head_dim_is_worked_out(model_type: str) -> None:
    for options in (
        {"hidden_size": 48, "num_attention_heads": 2},
        {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"hidden_size": 64, "num_attention_heads": 3},
        {"hidden_size": 40},
    ):
        refused(tiny(model_type), (ConfigError, UnsupportedArchitecture), **options)


@pytest.mark.parametrize("model_type", MULTI_HEAD)
def test_where_a_config_has_no_width_of_a_head_channels_and_heads_follow_each_other(model_type: str) -> None:
    for options in ({"hidden_size": 48}, {"num_attention_heads": 3}):
        after = compress(tiny(model_type), **options).report.numbers["shape_after"]
        assert (after["hidden_size"], after["num_attention_heads"]) == (48, 3)


# transformers wants hidden_size to be a multiple of the heads there, head_dim or not.
STRICT = ("gemma3_text", "llama")


SIX = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.mark.parametrize("model_type", STRICT)
def test_a_shape_that_transformers_would_not_load_is_refused(model_type: str) -> None:
    refused(built(model_type, **SIX), ConfigError, hidden_size=40)
    refused(tiny(model_type), ConfigError, hidden_size=41, divisor=1)


@pytest.mark.parametrize("cut", ["hidden", "width"])
@pytest.mark.parametrize("model_type", [*STRICT, "qwen3"])
def test_a_shape_that_was_derived_can_be_saved_and_loaded(model_type: str, cut: str, tmp_path: Path) -> None:
    assert_loads(compress(built(model_type, **SIX), sparsity=0.2, cut=cut), tmp_path / "a")


def test_residual_of_fewer_than_half_of_the_heads_is_refused() -> None:
    refused(built("llama", **GROUPS), ConfigError, num_attention_heads=2, head_residual=True)
    refused(tiny("gpt2"), ConfigError, num_attention_heads=1, hidden_size=16, head_residual=True)
    with pytest.raises(reference.Infeasible):
        expected(built("llama", **GROUPS), num_attention_heads=2, head_residual=True)


def test_models_of_unlike_or_shared_blocks_are_refused() -> None:
    ragged = METHODS["2ssp"].compress(tiny("llama"), ROWS, method_config("2ssp", {"sparsity": 0.5, "alpha": 1.0})).model
    shared = tiny("llama")
    share_blocks(shared, {1: [2]})
    for model in (ragged, shared):
        for options in ({"intermediate_size": 8}, {"hidden_size": 48}, {"num_attention_heads": 2}):
            refused(model, FoldawayError, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_aggregator": "max"},
        {"sequence_aggregator": "l1"},
        {"depth_ranking": "taylor"},
        {"cut": "heads"},
        {"rounds": 0},
        {"rounds": 1.5},
        {"divisor": 0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"contiguous": 1},
        {"head_residual": None},
        {"norm_compensation": "yes"},
        {"scoring_rows": 0},
        {"scoring_rows": 4},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    refused(tiny("llama"), ConfigError, **{"num_hidden_layers": 3, **options})


# The reference stands on its own


def test_the_reference_runs_a_model_that_lost_nothing_as_it_is(architecture: str) -> None:
    wanted = logits_of(dense(architecture))(LOOKED_AT).numpy()
    np.testing.assert_allclose(reference.Masked(dense(architecture)).logits(LOOKED_AT), wanted, rtol=0, atol=1e-12)


def test_what_the_reference_leaves_out_no_longer_matters(architecture: str) -> None:
    """Weights that only the parts that are gone have may be anything."""
    masked = theirs_of(architecture, "all")
    before, names = masked.logits(LOOKED_AT), masked.names
    changed = reference.Masked(dense(architecture))
    changed.blocks, changed.channels = masked.blocks, masked.channels
    changed.heads, changed.neurons = masked.heads, masked.neurons
    gone = [i for i in range(masked.D) if i not in masked.channels]
    for path in names.embeddings:
        changed.model.get_submodule(path).weight[:, gone] += 1
    for norm in changed.norms.values():
        norm.weight[gone] *= 3
    for b, module in enumerate(changed.modules):
        if b not in masked.blocks:
            matrix(module.get_submodule(names.attention_out)).mul_(2)
        matrix(module.get_submodule(names.ffn_out))[gone] += 1
        lost = [j for j in range(masked.F) if j not in masked.neurons[b]]
        matrix(module.get_submodule(names.ffn_out))[:, lost] *= 2
        queries = matrix(module.get_submodule(names.queries))
        for h in range(masked.H):
            if h not in masked.heads[b]:
                queries[h * HEAD_DIM : (h + 1) * HEAD_DIM] += 1
    np.testing.assert_allclose(changed.logits(LOOKED_AT), before, rtol=0, atol=1e-12)


def test_the_residual_of_heads_pairs_them_as_the_formula_says() -> None:
    """Of four heads in the order 2, 0, 3, 1 with three kept, the third takes from the fourth; with two, both take."""
    for kept, pairs in ((3, {3: 1}), (2, {2: 1, 0: 3}), (4, {})):
        masked = reference.Masked(built("llama", num_attention_heads=4, num_key_value_heads=1))
        weight = masked.modules[1].self_attn.q_proj.weight
        before = weight.clone().reshape(4, HEAD_DIM, D)
        reference.add_residual(masked, 1, [2, 0, 3, 1], kept)
        after = weight.reshape(4, HEAD_DIM, D)
        for h in range(4):
            wanted = 2 * before[h] - before[pairs[h]] if h in pairs else before[h]
            assert torch.equal(after[h], wanted)


def test_rounds_land_on_the_target() -> None:
    start, target = [5, 64, 80, 8], [3, 40, 24, 2]
    assert reference.sizes_of_round(start, target, 0, 1, 2) == target
    assert [reference.sizes_of_round(start, target, i, 2, 2) for i in range(2)] == [[4, 52, 52, 6], target]
    assert [reference.sizes_of_round(start, target, i, 4, 2)[3] for i in range(4)] == [6, 6, 4, 2]


def test_the_reference_knows_every_architecture_and_nothing_of_the_library() -> None:
    tree = ast.parse(inspect.getsource(reference))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    library = ("compress", "exporters", "serving", "benchmarks", "deploy", "tests")
    assert not {name for name in imported if name.split(".")[0] in library}
    assert set(reference.NAMES) == set(ARCHITECTURES)
    ours = {field.name: field.default for field in dataclasses.fields(MinitronConfig)}
    theirs = {field.name: field.default for field in dataclasses.fields(reference.Settings)}
    assert theirs == {name: ours[name] for name in theirs}
    assert set(ours) - set(theirs) == {"sparsity", "cut", "divisor"}


def test_scores_are_kept_for_further_shapes_of_the_same_model(tmp_path: Path) -> None:
    first = compress(tiny("llama"), Run(scratch=tmp_path), intermediate_size=40)
    second = compress(tiny("llama"), Run(scratch=tmp_path), hidden_size=48)
    fresh = compress(tiny("llama"), hidden_size=48)
    assert fingerprint(second.model) == fingerprint(fresh.model)
    assert second.report.numbers["block_forwards"] < first.report.numbers["block_forwards"]
    other = compress(tiny("llama"), Run(scratch=tmp_path), hidden_size=48, batch_aggregator="mean")
    assert fingerprint(other.model) == fingerprint(
        compress(tiny("llama"), hidden_size=48, batch_aggregator="mean").model
    )
    assert len(list(tmp_path.iterdir())) == 2
