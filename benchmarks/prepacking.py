"""How much memory an ONNX session holds, and whether weights that blocks share are packed once.

onnxruntime rewrites ("packs") constant matrices for its kernels while it loads. Were there a packed copy for each node
that reads a matrix, memory would follow what is executed and not what is stored. So two exports are loaded in three
ways:

* ``default``: as onnxruntime does it;
* ``off``: with ``session.disable_prepacking``, so that the kernels read weights as they are stored;
* ``saved``: packed ahead of time, written beside the optimised graph, and mapped. Such a file fits one kind of CPU.

``python -m benchmarks.prepacking BASELINE CANDIDATE [-o FILE]`` prints a table, and writes every run as JSON. A run is
a process of its own that has imported numpy and onnxruntime, and computes in one thread; the two exports take turns.
Memory is what the process holds beyond what it held before it loaded the graph (``idle``): ``anon`` is its own,
``file`` are pages of mapped files, which the system can take back. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.memory import resident
from compress.errors import ConfigError, FoldawayError, require
from compress.files import write_file

WAYS = ("default", "off", "saved")
PROMPT_TOKENS, STEPS, TIMED_STEPS = 64, 32, 64
"""A prompt that is read in one run, the steps before memory is read again, and those that are timed after that; fewer
where the context is shorter than all of them."""

Run = dict[str, float]
"""``idle_bytes``, ``{loaded,used}_{anon,file,total}_bytes``, ``peak_bytes``, ``load_seconds``, and
``decode_tokens_per_second``."""

Runs = dict[str, dict[str, list[Run]]]
"""By way and side, in the order in which they were made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure two exports, print a table, and write the runs if a file for them is named."""
    parser = argparse.ArgumentParser("python -m benchmarks.prepacking", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("baseline", type=Path, metavar="BASELINE", help="an ONNX export")
    parser.add_argument("candidate", type=Path, metavar="CANDIDATE", help="another")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the runs go")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="all")
    given = parser.parse_args(argv)
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: give 1 or more")
    exports = {"baseline": given.baseline, "candidate": given.candidate}
    sizes = {side: sum(f.stat().st_size for f in folder.glob("model.onnx*")) for side, folder in exports.items()}
    try:
        runs = measure(exports, given.ways, given.repeats)
    except FoldawayError as error:
        parser.error(str(error))
    sys.stdout.write(table(runs, sizes))
    if given.output:
        record = {"machine": asdict(machine()), "threads": 1, "file_bytes": sizes, "runs": runs}
        write_file(given.output, json.dumps(record, indent=1, sort_keys=True) + "\n")
    return 0


def measure(exports: dict[str, Path], ways: Sequence[str] = WAYS, repeats: int = 5) -> Runs:
    """Load and use each export in each way, taking turns.

    Raises:
        BackendError: one is no export.
        ConfigError: one cannot be loaded.
    """
    runs: Runs = {way: {side: [] for side in exports} for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {side: folder / "model.onnx" for side, folder in exports.items()}
        contexts = {side: context_of(folder) for side, folder in exports.items()}
        packed = {side: Path(scratch) / f"{side}.onnx" for side in exports}
        for side in exports if "saved" in ways else ():
            _in_a_process("save", graphs[side], contexts[side], packed[side])
        for _ in range(repeats):
            for way in ways:
                for side in exports:
                    graph = packed[side] if way == "saved" else graphs[side]
                    runs[way][side].append(json.loads(_in_a_process(way, graph, contexts[side])))
    return runs


def context_of(export: Path) -> int:
    """The most tokens that an export has positions for."""
    from exporters.onnx_session import read_settings  # which imports torch, and a run is to do without

    return int(read_settings(export / "config.json")["max_position_embeddings"])


def table(runs: Runs, sizes: dict[str, int]) -> str:
    """Medians in MB (1e6 bytes), seconds and tokens/second, and candidate / baseline. Markdown."""
    columns = {
        "idle": "idle_bytes",
        "loaded": "loaded_total_bytes",
        "(anon)": "loaded_anon_bytes",
        "used": "used_total_bytes",
        "(anon) ": "used_anon_bytes",
        "peak": "peak_bytes",
        "load, s": "load_seconds",
        "decode, tokens/s": "decode_tokens_per_second",
    }
    lines = [f"| packing | export | file | {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) + 1)]
    for way, sides in runs.items():
        rows = [
            [float(sizes[side]), *(median(run[key] for run in sides[side]) for key in columns.values())]
            for side in sides
        ]
        units = [1e6 if name.endswith("bytes") else 1.0 for name in ("bytes", *columns.values())]
        for side, row in zip(sides, rows, strict=True):
            cells = [f"{value / unit:.3g}" for value, unit in zip(row, units, strict=True)]
            lines.append(f"| {way} | {side} | {' | '.join(cells)} |")
        ratios = [f"{theirs / ours:.3f}" for ours, theirs in zip(*rows, strict=True)]
        lines.append(f"| {way} | ratio | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


# --- In the process of a run


def _in_a_process(*arguments: object) -> str:
    """Call `_run` in a fresh process, and return what it says."""
    code = "import sys; from benchmarks.prepacking import _run; _run(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-P", "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ConfigError(f"{arguments[1]} cannot be measured: {done.stderr.strip()[-200:]}")
    return done.stdout


def _run(way: str, graph: str, context: str, packed: str = "") -> None:
    """Load a graph in one way and use it, as far as its context goes; or ``save`` it with its packed weights."""
    room = min(1.0, int(context) / (PROMPT_TOKENS + STEPS + TIMED_STEPS))
    prompt, steps, timed = (int(tokens * room) for tokens in (PROMPT_TOKENS, STEPS, TIMED_STEPS))
    ort = require("onnxruntime", "onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if way == "off":
        options.add_session_config_entry("session.disable_prepacking", "1")
    elif way == "saved":  # it was optimised when it was saved
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif way == "save":
        options.optimized_model_filepath = packed
        external = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{external}_file_name", f"{Path(packed).name}.data")
        options.add_session_config_entry(f"{external}_min_size_in_bytes", "1024")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    random = np.random.default_rng(0)  # made before memory is read: it loads libraries of its own
    idle = _held()
    start = perf_counter()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    load_seconds = perf_counter() - start
    if way == "save":
        return
    loaded = _held()
    decode = _Decode(session)
    decode.run(random.integers(0, decode.vocabulary, (1, prompt)))
    decode.steps(steps)
    used = _held()
    start = perf_counter()
    decode.steps(timed)
    seconds = perf_counter() - start
    run = {
        f"{name}_{kind}_bytes": now[kind] - idle[kind]
        for name, now in (("loaded", loaded), ("used", used))
        for kind in ("anon", "file", "total")
    }
    sizes = {"idle_bytes": idle["total"], "peak_bytes": used["peak"] - idle["total"]}
    speeds = {"load_seconds": load_seconds, "decode_tokens_per_second": timed / seconds}
    sys.stdout.write(json.dumps(run | sizes | speeds))


def _held() -> dict[str, int]:
    """What this process holds, in bytes."""
    held = resident()
    if held is None:
        raise ConfigError("this system does not say what a process holds: measure on Linux")
    return asdict(held)


class _Decode:
    """One row, decoded greedily with a cache that the graph appends to in place."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self.vocabulary: int = session.get_outputs()[0].shape[-1]
        self._length = 0
        self._token = np.zeros((1, 1), np.int64)
        self._caches = []
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                heads, size = value.shape[1], value.shape[3]
                cache = np.zeros((1, heads, PROMPT_TOKENS + STEPS + TIMED_STEPS, size), np.float32)
                present = value.name.replace("past_key_values", "present")
                self._binding.bind_cpu_input(value.name, cache)
                self._binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
                self._caches.append(cache)

    def run(self, tokens: Any) -> None:
        """Read tokens (1, T)."""
        self._length += tokens.shape[1]
        logits = np.empty((1, tokens.shape[1], self.vocabulary), np.float32)
        self._binding.bind_cpu_input("input_ids", tokens)
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self._length), np.int64))
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(self._binding)
        self._token = logits[:, -1:].argmax(-1)

    def steps(self, count: int) -> None:
        """Continue with the preferred tokens."""
        for _ in range(count):
            self.run(self._token)


if __name__ == "__main__":
    sys.exit(main())
