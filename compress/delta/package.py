"""The delta package: a folder that holds what a fine-tune adds to its base model.

* ``delta.json``: what it is: base, options, one entry per tensor of the fine-tune, the hash of every other file;
* ``delta*.safetensors``: values, positions where no seed brings them back, scales, and what is stored as it is;
* ``config.json``, tokenizer files, ``generation_config.json``: copies of the fine-tune's; ``README.md``.

Every element is brought back by one rule, which is exact everywhere: ``W = cast(fp32(W_base) + fp32(s) * fp32(v))``,
product and sum each rounded to fp32, the cast to nearest even. s is the tensor's scale, or fp32(scale) * fp32(row
scale). docs/formats.md describes all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.delta import indices
from compress.delta.checkpoint import DESCRIPTION, TYPES, Checkpoint, Tensors, digest, is_delta
from compress.delta.masks import Scheme, checksum, random_index
from compress.delta.values import STORED_TYPE, ValueType, restore, stored_length
from compress.errors import ArtifactError, ConfigError, CorruptArtifact
from compress.files import sha256_of
from compress.schema import FileEntry, Strict, read_versioned

FORMAT: Final = "foldaway-delta"
VERSION: Final = 1

Kind = Literal["seed", "u16", "gap8", "bitmap", "rows", "dense", "same"]
PRUNED: tuple[Kind, ...] = ("seed", "u16", "gap8", "bitmap")

PIECES: dict[Kind, tuple[str, ...]] = {
    "seed": (),
    "u16": ("cols",),
    "gap8": ("gaps", "blocks"),
    "bitmap": ("bitmap",),
}
"""Tensors that hold the positions of a pruned tensor."""


COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "foldaway_model.py",
)
"""Files of the fine-tune that travel along."""


class Source(Strict):
    """A model that went in.

    Attributes:
        name: as it was given.
        digest: over names and digests of its tensors that are needed; empty for the fine-tune.
    """

    name: str
    digest: str = ""


class Entry(Strict):
    """One tensor of the fine-tune.

    Attributes:
        shape: of the fine-tune's tensor.
        dtype: of the fine-tune's tensor, as safetensors names it.
        kind: how it is stored.
        transposed: whether rows and columns of what is stored are those of the transposed tensor, so that rows are
            outputs.
        nnz: elements kept ("seed", "u16", "gap8", "bitmap"), or rows that changed ("rows").
        base: digest of the base's tensor; None where it is not needed.
        result: digest of the tensor that is brought back.
        index: checksum of the flat positions of a pruned tensor, into what is stored; None for other kinds.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    transposed: bool = False
    nnz: int = Field(default=0, ge=0)
    base: str | None = None
    result: str
    index: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of what is stored."""
        rows, cols = self.shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def elements(self) -> int:
        """Of the fine-tune's tensor."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the fine-tune's tensor, for weights."""
        found: torch.dtype = getattr(torch, TYPES[self.dtype])
        return found


class Sizes(Strict):
    """Bytes of the tensors of a package, by what they are for.

    Attributes:
        pruned_parameters: elements of the tensors that were pruned.
        values, positions, scales: of those tensors.
        rows: of embeddings whose rows changed.
        dense: of tensors that are stored as they are.
        headers: of the safetensors files; ``delta.json`` and copied files are not counted.
    """

    pruned_parameters: int = 0
    values: int = 0
    positions: int = 0
    scales: int = 0
    rows: int = 0
    dense: int = 0
    headers: int = 0

    @property
    def pruned(self) -> int:
        """All that pruned tensors take."""
        return self.values + self.positions + self.scales


class Measured(Strict):
    """What was seen of the delta before it was pruned, over the pruned tensors.

    Attributes:
        mean_abs_delta: mean magnitude.
        exact_zeros: share of elements that are the same in both models.
        influence_ratio: R, the mean over matrices; None where nothing was calibrated.
    """

    mean_abs_delta: float
    exact_zeros: float
    influence_ratio: float | None = None


class Description(Strict):
    """What ``delta.json`` says. Unknown keys are refused.

    Attributes:
        id: the first 16 hex digits of SHA-256 over the rest of this file as sorted JSON.
        base: the model that it is to be added to.
        finetuned: the model that it came from.
        licence: of the fine-tune's weights, where its card states it.
        density: share kept, 1 - p, as a fraction.
        scheme: of random masks; None where positions are written out.
        seed: of random masks.
        values: type of kept values.
        scale: what shares one.
        rows: type of changed rows of embeddings.
        config: how it was pruned; see `DarexConfig`.
        calibration: rows that were looked at; None where none were.
        measured: of the delta before pruning.
        sizes: in bytes.
        tensors: name -> entry, for every tensor of the fine-tune.
        versions: of what computed it.
        files: name -> hash and size, for every other file.
    """

    format: Literal["foldaway-delta"] = FORMAT
    version: int = VERSION
    id: str = ""
    base: Source
    finetuned: Source
    licence: str | None = None
    density: str = Field(pattern=r"^[0-9]{1,18}(/[1-9][0-9]{0,17})?$")
    scheme: Scheme | None
    seed: int
    values: ValueType
    scale: Literal["row", "tensor"]
    rows: Literal["int8", "exact"]
    config: dict[str, Any]
    calibration: dict[str, Any] | None
    measured: Measured
    sizes: Sizes
    tensors: dict[str, Entry]
    versions: dict[str, str]
    files: dict[str, FileEntry]

    def sealed(self) -> Description:
        """With its id filled in."""
        return self.model_copy(update={"id": self.identity()})

    def identity(self) -> str:
        """The hash of everything but the id."""
        content = json.loads(self.model_dump_json(exclude={"id"}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def base_digest(self) -> str:
        """The hash of the base's tensors that are needed."""
        lines = "".join(f"{name} {entry.base}\n" for name, entry in sorted(self.tensors.items()) if entry.base)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Change:
    """What a package does to one pruned tensor.

    Attributes:
        index: int64 (n,): flat positions in the tensor as it is stored in a checkpoint.
        addend: fp32 (n,): what is added there.
    """

    index: Tensor
    addend: Tensor


class Package:
    """A delta package that was opened: every file is there and as it was written, every entry makes sense.

    Raises:
        ArtifactError: there is none.
        ManifestVersionError: a newer foldaway wrote it.
        CorruptArtifact: a file was cut or changed, or what it says cannot be.
    """

    def __init__(self, folder: Path) -> None:
        if not is_delta(folder):
            raise ArtifactError(f"{folder} is not a delta package: it has no {DESCRIPTION}")
        self.folder = folder
        self.description = read_versioned(folder / DESCRIPTION, Description, VERSION)
        if self.description.identity() != self.description.id:
            raise CorruptArtifact(f"{folder / DESCRIPTION} was changed after it was written: its id is another")
        self._check_files()
        self._check_entries()

    @cached_property
    def _stored(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """Name -> entry, for every tensor of the fine-tune."""
        return self.description.tensors

    def _check_files(self) -> None:
        files = self.description.files
        for name, entry in files.items():
            file = self.folder / name
            if not file.resolve().is_relative_to(self.folder.resolve()):
                raise CorruptArtifact(f"{self.folder}: {name!r} lies outside the package")
            if not file.is_file() or file.stat().st_size != entry.bytes or sha256_of(file) != entry.sha256:
                raise CorruptArtifact(f"{file} is missing, cut or changed: get the package again")
        for file in self.folder.glob("*.safetensors"):
            if file.name not in files:
                raise CorruptArtifact(f"{file} does not belong to the package: remove it")

    def _check_entries(self) -> None:
        """Check that all pieces are there, of the shapes and types that the entries make them; nothing is read yet."""
        wanted: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, entry in self.tensors.items():
            needs_base = entry.kind in (*PRUNED, "rows", "same")
            if needs_base != (entry.base is not None) or (entry.kind in PRUNED) != (entry.index is not None):
                raise CorruptArtifact(f"{self.folder}: the entry of {name} contradicts itself")
            if entry.kind != "same" and entry.kind != "dense" and (len(entry.shape) != 2 or entry.dtype not in TYPES):
                raise CorruptArtifact(f"{self.folder}: {name} cannot be of kind {entry.kind}")
            expected = entry.elements * Fraction(self.description.density) if entry.kind == "seed" else 0
            if entry.nnz > max(entry.elements, 1) or expected > 2 * entry.nnz + SLACK:
                raise CorruptArtifact(f"{self.folder}: {name} cannot keep {entry.nnz} elements")
            wanted |= self._pieces(name, entry)
        found = set(self._stored.names)
        if found != set(wanted):
            odd = min(found ^ set(wanted))
            raise CorruptArtifact(f"{self.folder}: {odd} is {'missing' if odd in wanted else 'not in delta.json'}")
        for name, (shape, dtype) in wanted.items():
            if self._stored.dtype(name) != dtype or not _fits(self._stored.shape(name), shape):
                raise CorruptArtifact(f"{self.folder}: {name} is of another shape or type than its entry says")

    def _pieces(self, name: str, entry: Entry) -> dict[str, tuple[tuple[int, ...], str]]:
        """The stored tensors of an entry: shape (-1 where only the content tells) and type."""
        if entry.kind == "same":
            return {}
        if entry.kind == "dense":
            return {name: (entry.shape, entry.dtype)}
        rows, cols = entry.matrix
        if entry.kind == "rows":
            kept: dict[str, tuple[tuple[int, ...], str]] = {f"{name}.row_ids": ((entry.nnz,), "I32")}
            kept[f"{name}.new_rows"] = ((-1, cols), entry.dtype)
            if self.description.rows == "exact":
                return kept | {f"{name}.values": ((entry.nnz, cols), entry.dtype)}
            return kept | {f"{name}.values": ((entry.nnz, cols), "I8"), f"{name}.scale": ((entry.nnz,), "F32")}
        kind = self.description.values
        length = stored_length(kind, entry.nnz)
        pieces: dict[str, tuple[tuple[int, ...], str]] = {
            f"{name}.values": ((length,), TYPE_NAMES[STORED_TYPE[kind]]),
            f"{name}.scale": ((1,), "F32"),
        }
        if self.description.scale == "row":
            pieces[f"{name}.row_scale"] = ((rows,), "F16")
        shapes = {"cols": (rows, -1), "gaps": (-1,), "blocks": (-1,), "bitmap": (rows, -(-cols // 8))}
        types = {"cols": "U16", "gaps": "U8", "blocks": "I32", "bitmap": "U8"}
        return pieces | {f"{name}.{piece}": (shapes[piece], types[piece]) for piece in PIECES[entry.kind]}

    # --- Reading

    def positions(self, name: str) -> Tensor:
        """Flat positions of a pruned tensor, in what is stored (rows are outputs); checked against its checksum.

        Raises:
            CorruptArtifact: they are not those that were packed.
        """
        entry = self.tensors[name]
        if entry.kind == "seed":
            scheme, density = self.description.scheme, Fraction(self.description.density)
            if scheme is None or not 0 < density <= 1 or (scheme == "one-of-m" and density.numerator != 1):
                raise CorruptArtifact(f"{self.folder}: no scheme keeps {density}")
            index = random_index(scheme, density, self.description.seed, name, entry.matrix)
        else:
            stored = {piece: self._stored.get(f"{name}.{piece}") for piece in PIECES[entry.kind]}
            index = indices.decode(entry.kind, stored, entry.matrix)  # type: ignore[arg-type]
        if len(index) != entry.nnz or checksum(index) != entry.index:
            raise CorruptArtifact(f"{self.folder}: the positions of {name} are not those that were packed")
        return index

    def change(self, name: str) -> Change:
        """What to add to a pruned tensor, and where.

        Raises:
            CorruptArtifact: positions or numbers that cannot be.
        """
        entry, index = self.tensors[name], self.positions(name)
        rows, cols = entry.matrix
        values = restore(self._stored.get(f"{name}.values"), self.description.values, entry.nnz)
        scale = self._stored.get(f"{name}.scale")
        row_scale = self._stored.get(f"{name}.row_scale") if self.description.scale == "row" else None
        addend = scaled(values, index, scale, row_scale, (rows, cols))
        _finite(addend, name)
        return Change(as_stored(index, (rows, cols), transposed=entry.transposed), addend)

    def result(self, name: str, base: Tensor | None) -> Tensor:
        """The fine-tune's tensor.

        Args:
            name: of the tensor.
            base: the base's tensor, which is not changed; None for a kind that needs none.

        Raises:
            ConfigError: it is another base.
            CorruptArtifact: what comes out is not what was packed.
        """
        entry = self.tensors[name]
        if entry.base is not None and (base is None or digest(base) != entry.base):
            raise ConfigError(
                f"this is not the base of {self.folder.name}: {name} differs from that of {self.description.base.name}"
            )
        found = self._bring_back(name, entry, base)
        if tuple(found.shape) != entry.shape or (entry.kind != "same" and digest(found) != entry.result):
            raise CorruptArtifact(f"{self.folder}: {name} does not come out as it was packed")
        return found

    def _bring_back(self, name: str, entry: Entry, base: Tensor | None) -> Tensor:
        if entry.kind == "dense":
            return _finite(self._stored.get(name), name)
        assert base is not None
        if entry.kind == "same":
            return base
        if entry.kind == "rows":
            return self._with_rows(name, entry, base)
        if tuple(base.shape) != entry.shape:
            raise ConfigError(f"{name} of the base has shape {tuple(base.shape)}, the package says {entry.shape}")
        return added(base, self.change(name), entry.torch_dtype)

    def _with_rows(self, name: str, entry: Entry, base: Tensor) -> Tensor:
        new, ids = self._stored.get(f"{name}.new_rows"), self._stored.get(f"{name}.row_ids").long()
        values = self._stored.get(f"{name}.values")
        old = entry.shape[0] - len(new)
        sound = 0 <= old <= len(base) and base.shape[1] == entry.shape[1]
        if not sound or bool((ids < 0).any()) or bool((ids >= old).any()) or bool((ids.diff() <= 0).any()):
            raise CorruptArtifact(f"{self.folder}: the rows of {name} do not fit the base")
        found = base[:old].to(entry.torch_dtype, copy=True)
        if self.description.rows == "exact":
            found[ids] = values
        else:
            scale = self._stored.get(f"{name}.scale")
            found[ids] = (base[ids].float() + scale[:, None] * values.float()).to(entry.torch_dtype)
        return _finite(torch.cat([found, new]), name)


TYPE_NAMES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
SLACK = 1 << 20
"""Elements of a mask that may be looked at for nothing: an entry must not ask for work that its file does not bear."""


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and all(w in (-1, f) for f, w in zip(found, wanted, strict=True))


def scaled(values: Tensor, index: Tensor, scale: Tensor, row_scale: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Values times their scales: fp32(s) * fp32(v), with s = fp32(scale) * fp32(row scale)."""
    if row_scale is None:
        return values * scale
    return values * (scale * row_scale.float()).repeat_interleave(row_counts(index, shape))


def as_stored(index: Tensor, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """Flat positions in a matrix (rows are outputs) as positions in the tensor of the checkpoint."""
    rows, cols = shape
    return (index % cols) * rows + index // cols if transposed else index


def row_counts(index: Tensor, shape: tuple[int, int]) -> Tensor:
    """How many of the ascending flat indices lie in each row."""
    rows, cols = shape
    edges = torch.arange(rows + 1, device=index.device) * cols
    return torch.searchsorted(index, edges).diff()


def added(base: Tensor, change: Change, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor in a dtype, with a change added by the rule of the format."""
    found = base.to(dtype, copy=True, memory_format=torch.contiguous_format)
    before = base.contiguous().view(-1)[change.index].float()
    found.view(-1).index_copy_(0, change.index, _finite((before + change.addend).to(dtype), "a sum"))
    return found


def _finite(tensor: Tensor, what: str) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CorruptArtifact(f"{what} is not finite everywhere")
    return tensor


def check_base(package: Package, base: Tensors) -> None:
    """Check names and shapes of a base's tensors; their content is checked as it is read.

    Raises:
        ConfigError: it is another base.
    """
    names = set(base.names)
    for name, entry in package.tensors.items():
        if entry.base is None:
            continue
        if name not in names:
            raise ConfigError(f"this is not the base of {package.folder.name}: it has no {name}")
        shape = base.shape(name)
        if shape[1:] != entry.shape[1:] or (shape != entry.shape and entry.kind != "rows"):
            raise ConfigError(
                f"this is not the base of {package.folder.name}: {name} has shape {shape}, and {entry.shape} is needed"
            )
