"""The report of a search: which model was chosen, all that were tried, and a picture, as one HTML file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks import page, plots, words
from benchmarks.markup import Child, Html, join, tag
from compress.files import write_file
from deploy.fit_record import (
    DENSE,
    FitRecord,
    Row,
    Searched,
    accuracy,
    amount,
    axis,
    described,
    judgement,
    outcome,
)
from deploy.ruler import Kind

UNITS: dict[Kind, tuple[float, str]] = {
    "parameters": (1e6, "parameters, millions"),
    "bytes": (1e6, "on disk, MB"),
    "memory": (1e6, "memory, MB"),
    "latency": (1e-3, "a decoded token, ms"),
}
NAMES = {"perplexity": "perplexity (lower is better)", "accuracy": "accuracy, % (higher is better)"}
LOG_ABOVE = 6
"""Perplexities that differ by more than this factor are drawn on a logarithmic scale."""


def render(found: FitRecord) -> str:
    """The whole page."""
    target = found.target
    return page.page(
        f"{found.model.name} in {amount(target.kind, target.limit)}",
        [
            _header(found),
            _verdict(found),
            _candidates(found),
            _searched(found),
            _made(found),
            page.raw(found.model_dump_json()),
        ],
        f"Record {found.id or 'not written yet'}, schema version {found.version}. Made by foldaway.",
    )


def write(found: FitRecord, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_file(path, render(found))


def _header(found: FitRecord) -> Html:
    return tag(
        "header",
        tag("p", f"Search under a budget, {found.created[:10]}", class_="eyebrow"),
        tag("h1", f"{found.model.name} in {amount(found.target.kind, found.target.limit)}"),
        tag("p", f"Limited: {axis(found.target)}. Judged by: {found.judge}.", class_="note"),
    )


def _verdict(found: FitRecord) -> Html:
    best = found.best
    if best is None:
        badge, state = tag("span", "✕ None fits", class_="badge fail"), "fail"
        headline = "None of the candidates that were tried fits. Give a higher target, or try more (--top)."
        told: dict[str, str] = {}
    else:
        badge, state = tag("span", "✓ Fits", class_="badge pass"), "pass"
        headline = f"{described(best.method, best.shape, best.options)}"
        told = {
            "Found": f"{_amount(found, best.measured.value)}, where the dense model has "
            f"{_amount(found, found.dense.measured.value)} "
            f"({words.percent(best.measured.value / found.dense.measured.value)})",
            "Costs": f"{judgement(best.judged)}; the dense model {judgement(found.dense.judged)}",
            "Artifact": "" if best.made is None else best.made.artifact,
        }
    told["Search"] = outcome(found)[0].split(": ")[-1]
    return tag(
        "section",
        badge,
        tag(
            "div",
            tag("h2", headline),
            tag("dl", [join(tag("dt", name), tag("dd", fact)) for name, fact in told.items()]),
        ),
        class_=f"verdict {state}",
        aria_label="Verdict",
    )


def _amount(found: FitRecord, value: float) -> str:
    return amount(found.target.kind, value)


# --- Candidates


def _candidates(found: FitRecord) -> Html:
    rows = (found.dense, *found.candidates)
    return tag(
        "section",
        tag("h2", "What was tried"),
        tag(
            "p",
            "Predicted is what counting says before anything is made, measured what was found of the artifact. "
            "Only a candidate whose measured value is within the limit can be chosen; of those the best judged is.",
            class_="note",
        ),
        tag(
            "div",
            tag(
                "figure",
                picture(found),
                tag("figcaption", "Bars are one standard error. The ring marks the chosen model."),
            ),
            page.table(
                "The dense model, and every candidate that was tried",
                ("Candidate", "Predicted", "Measured", found.judge.capitalize(), "Made in", "Verdict"),
                [_cells(found, place, row) for place, row in enumerate(rows)],
                chosen=[row.name == found.chosen for row in rows],
            ),
            class_="ladder",
        ),
    )


def picture(found: FitRecord) -> Html | None:
    """What the budget limits against how good the models are; None where nothing was judged."""
    unit, name = UNITS[found.target.kind]
    points = [
        point
        for place, row in enumerate((found.dense, *found.candidates))
        if (point := _point(found, place, row, unit)) is not None
    ]
    if not points:
        return None
    log = found.judge == "perplexity" and max(p.y for p in points) > LOG_ABOVE * min(p.y for p in points)
    label = NAMES[found.judge].replace(" (", ", log scale (") if log else NAMES[found.judge]
    title = f"{found.judge.capitalize()} against {axis(found.target)}"
    return plots.under_budget(title, points, found.target.limit / unit, (name, label), log=log)


def _point(found: FitRecord, place: int, row: Row, unit: float) -> plots.Point | None:
    """A row in the picture; None where it was not judged, or its perplexity has no end."""
    if row.judged is None or not math.isfinite(row.judged.value):
        return None
    scale = 100.0 if found.judge == "accuracy" else 1.0
    error = row.judged.standard_error
    return plots.Point(
        x=row.measured.value / unit,
        y=row.judged.value * scale,
        error=error * scale if math.isfinite(error) else 0.0,
        label=DENSE if row.method is None else f"{place} {row.method}",
        state="dense" if row.method is None else "pass" if row.fits else "fail",
        chosen=row.name == found.chosen,
    )


def _cells(found: FitRecord, place: int, row: Row) -> list[Child]:
    name: Child = DENSE
    if row.method is not None:
        what = described(None if row.shape else row.method, row.shape, row.options).removeprefix(f"{DENSE}: ")
        name = join(f"{place} {row.method}", tag("small", what.removeprefix(f"{row.method}: ")))
    return [
        name,
        _amount(found, row.predicted),
        join(_amount(found, row.measured.value), tag("small", _spread(found, row))),
        _judged(row),
        "–" if row.made is None else words.seconds(row.made.seconds),
        _badge(found, row),
    ]


def _spread(found: FitRecord, row: Row) -> str | None:
    """Where runs lie, if there were several."""
    runs = row.measured.runs
    return None if len(runs) < 2 else f"{_amount(found, min(runs))} to {_amount(found, max(runs))}"


def _judged(row: Row) -> Child:
    if row.judged is None:
        return "–"
    if row.judged.perplexity is None:
        return accuracy(row.judged)
    return words.with_error(row.judged.value, row.judged.standard_error)


def _badge(found: FitRecord, row: Row) -> Child:
    if row.method is None:
        return "–"
    if not row.fits:
        return tag("span", "too large" if found.target.kind != "latency" else "too slow", class_="badge fail")
    return tag("span", "chosen" if row.name == found.chosen else "fits", class_="badge pass")


# --- What there was to choose from, and how to repeat it


def _searched(found: FitRecord) -> Html:
    return tag(
        "section",
        tag("h2", "What there was to choose from"),
        tag(
            "p",
            "Shapes and sparsities are counted without weights. The largest of those just below the limit is tried "
            "first, and then always the shape that is most unlike those tried; of a method without shapes the mildest "
            "sparsity that fits.",
            class_="note",
        ),
        page.table(
            "Candidates by method",
            ("Method", "Counted", "Predicted to fit", "Tried", "Least that can be reached"),
            [_searched_row(found, each) for each in found.searched],
        ),
    )


def _searched_row(found: FitRecord, each: Searched) -> list[Child]:
    tried = sum(row.method == each.method for row in found.candidates)
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in each.options.items())
    return [
        join(each.method, tag("small", options) if options else None),
        words.number(each.enumerated),
        words.number(each.fitting),
        str(tried),
        "–" if each.smallest is None else _amount(found, each.smallest),
    ]


def _made(found: FitRecord) -> Html:
    settings = {name.replace("_", " "): page.plain(value) for name, value in found.settings.items() if value}
    return tag(
        "section",
        tag("h2", "How it was made"),
        page.facts({"Dense model": found.model.name, "Licence": found.model.licence or "unknown", **settings}),
        page.texts(found.texts),
        page.machine_facts(found.machine),
        page.to_repeat(found.commands),
    )
