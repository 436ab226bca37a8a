"""`foldaway run` on a tiny model: the whole way, again, and killed at ten moments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks import record as records
from compress import artifact
from compress.files import sha256_of
from deploy import comparison
from deploy.cli import main
from deploy.workspace import Workspace, digest
from exporters.base import is_export, read_export

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("run")


def recipe_file(folder: Path, dense: Path, *, max_ratio: float = 1000.0, sparsity: Any = (0.2, 0.4)) -> Path:
    """A recipe that takes seconds, and the text that it evaluates on."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    recipe = {
        "name": "tiny",
        "model": str(dense),
        "calibration": {"rows": 2, "length": 48},
        "steps": [{"method": "2ssp", "set": {"sparsity": list(sparsity)}}],
        "evaluation": {"source": str(text), "window": 48, "windows": 4},
        "benchmark": {
            "prompt_tokens": 8,
            "decode_tokens": 8,
            "repeats": 5,
            "max_tokens": 8,
            "prompts": ["a", "b", "c", "d", "e"],
        },
        "gate": {"limits": [{"metric": "perplexity", "max_ratio": max_ratio}]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def done(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A recipe, the folder of its run, done once, and what its servers were found to do."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_file(folder, dense)
    found = []

    def serve_both(*args: Any) -> Any:
        found.append(comparison_serve_both(*args))
        return found[-1]

    comparison_serve_both = comparison.serve_both
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "serve_both", serve_both)
        assert main(["run", str(recipe), "-o", str(folder / "run")]) == 0
    (served,) = found
    return recipe, folder / "run", served


@pytest.fixture
def finished(done: tuple[Path, Path, Any]) -> tuple[Path, Path]:
    """The recipe and the folder."""
    return done[:2]


@pytest.fixture
def served(done: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No servers are started: what those of the other run did stands for them."""
    monkeypatch.setattr(comparison, "serve_both", lambda *args: done[2])


def test_a_run_leaves_artifacts_exports_a_record_and_a_report(finished: tuple[Path, Path]) -> None:
    _, run = finished
    assert len(list(run.glob("artifact-2ssp-*"))) == 2
    assert {path.name.rsplit("-", 1)[0] for path in run.glob("export-*")} == {"export-dense", "export-candidate"}
    record = records.read(run / "record.json")
    assert record.verdict == "pass"
    assert record.ladder is not None
    assert [step.sparsity for step in record.ladder.steps] == [0.0, 0.2, 0.4]
    assert [step.chosen for step in record.ladder.steps] == [False, False, True]
    report = (run / "report.html").read_text()
    assert record.artifacts["candidate"] in report


def test_a_second_run_skips_everything_and_ends_with_the_same_line(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert main(["run", str(recipe), "-o", str(run)]) == 0
    captured = capsys.readouterr()
    assert "Skipped" in captured.err
    last = json.loads(captured.out.splitlines()[-1])
    assert set(last) == {"verdict", "artifact", "report", "baseline", "candidate", "ratio", "gates"}
    metrics = {
        "parameters",
        "size_bytes",
        "perplexity",
        "decode_tokens_per_second",
        "ttft_seconds",
        "peak_rss_bytes",
    }
    for side in ("baseline", "candidate", "ratio"):
        assert set(last[side]) == metrics
        assert all(value is not None for value in last[side].values())
    assert last["ratio"]["parameters"] == last["candidate"]["parameters"] / last["baseline"]["parameters"]
    assert last["gates"] == [
        {"name": "perplexity.max_ratio", "limit": 1000.0, "value": last["ratio"]["perplexity"], "passed": True}
    ]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}


def test_a_run_whose_mildest_step_misses_the_gate_fails_with_exit_code_3(
    dense: Path, tmp_path: Path, served: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(tmp_path, dense, max_ratio=0.01, sparsity=(0.3, 0.5))
    assert main(["run", str(recipe), "-o", str(tmp_path / "run")]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["verdict"] == "fail"
    assert len(list((tmp_path / "run").glob("artifact-*"))) == 1, "it stops at the first that misses the gate"


def test_every_rung_learns_from_the_dense_model_and_is_judged_after_it(
    dense: Path, tmp_path: Path, served: None
) -> None:
    plain, taught = (yaml.safe_load(recipe_file(tmp_path, dense).read_text()) for _ in range(2))
    rows = {"rows": 4, "length": 32}
    options = {"batch": 2, "epochs": 30, "precision": "fp32", "learning_rate": 0.001}
    taught["steps"] = [*plain["steps"], {"method": "distill", "set": options, "calibration": rows}]
    recipe = tmp_path / "taught.yaml"
    recipe.write_text(yaml.safe_dump(taught))
    assert main(["run", str(recipe), "-o", str(tmp_path / "run")]) == 0
    record = records.read(tmp_path / "run" / "record.json")
    assert record.ladder is not None
    assert [step.sparsity for step in record.ladder.steps] == [0.0, 0.2, 0.4]
    made = {step.artifact: step.perplexity for step in record.ladder.steps[1:]}
    manifests = [artifact.read_manifest(path) for path in (tmp_path / "run").glob("artifact-distill-*")]
    assert {manifest.id for manifest in manifests} == set(made)
    for manifest in manifests:
        assert [step.method for step in manifest.steps] == ["2ssp", "distill"]
        assert manifest.steps[1].teacher is not None
        assert manifest.steps[1].teacher.name == dense.name
        assert manifest.steps[1].calibration is not None
        assert manifest.steps[1].calibration["rows"] == 4


def test_a_recipe_without_values_to_try_tells_of_what_was_cut(dense: Path, tmp_path: Path, served: None) -> None:
    recipe = yaml.safe_load(recipe_file(tmp_path, dense).read_text())
    cut = {"method": "2ssp", "set": {"sparsity": 0.3}}
    lesson = {"method": "distill", "set": {"batch": 2, "precision": "fp32"}, "calibration": {"rows": 2, "length": 32}}
    file = tmp_path / "plain.yaml"
    file.write_text(yaml.safe_dump({**recipe, "steps": [cut, lesson]}))
    assert main(["run", str(file), "-o", str(tmp_path / "run")]) == 0
    record = records.read(tmp_path / "run" / "record.json")
    assert record.ladder is not None
    (step,) = record.ladder.steps[1:]
    assert step.sparsity == 0.3
    assert step.block_sparsity == pytest.approx(0.3, abs=0.03)
    assert step.model_sparsity == pytest.approx(1 - step.parameters / record.ladder.steps[0].parameters)
    assert "sparsity=0.3 by 2ssp and distill" in record.title
    assert record.texts["distill"]["rows"] == 2
    assert not list((tmp_path / "run" / "scratch").glob("**/distillation-*"))


@pytest.mark.parametrize(
    ("steps", "word"),
    [
        ([{"method": "distill"}], "put a step before it"),
        ([{"method": "2ssp", "set": {"sparsity": 0.2}}, {"method": "distill"}], "do not fill batches"),
        (
            [
                {"method": "2ssp", "set": {"sparsity": 0.2}},
                {"method": "distill", "set": {"batch": 1}, "calibration": {"source": "/nowhere.txt"}},
            ],
            "/nowhere.txt",
        ),
        ([{"method": "2ssp", "set": {"sparsity": [0.2]}}, {"method": "wanda", "set": {"sparsity": [0.2]}}], "one step"),
    ],
)
def test_a_mistake_in_a_later_step_is_found_before_anything_is_done(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[dict[str, Any]], word: str
) -> None:
    recipe = yaml.safe_load(recipe_file(tmp_path, dense).read_text())
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**recipe, "steps": steps}))
    assert main(["run", str(file), "-o", str(tmp_path / "run")]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_text_that_changed_is_noticed(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDAWAY_API_KEY", "a key that only the user's own server asks for")
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    first = records.read(tmp_path / "run" / "record.json")
    text = Path(yaml.safe_load(recipe.read_text())["evaluation"]["source"])
    before = text.read_text()
    try:
        text.write_text("Pack my box with five dozen liquor jugs, said the wizard. " * 20)
        assert main(["run", str(recipe), "-o", str(tmp_path / "run")]) == 0
    finally:
        text.write_text(before)
    second = records.read(tmp_path / "run" / "record.json")
    assert first.texts["evaluation"]["sha256"] != second.texts["evaluation"]["sha256"]
    assert first.baseline.perplexity != second.baseline.perplexity
    assert first.artifacts == second.artifacts, "the calibration did not change"
    for stage in (tmp_path / "run").glob("record-*.json"):
        records.read(stage)


def test_other_inputs_make_another_stage(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "run")
    assert work.result("stage", {"seed": 0}, lambda: {"made": 1}) == {"made": 1}
    assert work.result("stage", {"seed": 0}, lambda: {"made": 2}) == {"made": 1}
    assert work.result("stage", {"seed": 1}, lambda: {"made": 3}) == {"made": 3}
    assert work.skipped == ["stage"]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def whole(run: Path) -> None:
    """Everything that a run's folder shows is whole."""
    for path in run.glob("artifact-*"):
        artifact.verify(path)
    for path in run.glob("export-*"):
        assert is_export(path)
        for name, entry in read_export(path).files.items():
            assert sha256_of(path / name) == entry.sha256
    for path in run.glob("*.json"):
        json.loads(path.read_text())
    if (run / "record.json").exists():
        records.read(run / "record.json")


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    """`foldaway run` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy", "run", str(recipe), "-o", str(run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_never_leaves_a_half_thing_and_goes_on(dense: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, dense)
    began = time.monotonic()
    process = start(recipe, tmp_path / "timed")
    assert process.wait() == 0
    duration = time.monotonic() - began
    shutil.rmtree(tmp_path / "timed")

    stages_seen = set()
    for moment in range(1, 11):
        run = tmp_path / f"run{moment}"
        process = start(recipe, run)
        time.sleep(duration * moment / 13)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"moment {moment} came too late"
        whole(run)
        stages = frozenset(path.name for path in run.glob("*-*"))
        stages_seen.add(stages)
        wait_until_no_server_of(run)

        process = start(recipe, run)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert ("Skipped" in err) == bool(stages - {"foldaway-run.json"})
        whole(run)
        assert json.loads(out.splitlines()[-1])["verdict"] == "pass"
        assert not list(run.glob(".*partial*")), "what the killed process left behind is gone"
    assert len(stages_seen) >= 4, "the kills hit different stages"


def wait_until_no_server_of(run: Path, seconds: float = 20.0) -> None:
    """Servers end with the process that started them, even when that was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        if not any("serve" in command and any(str(run) in word for word in command) for command in commands):
            return
        time.sleep(0.2)
    raise AssertionError("a server outlived its run")
