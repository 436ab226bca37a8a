"""``foldaway serve`` for each model, in processes of their own that end with the command, however it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.throughput.record import Settings
from benchmarks.throughput.sides import Side
from compress.errors import BackendError, require
from compress.result import Progress, no_progress

START_SECONDS = 900.0
"""vLLM may compile for minutes."""
STOP_SECONDS = (80.0, 20.0, 20.0)
"""How long a server may take to end once its input is closed, once it is terminated, and once it is killed."""
LAST_WORDS_SECONDS = 5.0
"""How long after a request failed its server may take to say why."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Server:
    """A server of one model.

    Attributes:
        name: of the model, in tables and towards clients.
        port: on the loopback interface.
        process: ends when its standard input does.
        log: what it writes.
    """

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def check(self, patience_seconds: float = 0.0) -> None:
        """Nothing, while it runs.

        Raises:
            BackendError: it ended, or does so within this time.
        """
        try:
            self.process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            return
        raise BackendError(
            f"{self.name}: its server ended; it said: {last_words(self.log)} (all of it is in {self.log})"
        )


@contextmanager
def servers(
    sides: Sequence[Side],
    settings: Settings,
    log_of: Callable[[str], Path],
    progress: Progress = no_progress,
) -> Iterator[list[Server]]:
    """Start a server for each model, one after the other: what each finds of free memory must not change meanwhile.

    Args:
        sides: what is served.
        settings: what serves, and how.
        log_of: where the log of a model's server goes.
        progress: told of each that answers.

    Yields:
        The servers, in the order of the sides, once all of them answer.

    Raises:
        BackendError: one ends before it answers, or does not answer in time.
    """
    started: list[Server] = []
    try:
        for side in sides:
            started.append(_start(side, settings, log_of(side.name)))
            _wait_until_ready(started[-1])
            progress(f"{side.name} is served", len(started), len(sides))
        yield started
    finally:
        _stop([server.process for server in started])


def command_of(side: Side, port: int, settings: Settings) -> list[str]:
    """The command line of one server."""
    # -P: a deploy.py in the working folder must not take our place.
    command = [sys.executable, "-P", "-m", "deploy", "serve", str(side.path), "--backend", settings.backend]
    command += ["--port", str(port), "--served-model-name", side.name, "--until-stdin-closes"]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    return [*command, "--", *settings.flags] if settings.flags else command


def _start(side: Side, settings: Settings, log: Path) -> Server:
    port = _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            # Our end of the pipe closes when this process ends, however it ends, and the server with it.
            command_of(side, port, settings),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=_environment(),
            start_new_session=True,
        )
    return Server(side.name, port, process, log)


def _environment() -> dict[str, str]:
    """A server finds the same packages as this process, and asks for no key that our client does not have."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FOLDAWAY_API_KEY": ""}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: Server) -> None:
    httpx = require("httpx", "serve")
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline:
            server.check(POLL_SECONDS)
            try:
                if client.get(f"http://127.0.0.1:{server.port}/health").status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
    raise BackendError(f"{server.name}: its server did not answer within {START_SECONDS:.0f} seconds; see {server.log}")


def last_words(log: Path) -> str:
    """The last line of what a server wrote."""
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End all of them: gently at the same time, and by force those that do not listen."""
    for process in processes:
        assert process.stdin is not None  # it is a pipe
        process.stdin.close()
    for end, seconds in zip((None, subprocess.Popen.terminate, subprocess.Popen.kill), STOP_SECONDS, strict=True):
        deadline = time.monotonic() + seconds
        for process in processes:
            if process.poll() is None and end is not None:
                end(process)
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
