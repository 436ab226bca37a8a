"""A closed loop of requests to one server, through OpenAI's client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from compress.errors import BackendError, first_line, require

TIMEOUT_SECONDS = 600.0
KEEP_ALIVE_SECONDS = 2.0
"""Servers close connections that were idle for 5: one that is about to be closed must not be used again."""


@dataclass(frozen=True)
class Answer:
    """One answer, streamed.

    Attributes:
        prompt_tokens, output_tokens: as the server counted them.
        ttft_seconds: from the request to the first chunk with a choice, which /v1/completions sends with a token.
        e2e_seconds: to the last one.
    """

    prompt_tokens: int
    output_tokens: int
    ttft_seconds: float
    e2e_seconds: float


async def drive(
    url: str, model: str, prompts: Sequence[str], *, in_flight: int, max_tokens: int
) -> tuple[float, list[Answer]]:
    """Send prompts, so many at a time: whenever one is answered, the next is sent.

    Args:
        url: of the API, with the version. Proxy settings of the environment are not used.
        model: its name towards clients.
        prompts: to complete.
        in_flight: requests that are open at the same time, at most.
        max_tokens: of each answer, and at least as many, for an end is not accepted.

    Returns:
        Seconds from the first request to the end of the last answer, and the answers in the order in which they ended.

    Raises:
        BackendError: a request failed or was answered with another number of tokens; names the first.
    """
    openai, httpx = require("openai", "serve"), require("httpx", "serve")
    answers: list[Answer] = []
    waiting = iter(prompts)
    async with openai.AsyncOpenAI(
        base_url=url,
        api_key="none",
        timeout=TIMEOUT_SECONDS,
        max_retries=0,  # a retry would hide a failure and count its time
        http_client=openai.DefaultAsyncHttpxClient(
            trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_SECONDS)
        ),
    ) as client:
        start = perf_counter()
        try:
            async with asyncio.TaskGroup() as slots:
                for _ in range(in_flight):
                    slots.create_task(_slot(client, model, waiting, max_tokens, answers))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        return perf_counter() - start, answers


async def _slot(client: Any, model: str, waiting: Iterator[str], max_tokens: int, answers: list[Answer]) -> None:
    """Ask one thing after the other, as long as any is waiting."""
    for prompt in waiting:
        try:
            answer = await _ask(client, model, prompt, max_tokens)
        except Exception as error:  # in the middle of a stream the errors are those of openai's transport
            raise BackendError(f"{model}: a request failed: {first_line(error)}") from error
        if answer.output_tokens != max_tokens:
            raise BackendError(
                f"{model}: an answer has {answer.output_tokens} tokens in place of {max_tokens}, and only answers of "
                "the same length can be compared: lower --max-tokens, or serve with a longer context"
            )
        answers.append(answer)


async def _ask(client: Any, model: str, prompt: str, max_tokens: int) -> Answer:
    first = last = 0.0
    usage = None
    start = perf_counter()
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices:
            last = perf_counter() - start
            first = first or last
        usage = chunk.usage or usage
    if usage is None:
        raise BackendError("the server did not count the tokens of its answer")
    return Answer(usage.prompt_tokens, usage.completion_tokens, round(first, 6), round(last, 6))
