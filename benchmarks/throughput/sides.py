"""What is served: a folder, and what its headers, its config and its manifest say of it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput.record import Served
from compress.artifact import is_artifact, read_manifest
from compress.delta.checkpoint import Checkpoint
from compress.errors import ConfigError, CorruptArtifact, first_line
from exporters.base import is_export, read_export

NAME = re.compile(r"[\w.-]+")
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""As safetensors calls them, and as we do."""


@dataclass(frozen=True)
class Side:
    """One model.

    Attributes:
        name: in tables, towards clients, and in the name of its log.
        path: its folder.
    """

    name: str
    path: Path


def sides_of(texts: Sequence[str]) -> list[Side]:
    """Read ``NAME=PATH``.

    Raises:
        ConfigError: one that does not say what it must, is named twice, or names what is not there.
    """
    sides = []
    for text in texts:
        name, equals, path = text.partition("=")
        if not (equals and path and NAME.fullmatch(name)):
            raise ConfigError(f"{text}: give NAME=PATH, with a name of letters, digits, '.', '_' and '-'")
        if not Path(path).is_dir():
            raise ConfigError(f"{text}: there is no folder {path}")
        sides.append(Side(name, Path(path).resolve()))
    names = [side.name for side in sides]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}: name every model once")
    return sides


def served(side: Side) -> Served:
    """What is known of a model before anything is measured.

    Raises:
        ConfigError: the folder holds no weights that are known.
        CorruptArtifact: a file of it cannot be read.
    """
    artifact_id = read_manifest(side.path).id if is_artifact(side.path) else None
    export = read_export(side.path) if is_export(side.path) else None
    if export is not None:
        artifact_id = export.artifact_id
    checkpoint = Checkpoint(side.path)
    if checkpoint.files:
        counts = elements_by_dtype(checkpoint)
        parameters, size_bytes = sum(counts.values()), sum(file.stat().st_size for file in checkpoint.files)
        dtype = ", ".join(DTYPES.get(name, name.lower()) for name, _ in counts.most_common())
        executed, stored = blocks_of(side.path)
    elif export is not None:  # a graph, in which weights have no names that say what they are
        parameters, size_bytes, dtype = export.parameters, export.bytes, str(export.options.dtype)
        executed, stored = _counted(export.blocks)
    else:
        raise ConfigError(f"{side.name}: {side.path.name} holds no .safetensors file, and is no export")
    return Served(side.name, parameters, size_bytes, dtype, executed, stored, artifact_id)


def elements_by_dtype(checkpoint: Checkpoint) -> Counter[str]:
    """How many numbers there are of each type, by the headers: what is stored once counts once."""
    counts: Counter[str] = Counter()
    for name in checkpoint.names:
        counts[checkpoint.dtype(name)] += math.prod(checkpoint.shape(name))
    return counts


def blocks_of(folder: Path) -> tuple[int | None, int | None]:
    """Blocks that are executed, and that are stored; None where the config does not say."""
    file = folder / "config.json"
    config = _json(file) if file.is_file() else {}
    blocks = config.get("block_configs")
    if isinstance(blocks, list):
        return _counted(blocks)
    count = config.get("num_hidden_layers")
    return (count, count) if isinstance(count, int) else (None, None)


def _counted(blocks: Sequence[dict[str, Any]]) -> tuple[int, int]:
    return len(blocks), sum(block.get("shares_with") is None for block in blocks)


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"{file} cannot be read: {first_line(error)}") from error
    return content
