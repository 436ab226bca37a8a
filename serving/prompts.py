"""From what a request says to the tokens of a prompt."""

from __future__ import annotations

import threading
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serving.protocol import ApiError, Message


class Prompts:
    """From what a request says to tokens. Used from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        """Warm up: the first encoding may change the tokenizer's settings, and later decoding must not meet that."""
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._encode("warm up", special=True)

    def of_chat(self, messages: list[Message]) -> tuple[int, ...]:
        """Through the model's own chat template, up to where the assistant speaks.

        Raises:
            ApiError: there is no template, or it refuses these messages.
        """
        if not self._tokenizer.chat_template:
            message = "this model has no chat template: it continues text (/v1/completions), it does not chat"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        turns = [message.for_template() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return self._encode(text, special=False)  # the template wrote the special tokens already

    def of_completion(self, prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[int, ...]:
        """A text, or tokens as they are.

        Raises:
            ApiError: more than one prompt, or ids that the model does not have.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ApiError(400, f"one prompt per request, not {len(prompt)}: send them apart", param="prompt")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._encode(prompt, special=True)
        if not all(isinstance(token, int) and 0 <= token < self._vocab_size for token in prompt):
            raise ApiError(400, f"token ids must lie in 0 to {self._vocab_size - 1}", param="prompt")
        return tuple(int(token) for token in prompt if isinstance(token, int))

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        with self._lock:
            return tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])
