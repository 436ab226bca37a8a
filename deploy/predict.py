"""What a compression would give and cost, from shapes alone: for ``--dry-run``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress import budget
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.sources import skeleton
from deploy.recipe import CalibrationSpec

LIBRARIES_BYTES = 500_000_000
"""Resident memory of Python with its libraries, before a model is there."""


@dataclass(frozen=True)
class Prediction:
    """What is to be expected. Shapes are exact; memory and time are estimates.

    Attributes:
        parameters: of the smaller model.
        bytes: of its weights.
        memory_bytes: the peak while compressing.
        minutes: on this machine's CPU.
        layout: "plain" or "ragged".
    """

    parameters: int
    bytes: int
    memory_bytes: int
    minutes: float
    layout: str


def predict(model: str, steps: Sequence[tuple[str, dict[str, Any]]], calibration: CalibrationSpec) -> Prediction:
    """Predict the outcome of methods applied one after the other.

    Args:
        model: as for ``compress.sources.load``; its weights are not read.
        steps: method names and options.
        calibration: of every step.

    Raises:
        BudgetError: a target cannot be reached.
        ConfigError: a name or an option cannot be meant.
    """
    shape = skeleton(model)
    item_size = shape.dtype.itemsize
    memory = _memory(shape, calibration.length)
    operations = 0.0
    for method, options in steps:
        pass_operations = 2.0 * budget.count(shape).total * calibration.length
        operations += METHODS[method].outline(shape, calibration.rows, method_config(method, options)) * pass_operations
    parameters = budget.count(shape).total
    minutes = operations / _operations_per_second(shape.dtype) / 60
    return Prediction(parameters, parameters * item_size, memory, minutes, layout_of(shape).kind)


def _memory(shape: PreTrainedModel, length: int) -> int:
    """Weights, the logits of one row with their fp32 copy in chunks, and what enters each block."""
    config, item_size = shape.config, shape.dtype.itemsize
    blocks = len(layout_of(shape).blocks)
    activations = length * item_size * (config.vocab_size + (blocks + 8) * config.hidden_size)
    return int(LIBRARIES_BYTES + budget.count(shape).total * item_size + activations)


def _operations_per_second(dtype: torch.dtype, size: int = 1024) -> float:
    """What a matrix product of the model's dtype reaches here; the best of a few."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds)
