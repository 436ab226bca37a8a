"""A suite of deltas on a tiny model: its cells, its record, its tables, and how it goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from benchmarks import delta_table
from benchmarks.delta_table import DeltaCell, DeltaTable, kept_of
from compress import artifact
from compress.delta.checkpoint import Checkpoint, roles_of
from compress.errors import ConfigError
from compress.result import no_progress
from deploy import delta_suite, learners
from deploy.cli import main
from deploy.delta_suite import DeltaSuite, DeltaSuiteRun
from deploy.show import describe
from tests.conftest import byte_tokenizer, tiny
from tests.deploy.test_bad_input import refuse
from tests.deploy.test_eval import TEXT, write_rows

# With the question around them, sentences and sums are shorter than the 64 tokens that the model reads.
SENTENCES = [(f"{word} and {end}", label) for label, word in enumerate(("dull", "warm")) for end in "abcdefgh"]
SUITE: dict[str, Any] = {
    "kind": "deltas",
    "name": "tiny",
    "text": "text/stories.txt",
    "pairs": [
        {
            "name": "mood",
            "model": "",
            "train": "mood.train.tsv",
            "test": "mood.test.tsv",
            "finetune": {"steps": 4, "batch": 8, "learning_rate": 1e-3, "train_embeddings": False},
            "grid": "full",
        },
        {
            "name": "sums",
            "model": "",
            "train": "sums.train.jsonl",
            "test": "sums.test.jsonl",
            "finetune": {"steps": 2, "batch": 4, "learning_rate": 1e-3, "optimizer": "adamr-l2"},
            "grid": "short",
        },
    ],
    "grids": {
        "full": [
            {"label": "DARE", "set": {"rescale": "dare"}, "p": [0.5, 0.9], "values": ["int8", "sign"]},
            {"label": "searched", "set": {"rescale": "search"}, "p": [0.9]},
            {"label": "low rank", "ranks": [1, 64]},
        ],
        "short": [{"label": "least squares", "set": {"rescale": "least-squares", "scale": "row"}, "p": [0.95]}],
    },
    "speed": "sums",
    "profiles": {
        "cpu": {"items": {"mood": 6, "sums": 3}, "window": 32, "windows": 2, "rows": 2, "length": 32, "repeats": 1}
    },
}
CELLS = [
    ("DARE", 0.5, "int8"),
    ("DARE", 0.5, "sign"),
    ("DARE", 0.9, "int8"),
    ("DARE", 0.9, "sign"),
    ("searched", 0.9, "int8"),
    ("low rank", None, "bf16"),
    ("low rank", None, "bf16"),
]


def sentences(path: Path, rows: list[tuple[str, int]]) -> None:
    path.write_text("sentence\tlabel\n" + "".join(f"{sentence}\t{label}\n" for sentence, label in rows))


def filled(folder: Path) -> Path:
    """A data folder with a model, a text and tasks."""
    artifact.write_model(tiny("llama"), byte_tokenizer(), folder / "model")
    (folder / "text").mkdir()
    (folder / "text" / "stories.txt").write_text(TEXT)
    sentences(folder / "mood.train.tsv", SENTENCES)
    sentences(folder / "mood.test.tsv", [(f"so {sentence}", label) for sentence, label in SENTENCES])
    for part, numbers in (("train", range(12)), ("test", range(20, 26))):
        rows = [{"question": f"{n} + {n}?", "answer": f"{n} and {n} are {2 * n}"} for n in numbers]
        write_rows(folder / f"sums.{part}.jsonl", rows)
    return folder


def suite_file(data: Path, edit: Callable[[dict[str, Any]], object] = lambda suite: None) -> Path:
    suite = json.loads(json.dumps(SUITE))
    for pair in suite["pairs"]:
        pair["model"] = str(data / "model")
    edit(suite)
    (data / "tiny.yaml").write_text(yaml.safe_dump(suite))
    return data / "tiny.yaml"


def line(data: Path, root: Path, *options: str) -> list[str]:
    return ["suite", str(data / "tiny.yaml"), "--data", str(data), "-o", str(root), *options]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return filled(tmp_path / "data")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder, and the folder of a run that was done."""
    folder = tmp_path_factory.mktemp("suite")
    data = filled(folder / "data")
    suite_file(data)
    assert main(line(data, folder / "run")) == 0
    return data, folder / "run"


def table_of(run: Path) -> DeltaTable:
    return delta_table.read(run / "record.json")


# --- The whole


@pytest.mark.xdist_group("delta-suite")
def test_a_suite_fills_a_table_of_all_pairs_and_ways(done: tuple[Path, Path]) -> None:
    table = table_of(done[1])
    mood, sums = table.pairs
    assert [(cell.label, cell.p, cell.values) for cell in mood.cells] == CELLS
    assert [(cell.label, cell.p, cell.values) for cell in sums.cells] == [("least squares", 0.95, "int8")]
    assert [len(pair.base.answers.item_nll) for pair in table.pairs] == [6, 3]
    for pair in table.pairs:
        assert pair.finetuned.answers.nll < pair.base.answers.nll
        assert (pair.finetuned.answers.kl, pair.finetuned.text_kl) == (None, None)
        assert pair.base.answers.kl is not None
        assert pair.base.answers.kl > 0
        for score in (pair.base, pair.finetuned, *(cell.score for cell in pair.cells)):
            assert score.answers.nll == pytest.approx(sum(score.answers.item_nll) / len(score.answers.item_nll))
            assert score.perplexity is not None
            assert score.perplexity > 1
        assert all(cell.pruned_bytes <= cell.bytes for cell in pair.cells)
    assert mood.base.answers.accuracy is not None
    assert len(mood.base.answers.right) == 6
    assert (sums.base.answers.accuracy, sums.base.answers.right) == (None, "")
    assert [timing.what.split(",")[0] for timing in table.timings] == ["pack", "apply", *["switch between two"] * 2]
    assert all(len(timing.seconds) == len(timing.reference_seconds) == 1 for timing in table.timings)


@pytest.mark.xdist_group("delta-suite")
def test_numbers_of_a_pair_are_those_of_its_models(done: tuple[Path, Path]) -> None:
    _, run = done
    (tuned,) = run.glob("finetuned-mood-*")
    (base,) = run.glob("base-*")
    ours, theirs = Checkpoint(base), Checkpoint(tuned)
    names = [name for name in roles_of(tuned).matrices if name in theirs.names]
    deltas = [theirs.get(name).float() - ours.get(name).float() for name in names]
    pair = table_of(run).pairs[0]
    count = sum(delta.numel() for delta in deltas)
    assert pair.pruned_parameters == count
    assert pair.mean_abs_delta == pytest.approx(sum(float(delta.abs().sum()) for delta in deltas) / count, rel=1e-4)
    assert pair.exact_zeros == pytest.approx(sum(int((delta == 0).sum()) for delta in deltas) / count)
    assert torch.equal(ours.get("model.embed_tokens.weight"), theirs.get("model.embed_tokens.weight"))
    assert pair.finetune["train_embeddings"] is False
    low, high = (cell for cell in pair.cells if cell.label == "low rank")
    assert low.pruned_bytes == sum(2 * sum(delta.shape) for delta in deltas)
    assert high.pruned_bytes == sum(2 * min(delta.shape) * sum(delta.shape) for delta in deltas)


@pytest.mark.xdist_group("delta-suite")
def test_what_is_dropped_least_is_closest_to_the_fine_tune(done: tuple[Path, Path]) -> None:
    pair = table_of(done[1]).pairs[0]
    by_place: dict[tuple[str, float | None, str], DeltaCell] = {}
    for cell in pair.cells:
        by_place.setdefault((cell.label, cell.p, cell.values), cell)

    def moved(*place: Any) -> float:
        return by_place[place].score.answers.kl or 0.0

    assert 0 < moved("DARE", 0.5, "int8") < moved("DARE", 0.9, "int8")
    assert moved("DARE", 0.5, "int8") <= moved("DARE", 0.5, "sign")
    assert moved("searched", 0.9, "int8") < moved("DARE", 0.9, "int8")
    strongest, full = (cell.score.answers.kl or 0.0 for cell in pair.cells if cell.label == "low rank")
    assert full < strongest
    searched = by_place["searched", 0.9, "int8"].config
    assert searched["rescale"] == "fixed"
    q = searched["q"]
    assert isinstance(q, float)
    assert 0.1 <= q <= 1


@pytest.mark.xdist_group("delta-suite")
def test_the_record_names_no_path_of_this_machine_but_those_that_the_user_gave(done: tuple[Path, Path]) -> None:
    data, run = done
    written = json.loads((run / "record.json").read_text())
    assert set(written["files"]) == {
        "text/stories.txt",
        *(pair[part] for pair in SUITE["pairs"] for part in ("train", "test")),
    }
    for pair in written["pairs"]:
        assert pair.pop("model") == str(data / "model")
    assert str(data.parent) not in json.dumps(written)
    kind, words, content = describe(run / "record.json")
    assert kind == "delta table"
    assert "mood (7), sums (1)" in words[0]
    assert content["id"] == written["id"]


@pytest.mark.xdist_group("delta-suite")
def test_the_tables_and_the_picture_hold_the_numbers(done: tuple[Path, Path]) -> None:
    table = table_of(done[1])
    for name in delta_table.GRIDS:
        for pair in ("mood", "sums"):
            grid = delta_table.grid_named(table, name.replace("PAIR", pair))
            assert grid is not None
            assert all(len(row) == len(grid.headers) for row in grid.rows), name
            assert grid.markdown().count("\n") == len(grid.rows) + 2
    methods = delta_table.methods_grid(table.pairs[0])
    assert methods.headers[1:] == ("p = 0.5", "p = 0.9")
    rows = {row[0]: row for row in methods.rows}
    assert rows["DARE"][1].startswith(f"{kept_of(table.pairs[0], table.pairs[0].cells[0])[0]:.0%} (")
    assert rows["searched"][1] == ""
    picture = delta_table.chart(table)
    ElementTree.fromstring(picture)
    assert {"DARE", "DARE, sign", "searched", "low rank"} <= set(re.findall(r">([^<>]+)</text>", picture))


def test_where_nothing_is_dropped_nothing_is_lost(data: Path, tmp_path: Path) -> None:
    def whole(suite: dict[str, Any]) -> None:
        one_pair(suite)
        exact = {"rescale": "none", "rows": "exact"}
        suite["grids"]["short"] = [{"label": "all of it", "set": exact, "p": [0], "values": ["bf16"]}]

    suite_file(data, whole)
    assert main(line(data, tmp_path / "run")) == 0
    (pair,) = table_of(tmp_path / "run").pairs
    (cell,) = pair.cells
    assert cell.score.answers.item_nll == pair.finetuned.answers.item_nll
    assert cell.score.perplexity == pair.finetuned.perplexity
    assert (cell.score.answers.kl, cell.score.text_kl) == pytest.approx((0, 0), abs=1e-9)
    assert kept_of(pair, cell)[0] == 1
    assert cell.bytes >= 2 * pair.pruned_parameters


# --- Going on


@pytest.mark.xdist_group("delta-suite")
def test_what_is_there_is_not_computed_again(
    done: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = done
    first = table_of(run)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("computed again")

    for module, name in (
        (delta_suite, "pack"),
        (delta_suite, "apply"),
        (learners, "finetune"),
        (learners, "score_answers"),
        (learners, "load"),
    ):
        monkeypatch.setattr(module, name, fail)
    there = sorted(path.name for path in run.iterdir())
    capfd.readouterr()
    assert main(line(data, run)) == 0
    captured = capfd.readouterr()
    (last,) = captured.out.splitlines()
    again = table_of(run)
    assert json.loads(last) == {"record": str(run / "record.json"), "id": again.id, "cells": 8}
    assert (again.pairs, again.timings) == (first.pairs, first.timings)
    assert sorted(path.name for path in run.iterdir()) == there
    assert "mood: DARE p=0.5 int8" in captured.err


def one_pair(suite: dict[str, Any]) -> None:
    """The second pair alone, with cells that are quick."""
    suite["pairs"] = suite["pairs"][1:]
    suite["grids"]["short"] = [{"label": "DARE", "set": {"rescale": "dare"}, "p": [0.5, 0.75, 0.9]}]


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> list[float]:
    """Shares dropped by the packages of cells that are made, the last of which is interrupted."""
    made: list[float] = []
    real = delta_suite.pack

    def pack(base: Any, finetuned: Any, path: Path, config: Any, *args: Any, **options: Any) -> Any:
        if path.name == "delta":
            made.append(config.p)
            if len(made) == stop_at:
                raise KeyboardInterrupt
        return real(base, finetuned, path, config, *args, **options)

    monkeypatch.setattr(delta_suite, "pack", pack)
    return made


def test_a_suite_that_was_stopped_goes_on_with_the_cell_it_was_at(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_file(data, one_pair)
    made = counted(monkeypatch, stop_at=2)
    assert main(line(data, tmp_path / "run")) == 130
    assert made == [0.5, 0.75]
    assert not (tmp_path / "run" / "record.json").exists()
    made.clear()
    made.append(-1)  # one is there
    assert main(line(data, tmp_path / "run")) == 130
    made.clear()
    monkeypatch.undo()
    made = counted(monkeypatch, stop_at=99)
    assert main(line(data, tmp_path / "run")) == 0
    assert made == [0.75, 0.9]
    assert [cell.p for cell in table_of(tmp_path / "run").pairs[0].cells] == [0.5, 0.75, 0.9]


def test_two_models_that_are_trained_alike_are_two_fine_tunes(data: Path, tmp_path: Path) -> None:
    other = tiny("llama")
    for parameter in other.parameters():
        parameter.mul_(1.25)
    artifact.write_model(other, byte_tokenizer(), data / "other")

    def two_models(suite: dict[str, Any]) -> None:
        one_pair(suite)
        suite["grids"]["short"][0]["p"] = [0.9]
        suite["pairs"] = [suite["pairs"][0], {**suite["pairs"][0], "name": "again", "model": str(data / "other")}]
        suite["profiles"]["cpu"]["items"]["again"] = 3

    suite_file(data, two_models)
    assert main(line(data, tmp_path / "run")) == 0
    sums, again = table_of(tmp_path / "run").pairs
    assert sums.finetuned != again.finetuned
    # A few small steps move the weights by as much from wherever they began.
    assert again.mean_abs_delta == pytest.approx(sums.mean_abs_delta, rel=0.5)


def test_another_test_file_is_another_score_of_the_same_fine_tune(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite_file(data, one_pair)
    assert main(line(data, tmp_path / "run")) == 0
    first = table_of(tmp_path / "run")
    write_rows(data / "sums.test.jsonl", [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(30, 36)])

    def fail(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(learners, "finetune", fail)
    assert main(line(data, tmp_path / "run")) == 0
    second = table_of(tmp_path / "run")
    assert second.pairs[0].finetuned != first.pairs[0].finetuned
    assert second.pairs[0].loss == first.pairs[0].loss
    assert second.pairs[0].cells[0].bytes == first.pairs[0].cells[0].bytes
    assert second.timings == first.timings


# --- Suites that cannot be meant


def pair(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda suite: suite["pairs"][0].update(changes)


def whole(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda suite: suite.update(changes)


def way(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda suite: suite["grids"]["full"][0].update(changes)


def profile(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda suite: suite["profiles"]["cpu"].update(changes)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (pair(test="mood.train.tsv"), "is tested on what it is trained on"),
        (pair(test="./mood.train.tsv"), "is tested on what it is trained on"),
        (pair(test="copy.tsv"), "is tested on what it is trained on"),
        (pair(grid="wide"), "needs a grid"),
        (pair(name="sums"), "names that differ"),
        (pair(name="new"), "number of items"),
        (pair(name="a b"), "name"),
        (pair(train="../mood.train.tsv"), "../mood.train.tsv lies outside"),
        (pair(test="link.tsv"), "link.tsv lies outside"),
        (pair(train="gone.tsv"), "there is no gone.tsv"),
        (pair(train="text"), "there is no text"),
        (pair(finetune={"stepps": 3}), "stepps"),
        (pair(finetune={"steps": -3}), "steps"),
        (whole(text="gone.txt"), "there is no gone.txt"),
        (whole(speed="none"), "speed"),
        (whole(pairs=[]), "pairs"),
        (whole(sparsities=[0.5]), "sparsities"),
        (whole(profiles={"gpu": SUITE["profiles"]["cpu"]}), "no profile 'cpu'"),
        (way(p=[1.5]), "p=1.5"),
        (way(values=["int3"]), "int3"),
        (way(set={"rescal": "dare"}), "rescal"),
        (way(surprise=1), "surprise"),
        (profile(window=1), "window"),
        (profile(items={"mood": 0, "sums": 3}), "items"),
        (profile(rows=0), "rows"),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused(
    edit: Callable[[dict[str, Any]], object], word: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences(data.parent / "mood.train.tsv", SENTENCES)
    (data / "link.tsv").symlink_to(data.parent / "mood.train.tsv")
    (data / "copy.tsv").write_bytes((data / "mood.train.tsv").read_bytes())
    suite_file(data, edit)
    refuse(line(data, tmp_path / "run"), capsys, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"train": "broken.tsv"}, "no questions"),
        ({"test": "broken.tsv"}, "no questions"),
        ({"test": "empty.tsv"}, "no questions"),
        ({"model": "gone/without/trace"}, "there is no model"),
    ],
)
def test_what_a_later_pair_lacks_is_said_before_anything_is_computed(
    changes: dict[str, Any],
    word: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(learners, "finetune", fail)
    (data / "broken.tsv").write_text("sentence\tlabel\nno label\n")
    (data / "empty.tsv").write_text("sentence\tlabel\n")
    suite_file(data, lambda suite: suite["pairs"][1].update(changes))
    refuse(line(data, tmp_path / "run"), capsys, word)


@pytest.mark.parametrize(
    ("options", "word"), [(["--jobs", "2"], "--jobs"), (["--cell", "dense"], "--cell"), (["--profile", "gpu"], "gpu")]
)
def test_options_of_other_suites_are_refused(
    options: list[str], word: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_file(data)
    refuse(line(data, tmp_path / "run", *options), capsys, word)
    refuse(["suite", str(data / "tiny.yaml"), "-o", str(tmp_path / "run")], capsys, "--data DIR")
    refuse(["suite", str(data / "tiny.yaml"), "--data", str(data)], capsys, "-o DIR")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite_file(data)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("keep me")
    refuse(line(data, tmp_path / "run"), capsys, "not the folder of a run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_more_calibration_than_there_is_text_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_file(data, lambda suite: (one_pair(suite), suite["profiles"]["cpu"].update(rows=1000)))
    refuse(line(data, tmp_path / "run"), capsys, "1000 x 32")


@pytest.mark.parametrize("path", ["deltas.yaml"])
def test_the_suite_of_the_project_can_be_read(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_suite, "fingerprint_of", lambda model, learner: model)
    monkeypatch.setattr(delta_suite, "learner_for", lambda model, device, progress: None)
    file = Path(__file__).parents[2] / "benchmarks" / "suites" / path
    with pytest.raises(ConfigError, match="--data DIR"):
        DeltaSuiteRun(
            file, tmp_path / "run", data=None, profile="cpu", device="cpu", say=lambda text: None, progress=no_progress
        )
    suite = DeltaSuite.model_validate(yaml.safe_load(file.read_text()))
    for name in {file for each in suite.pairs for file in (each.train, each.test)} | {suite.text}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        row = json.dumps({"question": name, "answer": "4"}) if name.endswith("jsonl") else f"{name}\t1"
        (tmp_path / name).write_text(f"sentence\tlabel\n{row}\n" if name.endswith("tsv") else f"{row}\n")
    DeltaSuiteRun(
        file, tmp_path / "run", data=tmp_path, profile="cpu", device="cpu", say=lambda text: None, progress=no_progress
    )
