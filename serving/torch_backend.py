"""A Hugging Face model or an artifact as a backend, in PyTorch, on the CPU or a GPU.

Rows are decoded one after the other, each with the cache that transformers builds for it: a batch of rows of different
lengths would need padding on the left and positions of its own per architecture. So B rows cost B forwards per step;
this backend is for models that have no export (yet), and for checking exports against.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.arch import check_text_model
from compress.device import device_named
from compress.errors import BackendError
from compress.sources import config_of, load
from exporters.base import is_export, read_export
from serving.backend import end_tokens_of, model_id_of


class TorchBackend:
    """One transformers cache per row."""

    name = "torch"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_id: str,
        artifact_id: str | None = None,
        device: str = "cpu",
    ) -> None:
        """Serve a model that is in eval mode; it is moved to `device`.

        Raises:
            ConfigError: there is no such device.
        """
        config: Any = model.config
        generation: Any = model.generation_config
        self.model_id = model_id
        self.artifact_id = artifact_id
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens_of(tokenizer, config.eos_token_id, generation and generation.eos_token_id)
        self._device = device_named(device)
        self._model: Any = model.to(self._device)  # type: ignore[arg-type]
        self._caches: list[Any] = []

    @classmethod
    def open(cls, path: str, *, device: str = "cpu") -> TorchBackend:
        """Load anything that ``compress.sources.load`` takes.

        Raises:
            ConfigError: no such model or device.
            BackendError: a folder that only holds another runtime's files.
            UnsupportedArchitecture: a vision-language model.
        """
        device_named(device)  # before the model is read
        artifact_id = None
        folder = Path(path).expanduser()
        if is_export(folder):
            record = read_export(folder)
            if record.to == "onnx":
                raise BackendError(
                    f"{path} is an ONNX export, which torch cannot run: leave the backend out, or give onnx"
                )
            artifact_id = record.artifact_id
        check_text_model(config_of(path), "foldaway serve")
        loaded = load(path)
        return cls(
            loaded.model,
            loaded.tokenizer,
            model_id=model_id_of(path),
            artifact_id=loaded.origin.artifact_id or artifact_id,
            device=device,
        )

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a row and read its prompt; returns the logits after the last token, float32 (V,)."""
        logits, cache = self._forward(tokens, None)
        self._caches.append(cache)
        return logits

    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Give each of the B rows its next token; returns the logits after them, float32 (B, V)."""
        rows = []
        for row, token in enumerate(tokens):
            logits, self._caches[row] = self._forward([token], self._caches[row])
            rows.append(logits)
        return np.stack(rows)

    def remove(self, row: int) -> None:
        """Drop a row; the last row takes its number."""
        last = self._caches.pop()
        if row < len(self._caches):
            self._caches[row] = last

    def _forward(self, tokens: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Run tokens behind a cache (None: the model makes its own); returns logits (V,) of the last, and the cache."""
        with torch.inference_mode():
            ids = torch.tensor([tokens], dtype=torch.long, device=self._device)
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[0, -1].float().cpu().numpy(), out.past_key_values
