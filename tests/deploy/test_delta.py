"""``foldaway finetune`` and ``foldaway delta`` on tiny models: from examples to a package and back, and what is
refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import artifact
from compress.delta import pack as packing
from compress.delta.checkpoint import Checkpoint, digest
from compress.delta.package import Package
from compress.sources import load
from deploy.cli import main
from deploy.show import describe
from deploy.terminal import Terminal
from tests.conftest import byte_tokenizer, tiny
from tests.deploy.test_bad_input import refuse
from tests.deploy.test_eval import write_rows

SUMS = [{"prompt": f"{n} + {n} =", "response": f"{2 * n}"} for n in range(12)]
TRAIN = ["--set", "steps=4", "--set", "batch=4", "--set", "learning_rate=0.001"]
TEXT = ["--rows", "2", "--length", "48"]


def noisy(scale: float, seed: int) -> Any:
    model, generator = tiny("llama"), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes of it (one of another base), another architecture, two packages, and examples."""
    folder = tmp_path_factory.mktemp("deltas")
    models = {"base": tiny("llama"), "tuned": noisy(0.003, 1), "other": noisy(0.003, 2), "gpt2": tiny("gpt2")}
    for name, model in models.items():
        artifact.write_model(model.to(torch.bfloat16), byte_tokenizer(), folder / name)
    for p in ("0.9", "0.5"):
        line = [
            "delta",
            "pack",
            str(folder / "base"),
            str(folder / "tuned"),
            "--set",
            f"p={p}",
            "--set",
            "rescale=dare",
        ]
        assert main([*line, "-o", str(folder / f"package-{p}")]) == 0
    write_rows(folder / "sums.jsonl", SUMS)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    (folder / "file").write_text("")
    return folder


def ran(capfd: pytest.CaptureFixture[str], *line: object) -> tuple[dict[str, Any], str]:
    """What a call that is done said: the object that is all of its stdout, and its stderr."""
    capfd.readouterr()
    assert main([str(word) for word in line]) == 0
    captured = capfd.readouterr()
    (last,) = captured.out.splitlines()
    found: dict[str, Any] = json.loads(last)
    return found, captured.err


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


# --- From examples to a package and back


def test_a_fine_tune_is_made_advised_on_packed_checked_and_brought_back(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, tuned, one, two, back = folder / "base", *(tmp_path / name for name in ("tuned", "one", "two", "back"))

    made, words = ran(capfd, "finetune", base, "--data", folder / "sums.jsonl", *TRAIN, "-o", tuned)
    assert made["path"] == str(tuned)
    assert made["loss"] > 0
    assert f"delta advise BASE {tuned}" in words
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {f.name for f in tuned.iterdir()}
    assert "steps=4" in (tuned / "README.md").read_text()
    assert load(str(tuned)).model.dtype == torch.bfloat16

    advice, words = ran(capfd, "delta", "advise", base, tuned, *TEXT)
    assert 0 < advice["mean_abs_delta"] < 0.005
    assert advice["influence_ratio"] > 0
    assert advice["options"]["keep"] == "random"
    assert all(reason in words for reason in advice["reasons"])
    assert [row["p"] for row in advice["outlook"]] == [0.5, 0.9, 0.95, 0.99]

    options = [word for name, value in advice["options"].items() for word in ("--set", f"{name}={value}")]
    assert " ".join(options) in words
    options += ["--set", "rescale=least-squares"]  # the last one counts
    packed, words = ran(capfd, "delta", "pack", base, tuned, *options, *TEXT, "-o", one)
    assert packed["config"] == {**packed["config"], "p": 0.95, "rescale": "least-squares"}
    assert packed["sizes"]["pruned_parameters"] == sum(matrix["parameters"] for matrix in advice["matrices"])
    assert packed["measured"]["influence_ratio"] == pytest.approx(advice["influence_ratio"], rel=1e-5)
    assert packed["measured"]["exact_zeros"] == pytest.approx(advice["exact_zeros"])

    inspected, words = ran(capfd, "delta", "inspect", one)
    assert (inspected["id"], inspected["sizes"]) == (packed["id"], packed["sizes"])
    assert "tuned as what it adds to base" in words
    verified, words = ran(capfd, "delta", "verify", one, "--base", base)
    assert verified["id"] == packed["id"]
    assert "bit for bit" in words

    applied, _ = ran(capfd, "delta", "apply", base, one, "-o", back)
    assert (applied["path"], applied["delta"]) == (str(back), packed["id"])
    entries = Package(one).description.tensors
    found = weights_of(back)
    assert {name: digest(tensor) for name, tensor in found.items()} == {n: e.result for n, e in entries.items()}
    assert applied["tensors"] == len(found)
    assert torch.isfinite(load(str(back)).model(input_ids=torch.arange(20)[None]).logits).all()
    assert load(str(back)).tokenizer.decode([104, 105]) == load(str(tuned)).tokenizer.decode([104, 105])

    ran(
        capfd,
        "delta",
        "pack",
        base,
        tuned,
        "--set",
        "p=1/2",
        "--set",
        "rescale=dare",
        "--set",
        "values=bf16",
        "-o",
        two,
    )
    difference, words = ran(capfd, "delta", "diff", one, two)
    assert difference["same_base"] is True
    assert difference["options"]["density"] == ["1/20", "1/2"]
    assert difference["options"]["values"] == ["int8", "bf16"]
    differing = {n for n, e in Package(two).description.tensors.items() if e.result != entries[n].result}
    assert set(difference["tensors_that_differ"]) == differing
    assert f"{len(differing)} of {len(entries)} tensors" in words

    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "one", "tuned", "two"]


def test_the_export_of_a_base_becomes_that_of_a_fine_tune(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    to_onnx = ["--to", "onnx", "--dtype", "int4", "--check-tokens", "40"]
    ran(capfd, "export", folder / "base", *to_onnx, "-o", tmp_path / "base")
    line = ["delta", "export", tmp_path / "base", folder / "package-0.9", "--base", folder / "base"]
    made, words = ran(capfd, *line, "--check-tokens", "1000", "-o", tmp_path / "tuned")
    assert (made["path"], made["dtype"]) == (str(tmp_path / "tuned"), "int4")
    assert made["parity"]["tokens"] == 64  # the model's context
    assert f"foldaway serve {tmp_path / 'tuned'}" in words
    ran(capfd, "delta", "apply", folder / "base", folder / "package-0.9", "-o", tmp_path / "again")
    ran(capfd, "export", tmp_path / "again", *to_onnx, "-o", tmp_path / "direct")
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    shown, words = ran(capfd, "show", tmp_path / "tuned")
    assert shown["artifact_id"] == Package(folder / "package-0.9").description.id


def test_a_package_is_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown, words = ran(capfd, "show", folder / "package-0.9")
    description = Package(folder / "package-0.9").description
    assert shown == {"kind": "delta", **json.loads(description.model_dump_json())}
    assert description.id in words
    assert "1/10 of each matrix kept, as int8" in words
    assert describe(folder / "package-0.9")[0] == "delta"


def test_a_package_is_no_different_from_itself(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found, _ = ran(capfd, "delta", "diff", folder / "package-0.9", folder / "package-0.9")
    assert (found["options"], found["tensors_that_differ"]) == ({}, [])
    assert found["bytes"][0] == found["bytes"][1]


@pytest.mark.parametrize("labelled", [False, True])
def test_q_is_searched_with_labels_or_without(
    labelled: bool, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = ["--labelled", folder / "sums.jsonl", "--plain"] if labelled else []
    line = ["delta", "pack", folder / "base", folder / "tuned", "--set", "p=0.9", "--set", "rescale=search"]
    made, _ = ran(capfd, *line, *TEXT, *labels, "-o", tmp_path / "out")
    assert made["config"]["rescale"] == "fixed"
    assert 0.1 <= made["config"]["q"] <= 1
    ran(capfd, "delta", "verify", tmp_path / "out", "--base", folder / "base")


def test_advice_without_text_looks_at_the_weights_alone(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["delta", "advise", folder / "base", folder / "tuned"]
    advice, _ = ran(capfd, *line, "--calibration", "none")
    assert advice["influence_ratio"] is None
    assert advice["options"] == {"p": 0.95, "keep": "random", "rescale": "dare", "values": "int8"}
    advice, _ = ran(capfd, *line, "--calibration", "none", "--labels")
    assert advice["options"]["rescale"] == "search"


def test_the_learning_rate_may_be_written_as_the_help_page_does(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--set",
        "steps=1",
        "--set",
        "learning_rate=2e-5",
        "--set",
        "optimizer=adamr-l2",
        "--set",
        "strength=1e-2",
    ]
    line = ["finetune", folder / "base", "--data", folder / "sums.jsonl", *options, "--dtype", "fp32", "--plain"]
    ran(capfd, *line, "-o", tmp_path / "out")
    assert load(str(tmp_path / "out")).model.dtype == torch.float32


# --- An adapter in place of a fine-tune


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """A LoRA of the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(load(str(folder / "base")).model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("rescale", ["dare", "least-squares", "search", "labelled"])
def test_an_adapter_is_packed_in_every_way(
    rescale: str, adapter: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ways = {"labelled": ["--set", "rescale=search", "--labelled", folder / "sums.jsonl"]}
    options = ["--set", "p=0.9", *TEXT, *ways.get(rescale, ["--set", f"rescale={rescale}"])]
    ran(capfd, "delta", "pack", folder / "base", adapter, *options, "-o", tmp_path / "out")
    ran(capfd, "delta", "apply", folder / "base", tmp_path / "out", "-o", tmp_path / "back")
    before, after = weights_of(folder / "base"), weights_of(tmp_path / "back")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ == {name for name in before if "q_proj" in name or "down_proj" in name}
    load(str(tmp_path / "back"))


def test_an_adapter_is_advised_on(adapter: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    advice, _ = ran(capfd, "delta", "advise", folder / "base", adapter, *TEXT)
    assert len(advice["matrices"]) == 10
    assert advice["options"]["keep"] == "wanda"


# --- Mistakes

PACK = ["delta", "pack", "{base}", "{tuned}"]
SQUARES = ["--set", "rescale=least-squares"]
TUNE = ["finetune", "{base}", "--data", "{sums}"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ([*PACK, "--set", "size=3", "-o", "{out}"], "'size'"),
        ([*PACK, "--set", "p=1.5", "-o", "{out}"], "p=1.5"),
        ([*PACK, "--set", "p=much", "-o", "{out}"], "p='much'"),
        ([*PACK, "--set", "p", "-o", "{out}"], "NAME=VALUE"),
        ([*PACK, "--set", "keep=best", "-o", "{out}"], "magnitude"),
        ([*PACK, "--set", "values=int3", "-o", "{out}"], "int4"),
        ([*PACK, "--set", "scale=column", "-o", "{out}"], "row"),
        ([*PACK, "--set", "q=0.5", "-o", "{out}"], "rescale=fixed"),
        ([*PACK, "--set", "rescale=fixed", "--set", "q=0.01", "-o", "{out}"], "q=0.01"),
        ([*PACK, "--set", "p=0.7", "--set", "scheme=one-of-m", "-o", "{out}"], "bernoulli"),
        ([*PACK, "--set", "rescale=dare", "--set", "seed=1.5", "-o", "{out}"], "seed"),
        ([*PACK, "--labelled", "{sums}", "-o", "{out}"], "rescale=search"),
        ([*PACK, *TEXT, "--set", "rescale=search", "--labelled", "{gone}", "-o", "{out}"], "no text"),
        ([*PACK, "--device", "abacus", "-o", "{out}"], "abacus"),
        ([*PACK, *SQUARES, "-o", "{out}"], "at most 64"),
        ([*PACK, "--rows", "0", "-o", "{out}"], "rows"),
        ([*PACK, *SQUARES, "--calibration", "{gone}", "--length", "48", "-o", "{out}"], "no text"),
        (PACK, "-o DIR"),
        ([*PACK, "-o", "{base}"], "not empty"),
        ([*PACK, "-o", "{file}/out"], "cannot be written"),
        (["delta", "pack", "{gone}", "{tuned}", "-o", "{out}"], "there is no model"),
        (["delta", "pack", "{base}", "{gone}", "-o", "{out}"], "there is no model"),
        (["delta", "pack", "{sums}", "{tuned}", "-o", "{out}"], "there is no model"),
        (["delta", "pack", "{gguf}", "{tuned}", "-o", "{out}"], "export"),
        (["delta", "pack", "demo:smollm2", "{tuned}", "-o", "{out}"], "smollm2"),
        (["delta", "pack", "{base}", "{gpt2}", "--set", "rescale=dare", "-o", "{out}"], "no tensor in common"),
        (["delta", "pack", "{base}", "{gpt2}", *TEXT, "-o", "{out}"], "no tensor in common"),
        (["delta", "pack", "{base}", "{package}", "-o", "{out}"], "delta package"),
        (["delta", "pack", "{base}", "{package}", "--set", "rescale=dare", "-o", "{out}"], "package"),
        (["delta", "pack", "{package}", "{tuned}", "--set", "rescale=dare", "-o", "{out}"], "package"),
        (["delta", "advise", "{base}", "{base}", *TEXT], "nothing to prune"),
        (["delta", "advise", "{base}", "{gpt2}", *TEXT], "nothing to prune"),
        (["delta", "advise", "{gguf}", "{tuned}"], "export"),
        (["delta", "apply", "{other}", "{package}", "-o", "{out}"], "not the base"),
        (["delta", "apply", "{gpt2}", "{package}", "-o", "{out}"], "not the base"),
        (["delta", "apply", "{gguf}", "{package}", "-o", "{out}"], "export"),
        (["delta", "apply", "{base}", "{tuned}", "-o", "{out}"], "not a delta package"),
        (["delta", "apply", "{base}", "{package}", "-o", "{tuned}"], "not empty"),
        (["delta", "apply", "{base}", "{package}"], "-o DIR"),
        (["delta", "export", "{tuned}", "{package}", "--base", "{base}", "-o", "{out}"], "not an export"),
        (["delta", "export", "{gone}", "{package}", "--base", "{base}", "-o", "{out}"], "not an export"),
        (["delta", "export", "{tuned}", "{tuned}", "--base", "{base}", "-o", "{out}"], "not a delta package"),
        (["delta", "export", "{tuned}", "{package}", "--base", "{gguf}", "-o", "{out}"], "export"),
        (["delta", "export", "{tuned}", "{package}", "--base", "{base}", "-o", "{base}"], "not empty"),
        (["delta", "export", "{tuned}", "{package}", "--base", "{base}"], "-o DIR"),
        (["delta", "verify", "{package}", "--base", "{other}"], "not the base"),
        (["delta", "verify", "{gone}"], "not a delta package"),
        (["delta", "inspect", "{base}"], "not a delta package"),
        (["delta", "inspect", "{file}"], "not a delta package"),
        (["delta", "diff", "{package}", "{base}"], "not a delta package"),
        (["delta"], "advise, pack, inspect, verify, apply, export or diff"),
        ([*TUNE, "--set", "stepps=3", "-o", "{out}"], "'stepps'"),
        ([*TUNE, "--set", "steps=-1", "-o", "{out}"], "steps"),
        ([*TUNE, "--set", "batch=2.5", "-o", "{out}"], "batch"),
        ([*TUNE, "--set", "optimizer=sgd", "-o", "{out}"], "adamr-l2"),
        ([*TUNE, "--set", "learning_rate=fast", "-o", "{out}"], "finetune"),
        ([*TUNE, "--set", "max_length=4", "-o", "{out}"], "teaches nothing"),
        ([*TUNE, "--dtype", "int8", "-o", "{out}"], "bf16"),
        ([*TUNE, "--device", "abacus", "-o", "{out}"], "abacus"),
        ([*TUNE, "-o", "{base}"], "not empty"),
        (TUNE, "-o DIR"),
        (["finetune", "{base}", "--data", "{gone}", "-o", "{out}"], "no text"),
        (["finetune", "{gone}", "--data", "{sums}", "-o", "{out}"], "there is no model"),
        (["finetune", "{package}", "--data", "{sums}", "-o", "{out}"], "safetensors"),
        (["show", "{tuned}"], "no artifact, export, delta"),
    ],
)
def test_a_mistake_is_refused_on_one_line_and_leaves_nothing(
    line: list[str], word: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: folder / name for name in ("base", "tuned", "other", "gpt2", "file")}
    names |= {"sums": folder / "sums.jsonl", "gguf": folder / "model.gguf", "package": folder / "package-0.9"}
    names |= {"gone": tmp_path / "gone", "out": tmp_path / "out"}
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    refuse([piece.format(**names) for piece in line], capsys, word)
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in folder.iterdir()) == before


def truncate(package: Path) -> None:
    weights = package / "delta-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def lose_the_config(package: Path) -> None:
    (package / "config.json").unlink()


def edit_the_description(package: Path) -> None:
    text = (package / "delta.json").read_text()
    (package / "delta.json").write_text(text.replace('"seed":0', '"seed":1'))


@pytest.mark.parametrize("spoil", [truncate, lose_the_config, edit_the_description])
@pytest.mark.parametrize("command", ["inspect", "verify", "apply", "diff", "show"])
def test_a_package_that_was_changed_is_refused(
    command: str, spoil: Callable[[Path], None], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(folder / "package-0.9", package)
    spoil(package)
    lines = {
        "apply": ["delta", "apply", str(folder / "base"), str(package), "-o", str(tmp_path / "out")],
        "diff": ["delta", "diff", str(folder / "package-0.5"), str(package)],
        "show": ["show", str(package)],
    }
    refuse(lines.get(command, ["delta", command, str(package)]), capsys, "package")
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


# --- Ctrl-C


@pytest.mark.parametrize("command", ["pack", "apply"])
def test_what_is_interrupted_in_the_middle_leaves_nothing_behind(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    monkeypatch.setattr(packing, "SHARD_BYTES", 5_000)  # so that files have been written by then

    def interrupt(terminal: Terminal, what: str, done: int, total: int) -> None:
        told.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "_show", interrupt)
    lines = {
        "pack": ["pack", folder / "base", folder / "tuned", "--set", "rescale=dare"],
        "apply": ["apply", folder / "base", folder / "package-0.9"],
    }
    capfd.readouterr()
    assert main(["delta", *map(str, lines[command]), "-o", str(tmp_path / "out")]) == 130
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("foldaway: interrupted")
    assert len(told) > 10
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuning_that_was_interrupted_goes_on_with_the_same_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def line(name: str) -> list[str]:
        words = ["finetune", folder / "base", "--data", folder / "sums.jsonl", *TRAIN, "--set", "batch=3", "-o"]
        return [*map(str, words), str(tmp_path / name)]

    steps: list[int] = []

    def show(terminal: Terminal, what: str, done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "_show", show)
    assert main(line("out")) == 130
    assert [path.name for path in tmp_path.iterdir()] == [".out.scratch"]
    ran(capfd, *line("out"))
    assert steps == [1, 2, 3, 3, 4]
    ran(capfd, *line("whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    ours, theirs = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    base = Checkpoint(folder / "base")
    assert not all(torch.equal(ours[name], base.get(name)) for name in base.names)
