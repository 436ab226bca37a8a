"""What a budget limits, measured on real weights: bytes on disk, memory of a process, seconds of a decoded token.

``python -m deploy.measured PATH TOKENS`` is the process whose memory is measured: it prints one JSON object.

Memory is what a fresh process holds more once it has loaded the weights and keeps a KV cache of so many tokens for one
sequence. Python, its libraries and the code of the model are there before; a tokenizer is not loaded. Weights are
mapped from the file, so the system counts them as resident and could take them back. What the allocator has to spare is
handed back before the reading (glibc), so that it does not depend on the order of events. ``peak_bytes`` includes it.

Latency is that of one token of one sequence behind a full cache, with PyTorch. Neither depends on what the weights and
the cache say, so the cache is filled with made-up numbers, and shapes can be timed before a method has chosen weights.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.servers import child_environment
from compress.errors import BudgetError, ConfigError, FoldawayError, UnsupportedArchitecture
from compress.layout import layout_of
from compress.result import Progress, no_progress
from compress.sources import load_weights, skeleton
from compress.surgery import clone, cut_ffn, drop_blocks
from deploy.ruler import Size, size_of
from deploy.terminal import quieten_libraries

RESIDENT_REPEATS = 3
LATENCY_REPEATS = 7
WARM_UP = 1
STEP_TOKENS = 8
"""Tokens that are decoded, and timed together, at the end of the context."""


def stored_bytes(folder: Path) -> int:
    """Of all weight files of a folder, headers included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def header_bytes(model: PreTrainedModel, shard_bytes: int = 500_000_000) -> int:
    """What safetensors files hold beside the weights, at most: no smaller model of the kind has a longer header.

    Args:
        model: on any device.
        shard_bytes: largest file.
    """
    entries = {
        name: {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [shard_bytes, shard_bytes]}
        for name, tensor in model.named_parameters()
    }
    files = 1 + sum(p.numel() * p.element_size() for p in model.parameters()) // shard_bytes
    # A length of 8 bytes, metadata and padding of each file.
    return len(json.dumps(entries, separators=(",", ":"))) + 64 * files


# --- Memory


def resident(
    path: Path, context: int, repeats: int = RESIDENT_REPEATS, progress: Progress = no_progress
) -> tuple[list[int], int]:
    """What fresh processes hold for a model with a cache of so many tokens; see the module.

    Returns:
        The bytes of each process, and the largest peak of them.

    Raises:
        FoldawayError: a process ended otherwise than it should.
    """
    runs, peak = [], 0
    for done in range(1, repeats + 1):
        command = [sys.executable, "-P", "-m", "deploy.measured", str(path), str(context)]
        process = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
        if process.returncode != 0:
            said = (process.stderr.strip().splitlines() or ["nothing"])[-1]
            raise FoldawayError(f"the memory of {path} cannot be measured: the process said: {said}")
        found = json.loads(process.stdout)
        runs.append(int(found["bytes"]))
        peak = max(peak, int(found["peak_bytes"]))
        progress("measuring memory", done, repeats)
    return runs, peak


def main(arguments: Sequence[str]) -> None:
    """Load a model, fill a cache, and say what that takes."""
    quieten_libraries()
    path, context = Path(arguments[0]), int(arguments[1])
    model_class = type(skeleton(str(path)))  # imports the code of the model
    warm = torch.ones(256, 256)
    torch.mm(warm, warm)
    idle = _memory_of_this_process()
    model = load_weights(model_class, str(path), dtype=None, trust_remote_code=False, local_files_only=True)
    stream = Stream(model, context)
    stream.decode(stream.steps)
    _hand_back()
    held = _memory_of_this_process()
    found = {"bytes": held["VmRSS"] - idle["VmRSS"], "peak_bytes": held["VmHWM"] - idle["VmRSS"]}
    sys.stdout.write(json.dumps(found))


def _memory_of_this_process() -> dict[str, int]:
    """Resident bytes now, and the most so far."""
    try:
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    except OSError as error:
        raise ConfigError("this system does not say what a process holds: --target-memory needs Linux") from error
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}


def _hand_back() -> None:
    """Return freed memory to the system, where the allocator can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- Latency


class Stream:
    """One sequence that a model goes on with, behind a cache of made-up numbers.

    Args:
        model: in eval mode, of any layout, on the device that it computes on.
        context: tokens that the cache holds at the end; at most the model's context.
    """

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        self._model: Any = model
        self.steps = min(STEP_TOKENS, max(1, context // 2))
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        with torch.no_grad():
            self._cache = self._model(input_ids=self._token, use_cache=True).past_key_values
            self._fill(context - self.steps - 1)

    def _fill(self, tokens: int) -> None:
        """Let every layer of the cache hold so many tokens more."""
        if tokens < 1:
            return
        for place, layer in enumerate(self._cache.layers):
            keys, values = (
                torch.full((*old.shape[:2], tokens, old.shape[3]), 0.5, dtype=old.dtype, device=old.device)
                for old in (layer.keys, layer.values)
            )
            self._cache.update(keys, values, place)

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        """Go on by so many tokens."""
        for _ in range(tokens):
            self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True)
        if self._token.is_cuda:
            torch.cuda.synchronize(self._token.device)


def seconds_per_token(model: PreTrainedModel, context: int) -> float:
    """Time the last tokens of a context once."""
    stream = Stream(model, context)
    start = perf_counter()
    stream.decode(stream.steps)
    return (perf_counter() - start) / stream.steps


def latencies(
    models: Sequence[PreTrainedModel],
    context: int,
    repeats: int = LATENCY_REPEATS,
    progress: Progress = no_progress,
) -> list[list[float]]:
    """Seconds per decoded token of several models that take turns, so that a slow moment is slow for all.

    Returns:
        For each model its runs, in the order in which they were made, without those that warmed up.
    """
    rounds = []
    for done in range(1, WARM_UP + repeats + 1):
        rounds.append([seconds_per_token(model, context) for model in models])
        progress("measuring latency", done, WARM_UP + repeats)
    return [list(runs) for runs in zip(*rounds[WARM_UP:], strict=True)]


def points_of_line(
    model: PreTrainedModel, context: int, progress: Progress = no_progress
) -> tuple[list[tuple[Size, float]], list[float]]:
    """Time a model, half of its blocks, and all of them with half of their neurons, in turns.

    Args:
        model: with weights, which may say nothing; not changed.
        context: tokens that the cache holds.
        progress: told of each round.

    Returns:
        Size and median seconds per token of each, the model itself first; and the runs of the model itself.
    """
    models = [model]
    blocks = layout_of(model).blocks
    cuts: list[Callable[[PreTrainedModel], None]] = [
        lambda trial: drop_blocks(trial, range(-(-len(blocks) // 2), len(blocks))),
        lambda trial: cut_ffn(trial, [-(-block.intermediate_size // 2) for block in blocks]),
    ]
    for cut in cuts:
        trial = clone(model)
        with suppress(BudgetError, UnsupportedArchitecture):  # no attention in that half, or weights that are shared
            cut(trial)
            models.append(trial)
    runs = latencies(models, context, progress=progress)
    found = [(size_of(each), float(median(own))) for each, own in zip(models, runs, strict=True)]
    return found, runs[0]


def made_up(name: str) -> PreTrainedModel:
    """A model with weights that say nothing, so that its shape can be timed; those behind the name are not read.

    Args:
        name: as for ``compress.sources.load``.
    """
    filled: Any = skeleton(name).to_empty(device="cpu")
    filled.tie_weights()
    with torch.no_grad():
        for tensor in (*filled.parameters(), *filled.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return filled  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(sys.argv[1:])
