"""What an ONNX export costs beside the model builder of onnxruntime-genai: seconds and peak memory, taking turns.

``python -m benchmarks.export_cost FOLDER [--dtype int4] [--rounds 3]`` reads a Hugging Face folder. Ours is everything
that ``foldaway export`` does but its comparison with PyTorch; the builder's is its own command. Each run is a process
of its own, imports and loading included.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.memory import peak_rss_of
from compress.errors import ConfigError

OURS = "import sys; from benchmarks.export_cost import write; write(*sys.argv[1:])"
BUILDER = "onnxruntime_genai.models.builder"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a line of JSON for each run."""
    parser = argparse.ArgumentParser("python -m benchmarks.export_cost", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face folder")
    parser.add_argument("--dtype", default="int4", metavar="TYPE", help="of both (int4)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (3)")
    given = parser.parse_args(argv)
    if not given.folder.is_dir():
        parser.error(f"there is no folder {given.folder}")
    try:
        for _ in range(given.rounds):
            for side in ("ours", "builder"):
                run = {"side": side, **cost(side, given.folder.resolve(), given.dtype)}
                sys.stdout.write(json.dumps(run) + "\n")
                sys.stdout.flush()
    except ConfigError as error:
        parser.error(str(error))
    return 0


def cost(side: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds, seconds of computing (which others on the machine change less), and peak bytes of one export.

    Raises:
        ConfigError: it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out, cache = f"{scratch}/out", f"{scratch}/cache"
        command = [sys.executable, "-P", "-c", OURS, str(folder), out, dtype]
        if side == "builder":
            command = [
                sys.executable,
                "-m",
                BUILDER,
                "-i",
                str(folder),
                "-o",
                out,
                "-p",
                dtype,
                "-e",
                "cpu",
                "-c",
                cache,
            ]
        before, start = _computing(), perf_counter()
        peak = peak_rss_of(command, quiet=True)
        return {"seconds": perf_counter() - start, "cpu_seconds": _computing() - before, "peak_bytes": peak}


def _computing() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(source: str, folder: str, dtype: str) -> None:
    """What our export does but for its check."""
    import torch

    from compress.sources import load
    from exporters import to_onnx
    from exporters.base import ExportOptions, in_dtype
    from exporters.onnx_graph import write_graph

    loaded = load(source)
    options = to_onnx.complete(ExportOptions(dtype=dtype))
    model = in_dtype(loaded.model, torch.float32)
    Path(folder).mkdir()
    write_graph(model, loaded.tokenizer, Path(folder), options, lambda *_: None)
    to_onnx.write_companions(model, loaded.tokenizer, Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
