"""The report: one record as one HTML file for a person who decides on a rollout.

The file needs nothing else: no network, no scripts, no fonts; its own content security policy forbids them. The verdict
comes first, then what it rests on, then everything that is needed to repeat it. All text from the record is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import yaml

from benchmarks import page, plots, words
from benchmarks.gate import GateLine, Outcome
from benchmarks.markup import Child, Html, join, tag
from benchmarks.measures import METRICS, Metric, PairedRuns
from benchmarks.record import Ladder, Record, Step, Variant
from compress.files import write_file

SIGNS: dict[Outcome, str] = {"pass": "✓", "fail": "✕", "undecided": "?"}


def render(record: Record) -> str:
    """The whole page."""
    return page.page(
        f"{record.title}: {_verdict_word(record)}",
        [
            _header(record),
            _verdict(record),
            _changes(record),
            _gate(record),
            _ladder(record.ladder) if record.ladder else None,
            _variants(record) if record.variants else None,
            _side_by_side(record),
            _speed(record.runs) if record.runs else None,
            _made(record),
            page.raw(record.model_dump_json()),
        ],
        f"Record {record.id or 'not written yet'}, schema version {record.version}. Made by foldaway.",
    )


def write(record: Record, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_file(path, render(record))


# --- The decision


def _header(record: Record) -> Html:
    dense = " The baseline is the dense model." if record.kind == "run" else ""
    return tag(
        "header",
        tag("p", f"Compression report, {record.created[:10]}", class_="eyebrow"),
        tag("h1", record.title),
        tag("p", f"Measured: {record.measured}.{dense} A ratio is candidate / baseline.", class_="note"),
    )


def _verdict(record: Record) -> Html:
    gained, lost, same = words.gains_and_losses(record)
    facts = [("Gained", gained), ("Lost", lost), ("No clear change", same)]
    return tag(
        "section",
        _badge(record.verdict),
        tag(
            "div",
            tag("h2", words.headline(record)),
            tag("dl", [join(tag("dt", name), tag("dd", "; ".join(found))) for name, found in facts if found]),
        ),
        class_=f"verdict {record.verdict or 'none'}",
        aria_label="Verdict",
    )


def _verdict_word(record: Record) -> str:
    return words.VERDICTS[record.verdict].lower() if record.verdict else "no verdict"


def _badge(outcome: Outcome | None) -> Html:
    if outcome is None:
        return tag("span", "No gate", class_="badge none")
    return tag("span", f"{SIGNS[outcome]} {words.VERDICTS[outcome]}", class_=f"badge {outcome}")


def _changes(record: Record) -> Html:
    return tag(
        "section",
        tag("h2", "What changes"),
        _KEY,
        tag("div", [_tile(record, metric) for metric in METRICS], class_="tiles"),
    )


_KEY = tag("ul", tag("li", "baseline", class_="base"), tag("li", "candidate", class_="cand"), class_="key")


def _tile(record: Record, metric: Metric) -> Html:
    name, ratio, how = words.NAMES[metric], record.ratio.get(metric), words.effect(record, metric)
    below, above = record.baseline.get(metric), record.candidate.get(metric)
    if ratio is None or below is None or above is None:
        drawn: Child = tag("p", "Not measured on both sides.")
    else:
        texts = (words.quantity(metric, below), words.quantity(metric, above))
        said = {"same": "no clear change"}.get(how, how)
        drawn = join(
            tag("p", words.percent(ratio), tag("small", said, class_=how), class_="change"),
            plots.bars(name, below, above, texts)
            if isfinite(below) and isfinite(above)
            else tag("p", " → ".join(texts)),
        )
    return tag("div", tag("h3", name), drawn, tag("p", words.MEANINGS[metric]), class_="tile")


def _gate(record: Record) -> Html:
    if not record.gates:
        told = "This record was made without limits. `foldaway bench --gate FILE` holds the candidate against some."
        return tag("section", tag("h2", "The gate"), tag("p", told))
    return tag(
        "section",
        tag("h2", "The gate"),
        tag(
            "p",
            "A limit passes or fails only when the whole interval of the measurement lies on one side of it; "
            "otherwise it is undecided, and more runs or more text may decide it.",
            class_="note",
        ),
        page.table(
            "Limits against measurements, with 95 % intervals",
            ("Metric", "Verdict", "Measured", "Limit", "Where it lies"),
            [_gate_row(line) for line in record.gates],
        ),
    )


def _gate_row(line: GateLine) -> list[Child]:
    is_ratio = line.bound in ("max_ratio", "min_ratio")
    interval = words.spread(line.interval, None if is_ratio else line.metric)
    drawn: Child = "–"
    low, high = (line.interval.low, line.interval.high) if line.interval else (line.value, line.value)
    if line.value is not None and low is not None and high is not None and isfinite(low + line.value + high):
        name = f"{words.NAMES[line.metric]} against its limit"
        picture = plots.gauge(name, line.limit, line.value, low, high, minimum=line.bound in ("min_ratio", "min"))
        drawn = tag("div", picture, class_="gauge")
    return [
        words.NAMES[line.metric],
        _badge(line.outcome),
        join(words.value(line), tag("small", interval) if interval else None),
        words.limit(line),
        drawn,
    ]


# --- What it rests on


def _ladder(ladder: Ladder) -> Html:
    dense = ladder.steps[0]
    limit = dense.perplexity * ladder.max_perplexity_ratio if ladder.max_perplexity_ratio is not None else None
    points = [_point(step) for step in ladder.steps if isfinite(step.perplexity)]
    asked = (
        "" if limit is None else f" The limit is {words.number(ladder.max_perplexity_ratio or 0)} × the dense model's."
    )
    return tag(
        "section",
        tag("h2", "Quality against size"),
        tag("p", f"Compressions tried from mild to strong, measured in {ladder.measured}.{asked}", class_="note"),
        tag(
            "div",
            tag(
                "figure",
                plots.ladder(points, limit if limit is None or isfinite(limit) else None) if points else None,
                tag("figcaption", "Bars are one standard error. The ring marks the candidate."),
            ),
            page.table(
                "Every compression that was tried",
                ("Sparsity of blocks", "Parameters", "Perplexity", "Ratio", "Verdict"),
                [_step_row(step) for step in ladder.steps],
                chosen=[step.chosen for step in ladder.steps],
            ),
            class_="ladder",
        ),
    )


def _outcome(step: Step) -> Outcome:
    return "undecided" if step.passed is None else "pass" if step.passed else "fail"


def _is_dense(step: Step) -> bool:
    return step.sparsity == 0


def _point(step: Step) -> plots.Point:
    error = step.perplexity_standard_error
    return plots.Point(
        x=step.parameters,
        y=step.perplexity,
        error=error if error is not None and isfinite(error) else 0.0,
        label="dense" if _is_dense(step) else f"{words.number(step.sparsity * 100)}{words.NBSP}%",
        state="dense" if _is_dense(step) else _outcome(step),
        chosen=step.chosen,
    )


def _step_row(step: Step) -> list[Child]:
    name: Child = "dense"
    if not _is_dense(step):
        whole = tag("small", f"{words.share(step.model_sparsity)} of model")
        name = join(words.share(step.block_sparsity), whole, tag("small", "the candidate") if step.chosen else None)
    interval = words.spread(step.ratio_interval)
    return [
        name,
        words.quantity("parameters", step.parameters),
        words.with_error(step.perplexity, step.perplexity_standard_error),
        join(words.times(step.perplexity_ratio), tag("small", interval) if interval else None),
        "–" if _is_dense(step) else _badge(_outcome(step)),
    ]


def _variants(record: Record) -> Html:
    first = record.variants[0]
    origin = record.model
    return tag(
        "section",
        tag("h2", "What the compression did, and what the number format did"),
        tag("p", "Ratios in this table are to its first row, so that neither is credited with the other's work."),
        [tag("p", sentence) for sentence in _credits(record.variants)],
        page.table(
            f"Forms of the model; ratios to {first.name}",
            ("Form", "Parameters", "Size", "Perplexity", "Decode speed", "Peak memory"),
            [_variant_row(variant, first) for variant in record.variants],
        ),
        tag(
            "p",
            f"The weights of {origin.name} were dequantised from {origin.quantised_from}: they had been rounded to a "
            "few bits before. This flatters int4: part of what rounding costs was lost before this comparison began; "
            "weights as trained would show a larger loss.",
            class_="aside",
        )
        if origin.quantised_from
        else None,
    )


def _variant_row(variant: Variant, first: Variant) -> list[Child]:
    def cell(metric: Metric, error: float | None = None) -> Html:
        value, reference = variant.measures.get(metric), first.measures.get(metric)
        ratio = words.times(value / reference) if value is not None and reference and variant is not first else None
        text = words.quantity(metric, value) if value is None or error is None else words.with_error(value, error)
        return join(text, tag("small", ratio) if ratio else None)

    return [
        variant.name,
        cell("parameters"),
        cell("size_bytes"),
        cell("perplexity", variant.perplexity_standard_error),
        cell("decode_tokens_per_second"),
        cell("peak_rss_bytes"),
    ]


def _credits(variants: Sequence[Variant]) -> list[str]:
    """Which step changed what: the same model in another format, and another model in the same format."""
    first = variants[0]
    pairs = [("The number format alone", first, v) for v in variants[1:] if v.side == first.side]
    pairs += [
        ("The compression alone", before, after)
        for after in variants
        for before in variants
        if after.side != before.side == "baseline" and (after.format, after.dtype) == (before.format, before.dtype)
    ]
    return [
        f"{what} ({before.name} to {after.name}): {found}."
        for what, before, after in pairs
        if (found := _ratio_words(before, after))
    ]


def _ratio_words(before: Variant, after: Variant) -> str:
    metrics: tuple[Metric, ...] = ("size_bytes", "perplexity")
    found = []
    for metric in metrics:
        below, above = before.measures.get(metric), after.measures.get(metric)
        if below and above is not None:
            found.append(f"{words.NAMES[metric].lower()} {words.times(above / below)}")
    return ", ".join(found)


def _side_by_side(record: Record) -> Html:
    rows: list[list[Child]] = []
    for metric in METRICS:
        own, of_ratio = record.intervals.candidate.get(metric), record.intervals.ratio.get(metric)
        rows.append(
            [
                words.NAMES[metric],
                words.quantity(metric, record.baseline.get(metric)),
                join(
                    words.quantity(metric, record.candidate.get(metric)),
                    tag("small", words.spread(own, metric)) if own else None,
                ),
                join(
                    words.times(record.ratio.get(metric)),
                    tag("small", words.spread(of_ratio)) if of_ratio else None,
                ),
            ]
        )
    return tag(
        "section",
        tag("h2", "Side by side"),
        page.table("Medians, with 95 % intervals below", ("Metric", "Baseline", "Candidate", "Ratio"), rows),
        _quality_table(record) if record.quality else None,
    )


def _quality_table(record: Record) -> Html:
    rows: list[list[Child]] = [
        [
            name,
            words.with_error(found.baseline_perplexity, found.baseline_standard_error),
            words.with_error(found.candidate_perplexity, found.candidate_standard_error),
            join(
                words.times(found.perplexity_ratio),
                tag("small", words.spread(found.ratio_interval)) if found.ratio_interval else None,
            ),
            words.with_error(found.kl, found.kl_standard_error),
            words.share(found.top1_agreement),
        ]
        for name, found in record.quality.items()
    ]
    return join(
        tag("h3", "Predictions on the evaluation text"),
        tag(
            "p",
            "KL divergence says how far the predicted probabilities moved (0 is identical); top-1 agreement is the "
            "share of positions where both would write the same next token.",
            class_="note",
        ),
        page.table(
            "Perplexities with standard errors; ratios with 95 % intervals from paired windows",
            ("Second against first", "First", "Second", "Ratio", "KL, nats per token", "Top-1 agreement"),
            rows,
        ),
    )


def _speed(runs: Sequence[PairedRuns]) -> Html:
    return tag(
        "section",
        tag("h2", "Speed, run by run"),
        tag(
            "p",
            "Both sides took turns. Each dot is one run, the first at the top; the bar is the median. "
            "The axes do not start at zero.",
            class_="note",
        ),
        _KEY,
        tag("div", [_runs_figure(found) for found in runs], class_="plots"),
    )


def _runs_figure(found: PairedRuns) -> Html:
    medians = (found.baseline_summary.median, found.candidate_summary.median)
    again = (
        f" The baseline against itself (every second run / the others): {words.times(found.a_a_ratio)}."
        if found.a_a_ratio is not None
        else ""
    )
    return tag(
        "figure",
        tag("h3", f"{found.name[:1].upper()}{found.name[1:]}"),
        plots.dots(found.name, found.unit, found.baseline, found.candidate, medians),
        tag(
            "figcaption",
            f"Medians {words.number(medians[0])} and {words.number(medians[1])} {found.unit}, ratio "
            f"{words.times(found.ratio)} ({words.spread(found.ratio_interval)}).{again}",
        ),
    )


# --- How to repeat it


def _made(record: Record) -> Html:
    return tag(
        "section",
        tag("h2", "How it was made"),
        page.facts(
            {
                "Dense model": record.model.name,
                "Licence": record.model.licence or "unknown",
                "Candidate artifact": record.artifacts.get("candidate") or "none",
                "Baseline artifact": record.artifacts.get("baseline") or "none",
            }
        ),
        page.texts(record.texts),
        join(tag("h3", "Recipe"), tag("pre", _yaml(record.recipe), tabindex="0")) if record.recipe else None,
        page.machine_facts(record.machine),
        page.to_repeat(record.commands),
    )


def _yaml(content: object) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)).strip()
