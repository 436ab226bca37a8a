"""The process side: the socket, signals, and the end.

The first SIGINT or SIGTERM drains: what was accepted is finished, new requests get 503, and when the last answer is
out the server returns. A second one stops at once. When the scheduler's worker has failed there is nothing to finish,
and the first one ends.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from compress.errors import BackendError, ConfigError
from serving.api import create_app
from serving.scheduler import Scheduler

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 10
"""How long clients may take to read the end of their answers once the model is done."""


def bind(host: str, port: int) -> socket.socket:
    """Take an address; nothing listens on it yet, so clients are refused until the model is loaded.

    Args:
        host: a name or an address, IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        ConfigError: not an address of this machine, or not a port.
        BackendError: another process has it.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port}: give 1 to 65535, or 0 for a free one")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is not known: {error}") from error
    sock = socket.socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise BackendError(_cannot_listen(host, port, error)) from error
    return sock


def run(sock: socket.socket, scheduler: Scheduler, *, api_key: str | None, ready: Callable[[str], None] | None) -> None:
    """Serve on a bound socket until a signal comes.

    Args:
        sock: from `bind`; closed at the end.
        scheduler: not started yet; closed at the end.
        api_key: see `serving.api.create_app`.
        ready: told the base URL once clients can connect.

    Raises:
        BackendError: another process was faster to listen on the port.
        KeyboardInterrupt: a second signal forced the end.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise BackendError(_cannot_listen(host, port, error)) from error
    config = uvicorn.Config(
        create_app(scheduler, api_key=api_key),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    server = _Server(config, scheduler, f"http://{f'[{host}]' if ':' in host else host}:{port}", ready)
    scheduler.start()
    try:
        server.run(sockets=[sock])
    finally:
        scheduler.close(timeout_seconds=FLUSH_SECONDS)
        sock.close()
    if server.forced:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """uvicorn, which would stop listening at the first signal and raise it again at the end, made to drain instead."""

    def __init__(
        self, config: uvicorn.Config, scheduler: Scheduler, url: str, ready: Callable[[str], None] | None
    ) -> None:
        super().__init__(config)
        self.forced = False
        self._scheduler = scheduler
        self._url = url
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._ready is not None:
            self._ready(self._url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. Not passed on to uvicorn's own handler, which would raise it again at the end."""
        if self._scheduler.failed:
            self.should_exit = True
        elif self._scheduler.draining:
            self.forced = self.force_exit = self.should_exit = True
        self._scheduler.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: end once the scheduler is drained and has nothing left.

        One whose worker has failed goes on until a signal comes, so that /health can say so.
        """
        if self.forced:
            self._scheduler.cancel_all()
        elif self._scheduler.draining and self._scheduler.idle and not self._scheduler.failed:
            self.should_exit = True
        return await super().on_tick(counter)


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    return f"cannot listen on {host} port {port}: {error.strerror}; give another --port, or stop what runs there"
