"""A delta package and its base to an ordinary Hugging Face folder, file by file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from compress.delta.checkpoint import Tensors
from compress.delta.package import COPIED, Description, Package, check_base
from compress.delta.parallel import in_order
from compress.files import new_folder
from compress.result import Progress, no_progress

SHARD_BYTES = 500_000_000
"""Of a file that is written: about so much memory is taken."""


def apply(package: Package, base: Tensors, path: Path, progress: Progress = no_progress) -> None:
    """Write the fine-tune as a folder that transformers loads; it appears whole, checked, or not at all.

    Args:
        package: what to add.
        base: to what.
        path: a folder that does not exist yet, or is empty.
        progress: told of each tensor.

    Raises:
        ConfigError: it is another base, or ``path`` is not empty.
        CorruptArtifact: what comes out is not what was packed.
    """
    check_base(package, base)
    shards = list(_shards(package))
    places = {}
    done = 0

    def result(name: str) -> Tensor:
        return package.result(name, base.get(name) if package.tensors[name].base is not None else None)

    with new_folder(path) as folder:
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name, tensor in zip(names, in_order(result, names), strict=True):
                tensors[name] = tensor
                places[name] = file
                done += 1
                progress("applying", done, len(package.tensors))
            save_file(tensors, folder / file, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(_bytes(package, name) for name in package.tensors)
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        for name in COPIED:
            if name in package.description.files:
                shutil.copyfile(package.folder / name, folder / name)
        (folder / "README.md").write_text(_card(package.description), encoding="utf-8")


def _card(description: Description) -> str:
    """The model card: what was added to what."""
    header = ["---", *([f"license: {description.licence.lower()}"] if description.licence else [])]
    header += ["library_name: transformers", "tags:", "- foldaway", "---", ""]
    lines = [
        f"# {description.finetuned.name}, brought back from a delta",
        "",
        f"Made by foldaway from {description.base.name} and the delta {description.id}, which keeps "
        f"{description.density} of what was added to each matrix, as {description.values}. "
        f"Licence of the weights: {description.licence or 'not stated by the source'}.",
    ]
    return "\n".join([*header, *lines]) + "\n"


def _shards(package: Package) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name in package.tensors:
        if names and size + _bytes(package, name) > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(package, name)
    yield names


def _bytes(package: Package, name: str) -> int:
    entry = package.tensors[name]
    return math.prod(entry.shape) * BYTES.get(entry.dtype, 8)


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
