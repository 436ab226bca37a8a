"""Advice on a delta: its numbers against a recount, its errors against a simulation, and where it leads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.delta.advise import DROPS, LARGE_DELTA, Advice, advise
from compress.delta.checkpoint import Checkpoint, roles_of
from compress.delta.pack import Storage, pack
from compress.delta.tune import matrix_inputs
from compress.errors import ConfigError
from compress.methods.darex import DarexConfig, factors, influence_ratio, kept_index, scattered
from compress.result import Run
from tests.compress.test_tune import ROWS, folders, live, matrices_of, noisy
from tests.conftest import V, tiny

SMALL, LARGE = 0.003, 0.03


def edited(
    folder: Path, scale: float = SMALL, rows: tuple[int, ...] = (), norms: bool = False, blocks: Any = "02"
) -> Any:
    """A base, and a fine-tune in which only some blocks, some rows of the embedding and maybe the norms changed."""
    base, model = tiny("llama"), noisy("llama", scale)
    ours = base.state_dict()
    for name, tensor in dict(model.named_parameters()).items():
        if name == "model.embed_tokens.weight":
            kept = torch.ones(len(tensor), dtype=torch.bool).index_fill_(0, torch.tensor(rows, dtype=torch.long), False)
            tensor[kept] = ours[name][kept]
        elif not (norms if tensor.dim() == 1 else name.split(".")[2] in blocks):
            tensor.copy_(ours[name])
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    model.to(torch.bfloat16).save_pretrained(folder / "tuned")
    return Checkpoint(folder / "base"), Checkpoint(folder / "tuned")


def seen_by(finetuned: Checkpoint) -> dict[str, Tensor]:
    return matrix_inputs(live(finetuned), matrices_of(finetuned), ROWS, Run())


# --- What is measured


def test_mean_magnitude_and_exact_zeros_are_those_of_a_recount(tmp_path: Path) -> None:
    base, finetuned = edited(tmp_path)
    advice = advise(base, finetuned)
    touched = [name for name in matrices_of(finetuned) if name.split(".")[2] in "02"]
    assert [matrix.name for matrix in advice.matrices] == sorted(touched)
    total, zeros, count = 0.0, 0, 0
    for matrix in advice.matrices:
        delta = finetuned.get(matrix.name).double() - base.get(matrix.name).double()
        assert matrix.parameters == delta.numel()
        assert matrix.mean_abs == pytest.approx(float(delta.abs().mean()), rel=1e-5)
        assert matrix.exact_zeros == pytest.approx(float((delta == 0).double().mean()), abs=1e-12)
        total, zeros, count = total + float(delta.abs().sum()), zeros + int((delta == 0).sum()), count + delta.numel()
    assert advice.mean_abs_delta == pytest.approx(total / count, rel=1e-5)
    assert advice.exact_zeros == pytest.approx(zeros / count)
    assert 0.01 < advice.exact_zeros < 0.9
    assert advice.influence_ratio is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 stores its matrices as (in, out)
def test_influence_ratios_are_those_of_the_inputs(architecture: str, tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path, architecture, scale=LARGE)
    inputs, transposed = seen_by(finetuned), roles_of(finetuned.folder).matrices
    advice = advise(base, finetuned, inputs.get)
    expected = []
    for matrix in advice.matrices:
        delta = (finetuned.get(matrix.name).float() - base.get(matrix.name).float()).double()
        delta = delta.T if transposed[matrix.name] else delta
        influences = inputs[matrix.name].double()[:, None, :] * delta[None]  # (T, out, in)
        ratio = float(influences.square().sum() / influences.sum(-1).square().sum())
        assert matrix.influence_ratio == pytest.approx(ratio, rel=1e-4)
        expected.append(ratio)
    assert advice.influence_ratio == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_rows_that_changed_are_counted(tmp_path: Path) -> None:
    advice = advise(*edited(tmp_path, LARGE, rows=(3, 10, 40)))
    assert advice.changed_rows == (3, V)
    assert not any("embedding rows" in reason for reason in advice.reasons)


def test_rows_that_are_new_are_counted_too(tmp_path: Path) -> None:
    base, model = tiny("llama"), noisy("llama", LARGE)
    model.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight)
    model.resize_token_embeddings(V + 6, mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    assert advise(Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "tuned")).changed_rows == (6, V + 6)


def test_many_rows_that_changed_are_a_reason_to_train_without_them(tmp_path: Path) -> None:
    advice = advise(*edited(tmp_path, LARGE, rows=tuple(range(100))))
    assert advice.changed_rows == (100, V)
    assert any("100 of 259 embedding rows" in reason for reason in advice.reasons)


def test_bytes_of_other_tensors_are_counted(tmp_path: Path) -> None:
    base, finetuned = edited(tmp_path, LARGE, norms=True)
    changed = [name for name in finetuned.names if finetuned.get(name).dim() == 1]
    assert advise(base, finetuned).other_bytes == sum(2 * finetuned.get(name).numel() for name in changed) > 0


@pytest.mark.parametrize("norms", [False, True])
def test_models_without_a_matrix_that_differs_are_refused(norms: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to prune"):
        advise(*edited(tmp_path, norms=norms, blocks=""))


def test_every_tensor_is_told_of(tmp_path: Path) -> None:
    base, finetuned = edited(tmp_path)
    told: list[tuple[int, int]] = []
    advise(base, finetuned, progress=lambda what, done, total: told.append((done, total)))
    count = len(finetuned.names)
    assert told == [(done, count) for done in range(1, count + 1)]


# --- What is foreseen


def calibrated(folder: Path, scale: float) -> Advice:
    base, finetuned = folders(folder, scale=scale)
    return advise(base, finetuned, seen_by(finetuned).get)


def test_errors_follow_from_the_influence_ratios(tmp_path: Path) -> None:
    advice = calibrated(tmp_path, LARGE)
    ratios = [matrix.influence_ratio or math.nan for matrix in advice.matrices]
    assert [row.p for row in advice.outlook] == list(DROPS)
    for row in advice.outlook:
        dare = [math.sqrt(row.p * ratio / (1 - row.p)) for ratio in ratios]
        best = [math.sqrt(row.p * ratio / (1 - row.p + row.p * ratio)) for ratio in ratios]
        assert row.dare_error == pytest.approx(sum(dare) / len(dare))
        assert row.best_error == pytest.approx(sum(best) / len(best))
        assert row.best_error is not None
        assert row.best_error < min(1, row.dare_error or 0)


def test_without_text_no_errors_are_foreseen(tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path)
    assert all((row.dare_error, row.best_error) == (None, None) for row in advise(base, finetuned).outlook)


@pytest.mark.parametrize(("rescale", "best"), [("dare", False), ("analytic-mse", True)])
def test_the_errors_foreseen_are_those_of_drawn_masks(rescale: Any, best: bool, tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path, scale=LARGE)
    name, p = "model.layers.1.mlp.down_proj.weight", 0.9
    inputs = seen_by(finetuned)[name]
    delta = finetuned.get(name).float() - base.get(name).float()
    wanted = inputs.float() @ delta.T
    squares = []
    for seed in range(300):
        config = DarexConfig(p=p, scheme="bernoulli", rescale=rescale, seed=seed)
        index = kept_index(name, delta, config)
        kept = scattered(index, delta.flatten()[index], delta.shape)
        found = inputs.float() @ (factors(delta, kept, config, inputs)[:, None] * kept).T
        squares.append(float((found - wanted).square().sum() / wanted.square().sum()))
    ratio = influence_ratio(delta, inputs)
    foreseen = p * ratio / (1 - p + (p * ratio if best else 0))
    assert sum(squares) / len(squares) == pytest.approx(foreseen, rel=0.03)


def test_the_bytes_foreseen_are_about_those_of_the_package(tmp_path: Path) -> None:
    base, finetuned = edited(tmp_path, LARGE, rows=(3, 10, 40), norms=True)
    advice = advise(base, finetuned)
    for row in advice.outlook:
        config = DarexConfig(p=row.p, rescale="dare")
        sizes = pack(base, finetuned, tmp_path / f"{row.p}", config, Storage(scale="tensor")).sizes
        made = sizes.values + sizes.positions + sizes.rows + sizes.dense
        assert row.bytes == pytest.approx(made, rel=0.06)
        assert sizes.scales == 4 * len(advice.matrices)


# --- What is recommended


@pytest.mark.parametrize(
    ("scale", "text", "labels", "options"),
    [
        (LARGE, False, False, {"p": 0.5, "keep": "magnitude", "rescale": "none"}),
        (LARGE, True, False, {"p": 0.5, "keep": "wanda", "rescale": "least-squares"}),
        (LARGE, True, True, {"p": 0.5, "keep": "wanda", "rescale": "least-squares"}),
        (SMALL, False, False, {"p": 0.95, "keep": "random", "rescale": "dare"}),
        (SMALL, True, False, {"p": 0.95, "keep": "random", "rescale": "dare"}),
        (SMALL, False, True, {"p": 0.95, "keep": "random", "rescale": "search"}),
        (SMALL, True, True, {"p": 0.95, "keep": "random", "rescale": "search"}),
    ],
)
def test_size_text_and_labels_decide(
    scale: float, text: bool, labels: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    base, finetuned = edited(tmp_path, scale)
    inputs = seen_by(finetuned) if text else {}
    advice = advise(base, finetuned, inputs.get, labels=labels)
    assert (advice.mean_abs_delta >= LARGE_DELTA) == (scale == LARGE)
    assert advice.options == {**options, "values": "int8"}
    config: dict[str, Any] = {name: value for name, value in advice.options.items() if name != "values"}
    assert DarexConfig(**config).needs_inputs <= text  # what is recommended can be done with what is there
    assert "large" in advice.reasons[0] if scale == LARGE else "small" in advice.reasons[0]
    assert all("\n" not in reason for reason in advice.reasons)
    assert "adamr-l2" in advice.reasons[-1]
