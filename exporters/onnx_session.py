"""Run an exported ONNX decoder: whole forwards, prefill, and batched decoding with a cache.

Parity, evaluation and the server all use this one class, so that what is checked is what is served.

The graph's names are the ones that optimum, transformers.js and onnxruntime-genai share: ``input_ids``,
``attention_mask``, ``past_key_values.N.{key,value}`` in; ``logits``, ``present.N.{key,value}`` out. On the CPU
GroupQueryAttention takes the length of each row from its attention mask (ones for its own length, right-padded), so
rows of different lengths decode together; and when the past and the present are the same memory it appends in place, so
that a step copies nothing.

Weights are packed for the CPU while loading, as onnxruntime does unless told otherwise: it keeps one packed copy of
weights that several nodes read, so memory follows what is stored, and without packing int4 decodes far slower
(``benchmarks/prepacking.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.errors import BackendError, ConfigError, first_line, require
from exporters.base import ExportRecord, is_export, read_export
from exporters.mapped import let_go
from exporters.onnx_file import data_file

KV = tuple[tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]], ...]
"""One (key, value) per attention, each (B, K, capacity, head_dim), C-contiguous, of the session's `kv_dtype`. A row's
first `length` positions count; the rest is free room. A tuple, because the session remembers which buffers it has
bound."""

FLOATS: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""What caches and logits may be."""

MODEL_FILE = "model.onnx"
LOGITS_FROM = "logits_from"
"""An input with a default: the first position of a run whose logits are wanted. Who does not know it gets all."""
POSITIONS = "position_ids"
"""Graphs whose attention does not count positions itself take them: those for dml."""
PREFILL_CHUNK = 256
"""Tokens per run while prefilling: enough for matrices to be read seldom, and what a run holds stays small."""

GRAPH_INPUTS = "input_ids, attention_mask and past_key_values.N.{key,value}"
HOW_TO_EXPORT = "make one with `foldaway export MODEL --to onnx -o DIR`"


class OnnxSession:
    """One exported graph, loaded. Use it from one thread at a time.

    Attributes:
        path: the export folder.
        num_layers: (key, value) pairs, that is attentions.
        num_key_value_heads: KV heads of each attention.
        head_dim: numbers per head.
        vocab_size: width of the logits.
        context_length: the most tokens that positions exist for.
        kv_dtype: of the caches: float32, or float16 in a graph that computes in it.
        config: config.json of the export.
        artifact_id: the artifact the export was made from, None for a model that is no artifact.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        graph: str | None = None,
        initializers: Mapping[str, Any] | None = None,
        spin: bool = True,
    ) -> None:
        """Load the graph in `path`.

        Args:
            path: an export folder made by ``to_onnx``.
            threads: threads of one run; None lets onnxruntime take one per physical core.
            graph: the file to load; None is the one that the export says.
            initializers: name -> ``OrtValue`` to take instead of what the file holds.
            spin: let threads wait for work actively: faster where nothing else wants the cores, and far slower where
                something does.

        Raises:
            BackendError: no graph or config.json there, one that onnxruntime cannot load, or a graph with other inputs
                and outputs than an export of ours.
            ConfigError: fewer than one thread.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads={threads}: give 1 or more, or nothing for one per core")
        ort = require("onnxruntime", "onnx")
        self.path = Path(path)
        record = read_export(self.path) if is_export(self.path) else None
        model_file = self.path / (graph or _graph_in(self.path, record) or MODEL_FILE)
        if not model_file.is_file():
            raise BackendError(f"{self.path} holds no {graph or MODEL_FILE}: {HOW_TO_EXPORT}")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._initializers = initializers  # onnxruntime reads them where they are
        if initializers:
            options.add_external_initializers(list(initializers), list(initializers.values()))
        try:
            self._session = ort.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exception classes share no public base
            raise BackendError(f"onnxruntime cannot load {model_file}: {first_line(error)}") from error
        let_go(data_file(model_file))
        self.config = read_settings(self.path / "config.json")
        self.artifact_id = record.artifact_id if record else None
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        self.num_layers = sum(name.startswith("past_key_values.") for name in inputs) // 2
        self._past = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in range(self.num_layers)]
        self._present = [(f"present.{i}.key", f"present.{i}.value") for i in range(self.num_layers)]
        self._check_names(model_file, inputs, outputs)
        self._takes_positions = POSITIONS in inputs
        _, self.num_key_value_heads, _, self.head_dim = inputs["past_key_values.0.key"].shape
        self.vocab_size: int = outputs["logits"].shape[-1]
        self._check_numbers(model_file, inputs, outputs["logits"])
        self.kv_dtype = FLOATS[inputs["past_key_values.0.key"].type]
        self._logits_dtype = FLOATS[outputs["logits"].type]
        self.context_length: int = self.config["max_position_embeddings"]
        chooses = any(value.name == LOGITS_FROM for value in self._session.get_overridable_initializers())
        self._last = ort.OrtValue.ortvalue_from_numpy(np.array([-1], np.int64)) if chooses else None
        self._all = ort.OrtValue.ortvalue_from_numpy(np.array([0], np.int64)) if chooses else None
        self._binding: Any = None
        self._bound: KV | None = None

    def _check_names(self, file: Path, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        expected = {"input_ids", "attention_mask", *(name for pair in self._past for name in pair)}
        if self.num_layers == 0 or set(inputs) - {POSITIONS} != expected:
            others = [name for name in inputs if not name.startswith("past_key_values.")]
            caches = f"{len(inputs) - len(others)} past_key_values"
            raise BackendError(
                f"{file} is no graph of ours: it takes {', '.join(others)} and {caches}, not {GRAPH_INPUTS}; "
                f"{HOW_TO_EXPORT}"
            )
        missing = {"logits", *(name for pair in self._present for name in pair)} - set(outputs)
        if missing:
            raise BackendError(f"{file} is no graph of ours: it does not return {min(missing)}; {HOW_TO_EXPORT}")

    def _check_numbers(self, file: Path, inputs: dict[str, Any], logits: Any) -> None:
        """What is read from the graph and from config.json must be numbers, and caches alike, in fp32 or fp16."""
        sizes = (self.num_key_value_heads, self.head_dim, self.vocab_size)
        caches = [inputs[name] for pair in self._past for name in pair]
        alike = len({(cache.type, cache.shape[1], cache.shape[3]) for cache in caches}) == 1
        known = caches[0].type in FLOATS and logits.type in FLOATS
        if not alike or not known or not all(isinstance(size, int) for size in sizes):
            raise BackendError(
                f"{file} is no graph of ours: its past_key_values are not alike, neither fp32 nor fp16, or of no fixed "
                f"head size; {HOW_TO_EXPORT}"
            )
        if not isinstance(self.config.get("max_position_embeddings"), int):
            raise BackendError(
                f"{self.path / 'config.json'} does not say max_position_embeddings, the context; {HOW_TO_EXPORT}"
            )

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of every position in one forward without a past: int64 (B, T) -> float32 (B, T, V)."""
        ids = np.ascontiguousarray(tokens.numpy(), dtype=np.int64)
        empty = np.zeros((ids.shape[0], self.num_key_value_heads, 0, self.head_dim), self.kv_dtype)
        feeds = {name: empty for pair in self._past for name in pair}
        feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if self._takes_positions:
            feeds[POSITIONS] = _positions(ids, np.ones_like(ids))
        return torch.from_numpy(self._session.run(["logits"], feeds)[0].astype(np.float32, copy=False))

    def decode(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits (V,) after each of the tokens (T,), computed one token at a time with a cache: for parity."""
        kv = self.empty_cache(1, len(tokens))
        for position, token in enumerate(tokens.numpy()):
            logits, kv = self.step(np.array([[token]], np.int64), kv, np.array([position]))
            yield torch.from_numpy(logits[0])

    def empty_cache(self, batch: int, capacity: int) -> KV:
        """A cache with room for `capacity` tokens in each of `batch` rows, all zeros."""
        shape = (batch, self.num_key_value_heads, capacity, self.head_dim)
        return tuple((np.zeros(shape, self.kv_dtype), np.zeros(shape, self.kv_dtype)) for _ in range(self.num_layers))

    def prefill(
        self, tokens: NDArray[np.int64], *, capacity: int | None = None, chunk: int = PREFILL_CHUNK
    ) -> tuple[NDArray[np.float32], KV]:
        """Read one prompt.

        Args:
            tokens: int64 (1, T), T >= 1.
            capacity: room of the cache in tokens, at least T (None = T, no room to decode into).
            chunk: tokens of a run, at least 1.

        Returns:
            The logits after the last token, float32 (V,), and the cache, filled up to T.

        Raises:
            ConfigError: an empty prompt, more than one row, too little room, or more tokens than positions.
        """
        rows, length = tokens.shape
        room = length if capacity is None else capacity
        if rows != 1 or length < 1:
            raise ConfigError(f"prefill takes one prompt (1, T) with T >= 1, not {tokens.shape}")
        if not length <= room <= self.context_length:
            raise ConfigError(
                f"{length} tokens in a cache of {room}: the model has positions for {self.context_length}"
            )
        kv = self.empty_cache(1, room)
        for start in range(0, length, chunk):
            part = tokens[:, start : start + chunk]
            logits = self._run(part, np.ones((1, start + part.shape[1]), np.int64), kv, last=True)
        return logits[0, -1], kv

    def step(self, tokens: NDArray[np.int64], kv: KV, lengths: NDArray[np.int64]) -> tuple[NDArray[np.float32], KV]:
        """Decode one token in each row; rows may have different lengths.

        Args:
            tokens: int64 (B, 1), the next token of each row.
            kv: the cache, (B, K, capacity, head_dim) each; changed in place: row b gets position ``lengths[b]``.
            lengths: int (B,), tokens already in each row of the cache.

        Returns:
            The logits after the new tokens, float32 (B, V), and `kv` itself.

        Raises:
            ConfigError: a row that is full.
        """
        total = int(lengths.max()) + 1
        capacity = kv[0][0].shape[2]
        if total > capacity:
            raise ConfigError(f"a row of {total - 1} tokens fills its cache of {capacity}: give the cache more room")
        mask = (np.arange(total) <= np.asarray(lengths)[:, None]).astype(np.int64)
        return self._run(tokens, mask, kv)[:, 0], kv

    def _run(
        self, tokens: NDArray[np.int64], mask: NDArray[np.int64], kv: KV, *, last: bool = False
    ) -> NDArray[np.float32]:
        """One run that appends to `kv` in place; float32 (B, T, V), or (B, 1, V) of the last token where it can."""
        if kv is not self._bound:
            self._bind(kv)
        tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        rows = tokens.shape[1]
        if self._last is not None:
            rows = 1 if last else rows
            self._binding.bind_ortvalue_input(LOGITS_FROM, self._last if last else self._all)
        logits: NDArray[np.floating[Any]] = np.empty((len(tokens), rows, self.vocab_size), self._logits_dtype)
        self._binding.bind_cpu_input("input_ids", tokens)
        self._binding.bind_cpu_input("attention_mask", mask)
        if self._takes_positions:
            self._binding.bind_cpu_input(POSITIONS, _positions(tokens, mask))
        self._binding.bind_output("logits", "cpu", 0, self._logits_dtype, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        whole: NDArray[np.float32] = logits.astype(np.float32, copy=False)
        return whole

    def _bind(self, kv: KV) -> None:
        """Bind each cache buffer as past and as present, which makes GroupQueryAttention append in place."""
        self._binding = self._session.io_binding()
        for past, present, pair in zip(self._past, self._present, kv, strict=True):
            for past_name, present_name, buffer in zip(past, present, pair, strict=True):
                if buffer.dtype != self.kv_dtype or not buffer.flags.c_contiguous:
                    raise ConfigError(
                        f"cache buffers must be {self.kv_dtype.__name__} and C-contiguous: make them with empty_cache"
                    )
                self._binding.bind_cpu_input(past_name, buffer)
                self._binding.bind_output(present_name, "cpu", 0, self.kv_dtype, buffer.shape, buffer.ctypes.data)
        self._bound = kv

    def unbind(self) -> None:
        """Let go of the cache of the last run, which would be kept until the next run with another one."""
        self._binding = self._bound = None


def _positions(tokens: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the tokens (B, T) of a run stand in their rows, of which the mask (B, past + T) counts them."""
    last: NDArray[np.int64] = mask.sum(-1, keepdims=True) - tokens.shape[1]
    return last + np.arange(tokens.shape[1], dtype=np.int64)


def graph_of(folder: Path) -> str | None:
    """The graph in a folder, from there: the one that export.json names, or ``model.onnx``; None: there is none."""
    return _graph_in(folder, read_export(folder) if is_export(folder) else None)


def _graph_in(folder: Path, record: ExportRecord | None) -> str | None:
    names = [MODEL_FILE] if record is None else [name for name in record.files if name.endswith(".onnx")]
    return next((name for name in names if (folder / name).is_file()), None)


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in an export folder, read from its files alone.

    Raises:
        BackendError: there is none, or it cannot be read.
    """
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise BackendError(f"{path} holds no tokenizer (tokenizer_config.json); {HOW_TO_EXPORT}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the loaders raise whatever a broken file leads them to
        raise BackendError(f"{path} has no tokenizer that can be read: {first_line(error)}; {HOW_TO_EXPORT}") from error
    return tokenizer


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object beside the graph.

    Raises:
        BackendError: it is missing, or something else.
    """
    try:
        settings = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BackendError(f"{file.parent} holds no {file.name}; {HOW_TO_EXPORT}") from error
    except (OSError, ValueError) as error:
        raise BackendError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise BackendError(f"{file} is not a JSON object; {HOW_TO_EXPORT}")
    return settings
