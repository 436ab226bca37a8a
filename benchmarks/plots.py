"""Small inline SVG plots. Colours come from the page's style sheet; every plot also says its numbers in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.markup import Html, join, tag
from benchmarks.words import number

Scale = Callable[[float], float]
State = Literal["dense", "pass", "fail", "undecided"]


@dataclass(frozen=True)
class Point:
    """One rung of a ladder: parameters, perplexity with its standard error, a label, and how it stands."""

    x: float
    y: float
    error: float
    label: str
    state: State
    chosen: bool


def bars(title: str, baseline: float, candidate: float, texts: tuple[str, str]) -> Html:
    """Two bars from zero, one per side, with their values written behind them."""
    longest = max(baseline, candidate) or 1.0
    rows = []
    for row, (side, value, text) in enumerate(zip(("base", "cand"), (baseline, candidate), texts, strict=True)):
        length = max(150.0 * value / longest, 1.0)
        rows.append(tag("rect", class_=side, x=0, y=row * 24 + 3, width=length, height=15, rx=3))
        rows.append(tag("text", text, x=length + 7, y=row * 24 + 15))
    return _svg(title, f"baseline {texts[0]}, candidate {texts[1]}", 250, 45, rows)


def gauge(title: str, limit: float, value: float, low: float, high: float, *, minimum: bool) -> Html:
    """A limit, the side of it that fails, and the measured value with its interval."""
    at = _linear(*_padded(min(limit, low), max(limit, high), 0.25), 4, 176)
    edge = at(limit)
    wrong = (4.0, edge) if minimum else (edge, 176.0)
    return _svg(
        title,
        f"limit {number(limit)}, measured {number(value)}, interval {number(low)} to {number(high)}",
        180,
        26,
        [
            tag("rect", class_="track", x=4, y=9, width=172, height=8, rx=2),
            tag("rect", class_="wrong", x=wrong[0], y=9, width=wrong[1] - wrong[0], height=8, rx=2),
            tag("line", class_="edge", x1=edge, x2=edge, y1=3, y2=23),
            tag("line", class_="reach", x1=at(low), x2=at(high), y1=13, y2=13),
            tag("circle", class_="cand", cx=at(value), cy=13, r=4.5),
        ],
    )


def ladder(points: Sequence[Point], limit: float | None) -> Html:
    """Perplexity against parameters, with standard errors, the limit, and the chosen point ringed."""
    left, right, top, bottom = 48, 404, 22, 254
    is_log = max(point.y for point in points) > 6 * min(point.y for point in points)
    ends = [point.y + point.error for point in points]
    ends += [point.y if is_log else point.y - point.error for point in points]
    ends += [limit] if limit is not None else []
    widths = _padded(min(point.x for point in points), max(point.x for point in points), 0.1, 0.24)
    x = _linear(*widths, left, right)
    heights = (min(ends) / 1.2, max(ends) * 1.2) if is_log else _padded(min(ends), max(ends), 0.1)
    y = (_log if is_log else _linear)(*heights, bottom, top)
    y_ticks = _log_ticks(*heights) if is_log else _ticks(*heights, 5)
    drawn: list[Html] = []
    for tick in y_ticks:
        drawn.append(tag("line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick)))
        drawn.append(tag("text", number(tick), class_="tick", x=left - 7, y=y(tick) + 4, text_anchor="end"))
    for tick in _ticks(*widths, 4):
        drawn.append(tag("text", number(tick / 1e6), class_="tick", x=x(tick), y=bottom + 17, text_anchor="middle"))
    drawn.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    drawn.append(
        tag("text", "parameters, millions", class_="name", x=(left + right) / 2, y=bottom + 36, text_anchor="middle")
    )
    scale = "perplexity, log scale (lower is better)" if is_log else "perplexity (lower is better)"
    drawn.append(tag("text", scale, class_="name", x=2, y=11))
    if limit is not None:
        drawn.append(tag("line", class_="limit", x1=left, x2=right, y1=y(limit), y2=y(limit)))
        drawn.append(tag("text", f"limit {number(limit)}", class_="limit", x=right, y=y(limit) - 6, text_anchor="end"))
    drawn.extend(_line_through(points, x, y))
    drawn.extend(_marker(point, x, y, heights[0]) for point in points)
    words = "; ".join(f"{p.label}: {number(p.x / 1e6)} million, perplexity {number(p.y)}" for p in points)
    return _svg("Perplexity against parameters", words, 420, 298, drawn)


def under_budget(
    title: str, points: Sequence[Point], limit: float, names: tuple[str, str], *, log: bool = False
) -> Html:
    """How good models are against what a budget limits: the limit, those that fit, and the chosen one ringed.

    Args:
        title: what the picture shows.
        points: the dense model and the candidates; these lie close together, so their labels stand in a column.
        limit: of the budget, in the unit of the points.
        names: of the axes.
        log: logarithmic scale of the second axis.
    """
    left, right, top, bottom = 52, 404, 22, 294
    across = [*(point.x for point in points), limit]
    widths = _padded(min(across), max(across), 0.65, 0.1)
    ends = [point.y + point.error for point in points]
    ends += [point.y if log else point.y - point.error for point in points]
    heights = (min(ends) / 1.15, max(ends) * 1.15) if log else _padded(min(ends), max(ends), 0.12)
    x, y = _linear(*widths, left, right), (_log if log else _linear)(*heights, bottom, top)
    drawn: list[Html] = []
    for tick in (_log_ticks if log else lambda low, high: _ticks(low, high, 5))(*heights):
        drawn.append(tag("line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick)))
        drawn.append(tag("text", number(tick), class_="tick", x=left - 7, y=y(tick) + 4, text_anchor="end"))
    for tick in _ticks(*widths, 5):
        drawn.append(tag("text", number(tick), class_="tick", x=x(tick), y=bottom + 17, text_anchor="middle"))
    drawn.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    drawn.append(tag("text", names[0], class_="name", x=(left + right) / 2, y=bottom + 36, text_anchor="middle"))
    drawn.append(tag("text", names[1], class_="name", x=2, y=11))
    drawn.append(tag("line", class_="limit", x1=x(limit), x2=x(limit), y1=top, y2=bottom))
    drawn.append(tag("text", f"limit {number(limit)}", class_="limit", x=x(limit) + 5, y=top + 10))
    drawn.extend(_column(points, x, y, top + 4, bottom - 4))
    drawn.extend(_marker(point, x, y, heights[0], labelled=False) for point in points)
    for point in points:
        if point.state == "dense":
            drawn.append(
                tag("text", point.label, class_="label", x=x(point.x) - 11, y=y(point.y) - 5, text_anchor="end")
            )
    words = "; ".join(f"{p.label}: {number(p.x)}, {number(p.y)}{', chosen' if p.chosen else ''}" for p in points)
    return _svg(title, f"{' against '.join(reversed(names))}; limit {number(limit)}; {words}", 420, 338, drawn)


LABEL_HEIGHT = 15


def _column(points: Sequence[Point], x: Scale, y: Scale, top: float, bottom: float) -> list[Html]:
    """Labels of all but the dense model in a column to their left, none over another, each with a line to its point."""
    named = sorted((point for point in points if point.state != "dense"), key=lambda point: y(point.y))
    places: list[float] = []
    for point in named:
        places.append(max(y(point.y), places[-1] + LABEL_HEIGHT if places else top))
    over = max(0.0, places[-1] - bottom) if places else 0.0
    for back in range(len(places) - 1, -1, -1):  # those that are pushed out at the bottom push the others up
        highest = bottom if back == len(places) - 1 else places[back + 1] - LABEL_HEIGHT
        places[back] = min(places[back], highest) if over else places[back]
    edge = min((x(point.x) for point in named), default=0.0) - 26
    drawn = []
    for point, place in zip(named, places, strict=True):
        drawn.append(tag("line", class_="lead", x1=edge + 4, x2=x(point.x), y1=place, y2=y(point.y)))
        drawn.append(tag("text", point.label, class_="label", x=edge, y=place + 4, text_anchor="end"))
    return drawn


def _line_through(points: Sequence[Point], x: Scale, y: Scale) -> list[Html]:
    path = " ".join(f"{x(point.x):.2f},{y(point.y):.2f}" for point in points)
    return [tag("polyline", class_="path", points=path)]


def _marker(point: Point, x: Scale, y: Scale, lowest: float, *, labelled: bool = True) -> Html:
    at, low, high = x(point.x), y(max(point.y - point.error, lowest)), y(point.y + point.error)
    parts = [
        tag("line", class_="error", x1=at, x2=at, y1=low, y2=high),
        tag("line", class_="error", x1=at - 4, x2=at + 4, y1=low, y2=low),
        tag("line", class_="error", x1=at - 4, x2=at + 4, y1=high, y2=high),
        tag("circle", class_=f"point {point.state}", cx=at, cy=y(point.y), r=5),
    ]
    if labelled:
        parts.append(tag("text", point.label, class_="label", x=at + 14, y=y(point.y) - 3))
    if point.chosen:
        parts.append(tag("circle", class_="ring", cx=at, cy=y(point.y), r=10))
    return tag("g", *parts)


def dots(
    title: str, unit: str, baseline: Sequence[float], candidate: Sequence[float], medians: tuple[float, float]
) -> Html:
    """Every run as a dot, in the order of the runs from top to bottom, with each side's median as a bar."""
    left, right = 10, 410
    runs = [*baseline, *candidate]
    low, high = _padded(min(runs), max(runs), 0.06)
    x = _linear(low, high, left, right)
    drawn: list[Html] = []
    for tick in _ticks(low, high, 5):
        drawn.append(tag("line", class_="grid", x1=x(tick), x2=x(tick), y1=8, y2=104))
        drawn.append(tag("text", number(tick), class_="tick", x=x(tick), y=121, text_anchor="middle"))
    for row, (side, values, median) in enumerate(zip(("base", "cand"), (baseline, candidate), medians, strict=True)):
        middle = 30 + row * 52
        drawn.append(tag("line", class_=f"median {side}", x1=x(median), x2=x(median), y1=middle - 20, y2=middle + 20))
        for place, value in enumerate(values):
            offset = 0.0 if len(values) == 1 else (place / (len(values) - 1) - 0.5) * 30
            drawn.append(tag("circle", class_=f"run {side}", cx=x(value), cy=middle + offset, r=4))
    drawn.append(tag("text", unit, class_="name", x=right, y=140, text_anchor="end"))
    words = "; ".join(
        f"{side}: {', '.join(map(number, values))}; median {number(median)}"
        for side, values, median in zip(("baseline", "candidate"), (baseline, candidate), medians, strict=True)
    )
    return _svg(title, f"{unit}. {words}", 420, 146, drawn)


def _svg(title: str, words: str, width: int, height: int, drawn: Sequence[Html]) -> Html:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", words),
        join(*drawn),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=f"{title}: {words}",
    )


def _padded(low: float, high: float, below: float, above: float | None = None) -> tuple[float, float]:
    """A range with room at its ends, as shares of its length."""
    length = (high - low) or abs(high) or 1.0
    return low - below * length, high + (below if above is None else above) * length


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _log(low: float, high: float, start: float, end: float) -> Scale:
    bottom, top = math.log(low), math.log(high)
    return lambda value: start + (math.log(value) - bottom) / (top - bottom) * (end - start)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in a range, about so many: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for factor in (1, 2, 5) if low <= (tick := factor * 10.0**power) <= high]


@dataclass(frozen=True)
class Curve:
    """One line of a chart: a label, and its points from left to right."""

    label: str
    points: tuple[tuple[float, float], ...]


def curves(title: str, lines: Sequence[Curve], reference: tuple[float, float], ceiling: float) -> Html:
    """Perplexity against parameters on a log scale, one line per method, as a picture that stands alone.

    Args:
        title: what the picture shows.
        lines: parameters and perplexity of each method.
        reference: parameters and perplexity of the dense model, from which every line starts.
        ceiling: perplexities above it leave the picture, and their line with them.
    """
    widths = _padded(min(x for line in lines for x, _ in line.points), reference[0], 0.04)
    seen = [value for line in lines for _, value in line.points if math.isfinite(value)]
    ceiling = min(ceiling, 1.3 * max(reference[1], *seen))
    x, y = _linear(*widths, LEFT, RIGHT), _log(reference[1] / 1.5, ceiling, BOTTOM, TOP)
    drawn = _frame(x, y, _ticks(*widths, 6), _log_ticks(reference[1] / 1.5, ceiling), lambda tick: number(tick / 1e6))
    drawn += _axes("parameters, millions", "perplexity, log scale (lower is better)")
    for place, line in enumerate(lines):
        points = sorted((reference, *((a, b) for a, b in line.points if math.isfinite(b))), reverse=True)
        drawn += _curve(place, line.label, points, x, y, [(a, b) for a, b in points if b <= ceiling])
    drawn.append(tag("circle", class_="dense", cx=x(reference[0]), cy=y(reference[1]), r=5))
    drawn.append(tag("text", "dense", x=x(reference[0]) - 9, y=y(reference[1]) + 16, text_anchor="end"))
    words = "; ".join(
        f"{line.label}: " + ", ".join(f"{number(a / 1e6)} million {number(b)}" for a, b in line.points)
        for line in lines
    )
    return _standing(
        title, f"dense: {number(reference[0] / 1e6)} million, perplexity {number(reference[1])}; {words}", drawn
    )


def lessons(title: str, lines: Sequence[Curve], reference: float, ceiling: float) -> Html:
    """Perplexity on a log scale against tokens learnt from, one line per lesson, as a picture that stands alone.

    Args:
        title: what the picture shows.
        lines: tokens and perplexity of each lesson, from no token on.
        reference: perplexity of the dense model, the teacher.
        ceiling: perplexities above it leave the picture, and their line with them.
    """
    most = max(tokens for line in lines for tokens, _ in line.points)
    highest = min(ceiling, 1.3 * max(value for line in lines for _, value in line.points))
    x, y = _linear(-0.02 * most, 1.02 * most, LEFT, RIGHT), _log(reference / 1.2, highest, BOTTOM, TOP)
    up = _log_ticks(reference / 1.2, highest)
    drawn = _frame(x, y, _ticks(0.0, most, 6), up, lambda tick: number(tick / 1e3))
    drawn += _axes("tokens learnt from, thousands", "perplexity, log scale (lower is better)")
    drawn.append(
        tag("line", class_="axis", x1=LEFT, x2=RIGHT, y1=y(reference), y2=y(reference), stroke_dasharray="4 4")
    )
    drawn.append(tag("text", "dense", x=RIGHT - 4, y=y(reference) - 6, text_anchor="end"))
    for place, line in enumerate(lines):
        drawn += _curve(place, line.label, line.points, x, y, [(a, b) for a, b in line.points if b <= highest])
    words = "; ".join(
        f"{line.label}: " + ", ".join(f"{number(a / 1e3)} thousand {number(b)}" for a, b in line.points)
        for line in lines
    )
    return _standing(title, f"dense: perplexity {number(reference)}; {words}", drawn)


def tradeoff(title: str, lines: Sequence[Curve], names: tuple[str, str]) -> Html:
    """What is kept, from 0 to 1, against bytes on a log scale, as a picture that stands alone.

    Args:
        title: what the picture shows.
        lines: bytes and share of each way; shares below 0 leave the picture, and their line with them.
        names: of the axes.
    """
    sizes = [size for line in lines for size, _ in line.points]
    low, high = min(sizes) / 1.2, max(sizes) * 1.2
    x, y = _log(low, high, LEFT, RIGHT), _linear(0.0, 1.05, BOTTOM, TOP)
    drawn = _frame(x, y, _log_ticks(low, high), [0, 0.2, 0.4, 0.6, 0.8, 1.0], lambda tick: f"{number(tick / 1e6)} MB")
    drawn += _axes(*names)
    for place, line in enumerate(lines):
        drawn += _curve(place, line.label, line.points, x, y, [(a, b) for a, b in line.points if b >= 0])
    words = "; ".join(
        f"{line.label}: " + ", ".join(f"{number(a / 1e6)} MB {number(b)}" for a, b in line.points) for line in lines
    )
    return _standing(title, words, drawn)


@dataclass(frozen=True)
class Spot:
    """One thing that every panel shows: its name, where it is, and its height in each panel (None: not there)."""

    label: str
    x: float
    heights: tuple[float | None, ...]


def panels(
    title: str, spots: Sequence[Spot], across: str, up: Sequence[str], lines: Sequence[tuple[str, Scale]]
) -> Html:
    """Panels side by side that share a log scale across and a legend below, as a picture that stands alone.

    Args:
        title: what the picture shows.
        spots: what is compared.
        across: name of the shared scale.
        up: name of each panel's own, which begins at zero.
        lines: name and height of a line in each panel to hold the spots against.
    """
    low, high = min(spot.x for spot in spots) / 1.4, max(spot.x for spot in spots) * 1.4
    drawn = [tag("style", Html(CURVES_STYLE)), tag("rect", class_="page", width=WIDTH, height=430)]
    room = WIDTH / len(up)
    for place, (name, (line, height)) in enumerate(zip(up, lines, strict=True)):
        x = _log(low, high, room * place + LEFT, room * (place + 1) - 16)
        seen = [(spot, top) for spot in spots if (top := spot.heights[place]) is not None]
        drawn += _panel(place, x, (low, high), (across, name), line, height, seen, [spots.index(s) for s, _ in seen])
    drawn += _spot_legend(spots)
    words = "; ".join(
        f"{spot.label}: {number(spot.x)} MB, "
        + ", ".join("not measured" if top is None else number(top) for top in spot.heights)
        for spot in spots
    )
    return _standing(title, f"{', '.join(up)} against {across}. {words}", drawn)


def _panel(
    place: int,
    x: Scale,
    ends: tuple[float, float],
    names: tuple[str, str],
    line: str,
    height: Scale,
    seen: Sequence[tuple[Spot, float]],
    colours: Sequence[int],
) -> list[Html]:
    """One panel: scales, the line, and the spots."""
    left, right, bottom = x(ends[0]), x(ends[1]), BOTTOM - 80
    most = 1.12 * max([top for _, top in seen] or [1.0])
    y = _linear(0.0, most, bottom, TOP)
    drawn: list[Html] = []
    for tick in _ticks(0.0, most, 5):
        drawn.append(tag("line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick)))
        drawn.append(tag("text", number(tick), x=left - 8, y=y(tick) + 4, text_anchor="end"))
    for tick in _log_ticks(*ends):
        drawn.append(tag("text", number(tick), x=x(tick), y=bottom + 18, text_anchor="middle"))
    drawn.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    drawn.append(tag("text", names[0], x=(left + right) / 2, y=bottom + 38, text_anchor="middle"))
    drawn.append(tag("text", names[1], x=left - LEFT + 4, y=16))
    region = f"panel-{place}"
    inside = tag("rect", x=left, y=TOP, width=right - left, height=bottom - TOP)
    drawn.append(tag("clipPath", inside, id=region))
    steps = [ends[0] * (ends[1] / ends[0]) ** (step / 60) for step in range(61)]
    path = " ".join(f"{x(at):.1f},{y(height(at)):.1f}" for at in steps)
    drawn.append(
        tag(
            "polyline",
            class_="curve",
            points=path,
            stroke="#9ca3af",
            stroke_dasharray="4 4",
            clip_path=f"url(#{region})",
        )
    )
    level = (0.93 if height(ends[0]) > height(ends[1]) else 0.3) * most
    at = min(steps, key=lambda step: abs(height(step) - level))  # to the right of the line there are no spots
    drawn.append(tag("text", line, x=x(at) + 9, y=y(height(at)) + 4, fill_opacity=0.7))
    for (spot, top), colour in zip(seen, colours, strict=True):
        drawn.append(_spot(colour, x(spot.x), y(top)))
    return drawn


def _spot(place: int, x: float, y: float) -> Html:
    """A mark: circles, and squares when the colours are used up."""
    colour = PALETTE[place % len(PALETTE)]
    if place < len(PALETTE):
        return tag("circle", cx=x, cy=y, r=5.5, fill=colour, stroke="#ffffff")
    return tag("rect", x=x - 5, y=y - 5, width=10, height=10, fill=colour, stroke="#ffffff")


def _spot_legend(spots: Sequence[Spot]) -> list[Html]:
    """Names below the panels, one after the other in lines."""
    drawn, left, level = [], 24.0, BOTTOM - 14
    for place, spot in enumerate(spots):
        width = 36 + 6.8 * len(spot.label)
        if left + width > WIDTH:
            left, level = 24.0, level + 20
        drawn += [_spot(place, left, level - 4), tag("text", spot.label, x=left + 12, y=level)]
        left += width
    return drawn


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its height and how far that spreads, and the height that was to be expected (None: none)."""

    label: str
    value: float
    low: float
    high: float
    expected: float | None


def groups(title: str, bars: Sequence[tuple[str, Sequence[Bar]]], up: str, expected: str) -> Html:
    """Panels of bars from zero with their spread, each on a scale of its own, as a picture that stands alone.

    Args:
        title: what the picture shows.
        bars: name of each panel, and its bars; all panels have the same ones, in the same order.
        up: name of the scales.
        expected: what the dashes at heights that were to be expected are called.
    """
    drawn = [tag("style", Html(CURVES_STYLE)), tag("rect", class_="page", width=WIDTH, height=430)]
    drawn.append(tag("text", up, x=4, y=16))
    room = (WIDTH - 8) / len(bars)
    for place, (name, group) in enumerate(bars):
        drawn += _group(name, group, room * place + LEFT, room * (place + 1))
    drawn += _bar_legend([bar.label for bar in bars[0][1]], expected)
    words = "; ".join(
        f"{name}: "
        + ", ".join(f"{bar.label} {number(bar.value)} ({number(bar.low)} to {number(bar.high)})" for bar in group)
        for name, group in bars
    )
    return _standing(title, f"{up}. {words}", drawn)


def _group(name: str, bars: Sequence[Bar], left: float, right: float) -> list[Html]:
    """One panel: scale, bars, spread and expectations; values are written where bars are wide enough for them."""
    bottom = BOTTOM - 24
    most = 1.12 * max(max(bar.high, bar.expected or 0.0) for bar in bars)
    y = _linear(0.0, most, bottom, TOP)
    drawn: list[Html] = []
    for tick in _ticks(0.0, most, 5):
        drawn.append(tag("line", class_="grid", x1=left, x2=right, y1=y(tick), y2=y(tick)))
        drawn.append(tag("text", number(tick), x=left - 8, y=y(tick) + 4, text_anchor="end"))
    slot = min(90.0, (right - left) / len(bars))
    start = (left + right - slot * len(bars)) / 2
    for place, bar in enumerate(bars):
        middle, width = start + slot * (place + 0.5), 0.72 * slot
        colour = PALETTE[place % len(PALETTE)]
        box = {"x": middle - width / 2, "y": y(bar.value), "width": width, "height": bottom - y(bar.value)}
        drawn.append(tag("rect", **box, fill=colour, fill_opacity=0.6))
        for x1, x2, y1, y2 in (
            (middle, middle, bar.low, bar.high),
            (middle - 4, middle + 4, bar.low, bar.low),
            (middle - 4, middle + 4, bar.high, bar.high),
        ):
            drawn.append(tag("line", x1=x1, x2=x2, y1=y(y1), y2=y(y2), stroke="#1f2937"))
        if bar.expected is not None:
            drawn.append(_dashes(middle - slot / 2 + 2, middle + slot / 2 - 2, y(bar.expected)))
        if slot >= 40:
            drawn.append(tag("text", number(bar.value), x=middle, y=bottom - 8, text_anchor="middle"))
    drawn.append(tag("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
    drawn.append(tag("text", name, x=(left + right) / 2, y=bottom + 20, text_anchor="middle"))
    return drawn


def _dashes(left: float, right: float, y: float) -> Html:
    return tag("line", x1=left, x2=right, y1=y, y2=y, stroke="#1f2937", stroke_width=1.5, stroke_dasharray="4 3")


def _bar_legend(names: Sequence[str], expected: str) -> list[Html]:
    """Names below the panels, and at the end what dashes are."""
    drawn, left, level = [], 24.0, BOTTOM + 26.0
    for place, name in enumerate([*names, expected]):
        width = 40 + 6.8 * len(name)
        if left + width > WIDTH:
            left, level = 24.0, level + 20
        if place < len(names):
            drawn.append(
                tag(
                    "rect",
                    x=left - 6,
                    y=level - 10,
                    width=12,
                    height=12,
                    fill=PALETTE[place % len(PALETTE)],
                    fill_opacity=0.6,
                )
            )
        else:
            drawn.append(_dashes(left - 9, left + 9, level - 4))
        drawn.append(tag("text", name, x=left + 14, y=level))
        left += width
    return drawn


WIDTH, LEFT, RIGHT, TOP, BOTTOM = 840, 56, 520, 34, 380
"""Of the page, and the edges of a chart that stands alone; its legend is to the right."""


def _frame(
    x: Scale, y: Scale, across: Sequence[float], up: Sequence[float], name: Callable[[float], str]
) -> list[Html]:
    """Page, grid and ticks, and the region that lines stay in."""
    drawn: list[Html] = [tag("style", Html(CURVES_STYLE)), tag("rect", class_="page", width=WIDTH, height=430)]
    for tick in up:
        drawn.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=y(tick), y2=y(tick)))
        drawn.append(tag("text", number(tick), x=LEFT - 8, y=y(tick) + 4, text_anchor="end"))
    drawn += [tag("text", name(tick), x=x(tick), y=BOTTOM + 20, text_anchor="middle") for tick in across]
    region = tag("rect", x=LEFT, y=TOP, width=RIGHT - LEFT, height=BOTTOM - TOP + 4)
    return [*drawn, tag("clipPath", region, id="inside")]


def _axes(across: str, up: str) -> list[Html]:
    return [
        tag("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM),
        tag("text", across, x=(LEFT + RIGHT) / 2, y=BOTTOM + 40, text_anchor="middle"),
        tag("text", up, x=4, y=16),
    ]


def _curve(
    place: int,
    label: str,
    points: Sequence[tuple[float, float]],
    x: Scale,
    y: Scale,
    marked: Sequence[tuple[float, float]],
) -> list[Html]:
    """One line, its marks, and its name in the legend."""
    colour, dashes = PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    stroke = {"stroke": colour, "stroke_dasharray": dashes, "clip_path": "url(#inside)"}
    level = TOP + 6 + 17 * place
    return [
        tag("polyline", class_="curve", points=path, **stroke),
        *(tag("circle", cx=x(a), cy=y(b), r=3, fill=colour) for a, b in marked),
        tag("line", class_="curve", x1=538, x2=562, y1=level, y2=level, **stroke | {"clip_path": None}),
        tag("text", label, x=570, y=level + 4),
    ]


def _standing(title: str, words: str, drawn: Sequence[Html]) -> Html:
    """A picture that stands alone."""
    return tag(
        "svg",
        tag("title", title),
        tag("desc", words),
        join(*drawn),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} 430",
        role="img",
    )


PALETTE = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#8f6a00", "#6940a5", "#c4342b", "#64748b")
DASHES = (None, "6 4", "2 3")
CURVES_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2937; }
.page { fill: #ffffff; }
.grid { stroke: #e5e7eb; }
.axis { stroke: #9ca3af; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dense { fill: #ffffff; stroke: #1f2937; stroke-width: 2.5; }
"""
