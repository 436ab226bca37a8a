"""How fast: prefill and decode of two exports in this process, and of two servers through the OpenAI client.

The sides take turns (A B A B), so that a machine that warms up, throttles or is shared slows both. Warm-up rounds are
discarded; every other run is kept. Greedy decoding, one stream, the same inputs and the same number of tokens on both
sides. Time to first token ends at the first chunk with content (a chunk that only names the role does not count), the
whole answer at the last one; the decode rate of an answer is (completion tokens - 1) / (time between these two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.measures import PairedRuns, paired_runs
from compress.errors import BackendError, ConfigError, require
from compress.result import Progress, no_progress

FEWEST_RUNS = 5

Input = TypeVar("Input")
Result = TypeVar("Result")


class Session(Protocol):
    """What in-process timing needs of exporters.onnx_session.OnnxSession."""

    vocab_size: int

    def prefill(self, tokens: NDArray[np.int64], *, capacity: int | None = None) -> tuple[NDArray[np.float32], Any]:
        """Read a prompt (1, T): the last logits (V,) and a cache with room for `capacity` tokens."""

    def step(self, tokens: NDArray[np.int64], kv: Any, lengths: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        """Decode one token (B, 1) in each row of a cache: the logits (B, V) and the cache."""


@dataclass(frozen=True)
class LatencyPair:
    """In-process timing: `prefill` in seconds for the whole prompt, `decode` in tokens/second."""

    prefill: PairedRuns
    decode: PairedRuns


@dataclass(frozen=True)
class ServedPair:
    """Timing through HTTP: `ttft` and `e2e` in seconds, `decode` in tokens/second.

    `skipped` counts the pairs of requests in which a side's answer was too short to time; they are in no series.
    """

    ttft: PairedRuns
    decode: PairedRuns
    e2e: PairedRuns
    skipped: int


def latency_pair(
    baseline: Session,
    candidate: Session,
    *,
    prompt_tokens: int = 128,
    decode_tokens: int = 64,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> LatencyPair:
    """Time two sessions on one seeded random prompt of tokens that both know, taking turns.

    Raises:
        ConfigError: fewer than five repeats, or nothing to time.
    """
    _check_repeats(repeats)
    if prompt_tokens < 1 or decode_tokens < 1 or warmup < 0:
        raise ConfigError(
            f"prompt_tokens={prompt_tokens}, decode_tokens={decode_tokens}, warmup={warmup}: "
            "give at least one token each, and no negative warm-up"
        )
    vocabulary = min(baseline.vocab_size, candidate.vocab_size)
    prompt = np.random.default_rng(seed).integers(0, vocabulary, (1, prompt_tokens), dtype=np.int64)
    rounds = _taking_turns(
        lambda tokens: _time_session(baseline, tokens, decode_tokens),
        lambda tokens: _time_session(candidate, tokens, decode_tokens),
        [prompt] * (warmup + repeats),
        lambda done, total: progress("timing both exports", done, total),
    )[warmup:]
    return LatencyPair(
        prefill=_series("prefill, in process", "seconds", rounds, lambda run: run[0]),
        decode=_series("decode, in process", "tokens/second", rounds, lambda run: run[1]),
    )


def served_pair(
    baseline_url: str,
    candidate_url: str,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    repeats: int = 1,
    warmup: int = 1,
    api_key: str = "none",
    timeout_seconds: float = 120.0,
    extra_body: Mapping[str, object] | None = None,
    progress: Progress = no_progress,
) -> ServedPair:
    """Send two running OpenAI endpoints the same prompts, streaming, at temperature 0, taking turns.

    Prompts go as chat where both models have a chat template, else as text to complete.

    Args:
        baseline_url: with the version, for example ``http://127.0.0.1:8001/v1``. Proxy settings of the environment are
            not used: a proxy would be timed too.
        candidate_url: likewise.
        prompts: one user message each. Different prompts are better than repeats where a server keeps a prefix cache.
        max_tokens: of each answer.
        repeats: rounds over all prompts; prompts x repeats must be at least five.
        warmup: requests per side before the timing, discarded.
        api_key: sent to both.
        timeout_seconds: of one request.
        extra_body: more fields of each request, such as ``{"ignore_eos": True}`` where the server knows it.
        progress: told of each pair.

    Raises:
        ConfigError: fewer than five pairs of requests.
        BackendError: a request failed, or fewer than five pairs of answers were long enough to time.
    """
    _check_repeats(len(prompts) * repeats)
    asked = [*(prompts[number % len(prompts)] for number in range(warmup)), *(list(prompts) * repeats)]
    baseline, candidate = (
        _Endpoint(url, max_tokens, api_key, timeout_seconds, dict(extra_body or {}))
        for url in (baseline_url, candidate_url)
    )
    if not (baseline.can_chat() and candidate.can_chat()):
        baseline.chat = candidate.chat = False  # base models have no chat template; both sides are asked alike
    rounds = _taking_turns(
        baseline.ask, candidate.ask, asked, lambda done, total: progress("asking both servers", done, total)
    )[warmup:]
    usable = [answers for answers in rounds if all(answer.is_timed for answer in answers)]
    if len(usable) < FEWEST_RUNS:
        raise BackendError(
            f"{len(usable)} of {len(rounds)} pairs of answers had two tokens or more and {FEWEST_RUNS} are needed: "
            "use more prompts, or prompts that call for longer answers"
        )
    return ServedPair(
        ttft=_series("time to first token, served", "seconds", usable, lambda answer: answer.first_seconds),
        decode=_series("decode, served", "tokens/second", usable, lambda answer: answer.tokens_per_second),
        e2e=_series("whole answer, served", "seconds", usable, lambda answer: answer.last_seconds),
        skipped=len(rounds) - len(usable),
    )


def _check_repeats(repeats: int) -> None:
    if repeats < FEWEST_RUNS:
        raise ConfigError(f"{repeats} runs of each side say little about the spread: ask for {FEWEST_RUNS} or more")


def _taking_turns(
    baseline: Callable[[Input], Result],
    candidate: Callable[[Input], Result],
    inputs: Sequence[Input],
    done: Callable[[int, int], None],
) -> list[tuple[Result, Result]]:
    """Run A B A B ... over the inputs, and pair the results."""
    rounds = []
    for number, item in enumerate(inputs, start=1):
        rounds.append((baseline(item), candidate(item)))
        done(number, len(inputs))
    return rounds


def _series(
    name: str, unit: str, rounds: Sequence[tuple[Result, Result]], number: Callable[[Result], float]
) -> PairedRuns:
    baseline, candidate = zip(*((number(below), number(above)) for below, above in rounds), strict=True)
    return paired_runs(name, unit, baseline, candidate)


def _time_session(session: Session, prompt: NDArray[np.int64], decode_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and tokens/second of greedy decoding after it."""
    length = prompt.shape[1]
    start = perf_counter()
    last, kv = session.prefill(prompt, capacity=length + decode_tokens)
    filled = perf_counter()
    logits = last[None]
    for lengths in range(length, length + decode_tokens):
        token = logits.argmax(axis=-1).astype(np.int64)[:, None]
        logits, kv = session.step(token, kv, np.array([lengths]))
    return filled - start, decode_tokens / (perf_counter() - filled)


@dataclass(frozen=True)
class _Answer:
    """When one streamed answer's first and last content came, counted from the request, and its tokens."""

    first_seconds: float
    last_seconds: float
    completion_tokens: int

    @property
    def is_timed(self) -> bool:
        return self.completion_tokens > 1 and 0 < self.first_seconds < self.last_seconds

    @property
    def tokens_per_second(self) -> float:
        return (self.completion_tokens - 1) / (self.last_seconds - self.first_seconds)


class _Endpoint:
    """One server and the model it offers first.

    Attributes:
        chat: ask for chat completions, or else for plain ones.
    """

    def __init__(
        self, url: str, max_tokens: int, api_key: str, timeout_seconds: float, extra_body: dict[str, object]
    ) -> None:
        self.chat = True
        self._openai = require("openai", "serve")
        self._url = url
        self._client = self._openai.OpenAI(
            base_url=url,
            api_key=api_key,
            timeout=timeout_seconds,
            max_retries=0,  # a retry would hide a failure and count its time
            http_client=self._openai.DefaultHttpxClient(trust_env=False),
        )
        self._max_tokens = max_tokens
        self._extra_body = extra_body
        models = self._checked(lambda: self._client.models.list().data)
        if not models:
            raise BackendError(f"{url} offers no model")
        self._model = models[0].id

    def can_chat(self) -> bool:
        """Whether the model has a chat template; asked with a first prompt, which is not timed."""
        try:
            self.ask("Hi")
        except BackendError as error:
            if isinstance(error.__cause__, self._openai.BadRequestError):
                return False
            raise
        return True

    def ask(self, prompt: str) -> _Answer:
        """One streamed answer, timed."""
        return self._checked(lambda: self._timed(prompt))

    def _timed(self, prompt: str) -> _Answer:
        first = last = 0.0
        completion_tokens = 0
        start = perf_counter()
        for chunk in self._stream(prompt):
            if chunk.choices and (text := self._text(chunk.choices[0])) is not None:
                last = perf_counter() - start
                first = first or (last if text else 0.0)
            if chunk.usage is not None:
                completion_tokens = chunk.usage.completion_tokens
        return _Answer(first, last, completion_tokens)

    def _stream(self, prompt: str) -> Any:
        options: dict[str, Any] = {
            "model": self._model,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": self._extra_body,
        }
        if self.chat:
            return self._client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options)
        return self._client.completions.create(prompt=prompt, **options)

    def _text(self, choice: Any) -> str | None:
        """The text of a chunk; empty for the one that ends an answer; None for one that says nothing of it."""
        text: str | None = choice.delta.content if self.chat else choice.text
        return text or ("" if choice.finish_reason else None)

    def _checked(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except Exception as error:  # in the middle of a stream the errors are those of openai's transport
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> BackendError:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, self._openai.APIConnectionError):
            return BackendError(f"{self._url} did not answer: {what}; is `foldaway serve` running there?")
        return BackendError(f"{self._url} did not do what was asked: {what}")
