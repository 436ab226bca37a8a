"""One worker thread that runs the model for all requests: continuous batching in its simple form.

A round is: forget the rows whose clients left, admit at most one waiting request (its prefill makes its first token),
then one decode step over all running rows. At most one prefill per round, so that a burst of new requests
delays those that run by one prompt at a time, not by all of them; a long prompt still delays them by its own length.

Events leave through the callback given with a request, called on the worker thread (`Scheduler.cancel_all` calls it on
its caller's): it must be quick and not raise. `Scheduler.round` does one round on the caller's thread, which is how the
tests drive it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from compress.errors import BackendError, ConfigError
from serving.backend import Backend, Event, Failure, Finish, Request, Token
from serving.detokenizer import Decode, Detokenizer, StopFinder
from serving.sampling import Sampler

logger = logging.getLogger(__name__)

Emit = Callable[[Event], None]

STOPPING = "the server is stopping"


class QueueFull(BackendError):
    """Too many requests wait already."""


class Draining(BackendError):
    """Nothing new is taken: the server is stopping, or its worker has failed."""


class Generation:
    """One accepted request: the handle to cancel it, and what the worker keeps about it."""

    def __init__(self, request: Request, emit: Emit, decode: Decode) -> None:
        """Made by `Scheduler.submit`."""
        self.request = request
        self.cancelled = False
        self.last_token = -1
        self.generated = 0
        self._emit = emit
        self._telling = threading.RLock()  # keeps an event of the worker from following the end told by another thread
        self._sampler = Sampler(request.temperature, request.top_p, request.seed)
        self._detokenizer = Detokenizer(decode, request.prompt_tokens)
        self._stop = StopFinder(request.stop)

    def cancel(self) -> None:
        """Stop generating at the next round; from any thread, at any time. Once this returns no event follows."""
        with self._telling:
            self.cancelled = True

    def advance(self, logits: NDArray[np.float32], end_tokens: frozenset[int]) -> bool:
        """Pick the next token from logits (V,) and tell about it; returns whether the answer has ended.

        One that was cancelled or has failed meanwhile has ended, and tells nothing.
        """
        if self.cancelled:
            return True
        token = self.last_token = self._sampler.pick(logits)
        self.generated += 1
        ended = token in end_tokens and not self.request.ignore_end
        text, stopped = ("", False) if ended else self._stop.push(self._detokenizer.push(token))
        full = self.generated == self.request.max_tokens
        if not stopped and (ended or full):
            rest, stopped = self._stop.push(self._detokenizer.flush())
            text += rest if stopped else rest + self._stop.flush()
        if text:
            self._tell(Token(token, text))
        if not (ended or stopped or full):
            return False
        reason = "stop" if ended or stopped else "length"
        self._tell(Finish(reason, len(self.request.prompt_tokens), self.generated))
        return True

    def fail(self, message: str) -> None:
        """End without a result, from any thread: a Failure, unless it was cancelled before, and no event after it."""
        with self._telling:
            self._tell(Failure(message))
            self.cancelled = True

    def _tell(self, event: Event) -> None:
        with self._telling:
            if not self.cancelled:
                self._emit(event)


class Scheduler:
    """Takes requests from any thread, runs them on one.

    Attributes:
        backend: the model; touched by the worker only.
        context_length: the most tokens of a sequence, prompt and answer together.
        draining: True once nothing new is taken. Setting it is all that `drain` does, so a signal handler may.
        failed: True once the worker thread has ended by an error; it is draining then, too.
    """

    def __init__(
        self,
        backend: Backend,
        decode: Decode,
        *,
        max_model_len: int | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            backend: with an empty batch, and from now on used by nobody else.
            decode: tokens to text, without special tokens.
            max_model_len: a context shorter than the model's.
            max_batch: the most rows that decode together.
            max_waiting: the most requests that wait for a row.

        Raises:
            ConfigError: a limit that cannot be meant.
        """
        if max_batch < 1 or max_waiting < 1:
            raise ConfigError(f"max_batch={max_batch}, max_waiting={max_waiting}: give 1 or more")
        self.backend = backend
        self.context_length = _context_length(backend, max_model_len)
        self.draining = False
        self.failed = False
        self._decode = decode
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._rows: list[Generation] = []  # mirrors the rows of the backend
        self._admitting: Generation | None = None
        self._changed = threading.Condition()  # its lock can be taken again by the thread that holds it
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> int:
        """Requests that have a row, or are about to."""
        return len(self._rows) + (self._admitting is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing waits."""
        return not self._rows and not self._waiting and self._admitting is None

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the worker thread."""
        self._thread = threading.Thread(target=self._work, name="foldaway-scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: Request, emit: Emit) -> Generation:
        """Queue a request.

        Args:
            request: prompt and answer must fit in `context_length`.
            emit: told of each event, on the worker thread (of a Failure also on another); the last one is a Finish or
                a Failure, unless it is cancelled.

        Raises:
            ConfigError: it does not fit.
            QueueFull: too many wait already.
            Draining: the server is stopping, or its worker has failed.
        """
        needed = len(request.prompt_tokens) + request.max_tokens
        if needed > self.context_length:
            raise ConfigError(f"prompt and max_tokens need {needed} tokens, the context has {self.context_length}")
        generation = Generation(request, emit, self._decode)
        with self._changed:
            if self.draining:
                raise Draining("the worker has failed; see the server's log" if self.failed else STOPPING)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def round(self) -> None:
        """One round: forget, admit, step."""
        self._forget()
        self._admit()
        if self._rows:
            self._step()

    def drain(self) -> None:
        """Take nothing new from now on; what was accepted is finished."""
        self.draining = True

    def cancel_all(self) -> None:
        """End everything that runs or waits: each gets a Failure now, and its row is dropped at the next round."""
        self._fail_all(STOPPING)

    def _fail_all(self, message: str) -> None:
        with self._changed:
            admitting = [self._admitting] if self._admitting else []
            for generation in [*self._waiting, *admitting, *self._rows]:
                try:
                    generation.fail(message)
                except Exception:  # a callback that raises must not keep the others from being told
                    logger.exception("telling of a failure failed")

    def close(self, timeout_seconds: float | None = None) -> None:
        """Take nothing new, finish everything accepted, end the worker thread."""
        with self._changed:
            self.draining = True
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _work(self) -> None:
        """The worker thread: rounds until it is closed, or until one raises what `round` does not expect."""
        try:
            self._rounds()
        except Exception as error:
            logger.exception("the worker failed; nothing is served any more")
            with self._changed:
                self.failed = self.draining = True
                self._fail_all(_describe(error))
                self._waiting.clear()
                self._rows.clear()
                self._admitting = None

    def _rounds(self) -> None:
        while True:
            with self._changed:
                while self.idle and not self._closing:
                    self._changed.wait()
                if self.idle:
                    return
            self.round()

    def _forget(self) -> None:
        """Give up what nobody waits for any more."""
        with self._changed:
            if any(generation.cancelled for generation in self._waiting):
                self._waiting = deque(generation for generation in self._waiting if not generation.cancelled)
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._remove(row)

    def _admit(self) -> None:
        """Prefill the first of the waiting requests, if there is a row for it."""
        with self._changed:
            if not self._waiting or len(self._rows) >= self._max_batch:
                return
            generation = self._waiting.popleft()
            self._admitting = generation
        try:
            logits = self.backend.prefill(generation.request.prompt_tokens)
            self._rows.append(generation)
        except Exception as error:  # one request that fails must not take the server down
            logger.exception("prefill failed")
            generation.fail(_describe(error))
            return
        finally:
            self._admitting = None
        self._advance(len(self._rows) - 1, logits)

    def _step(self) -> None:
        """One token in every row."""
        try:
            logits = self.backend.step([generation.last_token for generation in self._rows])
        except Exception as error:  # likewise; which row it was cannot be told, so all of them end
            logger.exception("decode step failed")
            for row in reversed(range(len(self._rows))):
                self._rows[row].fail(_describe(error))
                self._remove(row)
            return
        # From the last row to the first: a removal moves the last row, which was looked at already, into the gap.
        for row in reversed(range(len(self._rows))):
            self._advance(row, logits[row])

    def _advance(self, row: int, logits: NDArray[np.float32]) -> None:
        """Give one row its next token; drop the row if that ends it."""
        generation = self._rows[row]
        try:
            ended = generation.advance(logits, self.backend.end_tokens)
        except Exception as error:  # likewise
            logger.exception("decoding text failed")
            generation.fail(_describe(error))
            ended = True
        if ended:
            self._remove(row)

    def _remove(self, row: int) -> None:
        """Drop a row here and in the backend; the last one takes its number."""
        self.backend.remove(row)
        self._rows[row] = self._rows[-1]  # in this order every generation is in the list at any time
        self._rows.pop()


def _context_length(backend: Backend, wanted: int | None) -> int:
    """The context to serve: the model's own, or a shorter one.

    Raises:
        ConfigError: longer than the model's, too short to be of use, or not known at all.
    """
    known = backend.context_length
    if wanted is None and known is None:
        raise ConfigError(f"{backend.model_id} does not say how long its context is: give --max-model-len")
    if wanted is not None and (wanted < 2 or (known is not None and wanted > known)):
        limit = f"2 to {known}" if known is not None else "2 or more"
        raise ConfigError(f"max_model_len={wanted}: {backend.model_id} can be served with {limit}")
    length = known if wanted is None else wanted
    assert length is not None  # for mypy: one of both is known
    return length


def _describe(error: Exception) -> str:
    """One line about a failure of the model, for the client; the log has the traceback."""
    return f"the model failed: {type(error).__name__}"
