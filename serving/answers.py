"""The objects of the OpenAI wire format that answers are made of, whole and in chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from serving.backend import Finish


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class AnswerFormat:
    """The objects of one answer."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, artifact_id: str | None, *, stream_usage: bool) -> None:
        """`stream_usage`: end a stream with a chunk that counts the tokens (and say null in the others)."""
        self._stream_usage = stream_usage
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._head["system_fingerprint"] = artifact_id  # the weights that a seed is good for

    def choice(self, text: str, reason: str) -> dict[str, Any]:
        """The one choice of a whole answer."""
        raise NotImplementedError

    def piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        """The one choice of a chunk."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """Sent before the first text."""
        return b""

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """The answer in one object."""
        counts = usage(finish.prompt_tokens, finish.completion_tokens)
        choices = [self.choice(text, finish.reason)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": counts}

    def token(self, text: str) -> bytes:
        """One chunk of text."""
        return self._chunk([self.piece(text, None)])

    def closing(self, finish: Finish) -> bytes:
        """The last chunk, and the usage when it was asked for."""
        last = self._chunk([self.piece(None, finish.reason)])
        if not self._stream_usage:
            return last
        return last + self._chunk([], usage(finish.prompt_tokens, finish.completion_tokens))

    def _chunk(self, choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> bytes:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._stream_usage:
            chunk["usage"] = counts
        return sse(chunk)


class ChatAnswer(AnswerFormat):
    """Of /v1/chat/completions."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}

    def piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])


class TextAnswer(AnswerFormat):
    """Of /v1/completions."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, text: str, reason: str) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}

    def piece(self, text: str | None, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}


def sse(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
