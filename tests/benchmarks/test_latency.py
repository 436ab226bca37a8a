"""Timing: who takes turns, what is timed, and what a server's stream says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from benchmarks.latency import latency_pair, served_pair
from compress.errors import BackendError, ConfigError

CALLS: list[tuple[str, str, list[int]]] = []


class Clock:
    """A clock that goes on only when it is told to."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeSession:
    """Writes down what it is asked, and takes as long as it is told: ten times as long for a prompt as for a step."""

    vocab_size = 11

    def __init__(self, name: str, step_seconds: float = 0.001, clock: Clock | None = None) -> None:
        self.name = name
        self.step_seconds = step_seconds
        self.clock = clock or Clock()

    def prefill(self, tokens: Any, *, capacity: int | None = None) -> tuple[Any, Any]:
        CALLS.append((self.name, f"prefill {capacity}", tokens[0].tolist()))
        self.clock.seconds += 10 * self.step_seconds
        return np.arange(11.0), "cache"

    def step(self, tokens: Any, kv: Any, lengths: Any) -> tuple[Any, Any]:
        assert kv == "cache"
        assert tokens.tolist() == [[10]]
        CALLS.append((self.name, "step", lengths.tolist()))
        self.clock.seconds += self.step_seconds
        return np.arange(11.0)[None], kv


@pytest.fixture(autouse=True)
def _no_calls_yet() -> None:
    CALLS.clear()


def test_both_sides_take_turns_on_the_same_prompt_and_the_warm_up_is_dropped() -> None:
    found = latency_pair(FakeSession("a"), FakeSession("b"), prompt_tokens=4, decode_tokens=2, repeats=5, warmup=2)
    prefills = [call for call in CALLS if call[1].startswith("prefill")]
    assert [name for name, _, _ in prefills] == ["a", "b"] * 7
    assert len({tuple(tokens) for _, _, tokens in prefills}) == 1
    assert {what for _, what, _ in prefills} == {"prefill 6"}
    assert len(found.prefill.baseline) == len(found.decode.candidate) == 5


def test_decoding_goes_on_from_the_prompt_one_token_a_step() -> None:
    latency_pair(FakeSession("a"), FakeSession("b"), prompt_tokens=4, decode_tokens=3, warmup=0)
    assert [what for _, _, what in CALLS[:4]][1:] == [[4], [5], [6]]


def test_prefill_is_timed_in_seconds_and_decoding_in_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("benchmarks.latency.perf_counter", clock)
    found = latency_pair(FakeSession("a", 0.002, clock), FakeSession("b", 0.004, clock), decode_tokens=5)
    assert found.prefill.baseline == pytest.approx((0.02,) * 5)
    assert found.prefill.candidate == pytest.approx((0.04,) * 5)
    assert found.decode.baseline == pytest.approx((500.0,) * 5)
    assert found.decode.candidate == pytest.approx((250.0,) * 5)


@pytest.mark.parametrize("wrong", [{"repeats": 4}, {"prompt_tokens": 0}, {"decode_tokens": 0}, {"warmup": -1}])
def test_too_little_to_time_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        latency_pair(FakeSession("a"), FakeSession("b"), **wrong)


@contextmanager
def server(name: str, *, tokens: int = 4, token_seconds: float = 0.01, status: int = 200) -> Iterator[str]:
    """A server that speaks just enough of OpenAI's protocol: a chunk with the role, one a token, and the usage."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(json.dumps({"object": "list", "data": [{"id": name, "object": "model"}]}).encode(), "json")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            CALLS.append((name, body["messages"][0]["content"], [body["max_tokens"], body["temperature"]]))
            assert (body["model"], body["stream"]) == (name, True)
            if status != 200:
                self.send_error(status)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self._chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            time.sleep(0.03)
            for _ in range(tokens):
                self._chunk([{"index": 0, "delta": {"content": "x"}}])
                time.sleep(token_seconds)
            self._chunk([], {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1})
            self.wfile.write(b"data: [DONE]\n\n")

        def _chunk(self, choices: list[Any], usage: dict[str, int] | None = None) -> None:
            content = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": name}
            self.wfile.write(f"data: {json.dumps({**content, 'choices': choices, 'usage': usage})}\n\n".encode())
            self.wfile.flush()

        def _send(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", f"application/{kind}")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


PROMPTS = ["one", "two", "three", "four", "five"]


def test_two_servers_are_asked_the_same_in_turn_and_timed_from_the_first_content() -> None:
    pytest.importorskip("openai")
    with server("a") as ours, server("b", token_seconds=0.02) as theirs:
        found = served_pair(ours, theirs, PROMPTS, max_tokens=4)
    asked = [call for call in CALLS if call[1] in PROMPTS]
    assert [(name, prompt) for name, prompt, _ in asked] == [
        (name, prompt) for prompt in ["one", *PROMPTS] for name in "ab"
    ]
    assert {tuple(options) for _, _, options in asked} == {(4, 0)}
    assert min(found.ttft.baseline) >= 0.03  # the chunk that names the role came before
    for rate, first, whole in zip(found.decode.baseline, found.ttft.baseline, found.e2e.baseline, strict=True):
        assert rate == pytest.approx(3 / (whole - first))  # four tokens, the first one not counted
    assert found.skipped == 0


def test_answers_too_short_to_time_are_refused() -> None:
    pytest.importorskip("openai")
    with (
        server("a") as ours,
        server("b", tokens=1) as theirs,
        pytest.raises(BackendError, match="0 of 5 pairs"),
    ):
        served_pair(ours, theirs, PROMPTS)


def test_a_server_that_fails_is_named() -> None:
    pytest.importorskip("openai")
    with server("a") as ours, server("b", status=500) as theirs, pytest.raises(BackendError) as caught:
        served_pair(ours, theirs, PROMPTS)
    assert theirs in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_named() -> None:
    pytest.importorskip("openai")
    with pytest.raises(BackendError, match=r"127\.0\.0\.1:9/v1 did not answer"):
        served_pair("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1", PROMPTS)


def test_too_few_prompts_are_refused_before_a_server_is_asked() -> None:
    with pytest.raises(ConfigError, match="ask for 5 or more"):
        served_pair("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1", PROMPTS[:4])
