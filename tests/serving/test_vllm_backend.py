"""What foldaway does around vLLM's server, with a stand-in for vLLM: what it is started with, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from compress import artifact
from compress.delta import pack as packing
from compress.delta.checkpoint import Checkpoint
from compress.errors import BackendError, ConfigError, CorruptArtifact
from compress.layout import layout_of
from compress.methods.darex import DarexConfig
from compress.sources import Loaded, Origin, load
from compress.surgery import drop_attention, keep_heads, share_blocks
from deploy.cli import main
from exporters import export
from serving import service, vllm_backend, vllm_plugin
from tests.conftest import byte_tokenizer, tiny, token_rows

SERVER = """
import http.server, json, os, signal, subprocess, sys, time

arguments = sys.argv[1:]
mode = os.environ["STAND_IN"]
print("loading weights", flush=True)
if mode == "fail":
    print("(EngineCore pid=7) ERROR 01-01 [core.py:1] ValueError: 9 heads cannot be divided by 2", file=sys.stderr)
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
    sys.exit(1)
if mode == "dead":
    print("EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.", flush=True)
    print("warnings.warn(leaked objects)", flush=True)
    sys.exit(0)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"])
if mode == "slow":
    time.sleep(99)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass

with open(os.environ["STAND_IN_SEEN"], "w") as file:
    json.dump({"arguments": arguments, "key": os.environ.get("VLLM_API_KEY"),
               "offline": os.environ.get("HF_HUB_OFFLINE"), "pid": os.getpid()}, file)
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler)
if mode == "crash":
    import threading
    threading.Timer(1, lambda: (print("KeyError: 'lost'", flush=True), os._exit(3))).start()
print("answering", flush=True)
server.serve_forever()
"""


class StandIn:
    """vLLM in this environment, as far as foldaway can tell."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.seen_file, self._patch = folder / "seen.json", patch
        package = folder / "site" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        for each in (package, package.parent, package.parent.parent):
            (each / "__init__.py").touch()
        (package / "api_server.py").write_text(SERVER)
        patch.setenv("PYTHONPATH", str(folder / "site"))
        patch.setenv("STAND_IN_SEEN", str(self.seen_file))
        patch.setattr(vllm_backend, "installed_version", lambda: "0.32.0")
        patch.setattr(vllm_backend, "GRACE_SECONDS", 1)
        self.said: list[str] = []
        self.mode("serve")

    def mode(self, mode: str) -> None:
        self._patch.setenv("STAND_IN", mode)

    def serve(self, path: object, *signals: int, when_ready: bool = True, **options: Any) -> None:
        """Serve, and send signals to this process once it answers, or at once."""

        def send(url: str = "") -> None:
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.5)

        later: Callable[[str], None] = lambda url: threading.Thread(target=send).start()  # noqa: E731
        if not when_ready:
            threading.Timer(1, send).start()
        options = {"port": 0, "say": self.said.append, **options}
        vllm_backend.serve(str(path), ready=later if when_ready else None, **options)

    @property
    def seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads(self.seen_file.read_text())
        return seen

    def given(self, flag: str) -> str:
        arguments: list[str] = self.seen["arguments"]
        return arguments[arguments.index(flag) + 1]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny("llama"), tmp_path_factory.mktemp("plain") / "smol")


def saved(model: Any, path: Path) -> Path:
    artifact.save(model, byte_tokenizer(), path, origin=artifact.OriginEntry(name="tiny", kind="folder"), steps=[])
    return path


def log_of(error: BackendError) -> Path:
    return Path(str(error).rpartition("its log is ")[2])


def test_vllm_is_started_with_the_model_its_name_and_its_flags(vllm: StandIn, plain: Path) -> None:
    flags = ["--dtype", "float32", "--tensor-parallel-size=2"]
    vllm.serve(plain, signal.SIGTERM, max_model_len=48, flags=flags)
    assert vllm.given("--model") == str(plain)
    assert vllm.given("--served-model-name") == "smol"
    assert vllm.given("--max-model-len") == "48"
    assert vllm.given("--host") == "127.0.0.1"
    assert vllm.seen["arguments"][-3:] == flags
    assert not psutil.pid_exists(vllm.seen["pid"])


def test_a_key_travels_in_the_environment(vllm: StandIn, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "vLLM's own")
    vllm.serve(plain, signal.SIGTERM, api_key="secret", served_model_name="mine")
    assert vllm.seen["key"] == "secret"
    assert "secret" not in vllm.seen["arguments"]
    assert vllm.given("--served-model-name") == "mine"
    vllm.serve(plain, signal.SIGTERM)
    assert vllm.seen["key"] == "vLLM's own"


def test_what_vllm_says_is_shown_from_the_beginning_or_once_it_answers(vllm: StandIn, plain: Path) -> None:
    vllm.serve(plain, signal.SIGINT)
    assert vllm.said[:2] == ["loading weights", "answering"]
    vllm.said.clear()
    vllm.serve(plain, signal.SIGINT, quiet=True)
    assert "loading weights" not in vllm.said


def test_a_start_that_fails_is_told_in_one_line_with_its_cause(vllm: StandIn, plain: Path) -> None:
    vllm.mode("fail")
    with pytest.raises(BackendError, match=r"did not start: 9 heads cannot be divided by 2; its log is ") as caught:
        vllm.serve(plain)
    log = log_of(caught.value)
    assert "Engine core initialization failed" in log.read_text()
    log.unlink()


def test_a_crash_later_is_told(vllm: StandIn, plain: Path) -> None:
    vllm.mode("crash")
    with pytest.raises(BackendError, match=r"ended by itself with exit code 3: 'lost'$"):
        vllm.serve(plain)


def test_an_error_that_only_points_to_another_is_better_than_none(vllm: StandIn, plain: Path) -> None:
    vllm.mode("dead")
    with pytest.raises(BackendError, match="did not start: EngineCore encountered an issue"):
        vllm.serve(plain)


def test_a_second_signal_ends_what_does_not_want_to_and_its_children(vllm: StandIn, plain: Path) -> None:
    vllm.mode("stubborn")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        vllm.serve(plain, signal.SIGINT, signal.SIGINT)
    assert not psutil.pid_exists(vllm.seen["pid"])
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_signal_while_it_loads_ends_it(vllm: StandIn, plain: Path) -> None:
    vllm.mode("slow")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    vllm.serve(plain, signal.SIGTERM, when_ready=False)
    assert vllm.said == ["loading weights"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_signal_before_anything_is_started_interrupts(
    vllm: StandIn, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_backend, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        vllm.serve(plain)
    assert vllm.said == []


def test_a_proxy_is_not_asked_for_a_server_of_this_machine(
    vllm: StandIn, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    vllm.serve(plain, signal.SIGTERM)
    assert "answering" in vllm.said


@pytest.mark.parametrize(("flags", "offline"), [([], "1"), (["--lora-modules", "a=owner/name"], None)])
def test_a_hub_is_asked_only_where_a_flag_may_name_one(
    flags: list[str], offline: str | None, vllm: StandIn, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    vllm.serve(plain, signal.SIGTERM, flags=flags)
    assert vllm.seen["offline"] == offline


def test_handlers_of_signals_are_put_back(vllm: StandIn, plain: Path) -> None:
    usual = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    vllm.serve(plain, signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == usual


@pytest.mark.parametrize("flag", [*vllm_backend.REFUSED, "--model=x", "--max_model_len"])
def test_flags_that_foldaway_sets_itself_or_that_do_nothing_are_refused(flag: str, vllm: StandIn, plain: Path) -> None:
    with pytest.raises(ConfigError, match="after --"):
        vllm.serve(plain, flags=[flag, "1"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--shutdown-timeout", "7"], "7"),
        (["--shutdown-timeout=7"], "7"),
        (["--shutdown_timeout"], ""),
    ],
)
def test_the_value_of_a_flag_is_found(flags: list[str], expected: str | None) -> None:
    assert vllm_backend._value(flags, "--shutdown-timeout") == expected


def test_a_port_in_use_is_told_before_anything_is_loaded(vllm: StandIn, plain: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BackendError, match="cannot listen"):
            vllm.serve(plain, port=taken.getsockname()[1])


def test_without_vllm_the_way_to_install_it_is_told(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vllm_plugin.installed_version() is None
    assert main(["serve", str(plain), "--backend", "vllm"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("foldaway: vLLM is not installed: pip install")


def test_a_vllm_that_is_too_old_is_refused(vllm: StandIn, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_backend, "installed_version", lambda: "0.9.2")
    with pytest.raises(BackendError, match=r"vLLM 0\.9\.2 is older than .* 0\.32"):
        vllm.serve(plain)


def test_the_extra_installs_what_the_plugin_was_run_against() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (requirement,) = map(Requirement, project["optional-dependencies"]["vllm"])
    assert all(requirement.specifier.contains(f"{major}.{minor}.1") for major, minor in vllm_plugin.TESTED)
    (_, latest), (_, earliest) = max(vllm_plugin.TESTED), min(vllm_plugin.TESTED)
    assert not requirement.specifier.contains(f"0.{latest + 1}.0")
    assert not requirement.specifier.contains(f"0.{earliest - 1}.9")


def test_flags_and_deltas_are_for_vllm_alone(plain: Path) -> None:
    with pytest.raises(ConfigError, match="for --backend vllm"):
        service.serve(plain, backend="torch", flags=["--dtype", "float32"])
    with pytest.raises(ConfigError, match="for --backend vllm"):
        service.serve(plain, deltas=[("a", "b")])
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        service.serve(plain, backend="vllm", device="cuda:1")
    with pytest.raises(ConfigError, match="a server of its own"):
        service.open_backend(plain, "vllm")
    assert main(["serve", str(plain), "--backend", "vllm", "--delta", "nameless"]) == 2


class TestWhatIsServed:
    """The folder that vLLM is given."""

    def prepared(self, path: object, scratch: Path, version: str = "0.32.0") -> str:
        self.said: list[str] = []
        return vllm_backend.prepare(str(path), scratch, version, self.said.append)

    def test_a_plain_artifact_lies_ready(self, plain: Path, tmp_path: Path) -> None:
        assert self.prepared(plain, tmp_path) == str(plain)

    def test_a_hub_id_is_left_to_vllm(self, tmp_path: Path) -> None:
        assert self.prepared("owner/name", tmp_path) == "owner/name"

    @pytest.mark.parametrize("architecture", ["llama", "qwen3"])
    def test_a_ragged_or_shared_artifact_is_served_through_the_plugin(self, architecture: str, tmp_path: Path) -> None:
        model = tiny(architecture)
        share_blocks(model, {1: [2]})
        folder = saved(model, tmp_path / "x")
        assert self.prepared(folder, tmp_path / "scratch") == str(folder)

    def test_another_architecture_is_padded_and_that_is_said(self, tmp_path: Path) -> None:
        model = tiny("gemma3_text")
        drop_attention(model, (1,))
        made = self.prepared(saved(model, tmp_path / "x"), tmp_path / "scratch")
        assert layout_of(load(made).model).kind == "plain"
        assert any("padded to the widest" in line for line in self.said)

    @pytest.mark.parametrize(("name", "written"), [("llama", "DeciLMForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
    def test_another_version_of_vllm_gets_no_folder_for_the_plugin(
        self, name: str, written: str, tmp_path: Path
    ) -> None:
        model = tiny(name)
        drop_attention(model, (1,))
        made = self.prepared(saved(model, tmp_path / "x"), tmp_path / "scratch", "0.40.1")
        assert json.loads((Path(made) / "config.json").read_text())["architectures"] == [written]

    def test_products_beside_shared_weights_are_merged(self, tmp_path: Path) -> None:
        model = tiny("llama")
        share_blocks(model, {1: [2]}, adapter_rank=2)
        made = self.prepared(saved(model, tmp_path / "x"), tmp_path / "scratch")
        assert layout_of(load(made).model).kind == "plain"
        assert any("5 blocks are stored in place of 4" in line for line in self.said)

    def test_an_export_for_vllm_is_opened_by_vllm_without_a_word(self, plain: Path, tmp_path: Path) -> None:
        model = tiny("llama")
        drop_attention(model, (1,))
        loaded = Loaded(model, byte_tokenizer(), Origin("tiny", "folder"))
        folder = export(loaded, tmp_path / "x", to="vllm", check_tokens=token_rows(1, 12).tokens).path
        assert service._guess(folder) == "vllm"
        assert self.prepared(folder, tmp_path / "scratch") == str(folder)

    def test_an_onnx_export_is_refused(self, tmp_path: Path) -> None:
        loaded = Loaded(tiny("llama"), byte_tokenizer(), Origin("tiny", "folder"))
        folder = export(loaded, tmp_path / "x", to="onnx", check_tokens=token_rows(1, 12).tokens).path
        with pytest.raises(ConfigError, match="--backend onnx"):
            self.prepared(folder, tmp_path)

    def test_an_artifact_that_was_changed_is_refused(self, tmp_path: Path) -> None:
        folder = saved(tiny("llama"), tmp_path / "x")
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        with pytest.raises(CorruptArtifact):
            self.prepared(folder, tmp_path)

    def test_a_qwen2_without_some_heads_is_written_anew(self, tmp_path: Path) -> None:
        model = tiny("qwen2")
        keep_heads(model, {block: torch.tensor([0, 2]) for block in range(5)})
        made = self.prepared(saved(model, tmp_path / "x"), tmp_path / "scratch")
        assert json.loads((Path(made) / "config.json").read_text())["architectures"] == ["DeciLMForCausalLM"]

    @pytest.mark.parametrize(
        "content",
        [
            None,
            "{",
            "[]",
            '{"model_type": "foldaway"}',
            '{"model_type": "foldaway", "base_model_type": "llama", "block_configs": null}',
            '{"model_type": "foldaway", "base_model_type": "llama", "block_configs": [1]}',
            '{"model_type": "qwen2", "head_dim": 8}',
        ],
    )
    def test_a_folder_that_holds_no_model_is_refused(self, content: str | None, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            self.prepared(tmp_path, tmp_path)

    @pytest.mark.parametrize("path", ["./typo", "/no/such/folder", "a/b/c", "typo"])
    def test_a_path_that_is_mistyped_is_not_looked_up_on_a_hub(self, path: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="there is no model at"):
            self.prepared(path, tmp_path)


def test_a_delta_is_merged_and_served_under_its_name(vllm: StandIn, tmp_path: Path) -> None:
    base, tuned = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    artifact.write_model(base, byte_tokenizer(), tmp_path / "base")
    artifact.write_model(tuned, byte_tokenizer(), tmp_path / "tuned")
    package = tmp_path / "package"
    packing.pack(Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "tuned"), package, DarexConfig(p=0.5))
    vllm.serve(tmp_path / "base", signal.SIGTERM, deltas=[("sums", str(package))])
    assert vllm.given("--served-model-name") == "sums"
    assert not Path(vllm.given("--model")).exists()
    with pytest.raises(ConfigError, match="one set of weights"):
        vllm.serve(tmp_path / "base", deltas=[("a", "x"), ("a", "y")])
    with pytest.raises(ConfigError, match="leave one out"):
        vllm.serve(tmp_path / "base", deltas=[("a", "x")], served_model_name="b")


def test_what_follows_two_dashes_goes_to_vllm(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("serving.service.serve", lambda path, **options: seen.update(options))
    line = ["serve", str(plain), "--backend", "vllm", "--delta", "a=b", "--", "--dtype", "float32"]
    assert main(line) == 0
    assert seen["flags"] == ["--dtype", "float32"]
    assert seen["deltas"] == [("a", "b")]
    assert main(line[:4]) == 0
    assert seen["flags"] == []
