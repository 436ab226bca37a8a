"""`foldaway compress` with what learns: what a person calls, and what a kill leaves."""

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

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from benchmarks.servers import child_environment
from compress.artifact import read_manifest
from compress.schema import list_files
from deploy.cli import main
from tests.deploy.test_eval import QUIZ, write_rows

OPTIONS = {"sparsity": 0.6, "window": 4, "batch": 2, "coefficient_rank": 2, "lora_rank": 2, "loss": "mse"}


def line(dense: Path, out: Path, **options: object) -> list[str]:
    chosen = [word for name, value in {**OPTIONS, **options}.items() for word in ("--set", f"{name}={value}")]
    return ["compress", str(dense), "--method", "fusegpt", *chosen, "--rows", "4", "--length", "32", "-o", str(out)]


def kill_when_there(command: list[str], scratch: Path, kept: str) -> Path:
    """Start a command, and kill it as soon as it has left a file of some name."""
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (found := list(scratch.glob(kept))):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return found[0]


@pytest.mark.xdist_group("eval")
def test_a_killed_compression_goes_on_and_ends_with_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-P", "-m", "deploy", *line(dense, killed, epochs=40)]
    scratch = tmp_path / ".killed.scratch"
    kill_when_there(command, scratch, "fusegpt-*.safetensors")  # the first removal is done
    assert not killed.exists()
    assert main(line(dense, killed, epochs=40)) == 0
    assert main(line(dense, unbroken, epochs=40)) == 0
    assert list_files(killed) == list_files(unbroken)
    assert not scratch.exists()


def test_the_last_line_says_what_went(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"epochs": 1, "protect": "[0,-1]", "held_out": 2}
    assert main([*line(dense, tmp_path / "out", **options), "--device", "auto", "--spill", "0"]) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert sorted(last["blocks_removed"]) == [1, 2, 3]
    assert last["layout"] == "plain"
    assert [tuning["held_out_before"] > 0 for tuning in last["tuning"]] == [True] * 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch": 1, "loss": "batch_kl"}, "give 2 or more"),
        ({"window": 3}, "even"),
        ({"window": 6}, "up to 5"),
        ({"batch": 8}, "give 8 rows"),
        ({"blocks": "[1,2]"}, "name as many"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], word: str
) -> None:
    assert main(line(dense, tmp_path / "out", **options)) == 2
    assert word in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_negative_limit_of_memory_is_refused(dense: Path, tmp_path: Path) -> None:
    assert main([*line(dense, tmp_path / "out"), "--spill", "-1"]) == 2


def test_a_dry_run_says_what_would_come_out(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line(dense, tmp_path / "out"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layout"] == "plain"


# FoldGPT

PAIRS = {"sparsity": 0, "keep_ends": 0, "batch": 2, "held_out": 2, "lora_rank": 2, "epochs": 1}


def fold(dense: Path, out: Path, *more: str, **options: object) -> list[str]:
    chosen = [word for name, value in {**PAIRS, **options}.items() for word in ("--set", f"{name}={value}")]
    command = ["compress", str(dense), "--method", "foldgpt", *chosen, "--rows", "4", "--length", "32"]
    return [*command, *more, "-o", str(out)]


@pytest.mark.xdist_group("eval")
def test_healing_that_was_killed_goes_on_and_ends_with_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    program = "import compress.training, sys; compress.training.KEEP_SECONDS = 0; from deploy.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, *fold(dense, killed, epochs=100)]
    scratch = tmp_path / ".killed.scratch"
    kept = kill_when_there(command, scratch, "foldgpt-healing-*.safetensors")  # it has begun to learn
    assert not killed.exists()
    done = json.loads(safe_open(kept, "pt").metadata()["place"])["done"]  # type: ignore[no-untyped-call]
    assert 0 < done < 100
    assert main(fold(dense, killed, epochs=100)) == 0
    assert main(fold(dense, unbroken, epochs=100)) == 0
    assert list_files(killed) == list_files(unbroken)
    assert not scratch.exists()


def test_the_last_line_says_what_is_stored_and_what_is_executed(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(fold(dense, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert (last["layout"], last["blocks_stored"], last["blocks_executed"]) == ("shared", 3, 5)
    assert last["flops_per_token"][0] == last["flops_per_token"][1]
    assert "3 of 5 blocks are stored and all are executed" in captured.err
    assert main(["export", str(tmp_path / "out"), "--to", "hf", "--expand", "-o", str(tmp_path / "whole")]) == 0
    assert "5 blocks are stored in place of 3" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "model of 5 blocks, of which 3 are stored" in capsys.readouterr().err


def test_an_artifact_is_healed_alone_by_what_it_came_from(dense: Path, tmp_path: Path) -> None:
    assert main(fold(dense, tmp_path / "shared", epochs=0)) == 0
    healed = {
        name: read_manifest(tmp_path / name).steps[-1].numbers["divergence"]["healed"]
        for name, more in (("taught", ["--teacher", str(dense)]), ("alone", []))
        if main(fold(tmp_path / "shared", tmp_path / name, *more, group=1)) == 0
    }
    assert healed["taught"] > 0.1  # still far from the dense model
    assert healed["alone"] < healed["taught"]  # and near to itself


def test_a_teacher_that_is_not_asked_or_not_understood_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line(dense, tmp_path / "out"), "--teacher", str(dense)]) == 2
    assert "does not learn from a teacher" in capsys.readouterr().err
    assert main(fold(dense, tmp_path / "out", "--teacher", str(tmp_path / "none"))) == 2
    other = shutil.copytree(dense, tmp_path / "other")
    tokenizer: Any = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    capsys.readouterr()
    assert main(fold(dense, tmp_path / "out", "--teacher", str(other))) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


# Minitron and distillation


def lesson(student: Path, teacher: Path, out: Path, *more: str, **options: object) -> list[str]:
    given = {"batch": 2, "precision": "fp32", "learning_rate": 0.001, **options}
    chosen = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    command = ["distill", str(student), "--teacher", str(teacher), *chosen, "--rows", "4", "--length", "32"]
    return [*command, *more, "-o", str(out)]


@pytest.fixture(scope="module")
def half(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model with half of its neurons."""
    out = tmp_path_factory.mktemp("half") / "half"
    command = ["compress", str(dense), "--method", "minitron", "--set", "intermediate_size=40"]
    assert main([*command, "--rows", "4", "--length", "32", "-o", str(out)]) == 0
    return out


def test_a_student_learns_from_its_parent_and_the_manifest_says_from_whom(
    dense: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(lesson(half, dense, tmp_path / "out", epochs=20, held_out=2)) == 0
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert last["tokens_learnt"] == 20 * 2 * 32
    assert last["losses"][-1] < last["losses"][0]
    assert last["parameters_before"] == last["parameters_after"]
    assert "nats from the teacher" in captured.err
    cut, learnt = read_manifest(tmp_path / "out").steps
    assert (cut.method, cut.teacher, learnt.method) == ("minitron", None, "distill")
    assert learnt.teacher is not None
    assert (learnt.teacher.name, learnt.teacher.artifact) == (dense.name, None)
    assert read_manifest(tmp_path / "out").parent == read_manifest(half).id


@pytest.mark.xdist_group("eval")
def test_a_lesson_that_was_killed_goes_on_and_ends_with_the_same_bytes(dense: Path, half: Path, tmp_path: Path) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    program = "import compress.training as t, sys; t.KEEP_SECONDS = 0; t.KEEP_SHARE = 1e9"
    program += "; from deploy.cli import main; main()"
    command = [sys.executable, "-P", "-c", program, *lesson(half, dense, killed, epochs=60)]
    kept = kill_when_there(command, tmp_path / ".killed.scratch", "distillation-*.safetensors")
    assert not killed.exists()
    done = json.loads(safe_open(kept, "pt").metadata()["place"])["done"]  # type: ignore[no-untyped-call]
    assert 0 < done < 120
    assert main(lesson(half, dense, killed, epochs=60)) == 0
    assert main(lesson(half, dense, unbroken, epochs=60)) == 0
    assert list_files(killed) == list_files(unbroken)
    assert not list(tmp_path.glob(".*scratch"))


def test_a_teacher_with_another_tokenizer_is_refused(
    dense: Path, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(dense, tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"<pad>"', '"<end>"'))
    assert main(lesson(half, other, tmp_path / "out")) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_that_cannot_be_are_refused_with_the_nearest(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, words in (
        ("num_attention_heads=3", "the nearest are 2 and 4"),
        ("hidden_size=44", "the nearest are 40 and 48"),
        ("intermediate_size=100", "more than the 80"),
        ("depth_ranking=score", "give tasks"),
    ):
        command = ["compress", str(dense), "--method", "minitron", "--set", option, "--set", "num_hidden_layers=4"]
        assert main([*command, "--rows", "2", "--length", "32", "-o", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_blocks_are_ranked_by_a_task(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    write_rows(tmp_path / "quiz.jsonl", QUIZ)
    command = ["compress", str(dense), "--method", "minitron", "--set", "num_hidden_layers=3"]
    command += ["--set", "depth_ranking=score", "--set", "contiguous=true", "--tasks", str(tmp_path / "quiz.jsonl")]
    assert main([*command, "--rows", "2", "--length", "32", "-o", str(tmp_path / "out")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["block_scores"]) == 4
    first = last["block_scores"].index(min(last["block_scores"]))
    assert last["blocks_removed"] == [first, first + 1]
    assert all(-1 <= score <= 0 for score in last["block_scores"])
