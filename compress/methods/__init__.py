"""The methods, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import ConfigError
from compress.methods import baselines, distill, foldgpt, fusegpt, minitron, two_ssp
from compress.result import CompressedModel
from compress.schema import configured


@dataclass(frozen=True)
class Method:
    """One way to make a model smaller.

    Attributes:
        config: the dataclass of what the method leaves to the user.
        compress: ``compress(model, calibration, config, run) -> CompressedModel``.
        outline: ``outline(model, rows, config) -> passes``: cut a model, which may be on the meta device, to the shape
            that ``compress`` would give it, choosing nothing; and say how many forward passes of one row
            ``compress`` would take with so many calibration rows.
        paper: citation.
        memory: ``memory(model, rows, length, config, spill_bytes) -> bytes`` that ``compress`` holds beside the model
            and one pass, for methods that hold more than that.
        learns_from_teacher: whether ``run.teacher`` matters.
    """

    config: type[Any]
    compress: Callable[..., CompressedModel]
    outline: Callable[..., float]
    paper: str
    memory: Callable[..., int] | None = None
    learns_from_teacher: bool = False


METHODS: dict[str, Method] = {
    "2ssp": Method(two_ssp.TwoSSPConfig, two_ssp.compress, two_ssp.outline, "2SSP, Sandri et al. 2025"),
    "fusegpt": Method(
        fusegpt.FuseGPTConfig, fusegpt.compress, fusegpt.outline, "FuseGPT, Pei et al. 2024", fusegpt.memory
    ),
    "foldgpt": Method(
        foldgpt.FoldGPTConfig,
        foldgpt.compress,
        foldgpt.outline,
        "FoldGPT, Liu et al. 2024",
        foldgpt.memory,
        learns_from_teacher=True,
    ),
    "minitron": Method(
        minitron.MinitronConfig, minitron.compress, minitron.outline, "Minitron, Muralidharan et al. 2024"
    ),
    "distill": Method(
        distill.DistillConfig,
        distill.compress,
        distill.outline,
        "knowledge distillation, Hinton et al. 2015",
        distill.memory,
        learns_from_teacher=True,
    ),
    "shortgpt": Method(
        baselines.SimilarityConfig, baselines.shortgpt, baselines.similarity_outline, "ShortGPT, Men et al. 2024"
    ),
    "window": Method(
        baselines.SimilarityConfig,
        baselines.window,
        baselines.similarity_outline,
        "a window of blocks, Gromov et al. 2024",
    ),
    "sleb": Method(baselines.GreedyConfig, baselines.sleb, baselines.sleb_outline, "SLEB, Song et al. 2024"),
    "blockpruner": Method(
        baselines.GreedyConfig, baselines.blockpruner, baselines.blockpruner_outline, "BlockPruner, Zhong et al. 2024"
    ),
    "magnitude": Method(
        baselines.ShareConfig, baselines.magnitude, baselines.magnitude_outline, "FFN neurons by weight norm"
    ),
    "wanda": Method(
        baselines.ShareConfig, baselines.wanda, baselines.wanda_outline, "FFN neurons by Wanda, Sun et al. 2024"
    ),
    "random": Method(
        baselines.RandomConfig, baselines.random, baselines.random_outline, "the shape of 2SSP, filled by chance"
    ),
}


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        ConfigError: the name is not known.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; known are {', '.join(sorted(METHODS))}")
    return METHODS[name]


def method_config(name: str, options: Mapping[str, Any]) -> Any:
    """Build a method's configuration from named options.

    Raises:
        ConfigError: an option is not known, is missing, or has a value that cannot be meant.
    """
    return configured(method_named(name).config, options, name)


def takes_list(name: str) -> set[str]:
    """Options of a method whose value is a list itself.

    Raises:
        ConfigError: the name is not known.
    """
    return {field.name for field in dataclasses.fields(method_named(name).config) if "tuple" in str(field.type)}
