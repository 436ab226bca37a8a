"""The HTTP side: OpenAI's routes over a scheduler.

Everything here runs on one event loop; the model runs on the scheduler's thread. A token crosses over once, by a deque
and one wake-up, and a stream writes all that lies ready in one piece, so a slow loop costs chunks and not tokens.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from serving.answers import AnswerFormat, ChatAnswer, TextAnswer, sse
from serving.backend import Event, Failure, Finish, Request, Token
from serving.prompts import Prompts
from serving.protocol import ApiError, ChatRequest, CompletionRequest, parse
from serving.scheduler import Draining, Generation, QueueFull, Scheduler

logger = logging.getLogger(__name__)

SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

BODY_BYTES = 1_000_000
"""Bytes of a request's body that are always read."""

BODY_BYTES_PER_TOKEN = 64
"""Of a long context: bytes of the body per token, more than text in JSON needs."""


def create_app(scheduler: Scheduler, *, api_key: str | None = None) -> FastAPI:
    """The ASGI app.

    Args:
        scheduler: started by the caller, who also closes it.
        api_key: asked for on every route under /v1 (``Authorization: Bearer ...``); None asks for none.
    """
    app = FastAPI(title="foldaway", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.include_router(_Routes(scheduler).router(api_key))
    app.add_api_route("/health", _health(scheduler), methods=["GET"])
    return app


class _Routes:
    """The routes under /v1."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._backend = scheduler.backend
        self._prompts = Prompts(scheduler.backend.tokenizer, scheduler.backend.vocab_size)
        self._created = int(time.time())
        self._body_limit = max(BODY_BYTES, BODY_BYTES_PER_TOKEN * scheduler.context_length)

    def router(self, api_key: str | None) -> APIRouter:
        guard = [] if api_key is None else [Depends(_bearer(api_key))]
        router = APIRouter(prefix="/v1", dependencies=guard)
        router.add_api_route("/models", self.models, methods=["GET"])
        router.add_api_route("/models/{model:path}", self.model, methods=["GET"])
        router.add_api_route("/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/completions", self.completions, methods=["POST"], response_model=None)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_object()]}

    async def model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return self._model_object()

    async def chat(self, http: HttpRequest) -> JSONResponse | StreamingResponse:
        body = parse(ChatRequest, await _json(http, self._body_limit))
        self._check_model(body.model)
        prompt = await asyncio.to_thread(self._prompts.of_chat, body.messages)
        return await self._answer(http, body, prompt, ChatAnswer)

    async def completions(self, http: HttpRequest) -> JSONResponse | StreamingResponse:
        body = parse(CompletionRequest, await _json(http, self._body_limit))
        self._check_model(body.model)
        prompt = await asyncio.to_thread(self._prompts.of_completion, body.prompt)
        return await self._answer(http, body, prompt, TextAnswer)

    async def _answer(
        self,
        http: HttpRequest,
        body: ChatRequest | CompletionRequest,
        prompt: tuple[int, ...],
        format_class: type[ChatAnswer] | type[TextAnswer],
    ) -> JSONResponse | StreamingResponse:
        request = self._request(body, prompt, "messages" if isinstance(body, ChatRequest) else "prompt")
        answer = _Answer(every_token=bool(body.stream))
        answer.start(self._submit(request, answer))
        # The first event decides between a stream and an error with a status of its own.
        events = await _or_gone(http, answer)
        format = format_class(self._backend.model_id, self._backend.artifact_id, stream_usage=body.include_usage)
        if body.stream:
            chunks = _stream(answer, events, format)
            cancel = BackgroundTask(answer.cancel)  # also where the client left before the first chunk was taken
            return StreamingResponse(chunks, media_type="text/event-stream", headers=SSE_HEADERS, background=cancel)
        text = "".join(event.text for event in events if isinstance(event, Token))
        finish = events[-1]
        assert isinstance(finish, Finish)  # for mypy: failures were raised
        return JSONResponse(format.whole(text, finish))

    def _request(self, body: ChatRequest | CompletionRequest, prompt: tuple[int, ...], param: str) -> Request:
        context = self._scheduler.context_length
        room = context - len(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty", param=param)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens, the context {context}, of which the answer needs 1 or more"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        wanted, said_by = body.limit or (min(body.default_limit or room, room), None)
        if wanted > room:
            message = f"the prompt has {len(prompt)} tokens, the context {context}: {wanted} more do not fit"
            raise ApiError(400, message, param=said_by, code="context_length_exceeded")
        return Request(
            prompt_tokens=prompt,
            max_tokens=wanted,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stops,
            ignore_end=bool(body.ignore_eos),
        )

    def _submit(self, request: Request, answer: _Answer) -> Generation:
        try:
            return self._scheduler.submit(request, answer.emit)
        except Draining as error:
            raise ApiError(503, str(error), type="server_error", headers={"retry-after": "5"}) from error
        except QueueFull as error:
            message, wait = str(error), {"retry-after": "1"}
            raise ApiError(429, message, type="rate_limit_error", code="queue_full", headers=wait) from error

    def _check_model(self, model: str) -> None:
        if model != self._backend.model_id:
            message = f"the model {model!r} is not served here; {self._backend.model_id!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._backend.model_id,
            "object": "model",
            "created": self._created,
            "owned_by": "foldaway",
            "artifact_id": self._backend.artifact_id,
            "max_model_len": self._scheduler.context_length,
        }


class _Answer:
    """Events on their way from the worker thread to the event loop."""

    def __init__(self, *, every_token: bool) -> None:
        """Wake the loop for every token, or only at the end."""
        self._loop = asyncio.get_running_loop()
        self._every_token = every_token
        self._ready: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._generation: Generation | None = None

    def start(self, generation: Generation) -> None:
        """Remember what to cancel."""
        self._generation = generation

    def emit(self, event: Event) -> None:
        """Hand over one event; called on the worker thread."""
        self._ready.append(event)
        if self._every_token or not isinstance(event, Token):
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is closed: a forced stop
                logger.debug("an answer was dropped")

    async def next(self) -> list[Event]:
        """Wait; returns all that is ready.

        Raises:
            ApiError: the model failed.
        """
        await self._wake.wait()
        self._wake.clear()
        events = [self._ready.popleft() for _ in range(len(self._ready))]
        for event in events:
            if isinstance(event, Failure):
                raise ApiError(500, event.message, type="server_error")
        return events

    def cancel(self) -> None:
        """Nobody reads on; harmless after the end."""
        if self._generation is not None:
            self._generation.cancel()


async def _or_gone(http: HttpRequest, answer: _Answer) -> list[Event]:
    """The next events of an answer; generation is cancelled when the client leaves first."""
    events = asyncio.ensure_future(answer.next())
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({events, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not events.done():
            raise ApiError(499, "the client left")
        return events.result()
    finally:
        if not events.done() or events.cancelled() or events.exception():
            answer.cancel()
        events.cancel()
        gone.cancel()


async def _disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _stream(answer: _Answer, events: list[Event], format: AnswerFormat) -> AsyncIterator[bytes]:
    """Server-sent events: what is ready goes out as one piece."""
    out = format.opening()
    try:
        while True:
            for event in events:
                if isinstance(event, Token):
                    out += format.token(event.text)
                elif isinstance(event, Finish):
                    yield out + format.closing(event) + b"data: [DONE]\n\n"
                    return
            if out:
                yield out
            out = b""
            events = await answer.next()
    except ApiError as error:
        yield sse(error.body)
    finally:
        answer.cancel()


async def _json(http: HttpRequest, limit: int) -> Any:
    content = await _content(http, limit)
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()  # raises for half of a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python reads
        raise ApiError(400, f"the body is not JSON: {error}") from error
    return body


async def _content(http: HttpRequest, limit: int) -> bytes:
    """The body of a request, of which no more than `limit` bytes are kept."""
    content = bytearray()
    async for chunk in http.stream():
        if len(content) + len(chunk) > limit:
            raise ApiError(413, f"the body is longer than the {limit} bytes read here", code="request_too_large")
        content += chunk
    return bytes(content)


def _health(scheduler: Scheduler) -> Callable[[], Awaitable[JSONResponse]]:
    async def health() -> JSONResponse:
        status = "ok" if scheduler.alive else "failed"
        if scheduler.draining and not scheduler.failed:
            status = "draining"
        backend = scheduler.backend
        body = {
            "status": status,
            "model": backend.model_id,
            "artifact_id": backend.artifact_id,
            "backend": backend.name,
            "running": scheduler.running,
            "waiting": scheduler.waiting,
        }
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    return health


def _bearer(api_key: str) -> Callable[[HttpRequest], Awaitable[None]]:
    """A check of the Authorization header that takes as long for a wrong key as for a right one."""
    expected = f"Bearer {api_key}".encode()

    async def check(http: HttpRequest) -> None:
        given = http.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
        if not hmac.compare_digest(given, expected):
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    return check


async def _on_api_error(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_error(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return await _on_api_error(http, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _on_bug(http: HttpRequest, error: Exception) -> JSONResponse:
    return await _on_api_error(http, ApiError(500, "internal error; see the server's log", type="server_error"))
