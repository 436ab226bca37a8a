"""Where PyTorch computes, as a user names it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

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


AUTO = "auto"
"""As a device: all GPUs that there are, each with a like share of the blocks, or the CPU where there is none."""


def put(model: PreTrainedModel, device: str) -> str:
    """Move a model to where it computes.

    Args:
        model: on the CPU, or where an earlier call put it.
        device: the name of a device, or `AUTO`.

    Returns:
        The device that its inputs go to.

    Raises:
        ConfigError: it does not fit on the GPUs together.
    """
    if device != AUTO:
        model.to(device)  # type: ignore[arg-type]
        return device
    take_back(model)
    gpus: Mapping[int | str, int] = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())}
    return _spread(model, gpus) if gpus else "cpu"


def _spread(model: PreTrainedModel, free: Mapping[int | str, int]) -> str:
    """Spread the blocks evenly over devices with so many free bytes."""
    import accelerate
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules
    shares = get_balanced_memory(model, max_memory=dict(free), no_split_module_classes=whole)
    places = accelerate.infer_auto_device_map(model, max_memory=shares, no_split_module_classes=whole)
    if not {str(place) for place in places.values()} <= {str(device) for device in free}:
        raise ConfigError(
            f"the model does not fit on {len(free)} GPUs with {sum(free.values()):,} free bytes: give --device cpu"
        )
    accelerate.dispatch_model(model, places, force_hooks=True)
    return str(model.device)


def take_back(model: PreTrainedModel) -> None:
    """Move a model back to the CPU, wherever its parts are."""
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    vars(model).pop("hf_device_map", None)
    for module in model.modules():
        vars(module).pop("forward", None)  # what the hooks put over the class's own
    model.to("cpu")  # type: ignore[arg-type]


def has_bf16(device: str) -> bool:
    """Whether products in bf16 are worth it: on GPUs, and on CPUs with more than AVX2, which takes ten times as long
    as in fp32.
    """
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def autocast(model: PreTrainedModel, device: str) -> AbstractContextManager[Any]:
    """bf16 for the matrix products of an fp32 model on a GPU, while it learns."""
    if torch.device(device).type == "cuda" and model.dtype == torch.float32:
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters of a model another dtype, in place; buffers, such as rotary frequencies, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # in place of a new Parameter, which would untie embeddings
