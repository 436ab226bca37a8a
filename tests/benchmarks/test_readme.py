"""The README's numbers come from committed records."""

from __future__ import annotations

from pathlib import Path

from benchmarks import record as records
from benchmarks.readme import ROOT, with_fresh_tables


def test_the_readme_says_what_its_records_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- measured: begin benchmarks/results/" in text
    assert with_fresh_tables(text) == text, "stale: run python -m benchmarks.readme"


def test_every_committed_record_can_be_read() -> None:
    paths = sorted(Path(ROOT / "benchmarks" / "results").rglob("*.json"))
    assert paths
    for path in paths:
        records.read(path)
