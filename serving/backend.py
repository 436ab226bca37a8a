"""What the scheduler needs of a runtime, and the records that travel between HTTP and the model.

A backend keeps a *batch*: rows 0..B-1, each one sequence with its own length and its own part of a KV cache. Three
verbs change it, and the scheduler mirrors them in a plain list:

* ``prefill`` reads a prompt and appends a row;
* ``step`` decodes one token in every row;
* ``remove`` drops a row, and the last row takes its number.

A backend is used from one thread at a time, and holds nothing but memory: what starts and stops is the scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from compress.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt_tokens: at least one.
        max_tokens: the most tokens to generate, at least 1.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before sampling.
        top_p: share of the probability, in (0, 1], that sampling is limited to.
        seed: of the sampling; None draws one.
        stop: texts that end the answer; they are not part of it.
        ignore_end: go on after the model's end-of-sequence tokens, for measurements of a fixed length.
    """

    prompt_tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_tokens:
            raise ConfigError("a request needs at least one prompt token")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens}: give 1 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: give 0 or more")
        if not 0 <= self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: give 0 to 1")
        if "" in self.stop:
            raise ConfigError("a stop text cannot be empty")


@dataclass(frozen=True)
class Token:
    """Text that became certain with one generated token.

    Text may lag behind tokens: it waits while a character is incomplete, or while it could be the start of a stop text.
    """

    id: int
    text: str


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: ``"stop"`` (end-of-sequence token or stop text) or ``"length"`` (max_tokens reached).
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, the one that ended the answer included.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """The model raised: this answer ends without a result."""

    message: str


Event = Token | Finish | Failure


class Backend(Protocol):
    """One loaded model, and a batch of sequences in it.

    Attributes:
        name: key in BACKENDS.
        model_id: the model's name towards clients.
        artifact_id: id of the artifact behind it, None when it is none.
        context_length: the most tokens of a sequence, prompt and answer together; None when the model does not say.
        vocab_size: width V of the logits.
        tokenizer: text to tokens and back.
        end_tokens: ids that end an answer.
    """

    name: str
    model_id: str
    artifact_id: str | None
    context_length: int | None
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    end_tokens: frozenset[int]

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a row and read its prompt; returns the logits after the last token, float32 (V,)."""
        ...

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Give each of the B rows its next token; returns the logits after them, float32 (B, V)."""
        ...

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        ...


def end_tokens_of(tokenizer: PreTrainedTokenizerBase, *configs: Any) -> frozenset[int]:
    """The ids that end an answer: of the tokenizer, and of each (generation) config, an id or a list of ids."""
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, *configs):
        if isinstance(ids, int):
            found.add(ids)
        elif isinstance(ids, Iterable):
            found.update(int(i) for i in ids)
    return frozenset(found)


def model_id_of(path: str) -> str:
    """The default name of a model towards clients: a folder's or file's own name, any other name as given."""
    local = Path(path).expanduser()
    return local.resolve().name if local.exists() else path
