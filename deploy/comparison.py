"""Two sides, measured in one run: quality, in-process speed, speed and memory as served."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.latency import LatencyPair, ServedPair, latency_pair, served_pair
from benchmarks.measures import Comparison, Quality, compare
from benchmarks.memory import PeakMemory
from benchmarks.quality import quality
from compress.calibration import TokenRows
from compress.errors import BackendError, require
from compress.result import Progress
from deploy.recipe import BenchmarkSpec
from deploy.sides import Side

START_SECONDS = 180.0
WATCH_SECONDS = 1.0
"""Looking at a process tree reads all of /proc and slows what is timed; the kernel's own mark misses nothing."""


@dataclass(frozen=True)
class Measured:
    """Everything that was found out about two sides."""

    comparison: Comparison
    quality: Quality
    latency: LatencyPair | None
    served: ServedPair


def measure(
    baseline: Side, candidate: Side, rows: TokenRows, spec: BenchmarkSpec, log_folder: Path, progress: Progress
) -> Measured:
    """Measure two sides, one kind at a time.

    Args:
        baseline: the dense model.
        candidate: the smaller one.
        rows: evaluation windows.
        spec: how to time.
        log_folder: where the servers' own output goes.
        progress: told of each step.
    """
    found = quality(baseline.logits, candidate.logits, rows, progress)
    latency = None
    if baseline.session and candidate.session:
        latency = latency_pair(
            baseline.session,
            candidate.session,
            prompt_tokens=spec.prompt_tokens,
            decode_tokens=spec.decode_tokens,
            repeats=spec.repeats,
            progress=progress,
        )
    served, peaks = serve_both(baseline.path, candidate.path, spec, log_folder, progress)
    comparison = compare(
        parameters=(baseline.parameters, candidate.parameters),
        size_bytes=(baseline.size_bytes, candidate.size_bytes),
        peak_rss_bytes=peaks,
        quality=found,
        decode=latency.decode if latency else served.decode,
        ttft=served.ttft,
    )
    return Measured(comparison, found, latency, served)


def serve_both(
    baseline: str, candidate: str, spec: BenchmarkSpec, log_folder: Path, progress: Progress
) -> tuple[ServedPair, tuple[int, int]]:
    """Start a server for each side, drive both in turns, and watch their memory from start to end."""
    with (
        server(baseline, log_folder / "server-baseline.log") as (ours, ours_url),
        PeakMemory(ours, interval_seconds=WATCH_SECONDS) as ours_peak,
        server(candidate, log_folder / "server-candidate.log") as (theirs, theirs_url),
        PeakMemory(theirs, interval_seconds=WATCH_SECONDS) as theirs_peak,
    ):
        served = served_pair(
            ours_url,
            theirs_url,
            spec.prompts,
            max_tokens=spec.max_tokens,
            warmup=2,
            extra_body={"ignore_eos": True},  # answers of equal length on both sides
            progress=progress,
        )
    return served, (ours_peak.bytes, theirs_peak.bytes)


@contextmanager
def server(path: str, log: Path) -> Iterator[tuple[int, str]]:
    """Run ``foldaway serve`` in a process of its own, on a free port of the loopback interface.

    Yields:
        Its process id and the base URL of its API.

    Raises:
        BackendError: it ends before it is ready, or is not ready in time.
    """
    port = _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    # -P: a deploy.py in the working folder must not take our place.
    command = [sys.executable, "-P", "-m", "deploy", "serve", path, "--port", str(port), "--until-stdin-closes"]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            # Our end of the pipe closes when this process ends, however it ends, and the server with it.
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield process.pid, f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def child_environment() -> dict[str, str]:
    """The child finds the same packages as this process, and asks for no key that our client does not have."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FOLDAWAY_API_KEY": ""}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    httpx = require("httpx", "serve")
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                said = last_words(log)
                raise BackendError(f"the server ended before it was ready; it said: {said} (all of it is in {log})")
            try:
                if client.get(url).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise BackendError(f"the server was not ready after {START_SECONDS:.0f} seconds; see {log}")


def last_words(log: Path) -> str:
    """The last line of what a process of ours wrote before it ended."""
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
