"""What a search may try: shapes and sparsities, their values by counting, and which of them are taken."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from compress import budget
from compress.artifact import write_model
from compress.decoder import Decoder
from compress.errors import ConfigError
from compress.methods import METHODS, method_config
from compress.shape import Shape, heads_follow, resize, shape_of
from compress.surgery import without_weights
from deploy.grid import Grid, Space, default_step, near, sizes
from deploy.measured import header_bytes, stored_bytes
from deploy.ruler import Ruler, Size, Target, fit_line, size_of
from deploy.search import Candidate, Mildest, method_kind
from tests.conftest import byte_tokenizer, tiny

PARAMETERS = Target("parameters", 1.0)


def parameters(size: Size) -> float:
    return float(size.parameters)


def grid(model: PreTrainedModel, wanted: int = 4, space: Space | None = None, **options: object) -> Grid:
    return Grid("minitron", options, without_weights(model), 4, space or Space(), parameters, wanted)


def taken(source: Grid | Mildest, limit: float) -> list[Candidate]:
    found: list[Candidate] = []
    while len(found) < source.wanted and (candidate := source.next(limit, found, found)):
        found.append(candidate)
    return found


def test_sizes_are_multiples_of_the_step_down_to_the_largest_cut_and_the_whole() -> None:
    assert sizes(100, 0.4, 16) == [64, 80, 96, 100]
    assert sizes(64, 0.25, 16) == [48, 64]
    assert sizes(30, 0.2, 1) == [24, 25, 26, 27, 28, 29, 30]
    assert sizes(8, 0.9, 16) == [8]
    assert sizes(64, 0.0, 8) == [64]


@pytest.mark.parametrize(
    ("whole", "unit", "step"), [(576, 8, 16), (1536, 8, 64), (4096, 8, 128), (14336, 8, 512), (64, 8, 8), (576, 72, 72)]
)
def test_a_step_is_as_large_as_it_can_be_with_eight_of_them(whole: int, unit: int, step: int) -> None:
    assert default_step(whole, 0.4, unit) == step
    assert step == unit or whole * 0.4 / step >= 8


def test_a_grid_counts_what_cutting_gives(architecture: str) -> None:
    model = tiny(architecture)
    source = grid(model)
    whole, decoder = shape_of(model), Decoder(model)
    assert source.enumerated == len({candidate.name for candidate in source.candidates}) > 15
    for candidate in source.candidates[:: source.enumerated // 5]:
        assert candidate.shape is not None
        trial = without_weights(model)
        METHODS["minitron"].outline(trial, 4, method_config("minitron", candidate.options))
        assert shape_of(trial) == candidate.shape
        assert candidate.size.parameters == budget.count(trial).total
        counted = size_of(trial)
        assert (candidate.size.kv_per_token, candidate.size.parts) == (counted.kv_per_token, counted.parts)
        # Norms and biases are counted as well, which is little beside matrices of some size.
        assert candidate.size.read_per_token == pytest.approx(counted.read_per_token, rel=0.05)
        assert candidate.shape.num_hidden_layers >= 0.8 * whole.num_hidden_layers
        for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
            assert getattr(candidate.shape, name) >= 0.6 * getattr(whole, name)
        if heads_follow(decoder):
            assert candidate.shape.hidden_size == candidate.shape.num_attention_heads * decoder.head_dim


def test_every_shape_of_a_grid_can_be_written_and_read(architecture: str, tmp_path: Path) -> None:
    pairs: dict[tuple[int, int], Shape] = {}
    for candidate in grid(tiny(architecture), space=Space(max_width_cut=0.6)).candidates:
        assert candidate.shape is not None
        pairs.setdefault((candidate.shape.hidden_size, candidate.shape.num_attention_heads), candidate.shape)
    assert len(pairs) > 1
    for place, shape in enumerate(list(pairs.values())[-3:]):
        model = tiny(architecture)
        resize(model, shape)
        model.save_pretrained(tmp_path / str(place))
        assert shape_of(type(model).from_pretrained(tmp_path / str(place))) == shape


def test_where_a_config_wants_a_multiple_of_the_heads_the_grid_has_those() -> None:
    source = grid(tiny("llama"), space=Space(max_width_cut=0.5, hidden_step=8))
    shapes = [candidate.shape for candidate in source.candidates if candidate.shape is not None]
    assert {shape.num_attention_heads for shape in shapes} == {2, 4}
    assert all(shape.hidden_size % shape.num_attention_heads == 0 for shape in shapes)


def test_the_largest_that_fits_is_taken_first_and_then_what_is_unlike_it() -> None:
    source = grid(tiny("llama"), wanted=4)
    limit = 0.75 * source.candidates[0].predicted
    found = taken(source, limit)
    fitting = [candidate for candidate in source.candidates if candidate.predicted <= limit]
    assert source.fitting(limit) == len(fitting)
    assert found[0] == fitting[0]
    assert len({candidate.name for candidate in found}) == 4
    pool = near(fitting, limit, 4)
    assert set(map(name_of, found)) <= set(map(name_of, pool))

    def spread(chosen: list[Candidate]) -> float:
        logs = [[math.log(size) for size in dataclasses.astuple(c.shape)] for c in chosen if c.shape is not None]
        return min(math.dist(a, b) for a, b in itertools.combinations(logs, 2))

    assert spread(found) >= spread(pool[:4])
    assert taken(grid(tiny("llama"), wanted=4), limit) == found


def test_what_is_farthest_is_measured_in_ranges_of_the_grid() -> None:
    """Blocks from 4 to 5 are as far as channels from 40 to 64, and neurons from 48 to 80."""
    source = grid(tiny("llama"), wanted=40)
    found = taken(source, math.inf)
    assert len({candidate.name for candidate in found}) == len(found) == 40
    assert [candidate.name for candidate in found[:2]] == ["minitron-5x64x80x4", "minitron-4x40x48x4"]

    def place(candidate: Candidate) -> list[float]:
        assert candidate.shape is not None
        blocks, channels, neurons, _ = dataclasses.astuple(candidate.shape)
        return [blocks - 4, math.log(channels / 40) / math.log(64 / 40), math.log(neurons / 48) / math.log(80 / 48)]

    for count in range(1, 12):
        before = [place(candidate) for candidate in found[:count]]
        farthest = max(min(math.dist(place(each), other) for other in before) for each in source.candidates)
        assert min(math.dist(place(found[count]), other) for other in before) == pytest.approx(farthest)


def name_of(candidate: Candidate) -> str:
    return candidate.name


def test_the_pool_reaches_as_far_down_as_it_must() -> None:
    def candidate(value: float) -> Candidate:
        return Candidate("minitron", {}, Size(round(value), 0, 0, 0), value, Shape(1, round(value), 1, 1))

    left = [candidate(value) for value in (99, 97, 94, 92, 88, 40)]
    assert [each.predicted for each in near(left, 100, 1)] == [99, 97]
    assert [each.predicted for each in near(left, 100, 3)] == [99, 97, 94, 92]
    assert [each.predicted for each in near(left, 100, 6)] == [99, 97, 94, 92, 88, 40]
    assert len(near(left, 100, 9)) == 6
    assert near([], 100, 2) == []


def test_a_size_that_the_user_sets_stays() -> None:
    source = grid(tiny("llama"), num_hidden_layers=5, hidden_size=48)
    assert {(c.shape.num_hidden_layers, c.shape.hidden_size) for c in source.candidates if c.shape} == {(5, 48)}
    both = grid(tiny("gpt2"), num_attention_heads=3)
    assert {(c.shape.hidden_size, c.shape.num_attention_heads) for c in both.candidates if c.shape} == {(48, 3)}


@pytest.mark.parametrize(
    ("options", "space", "word"),
    [
        ({"hidden_size": 50}, Space(), "the nearest are"),
        ({"divisor": 1, "hidden_size": 62}, Space(), "the nearest are 60 and 64"),
        ({}, Space(hidden_step=12), "multiples of 8; give for example 8"),
        ({}, Space(neuron_step=4), "--neuron-step 4"),
        ({}, Space(hidden_step=0), "--hidden-step 0"),
    ],
)
def test_sizes_and_steps_that_cannot_be_cut_to_are_refused(options: dict[str, object], space: Space, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        grid(tiny("llama"), space=space, **options)


def test_too_many_shapes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.grid.MOST_SHAPES", 30)
    with pytest.raises(ConfigError, match="40 shapes are more than"):
        grid(tiny("llama"))


# --- Sparsities

BY_SPARSITY = [name for name in METHODS if name not in ("minitron", "distill")]
ROWS = 8
"""Enough for a batch of those that learn, and what they hold out."""
LIGHT = {"fusegpt": {"window": 2}, "foldgpt": {"keep_ends": 0, "held_out": 2, "batch": 2}}


@pytest.mark.parametrize("method", BY_SPARSITY)
def test_the_mildest_sparsity_that_fits_is_found(method: str) -> None:
    model = without_weights(tiny("llama"))
    options, limit = LIGHT.get(method, {}), 0.6 * budget.count(model).total

    def source() -> Mildest:
        return Mildest(method, options, model, ROWS, parameters)

    found = source().next(limit, [], [])
    assert found is not None
    assert found.predicted <= limit
    trial = without_weights(model)
    METHODS[method].outline(trial, ROWS, method_config(method, found.options))
    assert budget.count(trial).total == found.size.parameters
    if found.options["sparsity"] > 0:
        milder = {**found.options, "sparsity": round(found.options["sparsity"] - 0.005, 3)}
        trial = without_weights(model)
        METHODS[method].outline(trial, ROWS, method_config(method, milder))
        assert budget.count(trial).total > limit
    further = source().next(limit, [], [found])
    assert further is not None
    assert further.options["sparsity"] > found.options["sparsity"]
    assert source().next(limit, [found], [found]) is None


def test_what_cannot_be_reached_is_said_with_the_least_that_can() -> None:
    source = Mildest("wanda", {}, without_weights(tiny("llama")), ROWS, parameters)
    assert source.next(1000, [], []) is None
    assert source.fitting(1000) == 0
    assert source.smallest is not None
    assert 1000 < source.smallest.predicted < 0.6 * 155_520


def test_an_option_that_cannot_be_meant_is_no_matter_of_sparsity() -> None:
    with pytest.raises(ConfigError, match="batch"):
        Mildest("fusegpt", {"window": 2}, without_weights(tiny("llama")), 5, parameters)


def test_methods_that_make_nothing_smaller_have_no_candidates() -> None:
    assert method_kind("minitron") == "grid"
    assert {method_kind(name) for name in BY_SPARSITY} == {"sparsity"}
    with pytest.raises(ConfigError, match="distill makes no model smaller: give --methods some of 2ssp, "):
        method_kind("distill")


# --- Values


def test_values_follow_from_counts() -> None:
    size, ruler = Size(1000, 10, 900, 8), Ruler(2, 64, 0.001, 1e-6)
    assert ruler.predict(Target("parameters", 1.0), size) == 1000
    assert ruler.predict(Target("bytes", 1.0), size) == 2064
    assert ruler.predict(Target("memory", 1.0, 30), size) == 2 * (1000 + 300) + 64
    assert ruler.predict(Target("latency", 1.0, 30), size) == pytest.approx(0.008 + 2 * (900 + 300) * 1e-6)


@pytest.mark.parametrize("wanted", [(0.001, 1e-8), (0.0, 2e-8), (0.002, 0.0)])
def test_a_line_through_latencies_finds_what_they_were_made_of(wanted: tuple[float, float]) -> None:
    target, ruler = Target("latency", 1.0, 100), Ruler(4)
    made_of = dataclasses.replace(ruler, seconds_per_part=wanted[0], seconds_per_byte=wanted[1])
    points = [Size(0, 500, 10**8, 60), Size(0, 250, 5 * 10**7, 30), Size(0, 500, 7 * 10**7, 60)]
    found = fit_line(target, ruler, [(size, made_of.predict(target, size)) for size in points])
    assert found.seconds_per_part == pytest.approx(wanted[0], abs=1e-9)
    assert found.seconds_per_byte == pytest.approx(wanted[1], abs=1e-13)


def test_a_line_never_falls() -> None:
    target, ruler = Target("latency", 1.0, 1), Ruler(4)
    points = [(Size(0, 0, 10**8, 60), 0.1), (Size(0, 0, 5 * 10**7, 30), 0.02), (Size(0, 0, 7 * 10**7, 60), 0.03)]
    found = fit_line(target, ruler, points)
    assert found.seconds_per_part >= 0
    assert found.seconds_per_byte >= 0
    assert found.predict(target, points[0][0]) > 0


@pytest.mark.parametrize("shrink", [lambda model: None, lambda model: resize(model, Shape(4, 48, 56, 4))])
def test_no_file_has_a_longer_header_than_is_counted_on(
    shrink: Callable[[PreTrainedModel], None], tmp_path: Path
) -> None:
    dense, model = tiny("llama"), tiny("llama")
    shrink(model)
    write_model(model, byte_tokenizer(), tmp_path)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights < stored_bytes(tmp_path) <= weights + header_bytes(dense) < weights + 8000


def test_a_shared_model_reads_more_than_it_stores() -> None:
    model = without_weights(tiny("llama"))
    whole = size_of(model)
    METHODS["foldgpt"].outline(model, ROWS, method_config("foldgpt", {"sparsity": 0.0, **LIGHT["foldgpt"]}))
    shared = size_of(model)
    assert shared.parameters < whole.parameters
    assert (shared.read_per_token, shared.parts) == (whole.read_per_token, whole.parts)
