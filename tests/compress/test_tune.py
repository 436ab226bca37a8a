"""Calibration of deltas: inputs of matrices and scores against plain loops, and a search that finds no worse than its
ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.delta.apply import apply
from compress.delta.checkpoint import Checkpoint, roles_of
from compress.delta.pack import Storage, pack
from compress.delta.package import Package
from compress.delta.tune import ETAS, label_score, matrix_inputs, output_score, put_pruned, tuned
from compress.finetune import Example
from compress.methods import darex
from compress.methods.darex import DarexConfig
from compress.result import Run
from compress.sources import load_weights
from tests.conftest import byte_tokenizer, tiny, token_rows

ROWS = token_rows(rows=2, length=20).tokens
EXAMPLES = [Example("one and two are", " three"), Example("", "four"), Example("five", " and <eos>")]


def noisy(architecture: str, scale: float = 0.02, seed: int = 1) -> PreTrainedModel:
    """A fine-tune: the tiny model and a little noise."""
    model, generator = tiny(architecture), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def folders(
    folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, scale: float = 0.02
) -> tuple[Checkpoint, Checkpoint]:
    """A base and its fine-tune."""
    for name, model in (("base", tiny(architecture)), ("tuned", noisy(architecture, scale))):
        model.to(dtype).save_pretrained(folder / name)
    return Checkpoint(folder / "base"), Checkpoint(folder / "tuned")


def live(checkpoint: Checkpoint) -> PreTrainedModel:
    return load_weights(AutoModelForCausalLM, str(checkpoint.folder), dtype=None, local_files_only=True)


def matrices_of(checkpoint: Checkpoint) -> list[str]:
    return [name for name in roles_of(checkpoint.folder).matrices if name in checkpoint.names]


# --- What enters the matrices


def test_inputs_of_matrices_are_what_a_hook_sees(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    names = matrices_of(Checkpoint(tmp_path))
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: seen[name].append(args[0].flatten(0, -2).clone())
        )
        for name, module in modules.items()
    ]
    for row in ROWS:
        model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    told: list[tuple[int, int]] = []
    found = matrix_inputs(model, names, ROWS, Run(progress=lambda what, done, total: told.append((done, total))))
    assert set(found) == set(names)
    for name in names:
        assert torch.equal(found[name], torch.cat(seen[name])), name
        assert found[name].shape[0] == ROWS.numel()
    assert told == [(1, 2), (2, 2)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_matrices_that_read_the_same_tensor_share_one(tmp_path: Path) -> None:
    model = tiny("llama")
    parts = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    names = [f"model.layers.{block}.{part}.weight" for block in (0, 1) for part in parts]
    found = list(matrix_inputs(model, names, ROWS, Run()).values())
    for q, k, v, o, gate, up in (found[:6], found[6:]):
        assert q is k is v
        assert gate is up
        assert len({id(q), id(o), id(gate)}) == 3
    assert len({id(tensor) for tensor in found}) == 6


def test_hooks_are_taken_out_when_the_model_fails() -> None:
    model = tiny("llama")
    with pytest.raises(IndexError):
        matrix_inputs(model, ["model.layers.0.mlp.up_proj.weight"], ROWS + 1000, Run())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- Scores


def test_the_output_score_is_zero_for_the_fine_tune_and_falls_with_distance() -> None:
    score = output_score(noisy("llama"), ROWS)
    assert score(noisy("llama")) == 0
    near, far = score(noisy("llama", 0.02, seed=2)), score(noisy("llama", 0.1, seed=2))
    assert far < near < 0


def test_the_output_score_looks_at_the_five_logits_that_the_fine_tune_holds_highest() -> None:
    reference, other = noisy("llama"), tiny("llama")
    changes = []
    for row in ROWS:
        wanted, own = reference(input_ids=row[None]).logits[0], other(input_ids=row[None]).logits[0]
        for t in range(len(row)):
            places = sorted(range(wanted.shape[1]), key=lambda place: -float(wanted[t, place]))[:5]
            changes += [float(own[t, place] - wanted[t, place]) ** 2 for place in places]
    assert output_score(reference, ROWS)(other) == pytest.approx(-sum(changes) / len(changes), rel=1e-5)


def test_the_label_score_is_the_mean_log_likelihood_of_the_responses() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    found = []
    for example in EXAMPLES:
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
        response = tokenizer.encode(example.response.removesuffix("<eos>"), add_special_tokens=False)
        tokens = [*prompt, *response, tokenizer.eos_token_id]
        chances = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        found += [float(chances[t - 1, tokens[t]]) for t in range(max(1, len(prompt)), len(tokens))]
    assert label_score(tokenizer, EXAMPLES)(model) == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_the_label_score_cuts_examples_where_training_does() -> None:
    short = label_score(byte_tokenizer(), [Example("one and two are", " three")], max_length=18)
    same = label_score(byte_tokenizer(), [Example("one and two are", " th")], max_length=18)
    assert short(tiny("llama")) == same(tiny("llama"))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of the paper's bound with a twentieth of its points, which take the time of a search."""
    monkeypatch.setattr(darex, "Q_STEP", 20 * darex.Q_STEP)


# --- What a package would bring back, in a live model

WAYS = [
    (DarexConfig(p=0.9, rescale="dare"), Storage()),
    (DarexConfig(p=0.75, scheme="bernoulli", rescale="fixed", q=0.5), Storage(values="int4", scale="tensor")),
    (DarexConfig(p=0.9, rescale="least-squares"), Storage(values="sign", scale="row")),
    (DarexConfig(p=0.9, keep="wanda", rescale="least-squares", per_row=False), Storage(values="bf16")),
    (DarexConfig(p=0.98, keep="magnitude", rescale="none"), Storage()),
    (DarexConfig(p=0.9, rescale="paper-bound", eta=0.5), Storage()),
]


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.bfloat16), ("llama", torch.float32)]
)
def test_a_live_model_gets_the_weights_that_its_package_brings_back(
    architecture: str, dtype: torch.dtype, tmp_path: Path, coarse: None
) -> None:
    base, finetuned = folders(tmp_path, architecture, dtype)
    model = live(finetuned)
    names = matrices_of(finetuned)
    inputs = matrix_inputs(model, names, ROWS, Run())
    for number, (config, storage) in enumerate(WAYS):
        if architecture == "gpt2" and config.rescale == "paper-bound":
            continue  # its biases are another matter, see below
        put_pruned(model, base, finetuned, config, storage, inputs)
        # Opened anew: what is packed must not depend on what the search has done to its base.
        pack(
            Checkpoint(base.folder),
            Checkpoint(finetuned.folder),
            tmp_path / f"delta-{number}",
            config,
            storage,
            inputs=inputs.get,
        )
        apply(Package(tmp_path / f"delta-{number}"), Checkpoint(base.folder), tmp_path / f"applied-{number}")
        applied = load_file(tmp_path / f"applied-{number}" / "model.safetensors")
        for name, parameter in model.named_parameters():
            expected = applied[name] if name in names else finetuned.get(name)
            assert torch.equal(parameter, expected), (number, name)


def test_the_bound_counts_changes_of_biases_in_as_it_does_for_a_package(tmp_path: Path, coarse: None) -> None:
    base, finetuned = folders(tmp_path, "gpt2", scale=0.05)
    model, names = live(finetuned), matrices_of(finetuned)
    inputs = matrix_inputs(model, names, ROWS, Run())
    config = DarexConfig(p=0.9, rescale="paper-bound", eta=0.5)
    put_pruned(model, base, finetuned, config, Storage(), inputs)
    pack(base, finetuned, tmp_path / "delta", config, inputs=inputs.get)
    package = Package(tmp_path / "delta")
    for name in names:
        assert torch.equal(model.state_dict()[name], package.result(name, base.get(name))), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trying_a_candidate_leaves_base_and_fine_tune_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path, dtype=dtype)
    before = [{name: each.get(name).clone() for name in each.names} for each in (base, finetuned)]
    model = live(finetuned)
    put_pruned(model, base, finetuned, WAYS[0][0], Storage(), {})
    for each, kept in zip((base, finetuned), before, strict=True):
        assert all(torch.equal(each.get(name), tensor) for name, tensor in kept.items())
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    put_pruned(model, base, finetuned, WAYS[0][0], Storage(), {})
    assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())


# --- The search


def scored(
    score: Any, base: Checkpoint, finetuned: Checkpoint, config: DarexConfig, inputs: dict[str, Tensor]
) -> float:
    model = live(finetuned)
    put_pruned(model, Checkpoint(base.folder), Checkpoint(finetuned.folder), config, Storage(), inputs)
    found: float = score(model)
    return found


@pytest.mark.parametrize("labelled", [False, True])
def test_the_q_that_is_found_scores_no_worse_than_the_ends_of_its_range(labelled: bool, tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path)
    model = live(finetuned)
    score = label_score(byte_tokenizer(), EXAMPLES) if labelled else output_score(model, ROWS)
    told: list[tuple[int, int]] = []
    found = tuned(
        model,
        base,
        finetuned,
        DarexConfig(p=0.9, rescale="search", seed=3),
        Storage(),
        score,
        {},
        lambda what, done, total: told.append((done, total)),
    )
    assert (found.p, found.rescale, found.seed) == (0.9, "fixed", 3)
    assert found.q is not None
    assert 0.1 <= found.q <= 1
    best = scored(score, base, finetuned, found, {})
    for q in (0.1, 1.0):
        assert best >= scored(score, base, finetuned, DarexConfig(p=0.9, rescale="fixed", q=q, seed=3), {})
    assert told[-1] == (18, 18)
    assert all(done < 18 for done, _ in told[:-1])


def test_the_eta_that_is_found_scores_no_worse_than_the_ends_of_its_range(tmp_path: Path, coarse: None) -> None:
    base, finetuned = folders(tmp_path)
    model = live(finetuned)
    inputs = matrix_inputs(model, matrices_of(finetuned), ROWS, Run())
    score = output_score(model, ROWS)
    config = DarexConfig(p=0.95, rescale="paper-bound")
    found = tuned(model, base, finetuned, config, Storage(), score, inputs)
    assert (found.p, found.rescale, found.q) == (0.95, "paper-bound", None)
    assert found.eta is not None
    assert ETAS[0] <= found.eta <= ETAS[1]
    assert not found.needs_search
    best = scored(score, base, finetuned, found, inputs)
    for eta in ETAS:
        ends = DarexConfig(p=0.95, rescale="paper-bound", eta=eta)
        assert best >= scored(score, base, finetuned, ends, inputs)


def test_where_nothing_is_dropped_nothing_is_searched(tmp_path: Path) -> None:
    base, finetuned = folders(tmp_path)
    config = DarexConfig(p=0, rescale="search")
    found = tuned(live(finetuned), base, finetuned, config, Storage(), lambda model: pytest.fail("tried"), {})
    assert (found.rescale, found.q) == ("fixed", 1.0)
