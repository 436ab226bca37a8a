"""Runtimes beside each other: what is measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.bandwidth import bandwidth
from benchmarks.memory import Resident
from benchmarks.runtimes.__main__ import main
from benchmarks.runtimes.measure import SETTINGS, measure, memory_of, run, settings_for
from benchmarks.runtimes.probe import KINDS, prompt_of
from benchmarks.runtimes.record import Runtimes, chart, conditions, document, read, table
from benchmarks.runtimes.sides import Side, read_bytes, sides_of
from compress.errors import BackendError, ConfigError
from compress.sources import Loaded, Origin
from exporters import export
from exporters.onnx_session import MODEL_FILE
from tests.conftest import CONTEXT, V, byte_tokenizer, tiny, token_rows

HERE = ("onnx", "genai", "torch")
"""Runtimes that our environment has."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each kind of runtime."""
    model, folder = tiny("llama"), tmp_path_factory.mktemp("runtimes")
    model.to(torch.bfloat16).save_pretrained(folder / "hf")
    loaded = Loaded(tiny("llama"), byte_tokenizer(), Origin("tiny", "folder"))
    export(loaded, folder / "onnx", to="onnx", check_tokens=token_rows(1, 8).tokens)
    return {"onnx": folder / "onnx", "genai": folder / "onnx", "torch": folder / "hf"}


@pytest.fixture(scope="module")
def record(folders: dict[str, Path]) -> Runtimes:
    """All kinds that are here."""
    sides = [Side(f"by {kind}", kind, folders[kind]) for kind in HERE]
    return measure(sides, threads=1, rounds=1, perplexities={"by onnx": 12.5}, title="Tiny")


@pytest.mark.xdist_group("runtimes")
def test_every_runtime_is_measured_and_says_its_version(record: Runtimes) -> None:
    assert [side.kind for side in record.sides] == list(HERE)
    for side in record.sides:
        assert len(side.runs) == 1
        assert set(side.versions) == set(KINDS[side.kind][1])
        for each in side.runs:
            assert min(each.load_seconds, each.prefill_tokens_per_second, each.decode_tokens_per_second) > 0
    assert record.bandwidth_bytes_per_second > 1e8


@pytest.mark.xdist_group("runtimes")
def test_a_table_has_a_row_for_each_side_and_compares_with_the_baseline(record: Runtimes) -> None:
    grid = table(record)
    assert [row[0] for row in grid.rows] == ["by onnx", "by genai", "by torch"]
    assert {len(row) for row in grid.rows} == {len(grid.headers)}
    assert "×" not in "".join(grid.rows[0])
    assert grid.rows[1][1].endswith("(×\N{NO-BREAK SPACE}1)")  # the same files
    assert grid.rows[0][-1] == "12.5"
    assert grid.rows[1][-1] == "–"
    assert "1 processes" in conditions(record)
    assert document(record, "runtimes.json").endswith(f"the record is [{record.id}](runtimes.json).\n")


@pytest.mark.xdist_group("runtimes")
def test_the_picture_shows_every_side_twice(record: Runtimes) -> None:
    picture = ElementTree.fromstring(chart(record))
    circles = picture.findall(".//{http://www.w3.org/2000/svg}circle")
    measured = sum(side.used_bytes is not None for side in record.sides)
    assert len(circles) == 2 * len(record.sides) + measured  # speed, memory, and the legend
    assert all(side.name in chart(record) for side in record.sides)


@pytest.mark.xdist_group("runtimes")
def test_the_command_writes_a_record_that_can_be_read_and_its_picture(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "runtimes.json"
    argv = [f"a=genai:{folders['genai']}", "--baseline", "a", "--threads", "1", "--rounds", "1", "-o", str(file)]
    assert main(argv) == 0
    assert read(file).baseline == "a"
    assert file.with_suffix(".svg").read_text("utf-8").startswith("<svg")
    assert capsys.readouterr().out.startswith("| ")


def test_a_short_context_makes_everything_shorter(folders: dict[str, Path], tmp_path: Path) -> None:
    short = settings_for([Side("a", "onnx", folders["onnx"]), Side("b", "llama.cpp", tmp_path)])
    assert short["prompt_tokens"] < CONTEXT
    assert short["first_tokens"] + short["first_steps"] < CONTEXT
    assert short["repeats"] == SETTINGS["repeats"]
    assert settings_for([Side("b", "llama.cpp", tmp_path)]) == SETTINGS


def test_weights_that_are_only_looked_up_do_not_count_and_what_is_stored_once_counts_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
        helper.make_node("MatMul", ["y", "again"], ["z"]),
    ]
    tensors = []
    for name, offset in (("table", "0"), ("weight", "4096"), ("again", "4096")):
        tensor = onnx.TensorProto(name=name, data_type=floats, dims=[8, 8], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": "w.bin", "offset": offset, "length": "256"}.items():
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1])
    out = helper.make_tensor_value_info("z", floats, [1, 8])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [ids], [out], tensors)), str(tmp_path / MODEL_FILE))
    assert read_bytes(tmp_path / MODEL_FILE) == 256


def test_what_is_cast_while_loading_counts_as_what_it_is_read_as(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["scales"], ["scales_fp32"], to=types.FLOAT),
        helper.make_node("MatMul", ["x", "scales_fp32"], ["y"]),
        helper.make_node("Gather", ["scales", "ids"], ["row"]),
        helper.make_node("Cast", ["row"], ["row_fp32"], to=types.FLOAT),
        helper.make_node("Cast", ["cos_fp16"], ["cos"], to=types.FLOAT),
        helper.make_node("GroupQueryAttention", ["y", "cos"], ["z"], domain="com.microsoft"),
    ]
    tensors = [helper.make_tensor(name, types.FLOAT16, [4, 4], [0.0] * 16) for name in ("scales", "cos_fp16")]
    x, z = (helper.make_tensor_value_info(name, types.FLOAT, [1, 4]) for name in "xz")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [z], tensors)), str(tmp_path / MODEL_FILE))
    assert read_bytes(tmp_path / MODEL_FILE) == 4 * 16


def test_prompts_are_the_same_everywhere_and_within_the_vocabulary() -> None:
    prompt = prompt_of(200, V)
    assert prompt == prompt_of(400, V)[:200]
    assert min(prompt) >= 0
    assert max(prompt) < V


def test_memory_is_what_a_process_holds_beyond_its_imports() -> None:
    held = {
        "idle": Resident(50, 10, 60, 70),
        "loaded": Resident(100, 40, 140, 150),
        "used": Resident(110, 45, 155, 160),
        "done": Resident(110, 45, 155, 200),
    }
    memory = memory_of(held)
    assert (memory.idle_bytes, memory.loaded_anon_bytes, memory.loaded_file_bytes) == (60, 50, 30)
    assert (memory.used_total_bytes, memory.peak_bytes) == (95, 140)


@pytest.mark.parametrize(
    ("sides", "pythons", "message"),
    [
        (["a"], [], "NAME=KIND:PATH"),
        (["a=onnx"], [], "NAME=KIND:PATH"),
        (["a=tflite:."], [], "a kind of onnx, genai"),
        (["a=onnx:nowhere"], [], "nothing at nowhere"),
        (["a=onnx:.", "a=torch:."], [], "once"),
        (["a=onnx:."], ["b=python3"], "b: "),
    ],
)
def test_what_cannot_be_meant_is_refused(sides: list[str], pythons: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sides_of(sides, pythons)


@pytest.mark.parametrize(("kind", "package"), [("llama.cpp", "llama_cpp"), ("optimum", "optimum.onnxruntime")])
def test_a_runtime_that_is_missing_is_named_with_what_to_do(kind: str, package: str, tmp_path: Path) -> None:
    import importlib.util

    try:
        if importlib.util.find_spec(package):
            pytest.skip(f"{package} is here")
    except ModuleNotFoundError:
        pass
    with pytest.raises(BackendError, match=rf"it cannot be measured: '{package}' is not in .*--python it=PATH"):
        run(Side("it", kind, tmp_path), SETTINGS | {"threads": 1})


def test_a_side_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"it cannot be measured: .*holds no"):
        run(Side("it", "onnx", tmp_path), SETTINGS | {"threads": 1})
    with pytest.raises(BackendError, match="it cannot be measured: nothing-here"):
        run(Side("it", "onnx", tmp_path, "nothing-here"), SETTINGS | {"threads": 1})


def test_bandwidth_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    assert bandwidth(1, repeats=2, array_bytes=1 << 22) > 0
    assert torch.get_num_threads() == before


def test_a_record_that_was_edited_is_refused(record: Runtimes, tmp_path: Path) -> None:
    content = json.loads(record.model_dump_json())
    content["threads"] = 64
    (tmp_path / "edited.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="changed after it was written"):
        read(tmp_path / "edited.json")
