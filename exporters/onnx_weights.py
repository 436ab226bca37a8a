"""Which tensor of a model lies where in an exported graph, and in which shape: the one place that knows.

An initialiser is named after the node that reads it. A matrix lies there transposed, (in, out); queries, keys and
values are one matrix; a fused gate|up is two; Gemma's norms have their offset added. A table of embeddings lies as it
is, and a head that is tied to it has no initialiser. Blocks that share weights read one initialiser, that of the first.
To the names of matrices ``_fp16`` is added where they are stored so, and to those of quantised ones, which are two or
three initialisers, ``_Q4`` or ``_Q8``, ``_scales`` and ``_zero_points``.

`onnx_graph` writes all this; that both agree is tested for every architecture and dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.arch import Architecture, architecture_of
from compress.errors import BackendError, first_line, require
from compress.remote_code import base_config
from exporters.base import ExportOptions
from exporters.nbits import join, quantise
from exporters.onnx_graph import EMBEDDING, EMBEDDINGS_BY
from exporters.onnx_session import HOW_TO_EXPORT, graph_of

HEAD = "lm_head.weight"
HEAD_MATRIX = "lm_head.MatMul.weight"
Kind = Literal["float", "codes", "scales", "zero_points"]
"""What an initialiser holds: the numbers themselves, or that part of `nbits.Blocks`."""
PIECES: dict[str, Kind] = {"_scales": "scales", "_zero_points": "zero_points"}
FORMS: tuple[tuple[dict[str, Kind], int], ...] = (
    ({"": "float"}, 0),
    ({"_fp16": "float"}, 0),
    ({"_Q4": "codes", **PIECES}, 4),
    ({"_Q8": "codes", **PIECES}, 8),
)
"""In which ways a matrix may be stored: what is added to its name for each initialiser, and bits of a code."""


@dataclass(frozen=True)
class Part:
    """Rows of a parameter: one of several matrices of equal height that lie stacked in it.

    Attributes:
        name: of the parameter, as in a checkpoint.
        index: which of them.
        of: how many there are; 1 means the whole parameter.
    """

    name: str
    index: int = 0
    of: int = 1

    def take(self, tensor: Tensor) -> Tensor:
        """These rows, as a view."""
        return tensor.chunk(self.of)[self.index] if self.of > 1 else tensor


@dataclass(frozen=True)
class Source:
    """What an initialiser is made of.

    Attributes:
        parts: stacked along their outputs.
        transposed: whether the stack is then transposed.
        offset: what is added to each number.
    """

    parts: tuple[Part, ...]
    transposed: bool = False
    offset: float = 0.0

    def rows(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The parts in fp32, (outputs, inputs) or (outputs,)."""
        return [part.take(parameters[part.name]).float() for part in self.parts]

    def stack(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The initialiser in fp32."""
        rows = torch.cat(self.rows(parameters))
        if self.offset:
            rows = rows + self.offset
        return rows.T if self.transposed else rows


def sources(config: Any) -> dict[str, Source]:
    """What the graph of a model may hold: name of the initialiser, as a float one -> what it is made of.

    Only some of the names are in any one graph; rotary caches and constants are made of no parameter and not listed.

    Args:
        config: of the model, stock or ours.

    Raises:
        UnsupportedArchitecture: its parts are not known.
    """
    arch, stock = architecture_of(config), base_config(config)
    blocks: int = stock.num_hidden_layers
    head = EMBEDDING if stock.tie_word_embeddings else HEAD
    found = {
        EMBEDDING: Source((Part(EMBEDDING),)),
        HEAD_MATRIX: Source((Part(head),), transposed=True),
        f"model.layers.{blocks}.final_norm_layernorm.weight": _norm(arch, arch.final_norm),
    }
    for block in range(blocks):
        found |= _of_block(arch, block)
    return found


def _of_block(arch: Architecture, block: int) -> dict[str, Source]:
    graph, model = f"model.layers.{block}", f"{arch.blocks}.{block}"
    found = {
        f"{graph}.{norm}.weight": _norm(arch, f"{model}.{norm}") for norm in (*arch.attention_norms, *arch.ffn_norms)
    }
    for norm in ("q_norm", "k_norm"):
        found[f"{graph}.attn.{norm}.layernorm.weight"] = _norm(arch, f"{model}.{arch.attention}.{norm}")
    linears = {
        "attn.qkv_proj": [Part(path) for path in arch.attention_in],
        "attn.o_proj": [Part(arch.attention_out)],
        "mlp.down_proj": [Part(arch.ffn_out)],
    }
    ffn_in = [Part(path, i, arch.ffn_in_fused) for path in arch.ffn_in for i in range(arch.ffn_in_fused)]
    linears |= {f"mlp.{name}_proj": [part] for name, part in zip(("gate", "up"), ffn_in, strict=False)}
    for path, parts in linears.items():
        for node, kind, transposed in (("MatMul", "weight", True), ("Add", "bias", False)):
            rows = tuple(Part(f"{model}.{part.name}.{kind}", part.index, part.of) for part in parts)
            found[f"{graph}.{path}.{node}.{kind}"] = Source(rows, transposed)
    return found


def _norm(arch: Architecture, path: str) -> Source:
    return Source((Part(f"{path}.weight"),), offset=arch.norm_offset)


# --- As the files have them


@dataclass(frozen=True)
class Stored:
    """An initialiser of a graph.

    Attributes:
        name: in the graph.
        kind: what it holds.
        numbers: read-only, of its shape; mapped from `file`.
        file: of data, that holds it.
        offset: where it begins there, in bytes.
    """

    name: str
    kind: Kind
    numbers: NDArray[Any]
    file: Path
    offset: int

    def holds(self, array: NDArray[Any]) -> bool:
        """Whether these are the same numbers, to the last bit."""
        one, other = (np.ascontiguousarray(each) for each in (array, self.numbers))
        return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


@dataclass(frozen=True)
class Slot:
    """Where the graph keeps what is made of one source.

    Attributes:
        source: what it is made of.
        stored: one float initialiser; or codes, scales and, with some algorithms, zero points.
        bits: of a code; 0 for a float initialiser.
        block_size: inputs that share a scale.
        algorithm: that finds the codes.
    """

    source: Source
    stored: tuple[Stored, ...]
    bits: int = 0
    block_size: int = 0
    algorithm: str = ""

    @property
    def dtype(self) -> str:
        """What its numbers are stored as, for a reader."""
        return f"int{self.bits}" if self.bits else str(self.stored[0].numbers.dtype)

    @property
    def height(self) -> int:
        """Outputs of the stacked parts."""
        shape: tuple[int, ...] = self.stored[0].numbers.shape
        return shape[-1] if self.source.transposed and not self.bits else shape[0]

    def encode(self, parameters: Mapping[str, Tensor]) -> list[NDArray[Any]]:
        """Parameters as the exporter writes them here: one array for each of `stored`.

        Args:
            parameters: those that the source names, in the dtype of their checkpoint.
        """
        if not self.bits:
            like = torch.from_numpy(np.empty(0, self.stored[0].numbers.dtype))
            return [self.source.stack(parameters).to(like.dtype).contiguous().numpy()]
        rows = self.source.rows(parameters)
        blocks = join([quantise(each, self.bits, self.block_size, self.algorithm) for each in rows])
        return [getattr(blocks, each.kind).astype(each.numbers.dtype, copy=False) for each in self.stored]


def slots(folder: Path, config: Any, options: ExportOptions) -> list[Slot]:
    """Find what an export's graph holds of a model's parameters.

    Args:
        folder: of the export.
        config: of the model that was exported.
        options: of the export.

    Raises:
        BackendError: there is no graph.
        MissingExtra: onnx is not installed.
    """
    file, model = read_graph(folder)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for name, source in sources(config).items():
        for pieces, bits in FORMS:
            names: dict[str, Kind] = {f"{name}{suffix}": kind for suffix, kind in pieces.items()}
            stored = tuple(_stored(file, tensors[each], kind) for each, kind in names.items() if each in tensors)
            if stored and stored[0].name == next(iter(names)):
                algorithm = EMBEDDINGS_BY if name in (EMBEDDING, HEAD_MATRIX) else options.algorithm
                found.append(Slot(source, stored, bits, options.block_size or 0, algorithm or ""))
    return found


def read_graph(folder: Path) -> tuple[Path, Any]:
    """The graph of an export, without its weights: the file, and the ``ModelProto``.

    Raises:
        BackendError: there is none.
    """
    onnx = require("onnx", "onnx")
    name = graph_of(folder)
    if name is None:
        raise BackendError(f"{folder} holds no graph: {HOW_TO_EXPORT}")
    try:
        return folder / name, onnx.load(str(folder / name), load_external_data=False)
    except Exception as error:  # protobuf's own
        raise BackendError(f"{folder / name} cannot be read: {first_line(error)}") from error


def _stored(file: Path, tensor: Any, kind: Kind) -> Stored:
    from onnx import helper

    place = {entry.key: entry.value for entry in tensor.external_data}
    data, offset = file.parent / place["location"], int(place.get("offset", 0))
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Stored(tensor.name, kind, np.memmap(data, dtype, "r", offset, tuple(tensor.dims)), data, offset)
