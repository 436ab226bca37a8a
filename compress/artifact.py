"""Save and load one artifact: a folder that holds a compressed model and says how it came to be.

* ``manifest.json``: what it is: origin, layout, steps, parameters, the hash of every other file;
* ``config.json``: stock for a plain layout, ``model_type: "foldaway"`` for a ragged or shared one;
* the processor's files, for a vision-language model, as its source had them;
* ``*.safetensors``: every distinct tensor once;
* ``foldaway_model.py``: only for a ragged or shared layout, the code that builds it;
* tokenizer files, ``generation_config.json``, ``README.md``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress import budget, remote_code
from compress.arch import COMPOSITES, composite_of
from compress.errors import ArtifactError, CorruptArtifact
from compress.files import new_folder, sha256_of
from compress.layout import layout_of
from compress.schema import FileEntry, Strict, list_files, read_versioned
from compress.sources import MANIFEST, Loaded, Origin, auto_class, load_tokenizer, load_weights, read_processor

VERSION = 1
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".py", ".model", ".txt")
"""Of files that a loader may look for beside those that were saved."""
SHARD_SIZE = "500MB"
"""Small shards: serialising one takes a copy of it."""


class OriginEntry(Strict):
    """The model that the first step was applied to."""

    name: str
    kind: Literal["hub", "folder", "gguf", "demo"]
    licence: str | None = None
    quantised_from: str | None = None


class TeacherEntry(Strict):
    """The model that a step learnt from: its name, of a path the last part, and its id where it is an artifact."""

    name: str
    artifact: str | None = None

    @classmethod
    def of(cls, loaded: Loaded) -> TeacherEntry:
        """The entry of a loaded model; of a path only the last part is kept."""
        origin = loaded.origin
        return cls(
            name=origin.name if origin.kind in ("hub", "demo") else Path(origin.name).name, artifact=origin.artifact_id
        )


class Step(Strict):
    """One method that was applied: its options, the calibration rows it saw, its report, and whom it learnt from."""

    method: str
    config: dict[str, Any]
    calibration: dict[str, Any] | None = None
    numbers: dict[str, Any]
    teacher: TeacherEntry | None = None


class LayoutEntry(Strict):
    """The shape of the model, in the vocabulary of ``block_configs``."""

    kind: Literal["plain", "ragged", "shared"]
    blocks: list[dict[str, Any]]


class Manifest(Strict):
    """What ``manifest.json`` says. Unknown keys are refused.

    ``id`` is the first 16 hex digits of the SHA-256 over the sorted lines ``name sha256`` of all other files.
    """

    format: Literal["foldaway-artifact"] = "foldaway-artifact"
    version: int = VERSION
    id: str
    origin: OriginEntry
    parent: str | None = None
    model_type: str
    layout: LayoutEntry
    steps: list[Step]
    parameters: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileEntry]


def is_artifact(path: Path) -> bool:
    """Whether a folder holds an artifact of ours."""
    return (path / MANIFEST).is_file()


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    origin: OriginEntry,
    steps: Sequence[Step],
    parent: str | None = None,
    processor: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write an artifact. It appears whole or not at all.

    Args:
        model: of any layout.
        tokenizer: saved along, chat template included.
        path: a folder that does not exist yet, or is empty.
        origin: the model that the first step was applied to.
        steps: all methods applied since, in order.
        parent: id of the artifact that the last step was applied to, if it was one.
        processor: files of a vision-language model's processor, as in `Loaded`.

    Raises:
        ConfigError: ``path`` is not empty.
    """
    with new_folder(path) as folder:
        write_model(model, tokenizer, folder, processor)
        (folder / "README.md").write_text(_card(model, origin, steps), encoding="utf-8")
        manifest = _describe(model, folder, origin, steps, parent)
        text = manifest.model_dump_json(indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    processor: Mapping[str, bytes] | None = None,
) -> None:
    """Write the files that transformers needs to load a model of any layout, without foldaway installed."""
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    for name, content in (processor or {}).items():
        (folder / name).write_bytes(content)


def _describe(
    model: PreTrainedModel, folder: Path, origin: OriginEntry, steps: Sequence[Step], parent: str | None
) -> Manifest:
    layout, counts = layout_of(model), budget.count(model)
    files = list_files(folder)
    return Manifest(
        id=identity({name: entry.sha256 for name, entry in files.items()}),
        origin=origin,
        parent=parent,
        model_type=remote_code.base_config(model.config).model_type,
        layout=LayoutEntry(kind=layout.kind, blocks=layout.block_configs()),
        steps=list(steps),
        parameters={"total": counts.total, "blocks": counts.blocks},
        versions=versions(),
        files=files,
    )


def identity(hashes: dict[str, str]) -> str:
    """The id of a set of files: name -> sha256."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    return {
        "foldaway": importlib.metadata.version("foldaway"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest; the files it names are not read.

    Raises:
        ArtifactError: there is none.
        ManifestVersionError: a newer foldaway wrote it.
        CorruptArtifact: it does not follow the schema.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST}")
    return read_versioned(file, Manifest, VERSION)


def verify(path: Path) -> Manifest:
    """Check every file of an artifact against its manifest.

    Raises:
        CorruptArtifact: a file is missing, of another size, or of another hash.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise CorruptArtifact(f"{path}: the manifest names {name!r}, which lies outside the artifact")
        if not file.is_file():
            raise CorruptArtifact(f"{path}: {name} is missing")
        if file.stat().st_size != entry.bytes:
            raise CorruptArtifact(f"{file} has {file.stat().st_size} bytes, the manifest says {entry.bytes}")
        if sha256_of(file) != entry.sha256:
            raise CorruptArtifact(f"{file} was changed: its SHA-256 is not the manifest's")
    stray = [file.name for file in path.iterdir() if file.suffix in READ_SUFFIXES and file.name not in manifest.files]
    if set(stray) - {MANIFEST}:
        raise CorruptArtifact(f"{path}: {min(set(stray) - {MANIFEST})} is not in the manifest; remove it")
    if identity({name: entry.sha256 for name, entry in manifest.files.items()}) != manifest.id:
        raise CorruptArtifact(f"{path}: the id in the manifest does not belong to its files")
    return manifest


def load(path: Path, *, dtype: torch.dtype | None = None) -> Loaded:
    """Load an artifact after checking every file.

    Args:
        path: the folder.
        dtype: of the weights; None keeps what is stored.

    Raises:
        CorruptArtifact: the files are not those of the manifest.
    """
    manifest = verify(path)
    plain = manifest.layout.kind == "plain"
    model_class = auto_class(manifest.model_type) if plain else remote_code.FoldawayForCausalLM
    options = {"trust_remote_code": False, "local_files_only": True}
    model = load_weights(model_class, str(path), dtype=dtype, **options)
    tokenizer = load_tokenizer(str(path), model, **options)
    origin = Origin(
        str(path), "artifact", manifest.origin.licence, manifest.origin.quantised_from, artifact_id=manifest.id
    )
    processor = read_processor(str(path)) if manifest.model_type in COMPOSITES else {}
    return Loaded(model, tokenizer, origin, processor)


def ancestry(loaded: Loaded) -> tuple[OriginEntry, list[Step], str | None]:
    """What a new artifact made from ``loaded`` must say of its past: origin, earlier steps, id of the parent."""
    if loaded.origin.kind == "artifact":
        manifest = read_manifest(Path(loaded.origin.name))
        return manifest.origin, list(manifest.steps), manifest.id
    origin = loaded.origin
    entry = OriginEntry.model_validate(
        {"name": origin.name, "kind": origin.kind, "licence": origin.licence, "quantised_from": origin.quantised_from}
    )
    return entry, [], None


def _card(model: PreTrainedModel, origin: OriginEntry, steps: Sequence[Step]) -> str:
    """The model card: licence and base of the parent, what was done, how to load it."""
    header = ["---", *([f"license: {origin.licence.lower()}"] if origin.licence else [])]
    header += [f"base_model: {origin.name}"] if origin.kind == "hub" else []
    task = "text-generation" if composite_of(model.config) is None else "image-text-to-text"
    header += ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- foldaway", "- pruned", "---"]
    layout = layout_of(model)
    lines = ["", f"# {Path(origin.name).name}, compressed", "", f"Made by foldaway from `{origin.name}`"]
    lines[-1] += f" (licence of the weights: {origin.licence or 'not stated by the source'})."
    if origin.quantised_from:
        lines += ["", f"The source's weights were stored as {origin.quantised_from} and were expanded first."]
    for step in steps:
        before, after = step.numbers["parameters_before"], step.numbers["parameters_after"]
        lines += ["", f"* {step.method} {json.dumps(step.config)}: {before:,} -> {after:,} parameters"]
        lines[-1] += f" ({step.numbers['sparsity_of_blocks']:.1%} of the blocks, "
        lines[-1] += f"{step.numbers['sparsity_of_model']:.1%} of the model removed)"
    if layout.kind == "shared":
        lines += [
            "",
            f"{len(layout.blocks)} blocks are executed, and {layout.distinct} are stored: the model is smaller, ",
        ]
        lines[-1] += "and no faster for it."
    code = "" if layout.kind == "plain" else ", trust_remote_code=True"
    model_class = auto_class(model.config.model_type).__name__
    reader = "tokenizer = AutoTokenizer" if composite_of(model.config) is None else "processor = AutoProcessor"
    lines += ["", "```python", f"model = {model_class}.from_pretrained(PATH{code})"]
    lines += [f"{reader}.from_pretrained(PATH{code})", "```"]
    return "\n".join([*header, *lines]) + "\n"
