"""Runtimes that people use open real exports, and generate the text that our own session generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.consumers import CONSUMERS
from benchmarks.consumers.base import judge
from exporters import read_export
from exporters.onnx_session import load_tokenizer
from tests.consumers.conftest import Made

pytestmark = pytest.mark.consumers

PYTHON = [name for name in CONSUMERS if not name.startswith("transformers.js")]
"""Those of this file; the others are test_javascript's."""


@pytest.mark.parametrize("name", PYTHON)
def test_it_generates_the_text_that_our_own_session_generates(name: str, made: Made) -> None:
    CONSUMERS[name].prepare()
    found = judge(name, CONSUMERS[name], made.path, made.reference, made.dtype)
    assert found.ok, f"{found.reason}: {found.text!r}, not {made.reference!r}"


def test_the_reference_is_not_cut_short(made: Made) -> None:
    assert len(load_tokenizer(made.path)(made.reference)["input_ids"]) >= 16


def test_optimum_cli_writes_the_graph_that_foldaway_writes(tmp_path: Path, made: Made) -> None:
    if made.layout != "plain" or made.dtype != "int4":
        pytest.skip("once is enough")
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "foldaway", "demo:smollm2"]
    options = ["--to", "onnx", "--dtype", "int4", "--check-tokens", "16", "-o", str(tmp_path / "x")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    theirs, ours = read_export(tmp_path / "x"), read_export(made.path)
    differing = {name for name in ours.files if theirs.files[name] != ours.files[name]}
    assert differing <= {"README.md"}  # which says how many tokens it was checked on
