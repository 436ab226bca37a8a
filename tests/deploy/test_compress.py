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

from compress.artifact import read_manifest
from compress.schema import list_files
from deploy.cli import main
from deploy.comparison import child_environment

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
    command = [sys.executable, "-P", "-m", "deploy", *line(dense, killed, epochs=100)]
    scratch = tmp_path / ".killed.scratch"
    kill_when_there(command, scratch, "fusegpt-*.safetensors")  # the first removal is done
    assert not killed.exists()
    assert main(line(dense, killed, epochs=100)) == 0
    assert main(line(dense, unbroken, epochs=100)) == 0
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
    command = [sys.executable, "-P", "-c", program, *fold(dense, killed, epochs=300)]
    scratch = tmp_path / ".killed.scratch"
    kept = kill_when_there(command, scratch, "foldgpt-healing-*.safetensors")  # it has begun to learn
    assert not killed.exists()
    done = json.loads(safe_open(kept, "pt").metadata()["place"])["done"]  # type: ignore[no-untyped-call]
    assert 0 < done < 300
    assert main(fold(dense, killed, epochs=300)) == 0
    assert main(fold(dense, unbroken, epochs=300)) == 0
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
