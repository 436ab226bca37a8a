"""Continuous batching, driven round by round with a backend of plain integers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.errors import ConfigError
from serving.backend import Event, Failure, Finish
from serving.scheduler import Draining, QueueFull, Scheduler
from tests.serving.fake import END, Client, FakeBackend, echo, ids, noise, request, run, saying, scheduler_of

HELLO = len(ids("hello"))


def answer(text: str, **fields: Any) -> Client:
    """What a client of a backend that says `text` receives."""
    scheduler = scheduler_of(FakeBackend(saying(text, prompt_tokens=HELLO)))
    client = Client()
    scheduler.submit(request(**fields), client)
    run(scheduler)
    return client


def test_an_answer_ends_with_the_end_token() -> None:
    client = answer("good day")
    assert client.text == "good day"
    assert client.finish == Finish("stop", prompt_tokens=HELLO, completion_tokens=len("good day") + 1)


def test_an_answer_ends_at_max_tokens() -> None:
    client = answer("good day", max_tokens=4)
    assert client.text == "good"
    assert client.finish == Finish("length", prompt_tokens=HELLO, completion_tokens=4)


def test_the_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert answer("good", max_tokens=5).finish.reason == "stop"


def test_measurements_may_go_on_after_the_end() -> None:
    client = answer("good", ignore_end=True, max_tokens=9)
    assert client.text == "good"
    assert client.finish == Finish("length", prompt_tokens=HELLO, completion_tokens=9)


@pytest.mark.parametrize(("stop", "text"), [("day", "good "), ("d d", "goo"), ("g", ""), ("od", "go")])
def test_a_stop_text_never_leaks_although_its_tokens_come_apart(stop: str, text: str) -> None:
    client = answer("good day", stop=(stop, "unseen"))
    assert client.text == text
    assert client.finish == Finish("stop", HELLO, "good day".index(stop) + len(stop))


def test_what_could_have_become_a_stop_text_is_shown_when_it_does_not() -> None:
    assert answer("good da", stop=("day",)).text == "good da"
    assert answer("good dad", stop=("day",)).pieces == ["g", "o", "o", "d ", "da", "d"]


def test_the_start_of_a_stop_text_is_shown_at_max_tokens() -> None:
    client = answer("good day", stop=("day",), max_tokens=7)
    assert client.text == "good da"
    assert client.finish.reason == "length"


def test_characters_are_not_split() -> None:
    assert answer("é🦙!").pieces == ["é", "🦙", "!"]


def test_rows_of_different_lengths_do_not_mix() -> None:
    scheduler = scheduler_of(FakeBackend(echo), max_batch=3)
    clients = [Client() for _ in range(7)]
    for n, client in enumerate(clients):
        scheduler.submit(request("abcdefg"[: n + 1], max_tokens=3 + 5 * (n % 3)), client)
    run(scheduler)
    for n, client in enumerate(clients):
        assert client.text == "abcdefg"[n] * (3 + 5 * (n % 3))


def test_requests_start_in_order_as_rows_become_free() -> None:
    backend = FakeBackend(echo)
    scheduler = scheduler_of(backend, max_batch=2)
    order: list[str] = []

    def watch(name: str) -> Any:
        return lambda event: order.append(name) if isinstance(event, Finish) or name not in order else None

    for name in "abcd":
        scheduler.submit(request(name, max_tokens=4), watch(name))
    run(scheduler)
    assert [name for n, name in enumerate(order) if name not in order[:n]] == list("abcd")
    assert max(backend.batches) == 2


def test_one_round_reads_one_prompt_and_steps_all_rows() -> None:
    backend = FakeBackend(echo)
    scheduler = scheduler_of(backend)
    for name in "abc":
        scheduler.submit(request(name), Client())
    for rows in (1, 2, 3):
        scheduler.round()
        assert len(backend.rows) == rows
        assert (scheduler.running, scheduler.waiting) == (rows, 3 - rows)
    assert backend.batches == [1, 2, 3]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_seed_gives_the_same_answer_whoever_the_neighbours_are(top_p: float) -> None:
    fields = {"temperature": 1.0, "top_p": top_p, "seed": 5}

    def with_neighbours(count: int, first: int) -> str:
        scheduler = scheduler_of(FakeBackend(noise))
        mine = Client()
        for n in range(count):
            if n == first:
                scheduler.submit(request("mine", **fields), mine)
            scheduler.submit(request(f"other {n}", temperature=1.0, max_tokens=5 + n), Client())
        run(scheduler)
        return repr([event.id for event in mine.events if hasattr(event, "id")])

    alone = with_neighbours(1, 0)
    assert with_neighbours(6, 3) == alone
    fields["seed"] = 6
    assert with_neighbours(1, 0) != alone


def test_a_cancelled_row_leaves_and_the_others_go_on() -> None:
    backend = FakeBackend(echo)
    scheduler = scheduler_of(backend)
    clients = [Client() for _ in range(3)]
    handles = [scheduler.submit(request(name), client) for name, client in zip("abc", clients, strict=True)]
    for _ in range(4):
        scheduler.round()
    handles[0].cancel()
    scheduler.round()
    assert len(backend.rows) == 2
    heard = len(clients[0].events)
    run(scheduler)
    assert len(clients[0].events) == heard
    assert [client.text for client in clients[1:]] == ["b" * 20, "c" * 20]


def test_a_request_that_is_cancelled_while_it_waits_never_runs() -> None:
    backend = FakeBackend(echo)
    scheduler = scheduler_of(backend, max_batch=1, max_waiting=2)
    first, second = Client(), Client()
    scheduler.submit(request("a", max_tokens=3), first)
    scheduler.submit(request("b"), second).cancel()
    run(scheduler)
    assert first.text == "aaa"
    assert second.events == []


def test_a_full_queue_refuses() -> None:
    scheduler = scheduler_of(FakeBackend(echo), max_waiting=2)
    for name in "ab":
        scheduler.submit(request(name), Client())
    with pytest.raises(QueueFull, match="2 requests wait"):
        scheduler.submit(request("c"), Client())


def test_what_does_not_fit_the_context_is_refused() -> None:
    scheduler = scheduler_of(FakeBackend(echo), max_model_len=10)
    with pytest.raises(ConfigError, match="need 11 tokens, the context has 10"):
        scheduler.submit(request("hello", max_tokens=6), Client())
    client = Client()
    scheduler.submit(request("hello", max_tokens=5), client)
    run(scheduler)
    assert client.finish.reason == "length"


@pytest.mark.parametrize(
    ("known", "limits"),
    [
        (64, {"max_model_len": 65}),
        (64, {"max_model_len": 1}),
        (None, {}),
        (64, {"max_batch": 0}),
        (64, {"max_waiting": 0}),
    ],
)
def test_limits_that_cannot_be_meant_are_refused(known: int | None, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        scheduler_of(FakeBackend(echo, context_length=known), **limits)


def test_a_model_that_does_not_know_its_context_can_be_told() -> None:
    assert scheduler_of(FakeBackend(echo, context_length=None), max_model_len=32).context_length == 32


class Broken(FakeBackend):
    """Raises at a prompt that begins with "!", and at a step that reads "#"."""

    def prefill(self, tokens: Any) -> NDArray[np.float32]:
        if tokens[0] == ids("!")[0]:
            raise RuntimeError("secret detail")
        return super().prefill(tokens)

    def step(self, tokens: Any) -> NDArray[np.float32]:
        if ids("#")[0] in tokens:
            raise RuntimeError("secret detail")
        return super().step(tokens)


def test_a_prompt_that_breaks_the_model_fails_alone() -> None:
    scheduler = scheduler_of(Broken(echo))
    good, bad = Client(), Client()
    scheduler.submit(request("a"), good)
    scheduler.submit(request("!"), bad)
    run(scheduler)
    assert bad.events == [Failure("the model failed: RuntimeError")]
    assert good.text == "a" * 20


def test_a_step_that_breaks_ends_its_rows_and_the_next_request_is_served() -> None:
    scheduler = scheduler_of(Broken(echo))
    clients = [Client() for _ in range(3)]
    for name, client in zip("a#", clients, strict=False):
        scheduler.submit(request(name), client)
    run(scheduler)
    assert all(isinstance(client.events[-1], Failure) for client in clients[:2])
    scheduler.submit(request("z"), clients[2])
    run(scheduler)
    assert clients[2].text == "z" * 20


def collect(scheduler: Scheduler, prompt: str, **fields: Any) -> tuple[list[Event], threading.Event]:
    events: list[Event] = []
    done = threading.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if not hasattr(event, "id"):
            done.set()

    scheduler.submit(request(prompt, **fields), emit)
    return events, done


def test_the_worker_thread_serves_and_finishes_what_was_accepted() -> None:
    scheduler = scheduler_of(FakeBackend(echo))
    scheduler.start()
    assert scheduler.alive
    answers = [collect(scheduler, name, max_tokens=100) for name in "abcdefghijkl"]
    scheduler.drain()
    with pytest.raises(Draining):
        scheduler.submit(request("late"), Client())
    scheduler.close(timeout_seconds=30)
    assert not scheduler.alive
    for events, _ in answers:
        assert events[-1] == Finish("length", 1, 100)


def test_a_forced_end_fails_what_runs() -> None:
    scheduler = scheduler_of(FakeBackend(echo, context_length=10**9))
    scheduler.start()
    events, done = collect(scheduler, "a", max_tokens=10**8)
    scheduler.cancel_all()
    assert done.wait(10)
    scheduler.close(timeout_seconds=10)
    assert not scheduler.alive
    assert any(isinstance(event, Failure) for event in events)


def test_the_end_token_is_not_text() -> None:
    assert END not in [event.id for event in answer("x").events if hasattr(event, "id")]


def test_nothing_follows_the_failure_of_a_forced_end() -> None:
    class Ending(FakeBackend):
        def step(self, tokens: Any) -> NDArray[np.float32]:
            if len(self.batches) == 2:
                scheduler.cancel_all()  # as from another thread, while the model runs
            return super().step(tokens)

    backend = Ending(echo)
    scheduler = scheduler_of(backend)
    clients = [Client(), Client()]
    for client in clients:
        scheduler.submit(request("a"), client)
    run(scheduler)
    for client in clients:
        assert client.events[-1] == Failure("the server is stopping")
        assert sum(isinstance(event, Failure) for event in client.events) == 1
    assert backend.rows == []


def test_nothing_follows_a_cancellation_in_the_middle_of_a_step() -> None:
    class Leaving(FakeBackend):
        def step(self, tokens: Any) -> NDArray[np.float32]:
            handle.cancel()
            return super().step(tokens)

    client = Client()
    scheduler = scheduler_of(Leaving(echo))
    handle = scheduler.submit(request("a"), client)
    run(scheduler)
    assert client.text == "a"  # of the prefill


@pytest.mark.parametrize("broken", ["remove", "emit"])
def test_a_worker_that_fails_tells_everyone_and_takes_nothing_new(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Unremovable(FakeBackend):
        def remove(self, row: int) -> None:
            raise RuntimeError("secret detail")

    def refuse(_: Event) -> None:
        raise RuntimeError("secret detail")

    backend = Unremovable(echo) if broken == "remove" else FakeBackend(echo)
    scheduler = scheduler_of(backend, max_batch=2)
    clients = [Client() for _ in range(3)]
    scheduler.submit(request("a", max_tokens=2), refuse if broken == "emit" else Client())
    for client in clients:
        scheduler.submit(request("b"), client)
    scheduler.start()
    assert scheduler._thread is not None
    scheduler._thread.join(10)
    assert not scheduler.alive
    assert scheduler.failed
    assert scheduler.draining
    assert scheduler.idle
    assert all(client.events[-1] == Failure("the model failed: RuntimeError") for client in clients)
    assert "secret detail" in caplog.text
    with pytest.raises(Draining, match="the worker has failed"):
        scheduler.submit(request("late"), Client())
    scheduler.close(timeout_seconds=10)
