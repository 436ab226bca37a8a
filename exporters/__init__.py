"""Models and artifacts as other runtimes' files, each checked against its source before it appears.

>>> exported = export(loaded, Path("out"), to="onnx", options=ExportOptions(dtype="int4"), check_tokens=tokens)
>>> exported.parity.argmax_agreement
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from compress.calibration import context_length_of
from compress.errors import ConfigError
from compress.files import check_free
from compress.result import Progress, no_progress
from compress.sources import Loaded
from exporters import to_hf, to_onnx, to_vllm
from exporters.base import Exported, Exporter, ExportOptions, ExportRecord, is_export, read_export

EXPORTERS: dict[str, Exporter] = {"onnx": to_onnx.export, "hf": to_hf.export, "vllm": to_vllm.export}


def exporter_named(to: str) -> Exporter:
    """Look an exporter up.

    Raises:
        ConfigError: the format is not known.
    """
    if to not in EXPORTERS:
        raise ConfigError(f"export format {to!r} is not known; known are {', '.join(EXPORTERS)}")
    return EXPORTERS[to]


def export(
    loaded: Loaded,
    path: Path,
    *,
    to: str,
    options: ExportOptions | None = None,
    check_tokens: Tensor,
    progress: Progress = no_progress,
) -> Exported:
    """Write a model in another format, and check it.

    Args:
        loaded: a model of any layout; not changed.
        path: the folder to write: it must not exist or be empty, and appears whole or not at all.
        to: name in EXPORTERS.
        options: how to store the weights.
        check_tokens: int64 (B, T), real tokens to compare source and export on, whole and one by one; T at most the
            model's context, and the export's where that is shorter (ONNX of a model with LongRoPE).
        progress: told of the work.

    Raises:
        ConfigError: unknown format, output not empty, dtype not of this format, or tokens that cannot be compared on.
        LayoutNotSupported: the format has no words for this model.
        ParityError: the export does not compute what its source does; no folder is left.
    """
    exporter = exporter_named(to)
    check_free(path)
    context = context_length_of(loaded.model)
    if check_tokens.dim() != 2 or not 1 <= check_tokens.shape[1] <= context or len(check_tokens) == 0:
        raise ConfigError(
            f"the export is checked on tokens of shape (rows, 1..{context}), not on {tuple(check_tokens.shape)}"
        )
    return exporter(loaded, path, options or ExportOptions(), check_tokens, progress)


__all__ = [
    "EXPORTERS",
    "ExportOptions",
    "ExportRecord",
    "Exported",
    "Exporter",
    "export",
    "exporter_named",
    "is_export",
    "read_export",
]
