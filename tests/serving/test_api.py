"""OpenAI's routes, through the `openai` client and a real socket, with a backend of plain integers behind them."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from serving import server
from serving.api import BODY_BYTES, create_app
from serving.scheduler import Scheduler
from tests.conftest import V
from tests.serving.fake import FakeBackend, echo, ids, one_hot, saying, scheduler_of

CHAT = [{"role": "user", "content": "hi"}]
RENDERED = "user: hi\nassistant: "


@contextlib.contextmanager
def serving(backend: FakeBackend, *, api_key: str | None = None, **limits: int) -> Iterator[tuple[str, Scheduler]]:
    """A server on a thread of this process; yields its URL. Draining is what ends it."""
    scheduler = scheduler_of(backend, **limits)
    sock = server.bind("127.0.0.1", 0)
    up: list[str] = []
    started = threading.Event()

    def ready(url: str) -> None:
        up.append(url)
        started.set()

    options = {"api_key": api_key, "ready": ready}
    thread = threading.Thread(target=server.run, args=(sock, scheduler), kwargs=options)
    thread.start()
    try:
        assert started.wait(30)
        yield up[0], scheduler
    finally:
        scheduler.drain()
        thread.join(30)
        assert not thread.is_alive()


def client_of(url: str, api_key: str = "any", **options: Any) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=30, http_client=http, **options)


def post(url: str, path: str, body: Any, **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{path}", content=content, timeout=30, trust_env=False, **options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Says "good day 🦙" to CHAT, and the last byte of the prompt again and again to anything else."""
    told = saying("good day 🦙", prompt_tokens=len(ids(RENDERED)))
    start = list(ids(RENDERED))
    with serving(FakeBackend(lambda seen: told(seen) if seen[: len(start)] == start else echo(seen))) as (base, _):
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "fake", "messages": CHAT, "temperature": 0, **fields})


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.system_fingerprint == "sha256:1234"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "good day 🦙")
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.completion_tokens == len("good day 🦙".encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_is_streamed(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "good day 🦙"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_counts_its_tokens_when_asked(client: openai.OpenAI) -> None:
    *chunks, last = chat(client, stream=True, max_tokens=3, stream_options={"include_usage": True})
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(RENDERED), 3)
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_stream_is_server_sent_events(url: str) -> None:
    body = {"model": "fake", "messages": CHAT, "stream": True, "temperature": 0}
    response = post(url, "/v1/chat/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: ")) for event in events)
    assert "usage" not in events[0]


def test_a_text_is_completed(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="abc", temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "c" * 16
    assert answer.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(model="fake", prompt="abc", temperature=0, max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "c" * 5
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("prompt", [list(ids("xyz")), [list(ids("xyz"))], ["xyz"]])
def test_a_prompt_may_come_as_tokens_or_in_a_list_of_one(client: openai.OpenAI, prompt: Any) -> None:
    assert client.completions.create(model="fake", prompt=prompt, temperature=0, max_tokens=2).choices[0].text == "zz"


@pytest.mark.parametrize(("stop", "expected"), [("day", "good "), (["unseen", "day", "od d"], "go")])
def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI, stop: Any, expected: str) -> None:
    whole = chat(client, stop=stop).choices[0]
    streamed = list(chat(client, stop=stop, stream=True))
    assert whole.message.content == expected
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    assert whole.finish_reason == streamed[-1].choices[0].finish_reason == "stop"


def test_content_may_come_in_parts_and_from_a_developer(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content == "good day 🦙"
    developer = [{"role": "developer", "content": "be kind"}, *CHAT]
    expected = len("system: be kind\n" + RENDERED)
    assert chat(client, messages=developer, max_tokens=1).usage.prompt_tokens == expected


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = chat(client).choices[0].message
    again = [*CHAT, first.model_dump(), {"role": "user", "content": "and?"}]
    expected = len(f"user: hi\nassistant: {first.content}\nuser: and?\nassistant: ".encode())
    assert chat(client, messages=again, max_tokens=1).usage.prompt_tokens == expected


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        prompt, options = "q", {"temperature": 2.0, "top_p": 0.99, "seed": seed, "max_tokens": 30}
        return str(client.completions.create(model="fake", prompt=prompt, **options).choices[0].text)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_many_clients_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    def ask(letter: str) -> tuple[str, str]:
        options = {"temperature": 0, "max_tokens": 40, "stream": ord(letter) % 2 == 0}
        answer = client.completions.create(model="fake", prompt=letter, **options)
        chunks = list(answer) if options["stream"] else [answer]
        return letter, "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(20) as pool:
        for letter, text in pool.map(ask, "abcdefghijklmnopqrst"):
            assert text == letter * 40


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.artifact_id) == ("fake", "model", "sha256:1234")
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_says_what_is_served(url: str) -> None:
    health = httpx.get(f"{url}/health", trust_env=False)
    assert health.status_code == 200
    expected = {"status": "ok", "model": "fake", "artifact_id": "sha256:1234", "backend": "fake"}
    assert health.json() == {**expected, "running": 0, "waiting": 0}


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": None,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "user": "somebody",
}


def test_the_name_of_a_message_is_a_label(client: openai.OpenAI) -> None:
    named = [{**CHAT[0], "name": "Ann"}]
    assert chat(client, messages=named).choices[0].message.content == "good day 🦙"


@pytest.mark.parametrize("wanted", [False, None])
def test_what_vllm_clients_send_along_is_accepted(client: openai.OpenAI, wanted: bool | None) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": wanted}
    *chunks, last = chat(client, stream=True, stream_options=options, extra_body={"ignore_eos": wanted})
    assert last.usage.completion_tokens == len("good day 🦙".encode()) + 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_every_chunk_is_refused(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, stream=True, stream_options=options)
    assert caught.value.param == "stream_options.continuous_usage_stats"


def test_fields_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    assert chat(client, **NEUTRAL).choices[0].message.content == "good day 🦙"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("reasoning_effort", "high"),
        ("top_k", 40),
        ("repetition_penalty", 1.2),
        ("best_of", True),
        ("no_such_field", 1),
        ("no_such_field", None),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.5),
        ("seed", 1.5),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("max_tokens", 10_000),
        ("max_completion_tokens", -1),
        ("max_completion_tokens", 10_000),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stop", [1]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"role": "user", "content": "x" * 300}]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={field: value})
    assert str(caught.value.param).removesuffix("[0]") == field
    assert caught.value.type == "invalid_request_error"
    assert field.split("_", maxsplit=1)[0] in caught.value.message or "prompt" in caught.value.message


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([*CHAT, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[1].content[0].type"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
        (["hi"], "messages[0]"),
    ],
)
def test_a_message_that_is_wrong_is_named(client: openai.OpenAI, messages: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=messages)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", "b"], [V], [-1], [True], [[1], [2]], ["a", 1]])
def test_a_prompt_that_cannot_be_meant_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt=prompt)
    assert str(caught.value.param).startswith("prompt")


def test_a_prompt_longer_than_the_context_is_refused_with_its_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="300 tokens, the context 256") as caught:
        client.completions.create(model="fake", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"


def test_max_tokens_and_its_newer_name_exclude_each_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        chat(client, max_tokens=3, max_completion_tokens=4)
    assert chat(client, max_completion_tokens=4).choices[0].message.content == "good"


def test_the_default_of_a_completion_is_cut_to_the_context(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="x" * 250, temperature=0).choices[0].text == "x" * 6


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'fake' is") as caught:
        chat(client, model="gpt")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'"text"',
        b"[" * 100_000,
        rb'{"model":"fake","prompt":"\ud800"}',
        b'{"seed":' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(url: str, body: bytes) -> None:
    response = post(url, "/v1/completions", body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused_before_it_is_tokenised(url: str, chunked: bool) -> None:
    body = json.dumps({"model": "fake", "prompt": "x" * BODY_BYTES}).encode()
    pieces = (body[start : start + 10_000] for start in range(0, len(body), 10_000))
    response = httpx.post(f"{url}/v1/completions", content=pieces if chunked else body, timeout=30, trust_env=False)
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
    assert str(BODY_BYTES) in error["message"]


def test_a_long_context_has_room_for_a_long_body() -> None:
    letters = BODY_BYTES + 1
    with serving(FakeBackend(echo, context_length=2 * letters)) as (url, _):
        response = post(url, "/v1/completions", {"model": "fake", "prompt": "x" * letters, "max_tokens": 1})
        assert response.json()["usage"]["prompt_tokens"] == letters


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_a_route_that_does_not_exist_is_an_error_object(url: str, method: str, path: str, status: int) -> None:
    response = httpx.request(method, f"{url}{path}", trust_env=False)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_a_model_without_a_chat_template_does_not_chat() -> None:
    backend = FakeBackend(echo)
    backend.tokenizer.chat_template = None
    with serving(backend) as (url, _):
        with pytest.raises(openai.BadRequestError, match="no chat template") as caught:
            chat(client_of(url))
        assert caught.value.code == "no_chat_template"
        assert client_of(url).completions.create(model="fake", prompt="a", max_tokens=2, temperature=0).choices[0].text


def test_a_chat_template_that_refuses_is_the_clients_error() -> None:
    backend = FakeBackend(echo)
    backend.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(backend) as (url, _), pytest.raises(openai.BadRequestError, match="roles must alternate"):
        chat(client_of(url))


def test_the_key_is_asked_for_under_v1_only() -> None:
    with serving(FakeBackend(echo), api_key="s3cret") as (url, _):
        assert client_of(url, "s3cret").models.list().data[0].id == "fake"
        for wrong in ("Bearer s3cre", "Bearer s3cret2", "Bearer é", "s3cret", "Basic s3cret"):
            headers = {"authorization": wrong.encode()}
            assert httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == 401
        with pytest.raises(openai.AuthenticationError) as caught:
            chat(client_of(url, "wrong"))
        assert caught.value.code == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


class Gated(FakeBackend):
    """Steps only while the gate is open."""

    def __init__(self) -> None:
        super().__init__(echo, context_length=100_000)
        self.gate = threading.Event()

    def step(self, tokens: Any) -> Any:
        assert self.gate.wait(30)
        time.sleep(0.001)
        return super().step(tokens)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_queue_is_too_many_requests() -> None:
    backend = Gated()
    with serving(backend, max_batch=1, max_waiting=1) as (url, scheduler), ThreadPoolExecutor(2) as pool:
        client = client_of(url)
        answers = [pool.submit(client.completions.create, model="fake", prompt="a", temperature=0)]
        wait_until(lambda: scheduler.running == 1)
        answers.append(pool.submit(client.completions.create, model="fake", prompt="b", temperature=0))
        wait_until(lambda: scheduler.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="fake", prompt="c")
        assert caught.value.response.headers["retry-after"] == "1"
        backend.gate.set()
        assert [answer.result().choices[0].text for answer in answers] == ["a" * 16, "b" * 16]


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_leaves(stream: bool) -> None:
    backend = Gated()
    backend.gate.set()
    with serving(backend) as (url, scheduler):
        body = {"model": "fake", "prompt": "a", "stream": stream, "max_tokens": 90_000}
        with (
            httpx.Client(trust_env=False) as client,
            contextlib.suppress(httpx.ReadTimeout),
            client.stream("POST", f"{url}/v1/completions", json=body, timeout=1.0) as response,
        ):
            next(response.iter_raw())
        wait_until(lambda: scheduler.idle)
        assert len(backend.batches) < 80_000


def test_a_server_that_drains_finishes_streams_and_refuses_new_requests() -> None:
    backend = Gated()
    with serving(backend) as (url, scheduler):
        client = client_of(url)
        stream = client.completions.create(model="fake", prompt="a", temperature=0, max_tokens=50, stream=True)
        scheduler.drain()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="fake", prompt="b")
        assert caught.value.status_code == 503
        assert caught.value.type == "server_error"
        health = httpx.get(f"{url}/health", trust_env=False)
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        backend.gate.set()
        assert "".join(chunk.choices[0].text for chunk in stream) == "a" * 50


def test_a_model_that_raises_is_a_server_error_and_in_a_stream_an_error_event() -> None:
    end = ids("#")[0]

    def breaks(seen: list[int]) -> Any:
        if len(seen) > 5:
            raise RuntimeError("secret detail")
        return one_hot(end)

    with serving(FakeBackend(breaks)) as (url, _):
        client = client_of(url)
        with pytest.raises(openai.InternalServerError, match="the model failed") as caught:
            client.completions.create(model="fake", prompt="abc", temperature=0)
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(client.completions.create(model="fake", prompt="abc", temperature=0, stream=True))


class Unremovable(FakeBackend):
    """Raises where no request is to blame."""

    def remove(self, row: int) -> None:
        raise RuntimeError("secret detail")


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_that_fails_ends_every_answer_and_health_says_so(stream: bool) -> None:
    scheduler = scheduler_of(Unremovable(echo))
    sock = server.bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(scheduler), log_config=None, lifespan="off")
    running = server._Server(config, scheduler, "", None)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]})
    scheduler.start()
    thread.start()
    try:
        wait_until(lambda: running.started)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        body = {"model": "fake", "prompt": "a", "max_tokens": 100, "temperature": 0, "stream": stream}
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: post(url, "/v1/completions", body), range(2)))
        assert all(answer.status_code in (200, 500, 503) for answer in answers)  # and none timed out
        wait_until(lambda: scheduler.failed)
        time.sleep(0.3)  # longer than the server's tick: it must not end by itself
        health = httpx.get(f"{url}/health", trust_env=False)
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        late = post(url, "/v1/completions", body)
        assert (late.status_code, late.json()["error"]["message"]) == (
            503,
            "the worker has failed; see the server's log",
        )
    finally:
        running.handle_exit(signal.SIGTERM, None)
        thread.join(30)
        assert not thread.is_alive()
    assert not running.forced
