"""What an export is: options in; out comes a folder, checked against its source, and the record of it."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.device import cast_weights
from compress.errors import ArtifactError, ConfigError
from compress.layout import layout_of
from compress.result import Progress
from compress.schema import FileEntry, Strict, list_files, read_versioned
from compress.sources import Loaded
from exporters.parity import Parity

EXPORT_FILE = "export.json"
VERSION = 1
BLOCK_SIZES = (16, 32, 64, 128, 256)
ALGORITHMS = ("rtn", "k-quant", "hqq")
QUANTISED = ("int8", "int4")
EMBEDDINGS = ("fp32", *QUANTISED)
PARTS = ("qkv", "o", "gate", "up", "down")
"""Of a block: what makes queries, keys and values; the attention's output; the three matrices of the FFN."""
DIVISORS = (64, 256)
"""Of FFN widths: what kernels on GPUs ask for."""
PROVIDERS = ("cpu", "cuda", "webgpu", "dml")
LAYOUTS = {"flat": "", "transformersjs": "onnx/"}
"""Layout of an ONNX folder -> where the graph lies in it."""
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "int4": "_q4"}
"""dtype -> what transformers.js adds to the name of the graph."""
WEIGHT_SUFFIXES = (".onnx", ".onnx_data", ".safetensors")
PACKAGES = ("foldaway", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")


@dataclass(frozen=True)
class ExportOptions:
    """How to store the weights. None is the format's own choice; in a record, that it has no meaning for the export.

    Attributes:
        dtype: onnx: ``"fp32"`` (default), ``"fp16"``, ``"int8"`` or ``"int4"``; hf: ``"fp32"``, ``"fp16"``, ``"bf16"``
            (as the source has them); vllm: the same.
        block_size: int8 and int4: weights along the input dimension that share one scale (32).
        algorithm: int8 and int4: one of ALGORITHMS, see `nbits` (rtn).
        int8: int4: parts of blocks that are stored in int8 all the same, of PARTS.
        embeddings: int8 and int4: what embedding and LM head are in, ``"int4"``, ``"int8"`` or ``"fp32"`` (int8).
        accuracy_level: int8 and int4: the least that onnxruntime computes activations in: 1 fp32, 2 fp16, 3 bf16, 4
            int8; 0 leaves it open (4 on the cpu, else 0).
        smooth: int8 and int4: activations are evened out before weights are rounded, by so large a share of what can
            be done to them, up to 1, and the weights by the rest; 0: nothing is; see `smoothing` (0).
        ep: onnx: the execution provider that the graph is made for. All but cpu compute in fp16 unless dtype is fp32.
        layout: onnx: ``"flat"``, or ``"transformersjs"`` with the graph in a folder of its own.
        max_kl: onnx: the largest divergence from the source that is let pass, nats per token (by dtype).
        expand: hf only: blocks that share weights get copies of their own.
        divisor: vllm only: FFN widths are padded to multiples of this (exact widths).
        plugin: vllm only: whether it may be written for foldaway's plugin; else it is padded and expanded as needed.

    Raises:
        ConfigError: a value out of range.
    """

    dtype: str | None = None
    block_size: int | None = None
    algorithm: str | None = None
    int8: tuple[str, ...] = ()
    embeddings: str | None = None
    accuracy_level: int | None = None
    smooth: float | None = None
    ep: str = "cpu"
    layout: str = "flat"
    max_kl: float | None = None
    expand: bool = False
    divisor: int | None = None
    plugin: bool = True

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "block_size": BLOCK_SIZES,
            "algorithm": ALGORITHMS,
            "embeddings": EMBEDDINGS,
            "accuracy_level": tuple(range(5)),
            "ep": PROVIDERS,
            "layout": tuple(LAYOUTS),
            "divisor": DIVISORS,
        }
        asked = [(name, getattr(self, name), possible) for name, possible in choices.items()]
        asked += [("int8", part, PARTS) for part in self.int8]
        for name, value, possible in asked:
            if value is not None and value not in possible:
                raise ConfigError(f"{name}={value}: possible are {', '.join(map(str, possible))}")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ConfigError(f"smooth={self.smooth}: give a strength from 0, which is off, to 1; 0.5 is usual")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ConfigError(f"max_kl={self.max_kl}: give nats per token, more than 0")

    @property
    def graph(self) -> str:
        """The graph's file in an ONNX folder."""
        suffix = SUFFIXES[self.dtype or "fp32"] if self.layout == "transformersjs" else ""
        return f"{LAYOUTS[self.layout]}model{suffix}.onnx"


@dataclass(frozen=True)
class Exported:
    """An export that was written and checked.

    Attributes:
        path: the folder.
        format: name in EXPORTERS.
        dtype: how the weights are stored.
        parity: how closely it was found to compute what its source computes.
        bytes: graph and weights; tokenizer and texts are not counted.
        parameters: distinct parameters of the model, which are those of its source unless it was expanded.
        files: name -> bytes of every file but export.json.
        notes: what it takes to load it, and what was given up for the format; sentences without a full stop.
    """

    path: Path
    format: str
    dtype: str
    parity: Parity
    bytes: int
    parameters: int
    files: Mapping[str, int]
    notes: tuple[str, ...] = ()


Exporter = Callable[[Loaded, Path, ExportOptions, Tensor, Progress], Exported]
"""``exporter(loaded, path, options, check_tokens (B, T), progress)``: write ``path``, check it, describe it."""


class SourceEntry(Strict):
    """The model that was exported."""

    name: str
    kind: str
    licence: str | None
    quantised_from: str | None


class ExportRecord(Strict):
    """export.json: what an export folder holds, and how it was checked. Unknown keys are refused.

    ``blocks`` describes every block, those without attention too, which no runtime's config can say.
    """

    format: Literal["foldaway-export"] = "foldaway-export"
    version: int = VERSION
    to: str
    artifact_id: str | None
    source: SourceEntry
    model_type: str
    options: ExportOptions
    blocks: list[dict[str, Any]]
    parity: Parity
    parameters: int
    bytes: int
    files: dict[str, FileEntry]
    versions: dict[str, str]


def is_export(path: Path | str) -> bool:
    """Whether a folder holds an export of ours."""
    return (Path(path) / EXPORT_FILE).is_file()


def read_export(path: Path | str) -> ExportRecord:
    """Read the record of an export folder; the files that it names are not read.

    Raises:
        ArtifactError: there is none.
        ManifestVersionError: a newer foldaway wrote it.
        CorruptArtifact: it does not follow the schema.
    """
    file = Path(path) / EXPORT_FILE
    if not file.is_file():
        raise ArtifactError(f"{path} is not an export: it has no {EXPORT_FILE}; make one with `foldaway export`")
    return read_versioned(file, ExportRecord, VERSION)


def choose_dtype(to: str, options: ExportOptions, possible: tuple[str, ...], default: str) -> str:
    """The dtype to write.

    Raises:
        ConfigError: the format does not store the one asked for.
    """
    if options.dtype is not None and options.dtype not in possible:
        raise ConfigError(f"dtype={options.dtype}: the {to} export stores {' or '.join(possible)}")
    return options.dtype or default


def check_unused(options: ExportOptions, what: str, used: Collection[str]) -> None:
    """Refuse options that an export has no use for.

    Raises:
        ConfigError: naming the first one that was set.
    """
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name not in used and value != option.default:
            raise ConfigError(f"{option.name}={value}: the {what} export has no use for it; leave it out")


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model itself when its parameters have this dtype, else a copy where they have. Buffers stay as they are."""
    if all(parameter.dtype == dtype for parameter in model.parameters()):
        return model
    other = copy.deepcopy(model)
    cast_weights(other, dtype)
    return other


def seal(folder: Path, loaded: Loaded, to: str, options: ExportOptions, parity: Parity) -> ExportRecord:
    """Write export.json about the files that lie in `folder`; `options` say the dtype."""
    files = list_files(folder)
    origin = loaded.origin
    record = ExportRecord(
        to=to,
        artifact_id=origin.artifact_id,
        source=SourceEntry(
            name=origin.name, kind=origin.kind, licence=origin.licence, quantised_from=origin.quantised_from
        ),
        model_type=getattr(loaded.model.config, "base_model_type", loaded.model.config.model_type),
        options=options,
        blocks=layout_of(loaded.model).block_configs(),
        parity=parity,
        parameters=budget.count(loaded.model).total,
        bytes=sum(entry.bytes for name, entry in files.items() if name.endswith(WEIGHT_SUFFIXES)),
        files=files,
        versions=installed_versions(),
    )
    (folder / EXPORT_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def exported(path: Path, record: ExportRecord, notes: tuple[str, ...] = ()) -> Exported:
    """The record of an export, and what else is to be said of it, as its caller wants it."""
    return Exported(
        path=path,
        format=record.to,
        dtype=str(record.options.dtype),
        parity=record.parity,
        bytes=record.bytes,
        parameters=record.parameters,
        files={name: entry.bytes for name, entry in record.files.items()},
        notes=notes,
    )


def installed_versions(packages: Collection[str] = PACKAGES) -> dict[str, str]:
    """Versions of packages, by default those that shape an export, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
