"""``foldaway eval`` on tiny models: one model, a pair, an export, tasks; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import evaluation
from compress import artifact
from compress.calibration import windows
from compress.methods import METHODS, method_config
from compress.sources import load
from deploy.cli import main
from deploy.show import describe
from tests.conftest import byte_tokenizer, tiny, token_rows

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while.\n\n" * 8
QUIZ = [
    {"query": f"Question {n}: what is", "choices": ["a fox", "the lazy dog", "sleep"], "gold": n % 3} for n in range(9)
]
CONTEXTS = [
    {"context_options": [f"{n} foxes jump so a fox", f"{n} foxes jump so a dog"], "continuation": "sleeps", "gold": 1}
    for n in range(6)
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, its artifact, an fp32 export of that, a text and two files of tasks."""
    folder = tmp_path_factory.mktemp("eval")
    artifact.write_model(tiny("llama"), byte_tokenizer(), folder / "dense")
    made = METHODS["blockpruner"].compress(tiny("llama"), token_rows(), method_config("blockpruner", {"sparsity": 0.3}))
    step = artifact.Step(method="blockpruner", config=dict(made.report.config), numbers=dict(made.report.numbers))
    origin = artifact.OriginEntry(name="tiny", kind="folder")
    artifact.save(made.model, byte_tokenizer(), folder / "pruned", origin=origin, steps=[step])
    (folder / "text.txt").write_text(TEXT)
    write_rows(folder / "quiz.jsonl", QUIZ)
    write_rows(folder / "contexts.jsonl", CONTEXTS)
    assert (
        main(["export", str(folder / "pruned"), "--to", "onnx", "-o", str(folder / "onnx"), "--check-tokens", "32"])
        == 0
    )
    return folder


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str], path: str, *options: str) -> dict[str, Any]:
    text = ["--text", str(folder / "text.txt"), "--window", "32"]
    capsys.readouterr()
    assert main(["eval", str(folder / path), *text, *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def plain_loop(model: Any, rows: torch.Tensor, predicted: int) -> float:
    """Perplexity with nothing but a loop and a softmax."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            chances = torch.softmax(model(input_ids=row[None]).logits[0].double(), dim=-1)
        for t in range(len(row) - predicted, len(row)):
            total -= math.log(chances[t - 1, row[t]])
            count += 1
    return math.exp(total / count)


@pytest.mark.xdist_group("eval")
@pytest.mark.parametrize("stride", [None, 8, 32])
def test_perplexity_is_that_of_a_plain_loop(
    folder: Path, capsys: pytest.CaptureFixture[str], stride: int | None
) -> None:
    loaded = load(str(folder / "dense"))
    rows = windows(str(folder / "text.txt"), loaded.tokenizer, length=32, stride=stride).tokens
    found = evaluate(folder, capsys, "dense", *([] if stride is None else ["--stride", str(stride)]))
    predicted = 8 if stride == 8 else 31
    assert found["subject"]["perplexity"]["value"] == pytest.approx(plain_loop(loaded.model, rows, predicted), rel=1e-5)
    assert found["subject"]["perplexity"]["tokens"] == predicted * len(rows)
    assert found["text"].get("stride") == (8 if stride == 8 else None)


@pytest.mark.xdist_group("eval")
def test_a_pair_is_measured_on_the_same_text_and_items(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--tasks", str(folder / "quiz.jsonl"), str(folder / "contexts.jsonl"), "--limit", "5"]
    record = folder / "pair.json"
    found = evaluate(folder, capsys, "pruned", "--against", str(folder / "dense"), *tasks, "-o", str(record))
    read = evaluation.read(record)
    assert found["id"] == read.id
    assert found["subject"]["tasks"][0]["correct"] == read.subject.tasks[0].correct
    assert read.baseline is not None
    assert read.comparison is not None
    assert [task.items for task in read.subject.tasks] == [5, 5] == [task.items for task in read.baseline.tasks]
    assert [kept.task for kept in read.retention] == ["all", "quiz", "contexts"]
    assert read.comparison.perplexity_ratio == pytest.approx(
        read.subject.perplexity.value / read.baseline.perplexity.value
    )
    assert read.subject.artifact == artifact.read_manifest(folder / "pruned").id
    ours, theirs = read.subject.tasks[0].right, read.baseline.tasks[0].right
    assert read.retention[1].flipped == sum(a != b for a, b in zip(ours, theirs, strict=True)) / 5
    kind, words, _ = describe(record)
    assert kind == "evaluation"
    assert any("perplexity" in line for line in words)


@pytest.mark.xdist_group("eval")
def test_a_model_against_itself_keeps_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--against", str(folder / "dense"), "--tasks", str(folder / "quiz.jsonl")]
    found = evaluate(folder, capsys, "dense", *options)
    both = found["comparison"]
    assert (both["perplexity_ratio"], both["kl"], both["top1_agreement"], both["flipped"]) == (1.0, 0.0, 1.0, 0.0)
    (kept,) = found["retention"]
    assert kept["flipped"] == 0.0
    assert kept["value"] in (None, 1.0)


@pytest.mark.xdist_group("eval")
def test_an_export_answers_item_by_item_as_its_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--tasks", str(folder / "quiz.jsonl"), str(folder / "contexts.jsonl")]
    ours = evaluate(folder, capsys, "pruned", *tasks)["subject"]
    theirs = evaluate(folder, capsys, "onnx", *tasks)["subject"]
    assert theirs["form"] == "fp32 ONNX"
    assert [task["correct"] for task in theirs["tasks"]] == [task["correct"] for task in ours["tasks"]]
    assert theirs["perplexity"]["value"] == pytest.approx(ours["perplexity"]["value"], rel=1e-4)
    assert theirs["artifact"] == ours["artifact"]


def test_a_stride_beyond_the_window_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["eval", str(folder / "dense"), "--window", "32", "--stride", "33"], "stride")


def test_a_text_shorter_than_one_window_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.txt").write_text("short")
    refused(capsys, ["eval", str(folder / "dense"), "--text", str(folder / "short.txt"), "--window", "32"], "tokens")


def test_an_empty_text_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.txt").write_text("\n \n")
    line = ["eval", str(folder / "dense"), "--text", str(folder / "empty.txt"), "--window", "32"]
    refused(capsys, line, "no text")


def test_a_row_of_a_task_that_lacks_a_key_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_rows(folder / "lacking.jsonl", [QUIZ[0], {"query": "what", "gold": 0}])
    refused(capsys, ["eval", str(folder / "dense"), "--tasks", task], "line 2: lacks choices")


def test_a_task_that_is_not_there_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["eval", str(folder / "dense"), "--tasks", str(folder / "none.jsonl")], "no file")


def test_a_baseline_with_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<other>"])
    artifact.write_model(tiny("llama"), other, folder / "other")
    line = ["eval", str(folder / "dense"), "--against", str(folder / "other"), "--text", str(folder / "text.txt")]
    refused(capsys, [*line, "--window", "32"], "tokenizers")


def test_a_record_is_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "there.json").write_text("mine")
    refused(capsys, ["eval", str(folder / "dense"), "-o", str(folder / "there.json")], "exists already")
    assert (folder / "there.json").read_text() == "mine"


def refused(capsys: pytest.CaptureFixture[str], line: list[str], word: str) -> None:
    """One clear line, exit code 2, and nothing on stdout."""
    capsys.readouterr()
    assert main(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (said,) = (line for line in captured.err.splitlines() if line.startswith("foldaway: "))
    assert word in said
