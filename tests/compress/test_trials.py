"""Greedy removal: the same choices as a loop of full passes over clones, and nothing lost when a run is cut off."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compress import trials
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.evaluate import logits_of, perplexity
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.result import CompressedModel, Run
from compress.surgery import clone, drop_attention, drop_blocks, drop_ffn
from compress.trials import Part, remove_greedily
from tests.conftest import covering, tiny, token_rows
from tests.reference.two_ssp import Reference

ROWS = token_rows(2, 24)
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "ffn": ("ffn",),
    "block": ("block",),
    "mixed": ("attention", "ffn"),
}
# Three rounds or more for a llama of five blocks.
OPTIONS: dict[str, dict[str, Any]] = {
    "2ssp": {"sparsity": 0.6, "alpha": 1.0},
    "sleb": {"sparsity": 0.6, "rows": 2},
    "blockpruner": {"sparsity": 0.5},
}
GREEDY = sorted(OPTIONS)
STEPWISE = ["blockpruner", "sleb"]  # what they choose first does not depend on how much they remove

# --- the same loop again, with full passes


def choices(B: int, kinds: Sequence[str], count: int) -> Callable[[Sequence[Part]], list[Part]]:
    """All parts of some kinds may go, in no particular order, but for the last attention."""

    def candidates(gone: Sequence[Part]) -> list[Part]:
        left = [Part(b, kind) for kind in reversed(kinds) for b in reversed(range(B)) if Part(b, kind) not in gone]
        attending = [part for part in left if part.kind != "ffn"]
        return [part for part in left if part.kind == "ffn" or len(attending) > 1] if len(gone) < count else []

    return candidates


def without(model: PreTrainedModel, parts: Sequence[Part]) -> PreTrainedModel:
    """A clone of a dense model without some parts."""
    attentions = {part.block for part in parts if part.kind != "ffn"}
    ffns = {part.block for part in parts if part.kind != "attention"}
    cut = clone(model)
    drop_attention(cut, sorted(attentions - ffns))
    drop_ffn(cut, sorted(ffns - attentions))
    drop_blocks(cut, sorted(attentions & ffns))
    return cut


def naive(model: PreTrainedModel, candidates: Callable[[Sequence[Part]], list[Part]]) -> list[dict[Part, float]]:
    """The costs of every round; the cheapest part goes, the first of equals."""
    gone: list[Part] = []
    rounds = []
    while allowed := sorted(candidates(gone), key=lambda part: (part.block, part.kind)):
        costs = {part: perplexity(logits_of(without(model, [*gone, part])), ROWS.tokens).value for part in allowed}
        gone.append(min(allowed, key=lambda part: costs[part]))
        rounds.append(costs)
    return rounds


@covering("kinds", list(KINDS.values()))
def test_caching_changes_neither_what_goes_nor_its_perplexity(architecture: str, kinds: tuple[str, ...]) -> None:
    model, count = tiny(architecture), 6 if len(kinds) > 1 else 3
    candidates = choices(len(Decoder(model)), kinds, count)
    theirs = naive(model, candidates)
    cut = clone(model)
    removals = remove_greedily(cut, ROWS.tokens, candidates, Run(), "test", 1)
    assert len(removals.rounds) == count
    for ours, costs in zip(removals.rounds, theirs, strict=True):
        assert ours.costs == pytest.approx(costs, rel=1e-5)
        assert ours.part == min(costs, key=lambda part: costs[part])
    masked = without(model, [each.part for each in removals.rounds])
    assert layout_of(cut) == layout_of(masked)
    assert torch.equal(logits_of(cut)(ROWS.tokens), logits_of(masked)(ROWS.tokens))


def test_the_perplexities_told_are_those_of_the_model_after_each_removal(architecture: str) -> None:
    model = tiny(architecture)
    candidates = choices(len(Decoder(model)), KINDS["mixed"], 4)
    removals = remove_greedily(clone(model), ROWS.tokens, candidates, Run(), "test", 1)
    gone = [each.part for each in removals.rounds]
    seen = [perplexity(logits_of(without(model, gone[: n + 1])), ROWS.tokens).value for n in range(len(gone))]
    assert removals.perplexities == pytest.approx(seen, rel=1e-5)


# --- ties, and costs that are no numbers


def idle(model_type: str) -> PreTrainedModel:
    """A model in which no attention and no FFN adds anything."""
    masked = Reference(tiny(model_type))
    for b, block in enumerate(masked.blocks):
        masked.zero_attention(b)
        for parameter in block.get_submodule(masked.names.last).parameters():
            parameter.zero_()
    model: PreTrainedModel = masked.model.float()
    return model


@covering("kinds", list(KINDS.values()))
def test_ties_go_to_the_first_part(architecture: str, kinds: tuple[str, ...]) -> None:
    model = idle(architecture)
    candidates = choices(len(Decoder(model)), kinds, 3)
    removals = remove_greedily(model, ROWS.tokens, candidates, Run(), "test", 1)
    assert all(len(set(each.costs.values())) == 1 for each in removals.rounds)
    parts = [Part(b, kind) for b in range(3) for kind in kinds]
    assert [each.part for each in removals.rounds] == parts[:3]


def costs_replaced(values: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let some trials, counted from 0, cost something else."""
    right, calls = trials.cross_entropy, iter(range(1000))

    def replaced(*args: Any) -> float:
        return values.get(next(calls), right(*args))

    monkeypatch.setattr(trials, "cross_entropy", replaced)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [[0], [0, 1], [0, 1, 2, 3], [4], [1, 2, 3, 4]])
def test_a_cost_that_is_not_a_number_never_wins(
    where: list[int], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs_replaced(dict.fromkeys(where, value), monkeypatch)
    row = ROWS.tokens[:1]
    removals = remove_greedily(tiny("llama"), row, choices(5, ("attention",), 1), Run(), "test", 1)
    (only,) = removals.rounds
    assert only.part.block not in where
    assert math.isfinite(only.costs[only.part])
    assert only.costs[only.part] == min(cost for part, cost in only.costs.items() if part.block not in where)


def test_the_best_part_does_not_win_when_its_cost_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    row, candidates = ROWS.tokens[:1], choices(5, ("attention",), 1)
    best = remove_greedily(tiny("llama"), row, candidates, Run(), "test", 1).rounds[0].part
    costs_replaced({best.block: math.nan}, monkeypatch)
    found = remove_greedily(tiny("llama"), row, candidates, Run(), "test", 1).rounds[0]
    assert found.part != best
    assert math.isnan(found.costs[best])


def test_when_no_cost_is_a_number_the_first_part_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    costs_replaced(dict.fromkeys(range(100), math.nan), monkeypatch)
    removals = remove_greedily(tiny("llama"), ROWS.tokens, choices(5, ("ffn",), 2), Run(), "test", 1)
    assert removals.blocks("ffn") == [0, 1]


# --- a run that goes on from another


class Trials:
    """Counts the trials of a run, and may end it in the middle."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.count, self.stop_after = 0, stop_after

    def __call__(self, what: str, done: int, total: int) -> None:
        if not what.endswith("trial removals") or done == total:
            return
        self.count += 1
        if self.count == self.stop_after:
            raise KeyboardInterrupt


def run(
    method: str,
    scratch: Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    calibration: TokenRows = ROWS,
    stop_after: int | None = None,
    **options: Any,
) -> tuple[CompressedModel, int]:
    """A result, and the trials it took."""
    told = Trials(stop_after)
    config = method_config(method, {**OPTIONS[method], **options})
    given = tiny("llama") if model is None else model
    return METHODS[method].compress(given, calibration, config, Run(told, scratch=scratch)), told.count


def assert_same(one: CompressedModel, other: CompressedModel) -> None:
    assert json.dumps(one.report.numbers) == json.dumps(other.report.numbers)
    assert one.report.config == other.report.config
    assert layout_of(one.model) == layout_of(other.model)
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def traces(scratch: Path) -> list[Path]:
    return sorted(scratch.iterdir()) if scratch.exists() else []


def interrupt(method: str, scratch: Path, stop_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(method, scratch, stop_after=stop_after)


# Trials until the middle of the third round.
LATER = {"2ssp": 5 + 4 + 2, "sleb": 5 + 4 + 2, "blockpruner": 10 + 9 + 3}


@pytest.mark.parametrize("method", GREEDY)
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(method: str, tmp_path: Path) -> None:
    whole, needed = run(method)
    interrupt(method, tmp_path / "scratch", LATER[method])
    assert len(traces(tmp_path / "scratch")) == 1
    resumed, more = run(method, tmp_path / "scratch")
    assert_same(resumed, whole)
    assert more == needed - {"2ssp": 9, "sleb": 9, "blockpruner": 19}[method] > 0
    assert resumed.report.resumed_seconds > 0
    assert whole.report.resumed_seconds == 0


@pytest.mark.parametrize("method", GREEDY)
def test_a_run_interrupted_again_and_again_still_ends(method: str, tmp_path: Path) -> None:
    whole, _ = run(method)
    for _ in range(20):
        try:
            resumed, _ = run(method, tmp_path, stop_after=11)
            break
        except KeyboardInterrupt:
            continue
    else:
        pytest.fail("20 runs of up to 11 trials did not end")
    assert_same(resumed, whole)


@pytest.mark.parametrize("method", GREEDY)
def test_a_run_interrupted_in_its_first_round_leaves_nothing_to_go_on_from(method: str, tmp_path: Path) -> None:
    interrupt(method, tmp_path / "scratch", 3)
    assert traces(tmp_path / "scratch") == []
    whole, needed = run(method)
    again, took = run(method, tmp_path / "scratch")
    assert_same(again, whole)
    assert took == needed
    assert again.report.resumed_seconds == 0


@pytest.mark.parametrize("method", GREEDY)
def test_the_same_run_again_makes_no_trial(method: str, tmp_path: Path) -> None:
    first, _ = run(method, tmp_path)
    before = [file.read_bytes() for file in traces(tmp_path)]
    again, took = run(method, tmp_path)
    assert_same(again, first)
    assert took == 0
    assert again.report.resumed_seconds > 0 == first.report.resumed_seconds
    assert [file.read_bytes() for file in traces(tmp_path)] == before


@pytest.mark.parametrize("method", STEPWISE)
def test_a_stronger_removal_goes_on_from_a_milder_one(method: str, tmp_path: Path) -> None:
    whole, needed = run(method, sparsity=0.6)
    _, first = run(method, tmp_path, sparsity=0.4)
    stronger, more = run(method, tmp_path, sparsity=0.6)
    assert_same(stronger, whole)
    assert 0 < first < needed
    assert more == needed - first
    assert len(traces(tmp_path)) == 1


@pytest.mark.parametrize("method", STEPWISE)
def test_a_milder_removal_needs_no_trial_after_a_stronger_one_and_leaves_its_trace(method: str, tmp_path: Path) -> None:
    whole, _ = run(method, sparsity=0.4)
    run(method, tmp_path, sparsity=0.6)
    milder, took = run(method, tmp_path, sparsity=0.4)
    assert_same(milder, whole)
    assert took == 0
    assert run(method, tmp_path, sparsity=0.6)[1] == 0


# --- what a run must not go on from


def other_weights(name: str) -> PreTrainedModel:
    """The model with another value in one parameter."""
    model = tiny("llama")
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.mul_(1.5)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.4.self_attn.v_proj.weight",
        "model.layers.4.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("method", STEPWISE)
def test_another_model_does_not_take_over_a_trace(method: str, name: str, tmp_path: Path) -> None:
    run(method, tmp_path)
    expected, needed = run(method, model=other_weights(name))
    found, took = run(method, tmp_path, model=other_weights(name))
    assert took == needed
    assert found.report.resumed_seconds == 0
    assert_same(found, expected)


@pytest.mark.parametrize("method", STEPWISE)
def test_another_head_does_not_take_over_a_trace(method: str, tmp_path: Path) -> None:
    run(method, tmp_path, model=tiny("mistral"))
    other = tiny("mistral")
    with torch.no_grad():
        other.get_parameter("lm_head.weight").neg_()
    expected, needed = run(method, model=other)
    found, took = run(method, tmp_path, model=other)
    assert took == needed
    assert_same(found, expected)


@pytest.mark.parametrize("method", STEPWISE)
@pytest.mark.parametrize(
    "rows", [token_rows(2, 24, seed=5), token_rows(2, 23), token_rows(3, 16)], ids=["others", "shorter", "reshaped"]
)
def test_other_rows_do_not_take_over_a_trace(method: str, rows: TokenRows, tmp_path: Path) -> None:
    run(method, tmp_path, rows=2)
    expected, needed = run(method, calibration=rows, rows=2)
    found, took = run(method, tmp_path, calibration=rows, rows=2)
    assert took == needed
    assert found.report.resumed_seconds == 0
    assert_same(found, expected)


@pytest.mark.parametrize("method", STEPWISE)
def test_more_of_the_same_rows_do_not_take_over_a_trace(method: str, tmp_path: Path) -> None:
    run(method, tmp_path, rows=1)
    expected, needed = run(method, rows=2)
    found, took = run(method, tmp_path, rows=2)
    assert took == needed
    assert_same(found, expected)


def test_another_method_does_not_take_over_a_trace(tmp_path: Path) -> None:
    for method in GREEDY:
        fresh, needed = run(method)
        found, took = run(method, tmp_path)
        assert took == needed
        assert_same(found, fresh)
    assert len(traces(tmp_path)) == len(GREEDY)


def test_the_same_candidates_under_another_name_do_not_take_over_a_trace(tmp_path: Path) -> None:
    candidates = choices(5, ("block",), 2)
    for name in ("one", "other"):
        removals = remove_greedily(tiny("llama"), ROWS.tokens, candidates, Run(scratch=tmp_path), name, 1)
        assert removals.resumed_seconds == 0


def test_other_candidates_do_not_take_over_a_trace(tmp_path: Path) -> None:
    for kinds in KINDS.values():
        candidates = choices(5, kinds, 2)
        removals = remove_greedily(tiny("llama"), ROWS.tokens, candidates, Run(scratch=tmp_path), "test", 1)
        fresh = remove_greedily(tiny("llama"), ROWS.tokens, candidates, Run(), "test", 1)
        assert removals.resumed_seconds == 0
        assert [(each.part, each.costs) for each in removals.rounds] == [
            (each.part, each.costs) for each in fresh.rounds
        ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff\xfe" + data,
        lambda data: b"null\n",
        lambda data: b"{}\n",
        lambda data: b"[1, 2]\n",
        lambda data: b'[{"part": [0]}]\n',
        lambda data: data.replace(b'"costs"', b'"prices"'),
    ],
    ids=["empty", "cut short", "not text", "null", "object", "numbers", "incomplete", "another key"],
)
def test_a_trace_that_cannot_be_read_is_as_good_as_none(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    whole, needed = run("sleb", tmp_path)
    (trace,) = traces(tmp_path)
    good = trace.read_bytes()
    trace.write_bytes(spoil(good))
    again, took = run("sleb", tmp_path)
    assert_same(again, whole)
    assert took == needed
    assert run("sleb", tmp_path)[1] == 0  # the trace has been written anew


@pytest.mark.parametrize("method", GREEDY)
def test_nothing_is_written_without_a_scratch_folder(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a file was written")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trials, "write_file", refuse)
    run(method)
    assert list(tmp_path.iterdir()) == []
