"""Asking the consumers of an export: how outcomes are judged, recorded and shown. The real ones: tests/consumers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.consumers import CONSUMERS, record
from benchmarks.consumers.__main__ import main
from benchmarks.consumers.base import greedy_text, judge, last_line
from benchmarks.consumers.python import ONNXRUNTIME, TASK, InItsOwn
from benchmarks.readme import with_fresh_tables
from benchmarks.record import write
from compress.errors import BackendError
from compress.layout import layout_of
from compress.surgery import drop_attention, share_blocks
from exporters import ExportOptions, export, read_export
from tests.conftest import tiny, token_rows
from tests.exporters.test_onnx import loaded
from tests.test_imports import ORDER, imported_packages


class Says:
    """A consumer that says the same of everything, or fails."""

    def __init__(self, text: str | BackendError) -> None:
        self.text = text

    def prepare(self) -> None: ...

    def versions(self) -> dict[str, str]:
        return {"says": "1.0"}

    def run(self, export: Path, prompt: str, new_tokens: int) -> str:
        if isinstance(self.text, BackendError):
            raise self.text
        return self.text


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny("llama")
    drop_attention(model, (1,))
    path = tmp_path_factory.mktemp("consumers") / "x"
    export(loaded(model), path, to="onnx", options=ExportOptions(), check_tokens=token_rows(rows=1).tokens)
    return path


def test_onnxruntime_alone_generates_what_our_session_generates(exported: Path) -> None:
    found = judge("onnxruntime", ONNXRUNTIME, exported, greedy_text(exported), "fp32")
    assert found.ok, found.reason
    assert set(found.versions) == {"onnxruntime", "tokenizers"}


def test_another_text_is_no_and_says_where_it_parts(exported: Path) -> None:
    found = judge("x", Says("the same"), exported, "the other", "fp32")
    assert (found.ok, found.text, found.reason) == (False, "the same", "another text after 4 of 9 characters")


def test_a_failure_is_no_and_names_no_path(exported: Path) -> None:
    found = judge("x", Says(BackendError(f"cannot open {exported}/model.onnx")), exported, "", "fp32")
    assert (found.ok, found.text, found.reason) == (False, None, "cannot open x/model.onnx")


def test_an_environment_that_is_missing_is_named(exported: Path, tmp_path: Path) -> None:
    found = judge("x", InItsOwn("run_optimum.py", (), tmp_path / "none", (), "torch"), exported, "", "fp32")
    assert found.reason is not None
    assert "make test-consumers" in found.reason


def test_a_record_is_written_read_and_shown(exported: Path, tmp_path: Path) -> None:
    reference = greedy_text(exported)
    consumers = {"one": Says(reference), "two": Says("no | this"), "three": Says("no | this")}
    kept: list[int] = []
    asked = record.ask([exported, exported], consumers, "command", lambda so_far: kept.append(len(so_far.exports)))
    assert kept == [1, 2]
    found = write(asked, tmp_path / "record.json")
    assert record.read(tmp_path / "record.json") == found
    assert [each.layout for each in found.exports] == ["ragged"] * 2
    shown = record.table(found)
    assert shown.splitlines()[0] == "| export | one | two | three |"
    assert shown.splitlines()[2:4] == ["| ragged, fp32 | yes | no (1) | no (1) |"] * 2
    assert shown.splitlines()[5].startswith("1. another text after 0 of ")
    page = "<!-- measured: begin record.json -->\nold\n<!-- measured: end -->\n"
    assert shown in with_fresh_tables(page, tmp_path)


def test_the_command_prints_the_table_and_says_by_its_exit_code_whether_all_is_well(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONSUMERS, "optimum", Says(greedy_text(exported)))
    assert main([str(exported), "--only", "optimum"]) == 0
    assert "| ragged, fp32 | yes |" in capsys.readouterr().out
    monkeypatch.setitem(CONSUMERS, "optimum", Says("else"))
    assert main([str(exported), "--only", "optimum"]) == 3
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize("kind", ["plain", "ragged", "shared"])
def test_the_layout_of_an_export_is_that_of_its_model(kind: str, tmp_path: Path) -> None:
    model = tiny("llama")
    if kind == "ragged":
        drop_attention(model, (1,))
    if kind == "shared":
        share_blocks(model, {0: [1]})
    made = export(loaded(model), tmp_path / "x", to="onnx", check_tokens=token_rows(rows=1, length=4).tokens)
    assert record.layout_kind(read_export(made.path)) == layout_of(model).kind == kind


def test_a_program_that_fails_is_quoted_with_its_last_line() -> None:
    with pytest.raises(BackendError, match=r"^ValueError: so$"):
        last_line([sys.executable, "-c", "raise ValueError('so')"], 60)
    with pytest.raises(BackendError, match="without its result"):
        last_line([sys.executable, "-c", "pass"], 60)
    assert last_line([sys.executable, "-c", "print('noise'); print(3)"], 60) == json.loads("3")


def test_the_programs_that_stand_for_users_import_nothing_of_ours() -> None:
    programs = [*TASK.parent.glob("run_*.py"), TASK.with_suffix(".py")]
    assert len(programs) == 5
    assert not [path.name for path in programs if set(imported_packages(path.read_text())) & set(ORDER)]
