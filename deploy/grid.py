"""Shapes under a budget: all that a model may be cut to, counted by arithmetic, and those of them that are tried.

Of the shapes just below the budget the ones that are most unlike each other are tried.

Source: Muralidharan et al. 2024, section 2.4 (all shapes of a grid within 5 % of the budget, each judged).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from compress.arch import composite_of
from compress.decoder import Decoder
from compress.errors import ConfigError
from compress.methods import METHODS, method_config
from compress.options import check_share
from compress.shape import NAMES, Counter, Shape, has_words, heads_follow, shape_of
from compress.sizes import unit_of
from compress.surgery import without_weights
from deploy.ruler import Size
from deploy.search import Candidate, Source

NEAR = 0.05
"""The pool reaches so far below the budget (the paper's 5 %), and so much further each time it holds too few."""
STEPS = 8
"""Sizes between the largest cut and the whole, at least, where no step is given."""
MOST_SHAPES = 1_000_000


@dataclass(frozen=True)
class Space:
    """How far shapes may be cut, and how finely.

    Attributes:
        max_width_cut: largest share of channels, neurons and heads that may go.
        max_depth_cut: largest share of blocks that may go.
        hidden_step: channels from one size to the next; None: see `default_step`.
        neuron_step: likewise of the neurons of an FFN.
    """

    max_width_cut: float = 0.4
    max_depth_cut: float = 0.2
    hidden_step: int | None = None
    neuron_step: int | None = None

    def __post_init__(self) -> None:
        check_share("--max-width-cut", self.max_width_cut)
        check_share("--max-depth-cut", self.max_depth_cut)


def default_step(whole: int, cut: float, unit: int) -> int:
    """The largest unit, doubled as often as possible, that leaves `STEPS` steps between the largest cut and the whole.

    Args:
        whole: the size that there is.
        cut: largest share that may go.
        unit: what sizes must be multiples of.
    """
    most = whole * cut / STEPS / unit
    return unit * 2 ** math.floor(math.log2(most)) if most >= 1 else unit


def sizes(whole: int, cut: float, step: int) -> list[int]:
    """The whole size, and all smaller multiples of a step that leave at least ``1 - cut`` of it."""
    first = max(1, math.ceil(whole * (1 - cut) / step - 1e-9))
    return [*range(first * step, whole, step), whole]


class Grid(Source):
    """All shapes of a grid, counted by arithmetic.

    Args:
        method: whose options are sizes.
        options: of the user; a size among them is kept for all shapes.
        model: on the meta device.
        rows: calibration rows that there will be.
        space: how far and how finely to cut.
        predict: what to expect of a size.
        wanted: how many shapes are to be tried.

    Raises:
        ConfigError: a step or a size that cannot be cut to, or more than `MOST_SHAPES` shapes.
        UnsupportedArchitecture: the model's blocks differ.
    """

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        model: PreTrainedModel,
        rows: int,
        space: Space,
        predict: Callable[[Size], float],
        wanted: int,
    ) -> None:
        self.method, self.options, self.wanted = method, options, wanted
        config = method_config(method, options)
        METHODS[method].outline(without_weights(model), rows, config)  # refuses sizes that cannot be meant
        self.whole, counter, decoder = shape_of(model), Counter(model), Decoder(model)
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        words = 0 if head is None else head.weight.shape[0]
        self.candidates = []
        for shape in _shapes(decoder, self.whole, options, config.divisor, space):
            read = counter.of_blocks(shape) + words * shape.hidden_size
            size = Size(counter.parameters(shape), counter.kv_per_token(shape), read, 2 * shape.num_hidden_layers)
            cut = {name: getattr(shape, name) for name in NAMES if getattr(shape, name) != getattr(self.whole, name)}
            self.candidates.append(Candidate(method, {**options, **cut}, size, predict(size), shape))
        self.candidates.sort(key=_largest_first)
        self.enumerated, self.smallest = len(self.candidates), self.candidates[-1]
        self._places = _places([candidate.shape for candidate in self.candidates if candidate.shape is not None])

    def fitting(self, limit: float) -> int:
        return sum(candidate.predicted <= limit for candidate in self.candidates)

    def next(self, limit: float, taken: Sequence[Candidate], tried: Sequence[Candidate]) -> Candidate | None:
        """The largest first; then always the one that is farthest from all taken, among those just below the limit.

        Distance is that between the logarithms of the sizes, each divided by the range that the grid has of it.
        """
        known = {candidate.name for candidate in tried}
        left = [each for each in self.candidates if each.predicted <= limit and each.name not in known]
        pool = near(left, limit, self.wanted - len(taken))
        if not taken:
            return pool[0] if pool else None
        points = [self._places[candidate.shape] for candidate in taken]
        return max(pool, key=lambda each: _distance(self._places[each.shape], points), default=None)


def _shapes(decoder: Decoder, whole: Shape, options: Mapping[str, Any], divisor: int, space: Space) -> list[Shape]:
    """All combinations of the sizes that may be cut to, and that the config has words for."""
    cut, follow = space.max_width_cut, heads_follow(decoder)
    blocks = sizes(whole.num_hidden_layers, space.max_depth_cut, 1)
    neurons = _widths(decoder, whole, "intermediate_size", divisor, cut, space.neuron_step)
    heads = sizes(whole.num_attention_heads, cut, unit_of(decoder, "num_attention_heads", divisor))
    pairs = []
    for count in [whole.num_attention_heads] if follow else _pinned(options, "num_attention_heads", heads):
        hidden = _pinned(options, "hidden_size", _hidden(decoder, whole, count, divisor, space))
        pairs += [(width, width // decoder.head_dim if follow else count) for width in hidden]
    if follow and options.get("num_attention_heads") is not None:
        pairs = [pair for pair in pairs if pair[1] == options["num_attention_heads"]]
    pairs = [pair for pair in pairs if _words(decoder, whole, *pair)]
    blocks, neurons = _pinned(options, "num_hidden_layers", blocks), _pinned(options, "intermediate_size", neurons)
    if (count := len(blocks) * len(neurons) * len(pairs)) > MOST_SHAPES:
        raise ConfigError(
            f"{count:,} shapes are more than the {MOST_SHAPES:,} that are looked at: give larger --hidden-step and "
            "--neuron-step, or cut less"
        )
    return [Shape(b, width, n, count) for b, n, (width, count) in itertools.product(blocks, neurons, pairs)]


def _pinned(options: Mapping[str, Any], name: str, found: list[int]) -> list[int]:
    """The sizes of an axis, or the one that the user set."""
    return found if options.get(name) is None else [options[name]]


def _hidden(decoder: Decoder, whole: Shape, heads: int, divisor: int, space: Space) -> list[int]:
    """Hidden sizes for so many heads, of which some architectures want a multiple."""
    if composite_of(decoder.model.config) is not None:
        return [whole.hidden_size]
    free = heads_follow(decoder) or _words(decoder, whole, whole.hidden_size // heads * heads - 1, heads)
    multiple = 1 if free else heads
    return _widths(decoder, whole, "hidden_size", divisor, space.max_width_cut, space.hidden_step, multiple)


def _words(decoder: Decoder, whole: Shape, hidden: int, heads: int) -> bool:
    """Whether the architecture's config can say so many channels and heads."""
    return has_words(decoder, dataclasses.replace(whole, hidden_size=hidden, num_attention_heads=heads))


def _widths(
    decoder: Decoder, whole: Shape, name: str, divisor: int, cut: float, step: int | None, multiple: int = 1
) -> list[int]:
    """The sizes of one axis, of which only multiples of something may be meant."""
    unit, size = unit_of(decoder, name, divisor), getattr(whole, name)
    if step is None:
        return sizes(size, cut, default_step(size, cut, math.lcm(unit, multiple)))
    if step < 1 or step % unit:
        option = {"hidden_size": "--hidden-step", "intermediate_size": "--neuron-step"}[name]
        near_by = max(unit, step // unit * unit)
        raise ConfigError(f"{option} {step}: sizes of this model are multiples of {unit}; give for example {near_by}")
    return sizes(size, cut, step)


def _largest_first(candidate: Candidate) -> tuple[float, Any]:
    """Order by predicted value; where that is the same, deeper and wider first."""
    assert candidate.shape is not None
    return -candidate.predicted, tuple(-size for size in dataclasses.astuple(candidate.shape))


def near(left: Sequence[Candidate], limit: float, count: int) -> list[Candidate]:
    """Those just below a limit: within 5 % of it, or 10, and so on until there are so many; all where there are fewer.

    Args:
        left: candidates that fit.
        limit: on predicted values.
        count: how many are needed.
    """
    for place in range(1, math.ceil(1 / NEAR)):
        pool = [candidate for candidate in left if candidate.predicted >= (1 - place * NEAR) * limit]
        if len(pool) >= max(1, count):
            return pool
    return list(left)


def _places(shapes: Sequence[Shape]) -> dict[Shape | None, tuple[float, ...]]:
    """Where shapes lie: the logarithms of their sizes, each from 0 to 1 over all shapes."""
    logs = {shape: [math.log(size) for size in dataclasses.astuple(shape)] for shape in shapes}
    lows, highs = ([pick(axis) for axis in zip(*logs.values(), strict=True)] for pick in (min, max))
    return {
        shape: tuple((at - low) / ((high - low) or 1.0) for at, low, high in zip(point, lows, highs, strict=True))
        for shape, point in logs.items()
    }


def _distance(point: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> float:
    """How far a point is from the nearest of others; rounded, so that ties are ties on every machine."""
    return round(min(math.dist(point, other) for other in others), 9)
