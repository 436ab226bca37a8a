"""What is said of the machine, and what is not."""

from __future__ import annotations

import dataclasses
import getpass
import json
import platform
import subprocess
from pathlib import Path

from benchmarks import machine as module
from benchmarks.machine import machine, parse_cpuinfo

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: Other\n"


def test_the_machine_says_what_a_measurement_depends_on() -> None:
    found = machine()
    assert found.cpu
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.memory_bytes > 2**28
    assert found.python == platform.python_version()
    assert {"torch", "numpy"} <= set(found.packages)


def test_the_machine_names_no_host_no_user_and_no_path() -> None:
    text = json.dumps(dataclasses.asdict(machine()))
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(Path.home()) not in text
    assert str(Path(module.__file__).parent) not in text


def test_the_first_processor_of_cpuinfo_speaks_for_all() -> None:
    assert parse_cpuinfo(CPUINFO)["model name"] == "Some CPU @ 2 GHz"
    assert parse_cpuinfo(CPUINFO)["flags"] == "fpu avx2"


def test_the_commit_is_that_of_the_checkout_and_marked_when_files_differ(tmp_path: Path) -> None:
    def git(*argv: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *argv], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert module._commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert module._commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "new").write_text("")
    assert module._commit(tmp_path) == git("rev-parse", "HEAD") + "+"


def test_a_folder_inside_somebody_elses_checkout_has_no_commit(tmp_path: Path) -> None:
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    (tmp_path / "inner").mkdir()
    assert module._commit(tmp_path / "inner") is None
