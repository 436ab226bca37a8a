"""Every mistake of a user: one line that says what to do, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deploy.cli import main
from tests.conftest import tiny

COMPRESS = ["--method", "2ssp", "--set", "sparsity=0.3", "--rows", "2", "--length", "32"]


def refuse(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Expect exit code 2 and one line on stderr that holds the words."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    complaints = [line for line in captured.err.splitlines() if line.startswith("foldaway: ")]
    assert len(complaints) == 1, captured.err
    assert captured.err.splitlines()[-1] == complaints[0]
    for word in words:
        assert word in complaints[0]
    assert captured.out == ""


def test_a_model_is_compressed_when_nothing_is_wrong(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(dense), *COMPRESS, "-o", str(tmp_path / "out")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parameters_after"] < last["parameters_before"]
    assert main(["show", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "magic", "--set", "sparsity=0.3"], ("magic", "2ssp")),
        (["--method", "2ssp", "--set", "sparsity=1.2"], ("sparsity=1.2",)),
        (["--method", "2ssp", "--set", "sparsity=much"], ("2ssp",)),
        (["--method", "2ssp", "--set", "sparsity=0.98"], ("0.98",)),
        (["--method", "2ssp", "--set", "sparsty=0.3"], ("sparsty", "alpha")),
        (["--method", "2ssp"], ("sparsity",)),
        (["--method", "2ssp", "--set", "sparsity"], ("NAME=VALUE",)),
        ([*COMPRESS, "--device", "abacus"], ("abacus",)),
        ([*COMPRESS, "--rows", "0"], ("rows",)),
        ([*COMPRESS, "--length", "4096"], ("4096",)),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(
    options: list[str], words: tuple[str, ...], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--rows", "2", "--length", "32"]
    refuse(["compress", str(dense), *small, *options, "-o", str(tmp_path / "out")], capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["compress", str(tmp_path / "gone"), *COMPRESS, "-o", str(tmp_path / "out")], capsys, "there is no model")
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "cannot be read"


def corrupt(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    return "cannot be read"


def lose_a_tensor(folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.2.mlp.up_proj.weight"


def pickle(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    return "pickled"


def unknown_architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    return "bloom"


def invented_architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "perpetuum"}))
    return "perpetuum"


def quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return "gptq"


def adapter(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    return "PEFT adapter"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        corrupt,
        lose_a_tensor,
        pickle,
        unknown_architecture,
        invented_architecture,
        quantised,
        adapter,
        no_config,
    ],
)
def test_a_model_folder_that_cannot_be_used_is_refused(
    spoil: Callable[[Path], str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dense, tmp_path / "model")
    word = spoil(tmp_path / "model")
    refuse(["compress", str(tmp_path / "model"), *COMPRESS, "-o", str(tmp_path / "out")], capsys, word)
    assert not (tmp_path / "out").exists()


def test_a_changed_artifact_is_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    assert main(["compress", str(dense), *COMPRESS, "-o", str(made)]) == 0
    capsys.readouterr()
    weights = made / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refuse(["compress", str(made), *COMPRESS, "-o", str(tmp_path / "out")], capsys, "model.safetensors", "changed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "word"), [("", "no text"), ("too short", "tokens")])
def test_calibration_text_that_is_empty_or_too_short_is_refused(
    content: str, word: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content)
    argv = ["compress", str(dense), *COMPRESS, "--calibration", str(text), "-o", str(tmp_path / "out")]
    refuse(argv, capsys, word)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_not_empty_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    refuse(["compress", str(dense), *COMPRESS, "-o", str(tmp_path)], capsys, "not empty")
    refuse(["export", str(dense), "--to", "onnx", "-o", str(tmp_path)], capsys, "not empty")
    recipe = Path(__file__).parents[2] / "deploy" / "recipes" / "demo.yaml"
    refuse(["run", str(recipe), "-o", str(tmp_path)], capsys, "not empty")
    assert (tmp_path / "precious.txt").read_text() == "keep me"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unknown_format_or_dtype_is_refused(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(["export", str(dense), "--to", "stone", "-o", str(tmp_path / "out")], capsys, "stone", "onnx")
    refuse(["export", str(dense), "--to", "onnx", "--dtype", "int3", "-o", str(tmp_path / "out")], capsys, "int3")
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_refused(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refuse(["serve", str(dense), "--port", port], capsys, port)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: x\nmodel: m\nsteps: []\ngate: {limits: [{metric: perplexity, max_ratio: 2}]}", "steps"),
        ("name: x\nmodel: m\nsteps: [{method: magic}]\ngate: {limits: [{metric: perplexity, max_ratio: 2}]}", "magic"),
        (
            "name: x\nmodel: m\nsteps: [{method: 2ssp, set: {sparsity: [0.1, 1.2]}}]\n"
            "gate: {limits: [{metric: perplexity, max_ratio: 2}]}",
            "1.2",
        ),
        (
            "name: x\nmodel: m\nsteps: [{method: 2ssp, set: {sparsity: 0.1}}]\nsurprise: 1\n"
            "gate: {limits: [{metric: perplexity, max_ratio: 2}]}",
            "surprise",
        ),
        ("- just\n- a list", "recipe"),
        ("{", "YAML"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(
    text: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    refuse(["run", str(recipe), "-o", str(tmp_path / "out")], capsys, word)
    assert not (tmp_path / "out").exists()


def test_the_code_that_a_model_brings_is_never_run(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert main(["compress", str(model), *COMPRESS, "-o", str(tmp_path / "made")]) == 0
    assert main(["compress", str(model), *COMPRESS, "--dry-run"]) == 0
    assert main(["export", str(model), "--to", "hf", "--check-tokens", "16", "-o", str(tmp_path / "hf")]) == 0
    assert main(["eval", str(tmp_path / "hf"), "--window", "32", "--windows", "1"]) == 0
    assert not (tmp_path / "ran").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["subject"]["perplexity"]["standard_error"] is None


def test_a_file_that_the_manifest_does_not_name_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(dense), *COMPRESS, "-o", str(tmp_path / "made")]) == 0
    capsys.readouterr()
    (tmp_path / "made" / "adapter_config.json").write_text("{}")
    refuse(["show", str(tmp_path / "made")], capsys, "adapter_config.json")


def test_sides_with_different_tokenizers_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refuse(["eval", str(other), "--against", str(dense), "--window", "32"], capsys, "tokenizers")
    out = str(tmp_path / "out")
    refuse(["bench", str(other), "--baseline", str(dense), "--window", "32", "-o", out], capsys, "tokenizers")
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_model_that_is_not_there_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodel: gone/without/trace\nsteps: [{method: 2ssp, set: {sparsity: 0.1}}]\n"
        "gate: {limits: [{metric: perplexity, max_ratio: 2}]}"
    )
    refuse(["run", str(recipe), "-o", str(tmp_path / "out")], capsys, "there is no model")
    refuse(["bench", "gone/a/b", "--baseline", "gone/c/d", "-o", str(tmp_path / "out")], capsys, "there is no model")
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_refused_before_the_work(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    refuse(["compress", str(dense), *COMPRESS, "-o", out], capsys, "cannot be written")


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(
    device: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compress", str(dense), *COMPRESS, "--device", device, "-o", str(tmp_path / "out")]
    refuse(argv, capsys, device)


def test_a_recipe_leaves_no_room_for_other_options(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\nmodel: {dense}\ncalibration: {{rows: 2, length: 32}}\n"
        "steps: [{method: shortgpt, set: {sparsity: 0.2}}, {method: 2ssp, set: {sparsity: 0.2}}]\n"
        "gate: {limits: [{metric: perplexity, max_ratio: 2}]}"
    )
    refuse(["compress", "--recipe", str(recipe), "--rows", "3", "-o", str(tmp_path / "out")], capsys, "--recipe")
    assert main(["compress", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["compress", "--recipe", str(recipe), "--dry-run"]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (predicted["parameters"], predicted["layout"]) == (last["parameters_after"], last["layout"])


@pytest.mark.parametrize("options", [["fp32"], ["int8", "--smooth", "0.5"]], ids=" ".join)
def test_an_export_is_predicted_without_being_written(
    options: list[str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(dense), "--to", "onnx", "--dtype", *options]
    assert main([*argv, "--dry-run"]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*argv, "--check-tokens", "8", "-o", str(tmp_path / "out")]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert predicted["parameters"] == made["parameters"]
    graph = (tmp_path / "out" / "model.onnx").stat().st_size  # which is large beside so small a model
    assert predicted["bytes"] == pytest.approx(made["bytes"] - graph, rel=0.1)


@pytest.mark.parametrize("options", [["divisor=1.5"], ["divisor=0"], ["alpha=.nan"], ["sparsity=0.05", "divisor=64"]])
def test_a_divisor_that_cannot_be_kept_is_refused(
    options: list[str], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for option in ["sparsity=0.3", *options] for word in ("--set", option)]
    argv = ["compress", str(dense), "--method", "2ssp", "--rows", "2", "--length", "32", *settings]
    refuse([*argv, "-o", str(tmp_path / "out")], capsys)
