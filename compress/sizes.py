"""From what is asked of a model's sizes to the shape that it is cut to: checks, and solving for a share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from compress.arch import composite_of
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError
from compress.shape import Counter, Shape, has_words, heads_follow, shape_of

CUTS = {
    "width": ("hidden_size", "intermediate_size"),
    "ffn": ("intermediate_size",),
    "hidden": ("hidden_size",),
    "depth": ("num_hidden_layers",),
}
"""What a sparsity may be taken from -> the sizes that it finds."""


def target_shape(model: PreTrainedModel, sizes: Mapping[str, int], sparsity: float, cut: str, divisor: int) -> Shape:
    """The shape to cut to: sizes that are given, and then what a sparsity asks of the others.

    Args:
        model: of a plain layout, on any device.
        sizes: that are given, by their names in `Shape`.
        sparsity: share of the blocks' parameters to remove in all, in [0, 1); 0: what the sizes give.
        cut: what gives way to it, a name in `CUTS`.
        divisor: channels and neurons that change become multiples of it.

    Raises:
        BudgetError: the sparsity cannot be reached.
        ConfigError: a size that the model cannot be cut to.
        UnsupportedArchitecture: the model's blocks differ or share weights.
    """
    start, decoder = shape_of(model), Decoder(model)
    given = _with_heads(decoder, dict(sizes))
    for name, size in given.items():
        _check_size(decoder, start, name, size, divisor)
    shape = dataclasses.replace(start, **given)
    if not has_words(decoder, shape):
        raise ConfigError(
            f"hidden_size={shape.hidden_size} does not go together with {shape.num_attention_heads} heads of "
            f"{decoder.head_dim} in this architecture; the nearest are {_nearest_channels(decoder, shape, divisor)}"
        )
    if not sparsity:
        return shape
    if cut in ("width", "hidden"):
        if composite_of(model.config) is not None:
            raise ConfigError(
                f"cut={cut} cuts channels, of which a vision-language model's image features have as many: give "
                "cut=ffn or cut=depth"
            )
        if heads_follow(decoder) and "num_attention_heads" in sizes:
            raise ConfigError(
                f"cut={cut} is to find num_attention_heads, which follow the channels in this architecture: "
                "leave it out, or give cut=ffn or cut=depth"
            )
    counter = Counter(model)
    wanted = round((1 - sparsity) * counter.of_blocks(start))
    have = counter.of_blocks(shape)
    if have < wanted:
        raise BudgetError(
            f"the sizes given already remove {1 - have / counter.of_blocks(start):.1%} of the blocks' parameters, more "
            f"than sparsity {sparsity}: give a higher one, or none"
        )
    return _solve(decoder, counter, shape, wanted, cut, divisor)


def _with_heads(decoder: Decoder, given: dict[str, int]) -> dict[str, int]:
    """Where heads have no width of their own in the config, channels and heads go together, and one says the other."""
    if not heads_follow(decoder):
        return given
    width = decoder.head_dim
    if "num_attention_heads" in given:
        return {"hidden_size": given["num_attention_heads"] * width, **given}
    if "hidden_size" in given and given["hidden_size"] % width == 0:
        return {**given, "num_attention_heads": given["hidden_size"] // width}
    return given


def _check_size(decoder: Decoder, start: Shape, name: str, size: int, divisor: int) -> None:
    """Refuse a size that the model cannot be cut to, with the nearest that it can."""
    whole = getattr(start, name)
    step = unit_of(decoder, name, divisor)
    if name == "hidden_size" and size != whole and composite_of(decoder.model.config) is not None:
        raise ConfigError("hidden_size: a vision-language model's image features have as many; cut neurons or blocks")
    if size > whole:
        raise ConfigError(f"{name}={size} is more than the {whole} that the model has: nothing is added, only cut")
    if size != whole and size % step:
        near = [n for n in (size // step * step, min((size // step + 1) * step, whole)) if n > 0]
        why = {"num_attention_heads": f"the {decoder.kv_heads} KV heads must keep as many each"}.get(
            name, f"sizes are to be multiples of {step}"
        )
        raise ConfigError(f"{name}={size}: {why}; the nearest are {' and '.join(map(str, dict.fromkeys(near)))}")


def _nearest_channels(decoder: Decoder, shape: Shape, divisor: int) -> str:
    """Numbers of channels about one that a model cannot have with so many heads."""
    step, whole = unit_of(decoder, "hidden_size", divisor), decoder.config.hidden_size
    shapes = (dataclasses.replace(shape, hidden_size=n) for n in (*range(step, whole, step), whole))
    sizes = [each.hidden_size for each in shapes if has_words(decoder, each)]
    below, above = [n for n in sizes if n < shape.hidden_size][-1:], [n for n in sizes if n > shape.hidden_size][:1]
    return " and ".join(map(str, below + above)) or "none"


def unit_of(decoder: Decoder, name: str, divisor: int) -> int:
    """What a size is a multiple of, where it changes."""
    return {
        "num_hidden_layers": 1,
        "num_attention_heads": 1 if decoder.heads_are_alone else decoder.kv_heads,
        "hidden_size": math.lcm(divisor, decoder.head_dim) if heads_follow(decoder) else divisor,
        "intermediate_size": divisor,
    }[name]


def _solve(decoder: Decoder, counter: Counter, shape: Shape, wanted: int, cut: str, divisor: int) -> Shape:
    """The shape whose blocks have as many parameters as wanted, as nearly as the divisor allows."""

    def sized(**sizes: int) -> Shape:
        return dataclasses.replace(shape, **_with_heads(decoder, sizes))

    def options(name: str) -> range:
        step = unit_of(decoder, name, divisor)
        return range(step, getattr(shape, name), step)

    def fitting(shapes: Sequence[Shape]) -> Shape:
        """The one nearest to what is wanted; the budget must lie within a unit of it."""
        if not shapes or counter.of_blocks(min(shapes, key=counter.of_blocks)) > wanted:
            raise BudgetError(
                f"the sparsity cannot be reached by cut={cut} alone, with what the architecture's "
                "config can say: lower it, give another cut, or sizes on other axes as well"
            )
        return min(shapes, key=lambda each: (abs(counter.of_blocks(each) - wanted), each))

    whole = [shape]
    if cut == "depth":
        return fitting([sized(num_hidden_layers=n) for n in range(1, shape.num_hidden_layers)] + whole)
    if cut == "ffn":
        return fitting([sized(intermediate_size=n) for n in options("intermediate_size")] + whole)
    by_hidden = [each for n in options("hidden_size") if has_words(decoder, each := sized(hidden_size=n))] + whole
    if cut == "hidden":
        return fitting(by_hidden)
    # One ratio for both; the neurons, of which there are more, make up for the rounding of the channels.
    step = unit_of(decoder, "intermediate_size", divisor)

    def both(each: Shape) -> Shape:
        neurons = round(shape.intermediate_size * each.hidden_size / shape.hidden_size / step) * step
        return dataclasses.replace(each, intermediate_size=min(max(neurons, step), shape.intermediate_size))

    near = fitting([both(each) for each in by_hidden])
    widths = [*options("intermediate_size"), shape.intermediate_size]
    return fitting([dataclasses.replace(near, intermediate_size=n) for n in widths] + whole)
