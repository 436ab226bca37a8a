"""Serve with vLLM: its own OpenAI server, as a child process that never outlives this one.

What foldaway adds is the model: an artifact is served as it is through our plugin, a fine-tune is merged from its
delta, and what vLLM cannot open is exported to a temporary folder first. The engine, its batching, its parallelism and
its flags are vLLM's.

The child's output goes to a log. On a terminal only that is written until it answers, so that a failure can be told in
one line; afterwards, and where nobody watches, its lines are shown as they come.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from compress import artifact
from compress.errors import BackendError, ConfigError, MissingExtra, first_line
from compress.remote_code import MODEL_TYPE
from compress.result import Progress, no_progress
from compress.sources import kind_of, load
from exporters.base import ExportOptions, is_export, read_export
from exporters.to_vllm import loses_head_dim
from serving.backend import model_id_of
from serving.vllm_plugin import TESTED, installed_version, release, tested_versions, why_not

NAME = "vllm"
OURS = "foldaway has a word for that itself, see `foldaway serve --help`"
OVERLOOKED = "such a server answers no requests here, start it with `vllm serve`"
PLAIN_HTTP = "foldaway asks its server over HTTP whether it is ready, so put what encrypts or forwards in front of it"
REFUSED = {
    **dict.fromkeys(("--model", "--host", "--port", "--served-model-name", "--max-model-len", "--api-key"), OURS),
    **dict.fromkeys(("--headless", "--api-server-count"), OVERLOOKED),
    **dict.fromkeys(("--ssl-keyfile", "--ssl-certfile", "--uds"), PLAIN_HTTP),
}
"""Flags of vLLM that are not passed on, and why."""
HUB_FLAGS = ("--lora-modules", "--speculative-config", "--tokenizer", "--hf-config-path", "--generation-config")
"""Flags that may name something on a hub."""
DRAIN_SECONDS = 60
"""How long running answers may take after the first signal."""
GRACE_SECONDS = 10
"""How long the child may take after that, or when it is stopped before it answers."""
POLL_SECONDS = 0.2
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CAUSE = re.compile(r"(?:^|[\s\]])(?:[\w.]*(?:Error|Exception)|Value error|error)[:,] (?P<what>\S.*)")
HINTS = ("initialization failed", "See root cause above", "See stack trace", "For further information")
"""Errors that only say that there was another."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def serve(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    max_model_len: int | None = None,
    api_key: str | None = None,
    deltas: Sequence[tuple[str, str]] = (),
    flags: Sequence[str] = (),
    ready: Callable[[str], None] | None = None,
    say: Callable[[str], None] = logger.info,
    quiet: bool = False,
    progress: Progress = no_progress,
) -> None:
    """Run vLLM's server until SIGINT or SIGTERM; running answers are finished first, a second signal ends them.

    Args:
        path: an artifact, an export for vLLM, a Hugging Face folder, a hub id, a ``.gguf`` file or a demo model.
        host: the address to listen on.
        port: 0 takes a free one.
        served_model_name: the model's name towards clients; None takes the folder's or file's name.
        max_model_len: the most tokens of a sequence; None takes the model's.
        api_key: bearer key to ask for; None asks for none. It travels in the child's environment.
        deltas: name and package, at most one: the fine-tune is merged, and served under that name.
        flags: of vLLM, passed on as they are.
        ready: told the base URL, once requests are answered.
        say: told what is done, and what vLLM writes.
        quiet: what vLLM writes before it answers is told in its log alone.
        progress: told of tensors merged.

    Raises:
        ArtifactError: the files are not what they should be, or their weights are pickled.
        BackendError: vLLM does not start, ended by itself, or is too old; or the port is taken.
        ConfigError: an option or a path that cannot be meant.
        ExportError: it has to be rewritten for vLLM, and cannot be.
        KeyboardInterrupt: a signal came before vLLM was started, or a second one forced the end.
        MissingExtra: vLLM is not installed.
        UnsupportedArchitecture: it has to be rewritten for vLLM, and its parts are not known.
    """
    version = check_installed()
    from serving.server import bind  # which needs what vLLM brings along

    check_flags(flags)
    name = _name(str(path), served_model_name, deltas)
    sock = bind(host, port)  # a port in use should not cost a minute
    port = int(sock.getsockname()[1])
    sock.close()
    with tempfile.TemporaryDirectory(prefix="foldaway-vllm-") as scratch, _Signals() as signals:
        for _, package in deltas:
            path = _merge(package, str(path), Path(scratch), progress)
        model = prepare(str(path), Path(scratch), version, say)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", name, "--host", host, "--port", str(port)]
        if max_model_len is not None:
            command += ["--max-model-len", str(max_model_len)]
        drain = _value(flags, "--shutdown-timeout")
        if drain is None:
            command += ["--shutdown-timeout", str(DRAIN_SECONDS)]
        patience = GRACE_SECONDS + (int(drain) if drain is not None and drain.isdecimal() else DRAIN_SECONDS)
        offline = Path(model).is_dir() and not any(_has(flags, flag) for flag in HUB_FLAGS)
        environment = _environment(api_key, offline=offline)
        signals.collect()
        with _Child([*command, *flags], environment, say, patience=patience, quiet=quiet) as child:
            url = f"http://{_reachable(host)}:{port}"
            child.wait_until_healthy(url, signals.received)
            if not signals.received and ready is not None:
                ready(url)
            child.wait(signals.received)
            forced = len(signals.received) > 1
    if forced:
        raise KeyboardInterrupt


def check_installed() -> str:
    """The version of vLLM here.

    Raises:
        BackendError: it is older than what was ever run.
        MissingExtra: there is none.
    """
    version = installed_version()
    if version is None:
        raise MissingExtra(
            "vLLM is not installed: pip install 'foldaway[vllm]' on a machine with a GPU; on one without, see "
            "docs/vllm.md. Or serve with --backend onnx or torch"
        )
    if release(version) < min(TESTED):
        raise BackendError(
            f"vLLM {version} is older than what foldaway was run with, {tested_versions()}: pip install --upgrade vllm"
        )
    return version


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags of vLLM that foldaway sets itself, or cannot do with.

    Raises:
        ConfigError: naming the first.
    """
    for flag, reason in REFUSED.items():
        if _has(flags, flag):
            raise ConfigError(f"{flag} after --: {reason}")


def _name(path: str, asked: str | None, deltas: Sequence[tuple[str, str]]) -> str:
    """The model's name towards clients."""
    if len(deltas) > 1:
        raise ConfigError(
            f"{len(deltas)} deltas were given, and vLLM holds one set of weights: start one server for each"
        )
    if deltas and asked is not None:
        raise ConfigError(f"--served-model-name {asked}: the delta has a name already, {deltas[0][0]}; leave one out")
    return deltas[0][0] if deltas else asked or model_id_of(path)


def prepare(path: str, scratch: Path, version: str, say: Callable[[str], None]) -> str:
    """A folder or hub id that vLLM opens; written to ``scratch`` if there is none yet.

    Raises:
        ArtifactError: the files are not what they should be, or their weights are pickled.
        ConfigError: there is no such model.
        ExportError: it has to be rewritten, and cannot be.
        UnsupportedArchitecture: it has to be rewritten, and its parts are not known.
    """
    folder = Path(path).expanduser()
    if is_export(folder) and read_export(folder).to == "onnx":
        raise ConfigError(
            f"{path} is an ONNX export: serve it with --backend onnx, or give the model that it was made of"
        )
    kind = kind_of(path)
    if kind == "hub":
        return path  # vLLM looks it up
    if kind in ("gguf", "demo"):
        return _exported(path, scratch, ExportOptions(), say)
    if kind == "artifact":
        artifact.verify(folder)
    config = _config(folder)
    try:
        opens, plugin = _opens(config, version)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: its config.json describes no model: {first_line(error)}") from error
    return str(folder) if opens else _exported(path, scratch, ExportOptions(plugin=plugin), say)


def _opens(config: Mapping[str, Any], version: str) -> tuple[bool, bool]:
    """Whether vLLM opens a folder with this config.json as it is, and whether our plugin may be counted on."""
    if config.get("model_type") != MODEL_TYPE:
        return not loses_head_dim(config), True
    plugin = why_not(str(config["base_model_type"]), version) is None
    return plugin and not any(block.get("adapter_rank") for block in config["block_configs"]), plugin


def _exported(path: str, scratch: Path, options: ExportOptions, say: Callable[[str], None]) -> str:
    from compress.calibration import context_length_of, windows
    from exporters import export

    say(f"Writing {path} to a temporary folder as vLLM can open it")
    loaded = load(path)
    context = context_length_of(loaded.model)
    tokens = windows("builtin", loaded.tokenizer, length=min(64, context), count=1, context_length=context).tokens
    made = export(loaded, scratch / "model", to=NAME, options=options, check_tokens=tokens)
    for note in made.notes[1:]:  # the first is about opening the folder by hand
        say(note)
    return str(made.path)


def _merge(package: str, base: str, scratch: Path, progress: Progress) -> str:
    """The folder of a fine-tune, merged tensor by tensor."""
    from compress.delta.apply import apply
    from compress.delta.checkpoint import open_base
    from compress.delta.package import Package

    apply(Package(Path(package)), open_base(base), scratch / "merged", progress)
    return str(scratch / "merged")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no model that vLLM could open: its config.json cannot be read") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder} holds no model that vLLM could open: its config.json is not an object")
    return config


def _has(flags: Sequence[str], name: str) -> bool:
    return any(flag.partition("=")[0].replace("_", "-") == name for flag in flags)


def _value(flags: Sequence[str], name: str) -> str | None:
    """What a flag of vLLM was given, as ``--flag value`` or ``--flag=value``."""
    for flag, following in zip(flags, [*flags[1:], ""], strict=False):
        if _has([flag], name):
            return flag.partition("=")[2] if "=" in flag else following
    return None


def _environment(api_key: str | None, *, offline: bool) -> dict[str, str]:
    """The child's environment: nothing is reported to anyone, and what lies here is not looked up on a hub."""
    environment = {**QUIET, **({"HF_HUB_OFFLINE": "1"} if offline else {}), **os.environ}
    return environment if api_key is None else {**environment, "VLLM_API_KEY": api_key}


def _reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens on ``host``."""
    special = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}
    return special.get(host, f"[{host}]" if ":" in host else host)


class _Signals:
    """SIGINT, SIGTERM and SIGHUP: they interrupt, and from `collect` on they are counted instead."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._collecting = False

    def __enter__(self) -> _Signals:
        self._usual = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def collect(self) -> None:
        """Interrupt no more: there will be a child, which is to be told first."""
        self._collecting = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._collecting:
            raise KeyboardInterrupt
        self.received.append(number)


class _Child:
    """vLLM's server and the processes that it starts, in a process group of their own."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        say: Callable[[str], None],
        *,
        patience: float,
        quiet: bool,
    ) -> None:
        handle, name = tempfile.mkstemp(prefix="foldaway-vllm-", suffix=".log")
        self._log_path = Path(name)
        self._log = os.fdopen(handle, "w", encoding="utf-8")
        self._say = say
        self._patience = patience
        self._healthy = False
        self._shown = threading.Event()
        if not quiet:
            self._shown.set()
        self._tail: deque[str] = deque(maxlen=400)
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._kill()
        self._process.wait()
        self._reader.join(GRACE_SECONDS)
        self._log.close()
        if kind is None or not issubclass(kind, BackendError):
            self._log_path.unlink(missing_ok=True)

    def wait_until_healthy(self, url: str, signals: Sequence[int]) -> None:
        """Return once requests are answered, or a signal came.

        Raises:
            BackendError: the child ended before.
        """
        while not signals:
            if self._process.poll() is not None:
                raise BackendError(f"vLLM did not start: {self._cause()}; its log is {self._log_path}")
            if _answers(f"{url}/health"):
                self._healthy = True
                self._shown.set()
                self._log_path.unlink()  # what follows is shown, and may be much
                return
            time.sleep(POLL_SECONDS)

    def wait(self, signals: Sequence[int]) -> None:
        """Return once the child has ended after a signal; it is told of the first, and not waited for after a second.

        Raises:
            BackendError: the child ended by itself.
        """
        while not signals:
            if self._process.poll() is not None:
                raise BackendError(f"vLLM ended by itself with {_status(self._process.returncode)}: {self._cause()}")
            time.sleep(POLL_SECONDS)
        self._process.terminate()
        self._shown.clear()  # what comes now is of how the child takes itself apart
        deadline = time.monotonic() + (self._patience if self._healthy else GRACE_SECONDS)
        while self._process.poll() is None and len(signals) < 2 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._tail.append(line.rstrip())
            if not self._healthy:
                with suppress(OSError):  # a full disk must not stop who reads, and so the child
                    self._log.write(line)
                    self._log.flush()
            if self._shown.is_set():
                self._say(line.rstrip())

    def _cause(self) -> str:
        """What the child's last error says, in one line."""
        self._reader.join(1)  # what it wrote last may still be on the way
        lines = list(self._tail)
        found = [match["what"] for match in map(CAUSE.search, lines) if match]
        causes = [what for what in found if not any(hint in what for hint in HINTS)] or found
        if causes:
            return causes[-1].partition(" [type=")[0].strip()
        return next((line for line in reversed(lines) if line.strip()), _status(self._process.returncode))

    def _kill(self) -> None:
        """End whatever is left of the group."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _answers(url: str) -> bool:
    """Whether a server of this machine is ready; proxies are for others."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _status(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _end_with_parent() -> Callable[[], None] | None:
    """For Linux: let the kernel end the child when this process is killed and can no longer do so."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask
