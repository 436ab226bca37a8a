"""What requests may say in the OpenAI wire format, and the error object.

Every field that OpenAI or vLLM has and this server does not is listed with the values that ask for nothing; with any
other value, and for a field that nobody knows, the answer is an error that names the field. What is dropped without a
word are labels, which say who and not what: those in LABELS, and the ``name`` of a message.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

NonEmpty = Annotated[str, Field(min_length=1)]

LABELS = ("user", "safety_identifier", "prompt_cache_key")
"""Say who asks, not what: accepted, not kept."""

ABSENT: tuple[Any, ...] = (None,)

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # of both routes
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "service_tier": (None, "auto", "default"),
    # of /v1/completions
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    # of /v1/chat/completions
    "logprobs": (None, False),
    "top_logprobs": ABSENT,
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": ABSENT,
    "prediction": ABSENT,
    "reasoning_effort": (None, "none"),
    "verbosity": ABSENT,
    "web_search_options": ABSENT,
    "store": (None, False),
    "metadata": (None, {}),
    "moderation": ABSENT,
    "prompt_cache_options": ABSENT,
    "prompt_cache_retention": ABSENT,
    # of vLLM
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "repetition_penalty": (None, 1),
}
"""Field -> the values that change nothing."""

MESSAGE_LEFTOVERS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")
"""Fields of a message as a client gets it back and may send it again; empty ones are dropped, others refused."""


class ApiError(Exception):
    """An answer that is an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Args are those of the error object, and the HTTP status and headers."""
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None  # of vLLM


class TextPart(_Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # a label

    def for_template(self) -> dict[str, str]:
        """As chat templates read it: one text, and `developer` under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Generate(_Body):
    """What both routes take.

    ``default_limit`` is the most tokens to generate where the request does not say: OpenAI has 16 for completions,
    and as many as fit (None) for chats.
    """

    default_limit: ClassVar[int | None] = None

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def limit(self) -> tuple[int, str] | None:
        """The most tokens to generate and the field that said so; None where the request does not say."""
        return None if self.max_tokens is None else (self.max_tokens, "max_tokens")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether the last chunk of the stream counts the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generate):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> tuple[int, str] | None:
        """The most tokens to generate and the field that said so; None where the request does not say.

        Raises:
            ApiError: both fields say so.
        """
        if self.max_completion_tokens is None:
            return super().limit
        if self.max_tokens is not None:
            message = "max_tokens is the older name of max_completion_tokens: give one of them"
            raise ApiError(400, message, param="max_tokens")
        return self.max_completion_tokens, "max_completion_tokens"


class CompletionRequest(_Generate):
    """Body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    default_limit: ClassVar[int | None] = 16


_FIELDS = {
    name for kind in (ChatRequest, CompletionRequest, Message, TextPart, StreamOptions) for name in kind.model_fields
}
"""What names a place in a body; pydantic's own labels of union branches are none of them."""

R = TypeVar("R", ChatRequest, CompletionRequest)


def parse(kind: type[R], body: Any) -> R:
    """Check the JSON body of a request.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = {name: value for name, value in body.items() if not _asks_for_nothing(kind, name, value)}
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_leftovers(message) for message in fields["messages"]]
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is for streams: set stream to true", param="stream_options")
    return request


def _asks_for_nothing(kind: type[BaseModel], name: str, value: Any) -> bool:
    """Whether a field that we do not have may be dropped.

    Raises:
        ApiError: it asks for something.
    """
    if name in kind.model_fields:
        return False
    if name in LABELS:
        return True
    neutral = UNSUPPORTED.get(name)
    if neutral is None:
        message = f"{name} is not a field of this request; known are {', '.join(kind.model_fields)}"
        raise ApiError(400, message, param=name, code="unknown_parameter")
    if any(value == plain and isinstance(value, bool) == isinstance(plain, bool) for plain in neutral):
        return True
    raise ApiError(
        400, f"{name} is not supported by this server: leave it out", param=name, code="unsupported_parameter"
    )


def _without_leftovers(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name not in MESSAGE_LEFTOVERS or value}


def _invalid(error: ValidationError) -> ApiError:
    """What is wrong, as an OpenAI error. Of a union (stop, content) each branch is reported: the deepest is meant."""
    problems = error.errors()
    depth = max(len(problem["loc"]) for problem in problems)
    first = next(problem for problem in problems if len(problem["loc"]) == depth)
    unknown = first["type"] == "extra_forbidden"
    names = _FIELDS | ({first["loc"][-1]} if unknown else set())
    path = [part for part in first["loc"] if isinstance(part, int) or part in names]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    said = dict.fromkeys(problem["msg"] for problem in problems if problem["loc"][:1] == first["loc"][:1])
    message = f"{where}: {'; or '.join(said)}" if not unknown else f"{where} is not a known field"
    return ApiError(400, message, param=where or None, code="unknown_parameter" if unknown else None)
