"""The record of a suite of deltas: what is left of a gain, the tables, and the picture."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import delta_table
from benchmarks import record as records
from benchmarks.answers import AnswerScore
from benchmarks.delta_table import (
    GRIDS,
    DeltaCell,
    DeltaPair,
    DeltaTable,
    Score,
    Timing,
    bytes_grid,
    chart,
    divergence_grid,
    gain_kept,
    grid_named,
    kept_of,
    methods_grid,
    pairs_grid,
    timings_grid,
)
from benchmarks.plots import Curve, tradeoff
from benchmarks.readme import ROOT, pictures, with_fresh_tables
from benchmarks.record import Record
from compress.errors import ConfigError
from compress.schema import read_yaml
from deploy.delta_suite import DeltaSuite
from deploy.show import describe

SVG = "{http://www.w3.org/2000/svg}"
BASE = (2.0, 3.0, 2.5, 3.5, 2.0, 3.0)
TUNED = (1.0, 1.5, 2.0, 1.5, 1.0, 2.0)


def between(share: float) -> tuple[float, ...]:
    """Losses of something that keeps a share of the gain of every item."""
    return tuple(base + share * (tuned - base) for base, tuned in zip(BASE, TUNED, strict=True))


def score(nll: Sequence[float], right: str = "", kl: float | None = None, encoder: bool = False) -> Score:
    accuracy = right.count("1") / len(right) if right else None
    answers = AnswerScore(accuracy, sum(nll) / len(nll), kl, right, tuple(nll))
    return Score(answers) if encoder else Score(answers, 17.25, None if kl is None else kl / 2)


def cell(label: str, p: float | None, values: str, size: int, share: float, encoder: bool = False) -> DeltaCell:
    right = "110111"
    return DeltaCell(label, p, values, {"p": p}, size + 500, size, score(between(share), right, 0.25, encoder), 1.5)


CELLS = (
    cell("DARE", 0.5, "int8", 64_000, 0.95),
    cell("DARE", 0.9, "int8", 13_000, 0.6),
    cell("DARE", 0.9, "sign", 2_000, 0.5),
    cell("drop & <keep>", 0.9, "int8", 12_900, -0.2),
    cell("BitDelta-like sign", 0.0, "sign", 16_000, 0.9),
    cell("low rank", None, "bf16", 21_000, 0.8),
)


@pytest.fixture
def table(record: Record) -> DeltaTable:
    """Two fine-tunes with made-up numbers that could be true."""
    decoder = DeltaPair(
        name="sst2",
        model="demo:smollm2",
        finetune={"steps": 300, "learning_rate": 3e-5},
        loss=0.21,
        base=score(BASE, "010101", 0.8),
        finetuned=score(TUNED, "110111"),
        pruned_parameters=64_000,
        mean_abs_delta=2.31e-4,
        exact_zeros=0.125,
        influence_ratio=0.031,
        cells=CELLS,
    )
    encoder = dataclasses.replace(
        decoder,
        name="sst2-encoder",
        base=score(BASE, encoder=True),
        finetuned=score(TUNED, encoder=True),
        cells=(cell("DARE", 0.9, "int8", 13_000, 0.7, encoder=True),),
    )
    return DeltaTable(
        created="2026-11-20T09:30:00+00:00",
        title="deltas",
        profile="cpu",
        settings={"window": 512, "device": "cpu"},
        files={"tasks/sst2.train.tsv": "a3" * 32},
        pairs=(decoder, encoder),
        timings=(Timing("apply", (2.0, 1.0, 3.0), "load + save", (4.0, 5.0, 3.0)),),
        commands=("foldaway suite deltas.yaml --data DIR -o DIR",),
        machine=record.machine,
    )


# --- What is left of a gain


def test_the_base_keeps_nothing_of_the_gain_and_the_fine_tune_all() -> None:
    for losses, expected in ((BASE, 0.0), (TUNED, 1.0)):
        value, interval = gain_kept(BASE, TUNED, losses)
        assert value == expected
        assert (interval.low, interval.high) == (expected, expected)


@pytest.mark.parametrize("share", [-0.3, 0.25, 0.9, 1.2])
def test_a_share_of_every_gain_is_that_share_of_the_whole(share: float) -> None:
    value, interval = gain_kept(BASE, TUNED, between(share))
    assert value == pytest.approx(share)
    assert (interval.low, interval.high) == pytest.approx((share, share))


def test_the_interval_contains_the_value_and_is_wider_where_items_differ() -> None:
    generator = np.random.default_rng(5)
    base = generator.uniform(2, 4, 200)
    tuned, widths = base - generator.uniform(0.5, 1.5, 200), []
    for noise in (0.05, 0.5):
        candidate = base + 0.7 * (tuned - base) + noise * generator.standard_normal(200)
        value, interval = gain_kept(list(base), list(tuned), list(candidate))
        means = [each.mean() for each in (base, tuned, candidate)]
        assert value == pytest.approx((means[2] - means[0]) / (means[1] - means[0]))
        assert interval.low < value < interval.high
        assert interval.low < 0.7 < interval.high
        assert interval.level == 0.95
        widths.append(interval.high - interval.low)
    assert widths[0] < widths[1] < 0.25
    assert gain_kept(list(base), list(tuned), list(candidate)) == (value, interval)  # draws are seeded
    assert gain_kept(list(base), list(tuned), list(candidate), seed=1)[1] != interval


def test_a_cell_keeps_a_share_of_the_gain_in_likelihood(table: DeltaTable) -> None:
    pair = table.pairs[0]
    shares = (0.95, 0.6, 0.5, -0.2, 0.9, 0.8)
    assert [kept_of(pair, each)[0] for each in pair.cells] == pytest.approx(shares)


# --- The record


def test_a_record_reads_back(table: DeltaTable, tmp_path: Path) -> None:
    written = records.write(table, tmp_path / "record.json")
    assert written.id
    assert delta_table.read(tmp_path / "record.json") == written
    assert written.pairs == table.pairs
    assert written.timings[0].ratio == 0.5
    kind, words, content = describe(tmp_path / "record.json")
    assert (kind, content["id"]) == ("delta table", written.id)
    assert words == ["deltas, profile cpu: ways to store sst2 (6), sst2-encoder (1)"]


def test_a_record_that_was_edited_is_refused(table: DeltaTable, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write(table, path)
    text = path.read_text()
    for old, new in (("0.031", "0.032"), ('"title"', '"titel"'), ("foldaway-delta-table", "foldaway-table")):
        path.write_text(text.replace(old, new))
        with pytest.raises(ConfigError):
            delta_table.read(path)


def test_other_records_are_no_tables_of_deltas(record: Record, tmp_path: Path) -> None:
    records.write(record, tmp_path / "record.json")
    with pytest.raises(ConfigError, match="foldaway-delta-table"):
        delta_table.read(tmp_path / "record.json")


# --- Tables


def test_every_name_leads_to_a_table(table: DeltaTable) -> None:
    assert set(GRIDS) == {"pairs", "timings", "methods:PAIR", "divergence:PAIR", "bytes:PAIR"}
    for name in GRIDS:
        for pair in table.pairs:
            grid = grid_named(table, name.replace("PAIR", pair.name))
            assert grid is not None, name
            assert grid.rows
            assert all(len(row) == len(grid.headers) for row in grid.rows)


@pytest.mark.parametrize("name", ["methods", "methods:", "methods:gsm8k", "pairs:sst2", "speed", "speed:sst2", ""])
def test_other_names_lead_to_none(name: str, table: DeltaTable) -> None:
    assert grid_named(table, name) is None


def test_the_methods_stand_beside_each_other_at_every_p(table: DeltaTable) -> None:
    grid = methods_grid(table.pairs[0])
    assert grid.headers == ("gain kept, int8", "p = 0.5", "p = 0.9")
    assert grid.rows == (
        ("DARE", "95% (95% to 95%), 83.3% right", "60% (60% to 60%), 83.3% right"),
        ("drop & <keep>", "", "-20% (-20% to -20%), 83.3% right"),
    )


def test_divergences_come_with_perplexities_where_there_are_any(table: DeltaTable) -> None:
    decoder, encoder = (divergence_grid(pair) for pair in table.pairs)
    assert decoder.rows[0] == ("DARE", "0.25, perplexity 17.25", "0.25, perplexity 17.25")
    assert encoder.rows == (("DARE", "0.25"),)


def test_cells_are_ranked_by_their_bytes(table: DeltaTable) -> None:
    rows = bytes_grid(table.pairs[0]).rows
    assert [row[0] for row in rows] == [
        "DARE", "drop & <keep>", "DARE", "BitDelta-like sign", "low rank", "DARE"
    ]  # fmt: skip
    assert rows[0] == ("DARE", "0.9", "sign", "0.00 MB", "64.0", "50% (50% to 50%)", "83.3%")
    assert rows[4][1:5] == ("", "bf16", "0.02 MB", "6.1")


def test_a_cell_that_prunes_nothing_has_its_row_too(table: DeltaTable) -> None:
    whole = dataclasses.replace(CELLS[0], pruned_bytes=0, bytes=128_500, values="bf16", p=0.0)
    pair = dataclasses.replace(table.pairs[0], cells=(whole,))
    ((label, *_),) = bytes_grid(pair).rows
    assert label == "DARE"


def test_pairs_and_timings_are_told(table: DeltaTable) -> None:
    decoder, encoder = pairs_grid(table).rows
    assert decoder == ("sst2", "50.0% → 83.3%", "2.67 → 1.5", "0.00023", "12%", "0.031")
    assert encoder[:2] == ("sst2-encoder", "")
    assert timings_grid(table).rows == (("apply", "2 s", "load + save: 4 s", "× 0.50"),)


def test_documents_take_their_tables_and_pictures_from_the_record(table: DeltaTable, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "machine"
    path = folder / "deltas.json"
    records.write(table, path)
    source = "benchmarks/results/machine/deltas.json"
    document = f"<!-- measured: begin {source} {{}} -->\nold\n<!-- measured: end -->"
    fresh = with_fresh_tables(document.format("bytes:sst2"), tmp_path)
    assert bytes_grid(table.pairs[0]).markdown() in fresh
    assert "old" not in fresh
    with pytest.raises(ConfigError, match="methods:PAIR"):
        with_fresh_tables(document.format("perplexity"), tmp_path)
    assert pictures(tmp_path) == {path.with_suffix(".svg"): chart(table) + "\n"}


# --- The picture


def texts(picture: str) -> dict[str, ElementTree.Element]:
    """Words -> element; a picture that is no XML has none."""
    return {element.text or "": element for element in ElementTree.fromstring(picture).iter(f"{SVG}text")}


def test_the_picture_is_well_formed_and_says_its_numbers_in_words(table: DeltaTable) -> None:
    picture = chart(table)
    root = ElementTree.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "deltas: sst2 on demo:smollm2"
    words = root.findtext(f"{SVG}desc") or ""
    assert "DARE: 0.0135 MB 0.6, 0.0645 MB 0.95" in words
    assert "drop & <keep>: 0.0134 MB -0.2" in words
    names = {"DARE", "DARE, sign", "drop & <keep>", "BitDelta-like sign, sign", "low rank"}
    assert names <= set(texts(picture))
    assert {"bytes of the package, log scale", "share of the fine-tune's gain kept"} <= set(texts(picture))
    assert len(root.findall(f"{SVG}polyline")) == len(names)


def test_shares_below_zero_have_no_mark_and_stay_in_the_words() -> None:
    lines = [Curve("a", ((1e6, -0.5), (2e6, 0.5), (4e6, 1.0))), Curve("b", ((1e6, -0.1),))]
    root = ElementTree.fromstring(tradeoff("title", lines, ("across", "up")))
    assert len(root.findall(f"{SVG}circle")) == 2
    assert root.findtext(f"{SVG}desc") == "a: 1 MB -0.5, 2 MB 0.5, 4 MB 1; b: 1 MB -0.1"
    assert all(line.get("clip-path") for line in root.findall(f"{SVG}polyline"))


def test_marks_lie_where_their_numbers_say() -> None:
    lines = [Curve("a", ((1e6, 0.0), (1e7, 1.0))), Curve("b", ((1e6, 1.0), (1e7, 0.0)))]
    root = ElementTree.fromstring(tradeoff("title", lines, ("across", "up")))
    marks = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in root.findall(f"{SVG}circle")]
    assert marks[0][0] == marks[2][0] < marks[1][0] == marks[3][0]
    assert marks[0][1] == marks[3][1] > marks[1][1] == marks[2][1]
    ticks = {element.text: element for element in root.iter(f"{SVG}text")}
    assert float(ticks["1"].get("y") or 0) == pytest.approx(marks[1][1] + 4, abs=0.01)
    assert float(ticks["10 MB"].get("x") or 0) == pytest.approx(marks[1][0], abs=0.01)


def test_a_single_point_is_a_picture() -> None:
    root = ElementTree.fromstring(tradeoff("title", [Curve("a", ((5e5, 0.5),))], ("across", "up")))
    assert len(root.findall(f"{SVG}circle")) == 1


def names_of_the_suite() -> list[str]:
    """What the lines of the project's own picture are called."""
    suite = read_yaml(ROOT / "benchmarks" / "suites" / "deltas.yaml", DeltaSuite, "suite")
    ways = suite.grids[suite.pairs[0].grid]
    names = [
        way.label if values == "int8" or way.ranks else f"{way.label}, {values}"
        for way in ways
        for values in way.values
    ]
    return list(dict.fromkeys(names))


def test_every_way_of_the_suite_has_a_look_of_its_own_and_its_name_inside_the_picture() -> None:
    lines = [Curve(name, ((1e6 * (n + 1), 0.5), (2e6 * (n + 1), 0.75))) for n, name in enumerate(names_of_the_suite())]
    picture = tradeoff("title", lines, ("across", "up"))
    root, found = ElementTree.fromstring(picture), texts(picture)
    width, height = map(float, (root.get("viewBox") or "").split()[2:])
    looks = {(line.get("stroke"), line.get("stroke-dasharray")) for line in root.findall(f"{SVG}polyline")}
    assert len(looks) == len(lines)
    for line in lines:
        x, y = (float(found[line.label].get(axis) or "nan") for axis in "xy")
        assert 0 < y < height, line.label
        assert x + 6 * len(line.label) < width, line.label  # letters of 13 px are about 6 px wide


def test_no_name_of_a_way_is_markup() -> None:
    picture = tradeoff("<title> & more", [Curve("</text><script>", ((1e6, 0.5),))], ("<across>", "up"))
    assert not re.search(r"<script|<across", picture)
    assert "</text><script>" in texts(picture)


def test_what_is_written_is_json_without_infinities(table: DeltaTable, tmp_path: Path) -> None:
    endless = dataclasses.replace(table.pairs[0], influence_ratio=float("inf"))
    written = records.write(table.model_copy(update={"pairs": (endless,)}), tmp_path / "record.json")
    json.loads((tmp_path / "record.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert delta_table.read(tmp_path / "record.json") == written
