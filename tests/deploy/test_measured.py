"""What is measured of a model for a budget: files, the memory of a process, and the time of a token."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.artifact import write_model
from compress.errors import FoldawayError
from compress.methods import METHODS, method_config
from compress.surgery import clone
from deploy import measured
from deploy.measured import Stream, latencies, made_up, points_of_line, resident
from deploy.ruler import size_of
from tests.conftest import CONTEXT, byte_tokenizer, tiny


def ragged() -> PreTrainedModel:
    model = tiny("llama")
    METHODS["blockpruner"].outline(model, 2, method_config("blockpruner", {"sparsity": 0.4}))
    return model


def shared() -> PreTrainedModel:
    model = tiny("llama")
    options = {"sparsity": 0.0, "keep_ends": 0, "held_out": 2, "batch": 2}
    METHODS["foldgpt"].outline(model, 4, method_config("foldgpt", options))
    return model


def check_filled(model: PreTrainedModel) -> None:
    stream = Stream(model, CONTEXT)
    stream.decode(stream.steps)
    assert stream._cache.get_seq_length() == CONTEXT
    held = sum(layer.keys.numel() + layer.values.numel() for layer in stream._cache.layers if not layer.is_sliding)
    full = sum(not layer.is_sliding for layer in stream._cache.layers)
    assert held == size_of(model).kv_per_token * CONTEXT * full / len(stream._cache.layers)


def test_a_cache_of_made_up_numbers_is_as_long_as_the_context(architecture: str) -> None:
    check_filled(tiny(architecture))


@pytest.mark.parametrize("made", [ragged, shared])
def test_a_cache_is_filled_where_blocks_differ_or_share(made: type) -> None:
    check_filled(made())


@pytest.mark.parametrize("context", [2, 3, 9, 10])
def test_a_short_context_is_timed_as_well(context: int) -> None:
    stream = Stream(tiny("llama"), context)
    stream.decode(stream.steps)
    assert stream._cache.get_seq_length() == max(context, stream.steps + 1)


def test_models_take_turns_and_every_run_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    models = [tiny("llama"), tiny("gpt2")]

    def seconds(model: PreTrainedModel, context: int) -> float:
        order.append(models.index(model))
        return float(len(order))

    monkeypatch.setattr(measured, "seconds_per_token", seconds)
    assert latencies(models, 8, repeats=2) == [[3.0, 5.0], [4.0, 6.0]]
    assert order == [0, 1, 0, 1, 0, 1]


def test_a_line_is_drawn_through_the_model_and_two_smaller_ones() -> None:
    model = tiny("llama")
    points, runs = points_of_line(model, 16)
    sizes = [size for size, _ in points]
    assert sizes[0] == size_of(model)
    assert [size.parts for size in sizes] == [10, 6, 10]
    assert sizes[2].read_per_token < sizes[0].read_per_token
    assert len(runs) == measured.LATENCY_REPEATS
    assert all(seconds > 0 for _, seconds in points)
    assert len(points_of_line(shared(), 16)[0]) == 2  # weights that are shared are not narrowed


def test_a_model_is_timed_without_its_weights(dense: Path) -> None:
    model = made_up(str(dense))
    assert size_of(model) == size_of(tiny("llama"))
    assert torch.isfinite(model(input_ids=torch.zeros((1, 4), dtype=torch.int64)).logits).all()
    twin: PreTrainedModel = clone(model)
    assert len(latencies([model, twin], 8, repeats=1)) == 2


def test_what_a_process_holds_is_weights_and_cache(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=2,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        vocab_size=259,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config)
    write_model(model, byte_tokenizer(), tmp_path / "model")
    size = size_of(model)
    counted = 4 * (size.parameters + 4096 * size.kv_per_token)
    (held,), peak = resident(tmp_path / "model", 4096, repeats=1)
    assert counted < held < counted + 20_000_000  # what computing needs is in it
    assert peak >= held


def test_a_process_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: out of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FoldawayError, match="the process said: RuntimeError: out of memory"):
        resident(tmp_path, 8, repeats=1)
