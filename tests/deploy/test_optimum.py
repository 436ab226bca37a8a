"""`optimum-cli export foldaway`: the options and the handler of `foldaway export`, found where optimum looks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from deploy.cli import add_export_options, build_parser, main
from exporters import read_export
from tests.conftest import byte_tokenizer, tiny


@pytest.fixture
def optimum_cli(monkeypatch: pytest.MonkeyPatch):
    """Call optimum's command line in this process; gives its exit code."""
    command = pytest.importorskip("optimum.commands.optimum_cli")
    if importlib.util.find_spec("optimum.commands.register.register_foldaway") is None:
        pytest.skip("foldaway is not installed in this environment")

    def call(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return ended.value.code

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_it_exports_as_foldaway_does(
    optimum_cli, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(model), "--to", "onnx", "--check-tokens", "16", "-o"]
    assert optimum_cli("export", "foldaway", *options, str(tmp_path / "theirs")) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["format"] == "onnx"
    assert main(["export", *options, str(tmp_path / "ours")]) == 0
    theirs, ours = (read_export(tmp_path / name) for name in ("theirs", "ours"))
    assert theirs == ours


def test_a_mistake_is_one_line_and_exit_code_2(
    optimum_cli, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert optimum_cli("export", "foldaway", str(model), "--to", "nothing", "-o", str(out)) == 2
    assert capsys.readouterr().err.startswith("foldaway: ")
    assert not out.exists()


def test_its_options_are_those_of_foldaway_export() -> None:
    parser = argparse.ArgumentParser()
    add_export_options(parser)
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(parser._option_string_actions) == set(commands.choices["export"]._option_string_actions)
