"""A folder of safetensors, read tensor by tensor; and what a fine-tune's tensors are to its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from compress.errors import ConfigError, CorruptArtifact, UnsupportedArchitecture, first_line
from compress.methods.darex import lora_delta
from compress.remote_code import MODEL_TYPE
from compress.sources import local_folder, skeleton

DESCRIPTION = "delta.json"
"""What tells a delta package from a model."""
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of weights that a delta can be taken of: their names in safetensors, and in torch."""


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def folder(self) -> Path:
        """Where they lie."""
        ...

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of their names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        ...

    def dtype(self, name: str) -> str:
        """As safetensors names it, for example "BF16"."""
        ...

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU; it may be a view of a file."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder of safetensors.

    Raises:
        ConfigError: it is none.
        CorruptArtifact: its files cannot be read.
    """

    folder: Path
    _open: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Tensor -> file."""
        found: dict[str, str] = {}
        for file in self._listed() or sorted(file.name for file in self.folder.glob("*.safetensors")):
            for name in self._reader(file).keys():  # noqa: SIM118  (a reader of safetensors is no mapping)
                if name in found:
                    raise CorruptArtifact(f"{self.folder}: {name} is in {found[name]} and in {file}")
                found[name] = file
        return found

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors of it."""
        return [self.folder / file for file in sorted(set(self._files.values()))]

    def _listed(self) -> list[str]:
        """The files that an index names: others in the folder may hold the same weights in another shape."""
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            return []
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifact(f"{index} cannot be read: {first_line(error)}") from error
        if any(not isinstance(file, str) or "/" in file or "\\" in file for file in files):
            raise CorruptArtifact(f"{index} names a file outside its folder")
        return files

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise CorruptArtifact(f"{self.folder / file} cannot be read: {first_line(error)}") from error
        return self._open[file]

    @property
    def names(self) -> list[str]:
        """All tensors, in the order of their names."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors names it, for example "BF16"."""
        return str(self._slice(name).get_dtype())

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU; a view of the file."""
        tensor: Tensor = self._reader(self._files[name]).get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self._reader(self._files[name]).get_slice(name)


@dataclass(frozen=True)
class Adapter:
    """A LoRA of peft's, seen as the checkpoint that merging it into its base would give.

    Raises:
        ConfigError: it does more than add a product to linears.
    """

    base: Checkpoint
    folder: Path

    @cached_property
    def _factors(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @cached_property
    def _scaling(self) -> float:
        settings = json.loads((self.folder / "adapter_config.json").read_text(encoding="utf-8"))
        unusual = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if settings.get(key)]
        if settings.get("peft_type") != "LORA" or unusual or settings.get("bias", "none") != "none":
            what = unusual[0] if unusual else "another kind than LoRA, or biases"
            raise ConfigError(
                f"{self.folder} has {what}: merge it (peft's merge_and_unload) and give the merged folder"
            )
        rank = settings["r"] ** 0.5 if settings.get("use_rslora") else settings["r"]
        return float(settings["lora_alpha"] / rank)

    @cached_property
    def _stems(self) -> dict[str, str]:
        """Tensor of the base -> what the names of its two factors begin with."""
        found = {}
        for factor in self._factors.names:
            stem, _, kind = factor.rpartition(".lora_")
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            if kind not in ("A.weight", "B.weight") or name not in self._transposed or name not in self.base.names:
                raise ConfigError(f"{self.folder}: {factor} belongs to no matrix of {self.base.folder.name}")
            found[name] = stem
        return found

    @cached_property
    def _transposed(self) -> Mapping[str, bool]:
        return roles_of(self.base.folder).matrices

    @property
    def names(self) -> list[str]:
        """Those of the base."""
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the base."""
        return self.base.shape(name)

    def dtype(self, name: str) -> str:
        """As in the base."""
        return self.base.dtype(name)

    def get(self, name: str) -> Tensor:
        """The base's tensor, with the product added where there is one."""
        tensor = self.base.get(name)
        if name not in self._stems:
            return tensor
        down, up = (self._factors.get(f"{self._stems[name]}.lora_{factor}.weight") for factor in "AB")
        delta = lora_delta(down, up, self._scaling)
        return (tensor.float() + (delta.T if self._transposed[name] else delta)).to(tensor.dtype)


def model_folder(base: Tensors, finetuned: Tensors) -> Path:
    """Where the fine-tune's config and tokenizer lie: an adapter has those of its base."""
    return base.folder if isinstance(finetuned, Adapter) else finetuned.folder


def open_base(name: str) -> Checkpoint:
    """The base model: a folder or a hub id."""
    return _open_model(name)


def open_finetuned(name: str, base: Checkpoint) -> Checkpoint | Adapter:
    """A fine-tune: a folder, a hub id, or a folder with a LoRA adapter."""
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        return Adapter(base, Path(name))
    return _open_model(name)


def _open_model(name: str) -> Checkpoint:
    folder = local_folder(name)
    if is_delta(folder):
        raise ConfigError(f"{name} is a delta package, not a model: apply it first (foldaway delta apply)")
    return Checkpoint(folder)


def is_delta(path: Path) -> bool:
    """Whether a folder holds a delta package."""
    return (path / DESCRIPTION).is_file()


def digest(tensor: Tensor) -> str:
    """The first 16 hex digits of SHA-256 over a tensor's bytes, row-major."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike to the last bit: zeros of different sign are not."""
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, of its shape."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


# --- What tensors are


@dataclass(frozen=True)
class Roles:
    """Which tensors of a checkpoint may be pruned.

    Attributes:
        matrices: weights of linears inside the model's body -> whether they are stored as (in, out).
        embeddings: token tables and output layers, by row.
    """

    matrices: Mapping[str, bool]
    embeddings: frozenset[str]


def roles_of(folder: Path) -> Roles:
    """Find the matrices and the embeddings of a model folder, from its class alone: no weight is read.

    A head beside the body (a new classifier) is neither, and neither are norms and biases.

    Raises:
        ConfigError: no config that can be read.
        UnsupportedArchitecture: the config names no class of transformers.
    """
    model = _skeleton(folder)
    outputs = model.get_output_embeddings()
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    matrices, embeddings = {}, set()
    for name, module in model.named_modules():
        if module is outputs or isinstance(module, nn.Embedding):
            embeddings.add(f"{name}.weight")
        elif isinstance(module, nn.Linear | Conv1D) and name.startswith(body):
            matrices[f"{name}.weight"] = isinstance(module, Conv1D)
    # A checkpoint of the body alone leaves its prefix out.
    matrices |= {name.removeprefix(body): way for name, way in matrices.items()}
    embeddings |= {name.removeprefix(body) for name in embeddings}
    return Roles(matrices, frozenset(embeddings))


def _skeleton(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ValueError:
        config = None  # ours, which AutoConfig does not know, or nobody's
    if config is None or config.model_type == MODEL_TYPE:
        return skeleton(str(folder))
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UnsupportedArchitecture(f"{folder}: its config names no model class of transformers ({architecture!r})")
    with torch.device("meta"):
        build: Any = model_class._from_config  # typed by nobody
        return build(config)
