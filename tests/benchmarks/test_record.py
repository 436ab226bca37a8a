"""Records: written whole, read with care, and the line that a command prints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record as records
from benchmarks.measures import Measures
from benchmarks.record import Record
from compress.errors import ConfigError


def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    written = records.write(record, tmp_path / "new" / "record.json")
    assert records.read(tmp_path / "new" / "record.json") == written
    assert written.model_copy(update={"id": ""}) == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record.json"]


def test_the_same_content_has_the_same_id_and_other_content_another(record: Record) -> None:
    assert records.sealed(record).id == records.sealed(record.model_copy(update={"id": "x"})).id
    assert records.sealed(record).id != records.sealed(record.model_copy(update={"title": "x"})).id


def test_nan_and_infinity_survive(record: Record, tmp_path: Path) -> None:
    broken = record.model_copy(update={"candidate": Measures(perplexity=math.inf, ttft_seconds=math.nan)})
    records.write(broken, tmp_path / "record.json")
    found = records.read(tmp_path / "record.json").candidate
    assert found.perplexity == math.inf
    assert found.ttft_seconds is not None
    assert math.isnan(found.ttft_seconds)


def test_a_record_that_was_edited_is_refused(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    records.write(record, path)
    path.write_text(path.read_text().replace("106384512", "96384512"))
    with pytest.raises(ConfigError, match="was changed after it was written"):
        records.read(path)


def _rewrite(record: Record, path: Path, change: dict[str, Any], inside: tuple[str, ...] = ()) -> None:
    content = json.loads(record.model_dump_json())
    place = content
    for key in inside:
        place = place[key]
    place.update(change)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "inside", "complaint"),
    [
        ({"extra": 1}, (), "extra: this key is not known"),
        ({"extra": 1}, ("baseline",), "baseline.extra: this key is not known"),
        ({"extra": 1}, ("machine",), "machine.extra: this key is not known"),
        ({"extra": 1}, ("quality", "candidate int4 against dense int4"), "this key is not known"),
        ({"size_bites": 1}, ("ratio",), "ratio.size_bites"),
        ({"version": 2}, (), "has schema version 2; this foldaway reads version 1"),
        ({"format": "other"}, (), "is not a benchmark record"),
        ({"kind": "walk"}, (), "kind"),
        ({"verdict": "perhaps"}, (), "verdict"),
        ({"parameters": "many"}, ("candidate",), "candidate.parameters"),
    ],
)
def test_what_the_schema_does_not_know_is_refused_on_one_line(
    record: Record, tmp_path: Path, change: dict[str, Any], inside: tuple[str, ...], complaint: str
) -> None:
    path = tmp_path / "record.json"
    _rewrite(record, path, change, inside)
    with pytest.raises(ConfigError) as caught:
        records.read(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"format": 1}'])
def test_a_file_that_is_no_record_is_refused_on_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        records.read(tmp_path / "record.json")
    assert "\n" not in str(caught.value)


def test_a_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        records.read(tmp_path / "record.json")


def test_the_last_line_holds_what_the_command_promises(record: Record) -> None:
    line = record.last_line(Path("runs/demo/report.html"))
    assert list(line) == ["verdict", "artifact", "report", "baseline", "candidate", "ratio", "gates"]
    metrics = [field.name for field in dataclasses.fields(Measures)]
    assert all(list(line[side]) == metrics for side in ("baseline", "candidate", "ratio"))
    assert (line["verdict"], line["artifact"], line["report"]) == ("pass", "9f2c51d07ab3e684", "runs/demo/report.html")
    assert line["gates"][1] == {
        "name": "size_bytes.max_ratio",
        "limit": 0.9,
        "value": 68_902_117 / 86_433_291,
        "passed": True,
    }


def test_the_last_line_is_strict_json_even_when_a_number_is_not_one(record: Record) -> None:
    broken = record.model_copy(
        update={
            "candidate": Measures(perplexity=math.nan),
            "gates": (dataclasses.replace(record.gates[0], value=math.nan, outcome="fail"),),
        }
    )
    line = json.dumps(broken.last_line(Path("report.html")), allow_nan=False)
    assert json.loads(line)["gates"][0]["value"] == "NaN"
