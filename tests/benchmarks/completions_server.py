"""A server of /v1/completions that answers with known delays, for the tests of what drives one.

In a thread: `serving(Behaviour(...))`. As a process that ends with its standard input: run this file with a behaviour
in JSON and a port.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATIENCE_SECONDS = 20.0


@dataclass
class Behaviour:
    """What a server does.

    Attributes:
        first_seconds: before the first token of an answer.
        step_seconds: before each other one.
        together: no request is answered before so many are open; 0: none waits.
        short_by: tokens that answers lack.
        fail_at, die_at: number of the request, from 1 on, that is answered with an error, or that ends the process.
        break_at: likewise, with an error in the middle of the stream.
        count: whether tokens are counted when a stream ends.
        last_words: said before the process ends, instead of serving anything.
        stubborn: neither the end of its input nor SIGTERM ends the process.
    """

    first_seconds: float = 0.0
    step_seconds: float = 0.0
    together: int = 0
    short_by: int = 0
    fail_at: int = 0
    die_at: int = 0
    break_at: int = 0
    count: bool = True
    last_words: str = ""
    stubborn: bool = False


@dataclass
class Seen:
    """What a server saw.

    Attributes:
        bodies: of the requests, in the order in which they came.
        most_open: requests that were open at the same time.
        never_together: requests waited for others in vain.
    """

    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    never_together: bool = False


class Handler(BaseHTTPRequestHandler):
    """One request; each has a thread of its own."""

    behaviour = Behaviour()
    seen = Seen()
    lock = threading.Lock()
    barrier: threading.Barrier | None = None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """/health."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self) -> None:
        """/v1/completions."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.bodies.append(body)
            number = len(self.seen.bodies)
            self.seen.open += 1
            self.seen.most_open = max(self.seen.most_open, self.seen.open)
        if number == self.behaviour.die_at:
            sys.stderr.write("out of memory on request 3\n")
            sys.stderr.flush()
            os._exit(1)
        if number == self.behaviour.fail_at:
            self._close(400, {"error": {"message": "the prompt is too long"}})
            return
        if self.barrier is not None:
            try:
                self.barrier.wait(PATIENCE_SECONDS)
            except threading.BrokenBarrierError:
                self.seen.never_together = True
        self._answer(body, broken=number == self.behaviour.break_at)

    def _close(self, status: int, content: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        with self.lock:
            self.seen.open -= 1
        self.wfile.write(json.dumps(content).encode())

    def _answer(self, body: dict[str, Any], *, broken: bool) -> None:
        tokens = body["max_tokens"] - self.behaviour.short_by
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token in range(tokens):
            time.sleep(self.behaviour.step_seconds if token else self.behaviour.first_seconds)
            if broken and token == 1:
                self._send({"error": {"message": "the engine is dead", "code": 500}})
            self._send({"id": "1", "choices": [{"index": 0, "text": "a", "finish_reason": None}], "usage": None})
        with self.lock:  # before the client can know that it is over, and ask again
            self.seen.open -= 1
        if self.behaviour.count:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens, "total_tokens": 0}
            self._send({"id": "1", "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


def _handler(behaviour: Behaviour, seen: Seen) -> type[Handler]:
    barrier = threading.Barrier(behaviour.together) if behaviour.together else None
    return type("Bound", (Handler,), {"behaviour": behaviour, "seen": seen, "barrier": barrier})


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[tuple[int, Seen]]:
    """Serve in a thread; yields the port and what is seen."""
    seen = Seen()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(behaviour, seen))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve until standard input ends."""
    behaviour, port = Behaviour(**json.loads(sys.argv[1])), int(sys.argv[2])
    if behaviour.last_words:
        sys.exit(behaviour.last_words)
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(behaviour, Seen()))
    if behaviour.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    main()
