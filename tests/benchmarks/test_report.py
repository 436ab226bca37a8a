"""The report: complete, self-contained, safe with hostile text, and still a page when numbers are missing or broken."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import report, words
from benchmarks.intervals import Interval
from benchmarks.markup import VOID, Html, tag
from benchmarks.measures import METRICS, Intervals, Measures
from benchmarks.record import Ladder, Record

HOSTILE = "<script>alert('x')</script>\"><img src=http://example.org/x onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Everything that is in a page; complains about elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def count(self, name: str) -> int:
        return sum(element == name for element, _ in self.elements)


def test_the_verdict_comes_first_and_in_words(record: Record) -> None:
    page = Page(report.render(record))
    assert (
        page.text.index("✓ Pass") < page.text.index("The candidate meets all 4 limits.") < page.text.index("The gate")
    )


def test_every_number_of_both_sides_and_every_limit_is_there(record: Record) -> None:
    text = Page(report.render(record)).text
    for metric in METRICS:
        assert words.quantity(metric, record.baseline.get(metric)) in text
        assert words.quantity(metric, record.candidate.get(metric)) in text
        assert words.times(record.ratio[metric]) in text
    for line in record.gates:
        assert words.limit(line) in text
        assert words.value(line) in text
    assert record.ladder is not None
    for step in record.ladder.steps:
        assert f"{words.number(step.perplexity)} ± {words.number(step.perplexity_standard_error or 0)}" in text
    for variant in record.variants:
        assert variant.name in text
    for runs in record.runs:
        assert all(words.number(value) in text for value in (*runs.baseline, *runs.candidate))
    for found in record.quality.values():
        assert words.number(found.kl) in text
        assert words.share(found.top1_agreement) in text


def test_it_says_how_to_repeat_it(record: Record) -> None:
    text = Page(report.render(record)).text
    facts = [record.commands[0], "9f2c51d07ab3e684", "a3" * 32, "5d" * 32, "Example CPU 3000", "torch 2.13.0"]
    facts += ["0123456789abcdef0123456789abcdef01234567", "apache-2.0", "sparsity: [0.125, 0.25, 0.375]"]
    assert [fact for fact in facts if fact not in text] == []


def test_the_number_format_is_not_credited_to_the_compression(record: Record) -> None:
    text = Page(report.render(record)).text.replace(words.NBSP, " ")
    assert "(dense, fp32 PyTorch to dense, int4 ONNX): size on disk × 0.161, perplexity × 1.02." in text
    assert "(dense, int4 ONNX to candidate, int4 ONNX): size on disk × 0.797, perplexity × 1.44." in text
    assert "dequantised from Q4_1" in text
    trained = record.model_copy(update={"model": dataclasses.replace(record.model, quantised_from=None)})
    assert "dequantised" not in Page(report.render(trained)).text


def test_the_page_needs_nothing_from_elsewhere(record: Record) -> None:
    text = report.render(record)
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "div", "span"}
    allowed |= {"h1", "h2", "h3", "p", "ul", "li", "dl", "dt", "dd", "figure", "figcaption", "small", "pre"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    allowed |= {"svg", "desc", "g", "rect", "line", "circle", "text", "polyline"}
    assert {name for name, _ in page.elements} <= allowed
    attributes = {name for _, attrs in page.elements for name in attrs}
    assert not attributes & {"src", "href", "srcset", "style", "action", "data", "xlink:href"}
    assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?://", text)
    policies = [attrs["content"] for name, attrs in page.elements if name == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_text_stays_text(record: Record) -> None:
    hostile = record.model_copy(
        update={
            "title": HOSTILE,
            "measured": HOSTILE,
            "model": dataclasses.replace(record.model, name=HOSTILE, licence=HOSTILE, quantised_from=HOSTILE),
            "artifacts": {"candidate": HOSTILE, "baseline": HOSTILE},
            "variants": (dataclasses.replace(record.variants[0], name=HOSTILE), *record.variants[1:]),
            "quality": {HOSTILE: next(iter(record.quality.values()))},
            "runs": (dataclasses.replace(record.runs[0], name=HOSTILE, unit=HOSTILE),),
            "recipe": {HOSTILE: HOSTILE},
            "texts": {HOSTILE: {HOSTILE: HOSTILE}},
            "commands": (HOSTILE,),
            "machine": dataclasses.replace(record.machine, cpu=HOSTILE, packages={HOSTILE: HOSTILE}),
        }
    )
    page = Page(report.render(hostile))
    assert page.count("script") == page.count("img") == 0
    assert {name for name, _ in page.elements} == {name for name, _ in Page(report.render(record)).elements}
    assert page.text.count(HOSTILE) >= 12


def test_plots_and_tables_can_be_read_without_seeing_them(record: Record) -> None:
    page = Page(report.render(record))
    assert page.count("svg") == page.count("desc") >= len(METRICS) + len(record.gates) + len(record.runs) + 1
    assert all(attrs.get("aria-label") for name, attrs in page.elements if name == "svg")
    assert page.count("table") == page.count("caption")
    assert all(attrs.get("scope") in ("row", "col") for name, attrs in page.elements if name == "th")
    assert dict(page.elements)["html"]["lang"] == "en"


@pytest.mark.parametrize("outcome", ["fail", "undecided"])
def test_a_verdict_is_shown_for_what_it_is(record: Record, outcome: str) -> None:
    lines = (dataclasses.replace(record.gates[0], outcome=outcome), *record.gates[1:])
    text = Page(report.render(record.model_copy(update={"verdict": outcome, "gates": lines}))).text
    assert f"{report.SIGNS[lines[0].outcome]} {outcome.capitalize()}" in text
    assert words.headline(record.model_copy(update={"verdict": outcome, "gates": lines})) in text


def test_a_record_with_almost_nothing_is_still_a_page(record: Record) -> None:
    bare = record.model_copy(
        update={
            "kind": "bench",
            "baseline": Measures(parameters=100),
            "candidate": Measures(),
            "ratio": dict.fromkeys(METRICS),
            "intervals": Intervals(),
            "verdict": None,
            "gates": (),
            "ladder": None,
            "variants": (),
            "quality": {},
            "runs": (),
            "recipe": None,
            "texts": {},
            "commands": (),
        }
    )
    text = Page(report.render(bare)).text
    assert "No gate" in text
    assert text.count("Not measured on both sides.") == len(METRICS)


def test_broken_numbers_are_named_and_not_drawn(record: Record) -> None:
    assert record.ladder is not None
    steps = (*record.ladder.steps[:-1], dataclasses.replace(record.ladder.steps[-1], perplexity=math.inf))
    gate = dataclasses.replace(
        record.gates[0], value=math.nan, interval=Interval(math.nan, math.nan, 0.95, ""), outcome="fail"
    )
    broken = record.model_copy(
        update={
            "candidate": dataclasses.replace(record.candidate, perplexity=math.nan),
            "ratio": {**record.ratio, "perplexity": math.nan},
            "gates": (gate, *record.gates[1:]),
            "ladder": dataclasses.replace(record.ladder, steps=steps),
            "verdict": "fail",
        }
    )
    page = report.render(broken)
    assert "not a number" in page
    assert not re.search(r'(?:cx|cy|x|y|x1|x2|y1|y2|width|points)="[^"]*(?:nan|inf)', page)


def test_a_ladder_over_orders_of_magnitude_gets_a_log_scale(record: Record) -> None:
    assert record.ladder is not None
    last = dataclasses.replace(record.ladder.steps[-1], perplexity=8437.0, perplexity_standard_error=9000.0)
    steep = Ladder("fp32", None, (*record.ladder.steps[:-1], last))
    text = Page(report.render(record.model_copy(update={"ladder": steep}))).text
    assert "log scale" in text
    assert "limit 32.82" not in text


def test_the_report_is_written_whole(record: Record, tmp_path: Path) -> None:
    report.write(record, tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").read_text("utf-8") == report.render(record)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_markup_escapes_text_and_attributes_and_keeps_markup() -> None:
    made = tag("p", "<b>", tag("b", "x"), ["&", Html("<br>")], title='"', class_="c", aria_label=None, width=1.5)
    assert made == '<p title="&quot;" class="c" width="1.5">&lt;b&gt;<b>x</b>&amp;<br></p>'
