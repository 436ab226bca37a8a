"""Two sides, measured in one run: quality, in-process speed, speed and memory as served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.latency import LatencyPair, ServedPair, latency_pair, served_pair
from benchmarks.measures import Comparison, Quality, compare
from benchmarks.memory import PeakMemory
from benchmarks.quality import quality
from benchmarks.servers import server
from compress.calibration import TokenRows
from compress.result import Progress
from deploy.recipe import BenchmarkSpec
from deploy.sides import Side

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
        server("the baseline", baseline, log_folder / "server-baseline.log") as ours,
        PeakMemory(ours.process.pid, interval_seconds=WATCH_SECONDS) as ours_peak,
        server("the candidate", candidate, log_folder / "server-candidate.log") as theirs,
        PeakMemory(theirs.process.pid, interval_seconds=WATCH_SECONDS) as theirs_peak,
    ):
        served = served_pair(
            ours.url,
            theirs.url,
            spec.prompts,
            max_tokens=spec.max_tokens,
            warmup=2,
            extra_body={"ignore_eos": True},  # answers of equal length on both sides
            progress=progress,
        )
    return served, (ours_peak.bytes, theirs_peak.bytes)
