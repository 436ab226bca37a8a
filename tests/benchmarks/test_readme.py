"""The numbers and pictures of the documents come from committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import delta_table as deltas
from benchmarks import record as records
from benchmarks import table as suites
from benchmarks.consumers import record as consumers
from benchmarks.readme import ROOT, documents, pictures, with_fresh_tables
from benchmarks.runtimes import record as runtimes
from benchmarks.throughput import record as throughput
from compress.errors import ConfigError

RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_a_document_says_what_its_records_say(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert with_fresh_tables(text, folder=document.parent) == text, "stale: run python -m benchmarks.readme"


def test_the_readme_has_tables_of_a_run_and_of_a_suite() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "/demo.json -->" in text
    assert "/quality.json perplexity -->" in text


def test_the_pictures_are_those_of_their_records() -> None:
    drawn = pictures()
    assert drawn
    for path, picture in drawn.items():
        assert path.read_text(encoding="utf-8") == picture, "stale: run python -m benchmarks.readme"


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_every_committed_record_can_be_read(path: Path) -> None:
    readers = {each.FORMAT: each.read for each in (suites, deltas, runtimes, consumers, throughput)}
    assert readers.get(records.format_of(path), records.read)(path).id


def test_a_table_that_a_record_does_not_have_is_refused() -> None:
    path = next(path for path in RECORDS if records.format_of(path) == suites.FORMAT)
    marker = f"<!-- measured: begin {path.relative_to(ROOT)} speed -->\n<!-- measured: end -->"
    with pytest.raises(ConfigError, match="speed"):
        with_fresh_tables(marker)
