"""Where a model computes: hooks of accelerate move what enters its parts, and go again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress import device
from compress.device import AUTO, put, take_back
from compress.errors import ConfigError
from compress.methods import METHODS, method_config
from compress.result import Run
from tests.conftest import tiny, token_rows

ROWS = token_rows(4, 24)
OPTIONS: dict[str, dict[str, Any]] = {
    "fusegpt": {"sparsity": 0.4, "window": 4, "batch": 2, "epochs": 1, "coefficient_rank": 2, "lora_rank": 2},
    "foldgpt": {
        "sparsity": 0.1,
        "protect": [0, 1],  # which are alike in all tiny models, so that two can always share
        "gate_steps": 2,
        "keep_ends": 0,
        "adapter_rank": 2,
        "batch": 3,
        "lora_rank": 2,
        "lora_lr": 0.01,
        "held_out": 1,
    },
    "shortgpt": {"sparsity": 0.4},
    "sleb": {"sparsity": 0.4},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_a_model_that_is_spread_gives_the_same_bytes(method: str, architecture: str) -> None:
    config = method_config(method, OPTIONS[method])
    plain = METHODS[method].compress(tiny(architecture), ROWS, config).model
    spread = tiny(architecture)
    assert device._spread(spread, {"cpu": 10**9}) == "cpu"
    assert any(hasattr(module, "_hf_hook") for module in spread.modules())
    made = METHODS[method].compress(spread, ROWS, config, Run(consume=True)).model
    take_back(made)
    assert not any(hasattr(module, "_hf_hook") or "forward" in vars(module) for module in made.modules())
    ours, theirs = plain.state_dict(), made.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there are GPUs to spread over")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    model = tiny("llama")
    assert put(model, AUTO) == "cpu"
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        device._spread(tiny("llama"), {"cpu": 100_000})


def test_putting_a_model_on_one_device_needs_no_hooks() -> None:
    model = tiny("llama")
    assert put(model, "cpu") == "cpu"
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
