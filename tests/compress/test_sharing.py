"""Blocks that share one set of weights: what they keep, what is stored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from compress import artifact, budget
from compress.artifact import OriginEntry
from compress.decoder import Decoder
from compress.errors import ConfigError, UnsupportedArchitecture
from compress.evaluate import logits_of
from compress.gating import sharing
from compress.layout import layout_of
from compress.remote_code import FoldawayForCausalLM, linears
from compress.sources import load, skeleton
from compress.surgery import (
    block_kinds,
    clone,
    drop_attention,
    drop_blocks,
    drop_ffn,
    expand,
    keep_neurons,
    share_blocks,
)
from tests.conftest import byte_tokenizer, covering, tiny, token_rows

TOKENS = token_rows(2, 24).tokens
VARIANTS: list[dict[str, Any]] = [{}, {"own_biases": True}, {"adapter_rank": 3}]


def like_pair(model: PreTrainedModel) -> tuple[int, int]:
    kinds = block_kinds(model)
    return next((i, j) for i in range(len(kinds)) for j in range(i + 1, len(kinds)) if kinds[i] == kinds[j])


def shared(architecture: str, **options: Any) -> PreTrainedModel:
    """A model of which two blocks share the weights of the later one, with adapters that do something."""
    model = tiny(architecture)
    first, second = like_pair(model)
    share_blocks(model, {second: [first]}, generator=torch.Generator().manual_seed(0), **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_left"):
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def save(model: PreTrainedModel, path: Path) -> artifact.Manifest:
    return artifact.save(model, byte_tokenizer(), path, origin=OriginEntry(name="tiny", kind="folder"), steps=[])


@covering("options", VARIANTS)
def test_a_shared_model_is_stored_once_and_comes_back(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = shared(architecture, **options)
    manifest = save(model, tmp_path / "a")
    loaded = load(str(tmp_path / "a")).model
    assert manifest.layout.kind == "shared"
    assert layout_of(loaded) == layout_of(model)
    assert layout_of(loaded).distinct == len(Decoder(model)) - 1
    assert torch.equal(logits_of(loaded)(TOKENS), logits_of(model)(TOKENS))
    assert budget.count(loaded) == budget.count(model)
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    buffers = sum(b.numel() for name, b in model.named_buffers() if name in model.state_dict())
    assert stored - buffers == budget.count(model).total
    assert budget.count(skeleton(str(tmp_path / "a"))).total == budget.count(model).total


@covering("options", VARIANTS)
def test_each_block_that_shares_has_a_cache_of_its_own(architecture: str, options: dict[str, Any]) -> None:
    model = shared(architecture, **options)
    places = [block.attention.layer_idx for block in Decoder(model) if block.attention is not None]
    assert places == list(range(len(Decoder(model))))
    new = {
        cached: model.generate(TOKENS, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=258)
        for cached in (True, False)
    }
    assert torch.equal(new[True], new[False])


@covering("options", VARIANTS)
def test_expanding_gives_every_block_weights_of_its_own_and_the_same_logits(
    architecture: str, options: dict[str, Any]
) -> None:
    model = shared(architecture, **options)
    plain = clone(model)
    expand(plain)
    assert layout_of(plain) == layout_of(tiny(architecture))
    assert type(plain) is type(tiny(architecture))
    assert budget.count(plain) == budget.count(tiny(architecture))
    assert torch.allclose(logits_of(plain)(TOKENS), logits_of(model)(TOKENS), atol=1e-4)
    assert layout_of(model).kind == "shared"


def test_norms_stay_the_blocks_own(architecture: str) -> None:
    dense, model = tiny(architecture), shared(architecture)
    before, after = ([dict(b.module.named_parameters()) for b in Decoder(m)] for m in (dense, model))
    first, second = like_pair(dense)
    of_linears = {
        f"{path}.{leaf}" for path, _ in linears(Decoder(dense).blocks[0].module) for leaf in ("weight", "bias")
    }
    for name in before[first]:
        if name in of_linears:
            assert after[first][name] is after[second][name]
        else:
            assert torch.equal(after[first][name], before[first][name])


def test_own_biases_stay_the_blocks_own() -> None:
    dense, model = tiny("gpt2"), shared("gpt2", own_biases=True)
    first, _ = like_pair(dense)
    for (_, old), (_, new) in zip(*(linears(Decoder(m).blocks[first].module) for m in (dense, model)), strict=True):
        assert torch.equal(old.bias, new.bias)
        assert not torch.equal(old.weight, new.weight)


def test_where_the_owner_goes_the_others_keep_its_weights(architecture: str) -> None:
    model = shared(architecture)
    first, second = like_pair(model)
    weights = [module.weight for _, module in linears(Decoder(model).blocks[first].module)]
    drop_blocks(model, [first])
    assert layout_of(model).kind == "plain"
    left = [module.weight for _, module in linears(Decoder(model).blocks[second - 1].module)]
    assert all(ours is theirs for ours, theirs in zip(left, weights, strict=True))


def test_adapters_become_part_of_weights_that_are_shared_no_more(architecture: str) -> None:
    model = shared(architecture, adapter_rank=2)
    _, second = like_pair(model)
    whole = clone(model)
    expand(whole)
    drop_blocks(whole, [second])
    drop_blocks(model, [second])
    assert layout_of(model) == layout_of(whole)
    assert [b.adapter_rank for b in layout_of(model).blocks] == [0] * (len(Decoder(whole)))
    assert torch.allclose(logits_of(model)(TOKENS), logits_of(whole)(TOKENS), atol=1e-4)


def test_sharing_on_trial_leaves_no_trace(architecture: str) -> None:
    model = tiny(architecture)
    blocks = Decoder(model).blocks
    first, second = like_pair(model)
    with sharing([blocks[first]], blocks[second]):
        inside = logits_of(model)(TOKENS)
        assert layout_of(model).kind == "shared"
    assert torch.equal(logits_of(model)(TOKENS), logits_of(tiny(architecture))(TOKENS))
    assert torch.equal(inside, logits_of(shared(architecture))(TOKENS))


@pytest.mark.parametrize("parents", [{0: [0]}, {0: [1], 1: [3]}, {5: [0]}, {0: [-1]}])
def test_groups_that_cannot_be_meant_are_refused(parents: dict[int, list[int]]) -> None:
    with pytest.raises(ConfigError, match="cannot share"):
        share_blocks(tiny("llama"), parents)


def test_what_shares_already_is_not_shared_again() -> None:
    model = shared("llama")
    with pytest.raises(ConfigError, match="shares already"):
        share_blocks(model, {1: [2]})


def test_sliding_and_full_attention_never_share() -> None:
    model = tiny("gemma3_text")
    with pytest.raises(UnsupportedArchitecture, match="blocks 1 and 2"):
        share_blocks(model, {1: [2]})


def test_ffns_of_different_widths_never_share() -> None:
    model = tiny("llama")
    keep_neurons(model, {1: torch.arange(40)})
    with pytest.raises(UnsupportedArchitecture, match="blocks 0 and 1"):
        share_blocks(model, {0: [1]})
    share_blocks(model, {2: [3]})
    assert layout_of(model).kind == "shared"


def test_a_model_that_is_ragged_and_shared_comes_back(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    drop_attention(model, [0, 1])  # gemma3 has two of a kind there
    drop_ffn(model, [2])
    share_blocks(model, {0: [1]})
    save(model, tmp_path / "a")
    loaded = load(str(tmp_path / "a")).model
    assert layout_of(loaded) == layout_of(model)
    assert torch.equal(logits_of(loaded)(TOKENS), logits_of(model)(TOKENS))


@pytest.mark.parametrize("cut", [lambda m: keep_neurons(m, {0: torch.arange(9)}), lambda m: drop_attention(m, [2])])
def test_blocks_that_share_are_not_cut_apart(cut: Any) -> None:
    model = shared("llama")
    with pytest.raises(UnsupportedArchitecture, match="share one set of weights"):
        cut(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [*(("shares_with", owner) for owner in (1, 3, -1, 9, "0", 0.0)), ("adapter_rank", "2"), ("adapter_rank", -1)],
)
def test_a_config_that_cannot_be_meant_is_refused(key: str, value: object, tmp_path: Path) -> None:
    artifact.write_model(shared("llama"), byte_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["block_configs"][1]["shares_with"] == 0
    config["block_configs"][1][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="block 1 cannot"):
        FoldawayForCausalLM.from_pretrained(tmp_path)
    for read in (load, skeleton):
        with pytest.raises(ConfigError, match="block 1 cannot"):
            read(str(tmp_path))


def test_costs_count_what_is_executed_and_not_what_is_stored(architecture: str) -> None:
    assert budget.costs(shared(architecture)) == budget.costs(tiny(architecture))
    model = tiny(architecture)
    drop_blocks(model, [0])
    dense, fewer = budget.costs(tiny(architecture)), budget.costs(model)
    blocks = len(Decoder(tiny(architecture)))
    assert fewer.kv_per_token == dense.kv_per_token * (blocks - 1) // blocks
    assert dense.flops_per_token - fewer.flops_per_token == 2 * budget.block_weights(Decoder(model).blocks[0])


def test_what_a_token_of_the_tiny_llama_costs() -> None:
    hidden, inner, heads, kv, head_dim, blocks, vocabulary = 64, 80, 4, 2, 16, 5, 259
    block = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * inner
    assert budget.costs(tiny("llama")) == budget.Costs(
        2 * (blocks * block + hidden * vocabulary), 2 * blocks * kv * head_dim
    )
