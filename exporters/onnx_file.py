"""Write a graph and its weights: ``NAME.onnx`` and, beside it, ``NAME.onnx_data``.

Weights go to the data file one after the other, each as it is computed, so that they are never all held; whole numbers
stay in the graph, where runtimes look for those that shapes depend on. The name of the data file is the one that
transformers.js expects; others find it in the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import require

DATA_SUFFIX = "_data"
PAGE = 4096
MAPPED = 16 * PAGE
"""A tensor of this size begins a page, for it is mapped; smaller ones come after those, so that gaps are few."""


def data_file(graph: Path) -> Path:
    """The file that holds a graph's weights."""
    return graph.with_name(graph.name + DATA_SUFFIX)


def save(model: Any, file: Path) -> None:
    """Write a model.

    Args:
        model: an ``onnx_ir.Model``; afterwards its large initialisers are those in the file.
        file: of the graph; the data file is named after it.
    """
    onnx_ir = require("onnx_ir", "onnx")
    model.graph.sort()
    data = data_file(file)
    with data.open("wb") as out:
        for value in sorted(model.graph.initializers.values(), key=lambda each: each.const_value.nbytes < MAPPED):
            tensor = value.const_value
            if tensor.dtype != onnx_ir.DataType.INT64:
                offset = _append(out, tensor)
                value.const_value = onnx_ir.ExternalTensor(
                    data.name,
                    offset,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=tensor.name,
                    base_dir=data.parent,
                )
    onnx_ir.save(model, file)


def _append(out: BinaryIO, tensor: Any) -> int:
    """Write a tensor, and say where."""
    out.write(bytes(-out.tell() % (PAGE if tensor.nbytes >= MAPPED else 64)))
    offset = out.tell()
    out.write(tensor.tobytes())
    return offset
