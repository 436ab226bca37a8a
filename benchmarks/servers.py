"""``foldaway serve`` in processes of their own, which end with this one, however it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.errors import BackendError, require

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
def server(name: str, path: str, log: Path, options: Sequence[str] = (), flags: Sequence[str] = ()) -> Iterator[Server]:
    """Serve a model on a free port of the loopback interface.

    Args:
        name: of the model in messages.
        path: the model.
        log: where the server's own output goes.
        options: of ``foldaway serve``.
        flags: of vLLM.

    Yields:
        The server, once it answers.

    Raises:
        BackendError: it ends before it answers, or does not answer in time.
    """
    port = _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            # Our end of the pipe closes when this process ends, however it ends, and the server with it.
            command_of(path, port, options, flags),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=child_environment(),
            start_new_session=True,
        )
    started = Server(name, port, process, log)
    try:
        _wait_until_ready(started)
        yield started
    finally:
        _stop(process)


def command_of(path: str, port: int, options: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line of a server."""
    # -P: a deploy.py in the working folder must not take our place.
    command = [sys.executable, "-P", "-m", "deploy", "serve", path, "--port", str(port), "--until-stdin-closes"]
    return [*command, *options, *(["--", *flags] if flags else [])]


def child_environment() -> dict[str, str]:
    """A process of ours finds the same packages as this process, and asks for no key that our client does not have."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FOLDAWAY_API_KEY": "", "VLLM_API_KEY": ""}


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
    """The last line of what a process of ours wrote."""
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it: gently, and by force if it does not listen."""
    assert process.stdin is not None  # it is a pipe
    process.stdin.close()
    for end, seconds in zip((None, process.terminate, process.kill), STOP_SECONDS, strict=True):
        if end is not None:
            end()
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
