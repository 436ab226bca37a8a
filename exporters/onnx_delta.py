"""A delta package on a device: the ONNX export of its base becomes the fine-tune, without a new download of the model.

* `attach` opens a session in which the initialisers that the package changes come from memory, while all others stay
  mapped from the base export's file. Nothing is written.
* `patch` writes a copy of the export in which they are changed in the data file; it is then, bit for bit, that of a
  direct export of the fine-tune.

Both go over the graph matrix by matrix (`onnx_changes`).

onnxruntime has two calls that put an initialiser into a session from memory. ``add_external_initializers`` replaces it
before the graph is optimised, and is the one used. ``add_initializer`` (tried with 1.31.1, fp32 export with a tied
head) comes too late: what the optimiser had folded, there the transposed table of embeddings, kept the numbers of the
file, and logits were wrong without an error.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.delta.apply import apply
from compress.delta.checkpoint import Checkpoint, open_base
from compress.delta.package import Package
from compress.errors import require
from compress.files import new_folder
from compress.result import Progress, no_progress
from compress.sources import Loaded, Origin, load
from exporters import to_onnx
from exporters.base import (
    WEIGHT_SUFFIXES,
    Exported,
    ExportRecord,
    exported,
    in_dtype,
    read_export,
)
from exporters.onnx_changes import changes
from exporters.onnx_graph import write_graph
from exporters.onnx_session import OnnxSession
from exporters.onnx_weights import Stored

MERGED = "merged"
"""Folder in an unfinished export: the fine-tune, to be compared with."""


def attach(
    export: Path,
    package: Path,
    *,
    base: str | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> OnnxSession:
    """Open a base's export as a fine-tune.

    Args:
        export: folder of the base's ONNX export.
        package: folder of the delta.
        base: the base's checkpoint, a folder of safetensors or a hub id; not needed beside an fp32 export.
        threads: of one run, as for `OnnxSession`.
        progress: told of the parts of the graph that were looked at.

    Returns:
        The session; its `artifact_id` is the package's. The fine-tune's tokenizer lies in the package.

    Raises:
        ArtifactError: there is no package or no export, or a broken one.
        ConfigError: the export or `base` is not the package's base, `base` is needed, or the package changes what the
            graph computes beside its weights.
        BackendError: the graph is none of ours.
    """
    ort = require("onnxruntime", "onnx")
    opened = Package(package)
    initializers = {}
    for stored, array in changes(export, opened, open_base(base) if base else None, progress):
        initializers[stored.name] = ort.OrtValue.ortvalue_from_numpy(array)
    session = OnnxSession(export, threads=threads, initializers=initializers)
    session.artifact_id = opened.description.id
    return session


def patch(
    export: Path, package: Path, base: str, path: Path, check_tokens: Tensor, progress: Progress = no_progress
) -> Exported:
    """Write the export of a fine-tune from that of its base; it appears whole, checked, or not at all.

    Only what the package changes is computed and quantised anew. The fine-tune is brought back beside the result for a
    while, to compare the graph with it, as every export is compared with its source.

    Args:
        export: folder of the base's ONNX export.
        package: folder of the delta.
        base: the base's checkpoint: a folder of safetensors or a hub id.
        path: the folder to write.
        check_tokens: int64 (B, T), tokens to compare fine-tune and export on; T at most the export's context.
        progress: told of the work.

    Raises:
        ArtifactError, ConfigError, BackendError: as `attach`; also where `path` is not empty.
        ExportError: the export's layout cannot have the fine-tune's tokenizer.
        ParityError: the graph does not compute what the fine-tune does.
    """
    opened, checkpoint, record = Package(package), open_base(base), read_export(export)
    with new_folder(path) as folder:
        _write_graph(export, folder, changes(export, opened, checkpoint, progress))
        loaded = _brought_back(opened, checkpoint, record, folder / MERGED, progress)
        to_onnx.check_tokenizer(loaded.tokenizer, record.options)
        source = in_dtype(loaded.model, torch.float32)
        # A fine-tune may end its answers, or draw them, otherwise than its base.
        write_graph(source, loaded.tokenizer, folder, record.options, no_progress, weights=False)
        finished = to_onnx.finish(folder, loaded, source, record.options, check_tokens, progress)
    return exported(path, finished)


def _write_graph(export: Path, folder: Path, changed: Iterable[tuple[Stored, NDArray[Any]]]) -> None:
    """Copy a graph and its data file, and write over what is changed."""
    for file in export.rglob("*"):
        if file.name.endswith(WEIGHT_SUFFIXES):
            (folder / file.relative_to(export)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(export))
    for stored, array in changed:
        with (folder / stored.file.relative_to(export)).open("r+b") as data:
            data.seek(stored.offset)
            data.write(np.ascontiguousarray(array).tobytes())


def _brought_back(package: Package, base: Checkpoint, record: ExportRecord, folder: Path, progress: Progress) -> Loaded:
    """The fine-tune as `foldaway delta apply` writes it; the files are removed, for it is in memory."""
    apply(package, base, folder, progress)
    loaded = load(str(folder))
    shutil.rmtree(folder)
    description = package.description
    of = f"{description.base.name}, artifact {record.artifact_id}" if record.artifact_id else description.base.name
    name = f"{description.finetuned.name} (delta {description.id} of {of})"
    origin = Origin(name, "delta", licence=description.licence, artifact_id=description.id)
    return dataclasses.replace(loaded, origin=origin)
