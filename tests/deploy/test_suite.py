"""A suite on a tiny model: its cells, its record, its tables, and how it goes on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks import table as tables
from benchmarks.servers import child_environment
from benchmarks.table import Table
from compress import artifact
from compress.errors import ConfigError, FoldawayError
from compress.result import no_progress
from deploy.cli import main
from deploy.show import describe
from deploy.suite import SuiteRun
from tests.conftest import byte_tokenizer, tiny
from tests.deploy.test_eval import QUIZ, TEXT, write_rows

SUITE: dict[str, Any] = {
    "name": "tiny",
    "texts": {"stories": "text/stories.txt"},
    "tasks": {"quiz": "quiz.jsonl"},
    "calibration": "builtin",
    "evaluation": "stories",
    "sparsities": [0.25, 0.5],
    "methods": [
        {"label": "2SSP", "method": "2ssp", "set": {"alpha": 1.0}},
        {"label": "SLEB", "method": "sleb"},
    ],
    "calibrations": {"label": "2SSP", "sparsity": 0.25, "draws": [{"source": "builtin", "seeds": [0, 1]}]},
    "profiles": {"cpu": {"rows": 2, "length": 48, "window": 48, "windows": 3, "limit": 4}},
}
CELLS = ["dense", "2ssp-0.25", "2ssp-0.5", "sleb-0.25", "sleb-0.5", "2ssp-0.25-builtin-1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a model, a text and a task."""
    data = tmp_path / "data"
    artifact.write_model(tiny("llama"), byte_tokenizer(), data / "model")
    (data / "text").mkdir()
    (data / "text" / "stories.txt").write_text(TEXT)
    write_rows(data / "quiz.jsonl", QUIZ)
    return data


def suite(data: Path, root: Path, **changes: Any) -> SuiteRun:
    file = data / "tiny.yaml"
    file.write_text(yaml.safe_dump({"model": str(data / "model"), **SUITE, **changes}))
    return SuiteRun(file, root, data=data, profile="cpu", device="cpu", jobs=1, say=lambda text: None)


def computed(data: Path, root: Path) -> Table:
    """The suite's table, with all cells computed in this process."""
    run = suite(data, root)
    for name in CELLS:
        run.compute(name, no_progress)
    return run.run(no_progress)


def test_a_suite_fills_a_table_of_all_methods_and_sparsities(data: Path, tmp_path: Path) -> None:
    table = computed(data, tmp_path / "run")
    assert [(cell.label, cell.sparsity) for cell in table.cells] == [
        ("2SSP", 0.25), ("2SSP", 0.5), ("SLEB", 0.25), ("SLEB", 0.5)
    ]  # fmt: skip
    assert [cell.calibration and cell.calibration["seed"] for cell in table.calibrations] == [0, 1]
    assert table.calibrations[0] == table.cells[0]  # it stands in the table already
    assert table.dense.method is None
    for cell in (table.dense, *table.cells):
        assert [(task.name, task.source, task.items) for task in cell.tasks] == [("quiz", "quiz.jsonl", 4)]
        assert len(cell.perplexity.window_nll) == 3
        assert cell.peak_rss_bytes > 0
    for cell in table.cells:
        assert cell.parameters < table.dense.parameters
        assert cell.compression_seconds is not None
        assert cell.compression_seconds > 0
    written = json.loads((tmp_path / "run" / "record.json").read_text())
    named_by_the_user = {"commands", "model"}
    assert str(tmp_path) not in json.dumps({key: written[key] for key in written.keys() - named_by_the_user})
    assert tables.read(tmp_path / "run" / "record.json") == table
    assert describe(tmp_path / "run" / "record.json")[0] == "table"


def test_the_tables_and_the_picture_of_a_suite_hold_its_numbers(data: Path, tmp_path: Path) -> None:
    table = computed(data, tmp_path / "run")
    for name, grid in tables.GRIDS.items():
        made = grid(table)
        assert all(len(row) == len(made.headers) for row in made.rows), name
        assert made.markdown().count("\n") == len(made.rows) + 2
    rows = {row[0]: row for row in tables.perplexity_grid(table).rows}
    assert set(rows) == {"dense", "2SSP", "SLEB"}
    assert rows["SLEB"][2].startswith(f"{table.cells[3].perplexity.value:.4g}")
    picture = tables.chart(table)
    assert picture.count("<polyline") == 2
    assert {"2SSP", "SLEB", "dense"} <= set(re.findall(r">([^<>]+)</text>", picture))


def test_cells_that_are_there_are_not_computed_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = computed(data, tmp_path / "run")

    def fail(*args: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(SuiteRun, "_compute", fail)
    again = suite(data, tmp_path / "run").run(no_progress)
    assert again.cells == first.cells
    assert not (tmp_path / "run" / "logs").exists()  # no process was started


def test_another_text_is_another_cell(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed(data, tmp_path / "run")
    (data / "text" / "stories.txt").write_text(TEXT.replace("fox", "cat"))
    assert not (run := suite(data, tmp_path / "run")).work.has(*run._stage(run._all_jobs()[0]))


@pytest.mark.xdist_group("eval")
def test_a_suite_computes_its_cells_in_processes_of_their_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite(data, tmp_path / "x", sparsities=[0.5], methods=SUITE["methods"][1:], calibrations=None)
    root = tmp_path / "run"
    line = ["suite", str(data / "tiny.yaml"), "--data", str(data), "--jobs", "2", "-o", str(root)]
    assert main(line) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["cells"] == 1
    assert "SLEB 50.0%" in captured.err
    (cell,) = tables.read(root / "record.json").cells
    assert cell.numbers["blocks_removed"]
    assert {path.name for path in (root / "logs").iterdir()} == {"dense.log", "sleb-0.5.log"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"calibration": "stories"}, "calibrated on"),
        ({"calibrations": {**SUITE["calibrations"], "draws": [{"source": "stories"}]}}, "calibrated on"),
        ({"methods": [*SUITE["methods"], {"label": "sleb", "method": "sleb"}]}, "'sleb-0.25'"),
        ({"methods": [{"label": "x", "method": "sleb", "set": {"sparsity": 0.1}}]}, "under sparsities"),
        ({"methods": [{"label": "x", "method": "2sspp"}]}, "2sspp"),
        ({"methods": [{"label": "x", "method": "sleb"}, {"label": "x", "method": "sleb"}]}, "label"),
        ({"methods": [{"label": "x", "method": "sleb", "set": {"row": 1}}]}, "row"),
        ({"sparsities": [1.5]}, "sparsity"),
        ({"tasks": {"quiz": "../quiz.jsonl"}}, "outside"),
        ({"tasks": {"quiz": "none.jsonl"}}, "no none.jsonl"),
        ({"texts": {"stories": "none.txt"}}, "no none.txt"),
        ({"calibrations": {"label": "y", "sparsity": 0.5, "draws": [{"source": "builtin"}]}}, "'y'"),
        ({"profiles": {"gpu": SUITE["profiles"]["cpu"]}}, "no profile 'cpu'"),
        ({"speed": 1}, "speed"),
        ({"exports": {"sparsities": [0.3], "labels": ["SLEB"]}}, "no method 'SLEB' at sparsity 0.3"),
        ({"exports": {"sparsities": [0.25], "labels": ["SLIB"]}}, "'SLIB'"),
        ({"methods": [{"label": "x", "method": "fusegpt", "same_blocks_as": "y"}]}, "'y'"),
        ({"methods": [*SUITE["methods"], {"label": "x", "method": "2ssp", "same_blocks_as": "SLEB"}]}, "blocks"),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused(
    data: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)) as caught:
        suite(data, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_method_may_have_sparsities_of_its_own(data: Path, tmp_path: Path) -> None:
    methods = [SUITE["methods"][0], {**SUITE["methods"][1], "sparsities": [0.3]}]
    run = suite(data, tmp_path / "run", sparsities=[0.25], methods=methods, calibrations=None)
    for name in ("dense", "2ssp-0.25", "sleb-0.3"):
        run.compute(name, no_progress)
    table = run.run(no_progress)
    assert [row[1:] == ("", "") for row in tables.perplexity_grid(table).rows] == [False, False, False]
    assert tables.perplexity_grid(table).rows[1][2] == ""
    assert tables.ratio_grid(table).rows == ()


def test_the_model_of_a_row_may_learn_from_the_dense_one(data: Path, tmp_path: Path) -> None:
    options = {"batch": 2, "epochs": 20, "learning_rate": 0.001, "precision": "fp32"}
    wanted = {"rows": 4, "set": options}
    row = {"label": "cut", "method": "minitron", "set": {"intermediate_size": 40}, "sparsities": [0], "tasks": False}
    methods = [row, {**row, "label": "taught", "distil": wanted}]
    run = suite(data, tmp_path / "run", methods=methods, calibrations=None)
    for name in ("dense", "cut-0.0", "taught-0.0"):
        run.compute(name, no_progress)
    table = run.run(no_progress)
    cut, taught = table.cells
    assert cut.distilled is None
    assert taught.distilled is not None
    assert taught.distilled.before == cut.perplexity
    assert taught.distilled.tokens == 20 * 4 * 48
    assert taught.distilled.calibration["source"] == "builtin"
    assert taught.perplexity.value != cut.perplexity.value
    assert [row[3] for row in tables.learning_grid(table).rows] == ["–", "3 840 of builtin"]
    picture = tables.chart(table)
    assert picture.count("<polyline") == 1
    assert {"taught", "dense", "tokens learnt from, thousands"} <= set(re.findall(r">([^<>]+)</text>", picture))
    with pytest.raises(ConfigError, match="give 4 or 6 rows"):
        suite(data, tmp_path / "other", methods=[{**row, "distil": {**wanted, "rows": 5}}], calibrations=None)


def test_a_task_that_cannot_be_asked_is_refused_before_anything_is_computed(data: Path, tmp_path: Path) -> None:
    write_rows(data / "quiz.jsonl", [{"query": "what", "gold": 0}])
    with pytest.raises(ConfigError, match="lacks choices"):
        suite(data, tmp_path / "run")


@pytest.mark.xdist_group("eval")
def test_ctrl_c_stops_the_cells_and_the_next_run_goes_on(data: Path, tmp_path: Path) -> None:
    file, root = data / "tiny.yaml", tmp_path / "run"
    suite(data, root)
    command = [sys.executable, "-P", "-m", "deploy", "suite", str(file), "--data", str(data), "-o", str(root)]
    process = subprocess.Popen(
        command,
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs these tests in the background may have left SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stderr is not None
    while "perplexity" not in (line := process.stderr.readline()):  # the line that tells that the first cell is there
        assert line or process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]
    there = list(root.glob("cell-*.json"))
    assert 1 <= len(there) < len(CELLS)
    table = computed(data, root)
    assert len(table.cells) == 4


def test_a_cell_that_is_not_there_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cell 'sleb-0\.9'"):
        suite(data, tmp_path / "run").compute("sleb-0.9", no_progress)


FUSED = {"window": 4, "batch": 2, "epochs": 1, "coefficient_rank": 2, "lora_rank": 2}


def test_a_row_can_remove_the_blocks_of_another_and_a_cell_be_exported_and_timed(data: Path, tmp_path: Path) -> None:
    methods = [
        {"label": "deleted", "method": "fusegpt", "set": {"coefficient_rank": 0, "lora_rank": 0}},
        {"label": "fused", "method": "fusegpt", "set": {**FUSED, "ranking": "loss"}},
    ]
    methods[0] |= {"same_blocks_as": "fused", "tasks": False}
    methods[1]["rows"] = 4
    exports = {"sparsities": [0.4], "labels": ["fused"], "prompt_tokens": 4, "decode_tokens": 3, "repeats": 5}
    changes = {"sparsities": [0.2, 0.4], "methods": methods, "calibrations": None, "exports": exports}
    run = suite(data, tmp_path / "run", **changes)
    with pytest.raises(FoldawayError):  # its blocks are not known yet
        run.compute("deleted-0.4", no_progress)
    for name in ("dense", "fused-0.2", "fused-0.4", "deleted-0.2", "deleted-0.4"):
        run.compute(name, no_progress)
    table = run.run(no_progress)
    cells = {(cell.label, cell.sparsity): cell for cell in table.cells}
    for sparsity in (0.2, 0.4):
        fused, deleted = cells["fused", sparsity], cells["deleted", sparsity]
        assert deleted.numbers["blocks_removed"] == fused.numbers["blocks_removed"]
        assert deleted.perplexity != fused.perplexity
        assert [len(cell.tasks) for cell in (deleted, fused)] == [0, 1]
        assert [(cell.calibration or {})["rows"] for cell in (deleted, fused)] == [2, 4]
        assert fused.costs is not None
        assert table.dense.costs is not None
        assert fused.costs.kv_per_token < table.dense.costs.kv_per_token
    exported = cells["fused", 0.4].exported
    assert exported is not None
    assert table.dense.exported is not None
    assert exported.size_bytes < table.dense.exported.size_bytes
    assert len(exported.decode.candidate) == 5
    assert exported.perplexity is not None
    assert len(exported.perplexity.window_nll) == 3
    assert exported.resident_bytes is not None
    assert exported.resident_bytes > exported.size_bytes / 2
    assert cells["fused", 0.2].exported is None
    rows = tables.export_grid(table).rows
    assert [row[0] for row in rows] == ["dense, int4", "fused, int4, 40.0%"]
    assert "–" not in rows[1]
    assert suite(data, tmp_path / "run", **changes).run(no_progress).cells == table.cells


@pytest.mark.parametrize("name", ["quality", "fusegpt", "foldgpt"])
def test_the_suites_of_the_project_can_be_read(tmp_path: Path, name: str) -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "suites" / f"{name}.yaml"
    with pytest.raises(ConfigError, match="--data DIR"):
        SuiteRun(file, tmp_path / "run", data=None, profile="cpu", device="cpu", jobs=1, say=lambda text: None)
