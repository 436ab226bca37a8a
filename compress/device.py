"""Where PyTorch computes, as a user names it."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Types of weights, by the names that users give them."""


def device_named(name: str) -> torch.device:
    """Look a device up: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: it is of another kind, or this machine has none such.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; give cpu")
    return device


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a model another dtype, in place; buffers, such as rotary frequencies, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # in place of a new Parameter, which would untie embeddings
