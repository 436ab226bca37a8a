"""`foldaway compress` with FuseGPT: what a person calls, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.schema import list_files
from deploy.cli import main
from deploy.comparison import child_environment

OPTIONS = {"sparsity": 0.6, "window": 4, "batch": 2, "coefficient_rank": 2, "lora_rank": 2, "loss": "mse"}


def line(dense: Path, out: Path, **options: object) -> list[str]:
    chosen = [word for name, value in {**OPTIONS, **options}.items() for word in ("--set", f"{name}={value}")]
    return ["compress", str(dense), "--method", "fusegpt", *chosen, "--rows", "4", "--length", "32", "-o", str(out)]


@pytest.mark.xdist_group("eval")
def test_a_killed_compression_goes_on_and_ends_with_the_same_bytes(dense: Path, tmp_path: Path) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    command = [sys.executable, "-P", "-m", "deploy", *line(dense, killed, epochs=100)]
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    scratch = tmp_path / ".killed.scratch"
    while not list(scratch.glob("fusegpt-*.safetensors")):  # the first removal is done
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
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
