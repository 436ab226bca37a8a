"""What a compression would give and cost, from shapes alone: for ``--dry-run``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from compress import budget
from compress.decoder import Block, Decoder
from compress.layout import layout_of
from compress.methods import METHODS, method_config
from compress.result import Run
from compress.sources import skeleton
from compress.surgery import expand
from deploy.recipe import CalibrationSpec, StepSpec
from exporters import exporter_named, to_hf, to_vllm
from exporters.base import QUANTISED, ExportOptions
from exporters.to_onnx import check_layout, complete

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
        layout: "plain", "ragged" or "shared".
    """

    parameters: int
    bytes: int
    memory_bytes: int
    minutes: float
    layout: str


def predict(
    model: str,
    steps: Sequence[StepSpec],
    calibration: CalibrationSpec,
    spill_bytes: int = Run.spill_bytes,
) -> Prediction:
    """Predict the outcome of methods applied one after the other.

    Args:
        model: as for ``compress.sources.load``; its weights are not read.
        steps: methods with their options.
        calibration: of every step that has none of its own.
        spill_bytes: sets of hidden states or weights that are larger lie in files.

    Raises:
        BudgetError: a target cannot be reached.
        ConfigError: a name or an option cannot be meant.
    """
    shape = skeleton(model)
    item_size = shape.dtype.itemsize
    memory, operations = _memory(shape, calibration.length), 0.0
    for step in steps:
        method, config, drawn = (
            METHODS[step.method],
            method_config(step.method, step.set),
            step.calibration or calibration,
        )
        pass_operations = 2.0 * budget.count(shape).total * drawn.length
        memory = max(memory, _memory(shape, drawn.length))
        if method.memory is not None:
            more = method.memory(shape, drawn.rows, drawn.length, config, spill_bytes)
            memory = max(memory, _memory(shape, drawn.length) + more)
        operations += method.outline(shape, drawn.rows, config) * pass_operations
    parameters = budget.count(shape).total
    minutes = operations / _operations_per_second(shape.dtype) / 60
    return Prediction(parameters, parameters * item_size, memory, minutes, layout_of(shape).kind)


BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 8.0, "int4": 4.0}


def predict_export(model: str, to: str, options: ExportOptions) -> tuple[int, int, tuple[str, ...]]:
    """Parameters of an export, about how many bytes its weights take, and what else is to be said of it.

    Raises:
        LayoutNotSupported: the format has no words for the model.
        ConfigError: a name or an option cannot be meant.
    """
    exporter_named(to)
    shape = skeleton(model)
    notes: tuple[str, ...] = ()
    if to == "onnx":
        options = complete(options)
        check_layout(shape, options)
    elif to == "vllm":
        options = to_vllm.complete(options, shape.dtype)
        made = to_vllm.plan(shape, options)
        shape, notes = made.model, made.notes
    else:
        options = to_hf.complete(options, shape.dtype)
    if options.expand:
        expand(shape)
    parameters = budget.count(shape).total
    dtype = str(options.dtype)
    if options.block_size is None:
        return parameters, int(parameters * BITS[dtype] / 8), notes
    head: Any = shape.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings = sum(table.numel() for table in {shape.get_input_embeddings().weight, head.weight})
    kept = sum(_numel(block, part) for block in Decoder(shape) for part in options.int8)
    bits = {each: BITS[each] + BITS["fp16"] / options.block_size for each in QUANTISED} | {"fp32": BITS["fp32"]}
    of_blocks = (parameters - embeddings - kept) * bits[dtype] + kept * bits["int8"]
    return parameters, int((of_blocks + embeddings * bits[str(options.embeddings)]) / 8), notes


def _numel(block: Block, part: str) -> int:
    """Weights of a part of a block, as `exporters.base.PARTS` name them."""
    if part in ("qkv", "o"):
        if block.attention is None:
            return 0
        linears = block.attention_in if part == "qkv" else [block.attention_out]
        return sum(each.outputs * each.inputs for each in linears)
    return block.ffn_out.outputs * block.width if block.has_ffn else 0  # gate, up and down are alike


def _memory(shape: PreTrainedModel, length: int) -> int:
    """Weights, the logits of one row with their fp32 copy in chunks, and what enters each block."""
    config, item_size = Decoder(shape).config, shape.dtype.itemsize
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
