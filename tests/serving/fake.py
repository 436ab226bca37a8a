"""A backend of plain integers: what it says next is a function of what a row has read so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.backend import Event, Finish, Request, Token
from serving.detokenizer import plain_decode
from serving.scheduler import Scheduler
from tests.conftest import V, byte_tokenizer

END = 257


def ids(text: str) -> tuple[int, ...]:
    """One token per byte."""
    return tuple(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def one_hot(token: int) -> NDArray[np.float32]:
    return np.where(np.arange(V) == token, 9.0, 0.0).astype(np.float32)


def saying(answer: str | Sequence[int], *, prompt_tokens: int) -> Callable[[list[int]], NDArray[np.float32]]:
    """Logits that spell an answer out after a prompt of so many tokens, and then end."""
    tokens = [*(ids(answer) if isinstance(answer, str) else answer), END]
    return lambda seen: one_hot(tokens[min(len(seen) - prompt_tokens, len(tokens) - 1)])


def echo(seen: list[int]) -> NDArray[np.float32]:
    """Say again what was last read: a row that got another row's tokens would show it."""
    return one_hot(seen[-1])


def noise(seen: list[int]) -> NDArray[np.float32]:
    """Random logits that depend on all that was read, and on nothing else."""
    return np.random.default_rng(seen).standard_normal(V).astype(np.float32)


class FakeBackend:
    """Rows are lists of integers."""

    name = "fake"
    model_id = "fake"
    artifact_id: str | None = "sha256:1234"
    vocab_size = V
    end_tokens = frozenset({END})

    def __init__(self, logits: Callable[[list[int]], NDArray[np.float32]], *, context_length: int | None = 256) -> None:
        self.context_length = context_length
        self.tokenizer: Any = byte_tokenizer()
        self.rows: list[list[int]] = []
        self.batches: list[int] = []
        self.logits = logits

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.rows.append(list(tokens))
        return self.logits(self.rows[-1])

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        assert len(tokens) == len(self.rows)
        self.batches.append(len(tokens))
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return np.stack([self.logits(row) for row in self.rows])

    def remove(self, row: int) -> None:
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


def scheduler_of(backend: FakeBackend, **limits: int) -> Scheduler:
    return Scheduler(backend, plain_decode(backend.tokenizer), **limits)


class Client:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def pieces(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Token)]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish(self) -> Finish:
        last = self.events[-1]
        assert isinstance(last, Finish), last
        assert sum(isinstance(event, Finish) for event in self.events) == 1
        return last


def request(prompt: str = "hello", **fields: Any) -> Request:
    return Request(**{"prompt_tokens": ids(prompt), "max_tokens": 20, "temperature": 0, **fields})


def run(scheduler: Scheduler) -> None:
    """Rounds on this thread until nothing is left."""
    while not scheduler.idle:
        scheduler.round()
