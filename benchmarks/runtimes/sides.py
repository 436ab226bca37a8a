"""What is measured: a folder or a file, the runtime it is for, and how many bytes there are to read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runtimes.probe import KINDS
from compress.errors import ConfigError, require

ONNX_KINDS = ("onnx", "genai", "optimum")
LOOKS_UP = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")
"""Operators that read some rows of a table: of embeddings, of positions."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Side:
    """One model in one runtime.

    Attributes:
        name: in tables.
        kind: one of KINDS.
        path: a folder, or a GGUF file.
        python: the interpreter that has the runtime.
    """

    name: str
    kind: str
    path: Path
    python: str = sys.executable

    @property
    def file_bytes(self) -> int:
        """Of graph and weights, without tokenizer and the like."""
        return sum(file.stat().st_size for file in self._files())

    @property
    def bytes_per_token(self) -> int:
        """Of the weights that decoding one token reads: all but tables of which it reads a row."""
        if self.kind not in ONNX_KINDS:
            return self.file_bytes  # tied tables, or nearly; GGUF and safetensors do not say who reads what
        return sum(read_bytes(graph) for graph in self.path.rglob("*.onnx"))

    @property
    def context(self) -> int | None:
        """The most tokens that there are positions for; None where that is not looked up."""
        for name in ("config.json", "genai_config.json"):
            file = self.path / name
            if self.path.is_dir() and file.is_file():
                settings: dict[str, Any] = json.loads(file.read_text("utf-8"))
                found = [settings[key] for key in CONTEXT_KEYS if key in settings]
                return int(found[0] if found else settings.get("model", {})["context_length"])
        return None

    def _files(self) -> Iterator[Path]:
        if self.kind not in ONNX_KINDS:
            return iter([self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors")))
        return (file for file in sorted(self.path.rglob("*.onnx*")) if file.is_file())


def sides_of(texts: list[str], pythons: list[str]) -> list[Side]:
    """Read ``NAME=KIND:PATH`` and ``NAME=PYTHON``.

    Raises:
        ConfigError: one that does not say what it must, is named twice, or names what is not there.
    """
    interpreters = dict(_pair(text, "NAME=PYTHON") for text in pythons)
    sides = []
    for text in texts:
        name, what = _pair(text, "NAME=KIND:PATH")
        kind, _, path = what.partition(":")
        if kind not in KINDS or not path:
            raise ConfigError(f"{text}: give NAME=KIND:PATH, with a kind of {', '.join(KINDS)}")
        if not Path(path).exists():
            raise ConfigError(f"{text}: there is nothing at {path}")
        sides.append(Side(name, kind, Path(path).resolve(), interpreters.pop(name, sys.executable)))
    names = [side.name for side in sides]
    for name in {name for name in names if names.count(name) > 1} | set(interpreters):
        raise ConfigError(f"{name}: name every side once, and interpreters only for sides")
    for side in sides:
        if side.file_bytes == 0:
            raise ConfigError(f"{side.name}: {side.path.name} holds no weights of the kind {side.kind}")
    return sides


def _pair(text: str, form: str) -> tuple[str, str]:
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise ConfigError(f"{text}: give {form}")
    return name, rest


def read_bytes(graph: Path) -> int:
    """Bytes of a graph's initialisers, but not of those that are only looked up in; what is stored once counts once."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(graph), load_external_data=False)
    nodes = model.graph.node
    read = {name for node in nodes if node.op_type not in (*LOOKS_UP, "Cast") for name in node.input}
    # To fp32, while it is loaded.
    cast = {node.input[0] for node in nodes if node.op_type == "Cast" and node.output[0] in read}
    read |= cast
    places: dict[object, int] = {}
    for tensor in model.graph.initializer:
        if tensor.name in read:
            where = {entry.key: entry.value for entry in tensor.external_data}
            place = (where["location"], where.get("offset")) if where else tensor.name
            size = int(where["length"]) if "length" in where else _bytes_of(onnx, tensor)
            places[place] = 2 * size if tensor.name in cast else size
    return sum(places.values())


def _bytes_of(onnx: Any, tensor: Any) -> int:
    elements = 1
    for size in tensor.dims:
        elements *= size
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
