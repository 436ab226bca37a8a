"""An ONNX export as a backend: the graph through OnnxSession, all rows of the batch in one run per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from compress.errors import ConfigError
from exporters.onnx_session import OnnxSession, load_tokenizer, read_settings
from serving.backend import end_tokens_of, model_id_of
from serving.kv_cache import BatchCache, room_for


class OnnxBackend:
    """Decodes rows of different lengths together; a row's logits may differ from those alone by rounding."""

    name = "onnx"

    def __init__(
        self, session: OnnxSession, tokenizer: PreTrainedTokenizerBase, *, model_id: str, end_tokens: frozenset[int]
    ) -> None:
        """Serve a session that nobody else uses."""
        self.model_id = model_id
        self.artifact_id = session.artifact_id
        self.context_length: int | None = session.context_length
        self.vocab_size = session.vocab_size
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self._session = session
        self._limit = session.context_length
        self._cache = BatchCache(session.context_length)

    @classmethod
    def open(cls, path: str, *, device: str = "cpu") -> OnnxBackend:
        """Load an export folder.

        Args:
            path: of the folder.
            device: "cpu", the only one that the exports are made for.

        Raises:
            BackendError: the folder is no export that can be run: what is missing, or what is wrong with it.
            ConfigError: another device.
        """
        if device != "cpu":
            raise ConfigError(f"device {device!r}: ONNX exports run on the cpu; serve the model itself with torch")
        session = OnnxSession(Path(path).expanduser())
        tokenizer = load_tokenizer(session.path)
        generation = session.path / "generation_config.json"
        settings = read_settings(generation) if generation.is_file() else {}
        ends = end_tokens_of(tokenizer, session.config.get("eos_token_id"), settings.get("eos_token_id"))
        return cls(session, tokenizer, model_id=model_id_of(path), end_tokens=ends)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a row and read its prompt; returns the logits after the last token, float32 (V,)."""
        prompt = np.array([tokens], np.int64)
        try:
            logits, kv = self._session.prefill(prompt, capacity=room_for(len(tokens), self._limit))
        finally:
            self._session.unbind()  # what is bound is the prompt's own cache, and the batch changes anyway
        self._cache.join(kv, len(tokens))
        return logits

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Give each of the B rows its next token; returns the logits after them, float32 (B, V)."""
        if self._cache.full:
            self._session.unbind()
        self._cache.reserve()
        logits, _ = self._session.step(np.array(tokens, np.int64)[:, None], self._cache.kv, self._cache.lengths)
        self._cache.lengths += 1
        return logits

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        self._cache.leave(row)
        if not self._cache.kv:
            self._session.unbind()
