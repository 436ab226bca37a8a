"""Run every side in processes of their own, taking turns."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import bandwidth
from benchmarks.machine import machine
from benchmarks.memory import Resident, resident
from benchmarks.record import sealed
from benchmarks.runtimes import probe
from benchmarks.runtimes.record import Memory, Run, Runtimes, SideRuns
from benchmarks.runtimes.sides import Side
from compress.errors import BackendError
from compress.result import Progress, no_progress

SETTINGS = {
    "first_tokens": 64,
    "first_steps": 16,
    "prompt_tokens": 400,
    "short_tokens": 16,
    "steps": 64,
    "repeats": 3,
}
"""Of a run: a prompt and steps before memory is read; then so often a long prompt, and steps after a short one."""


def measure(
    sides: Sequence[Side],
    *,
    threads: int = 2,
    rounds: int = 5,
    baseline: str | None = None,
    perplexities: Mapping[str, float] | None = None,
    title: str = "Runtimes",
    command: str = "",
    progress: Progress = no_progress,
) -> Runtimes:
    """Measure how fast memory is read, and then every side in each round.

    Args:
        sides: with different names.
        threads: of each.
        rounds: runs of each side.
        baseline: name of the side that others are compared with; None is the first one.
        perplexities: by the names of sides, where they are known.
        title: of the record.
        command: that repeats this.
        progress: told of each run.

    Raises:
        BackendError: a runtime is missing or fails; the message says which, and what it said.
    """
    settings = settings_for(sides)
    speed = bandwidth(threads)
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for done in range(rounds * len(sides)):
        side = sides[done % len(sides)]
        found[side.name].append(run(side, settings | {"threads": threads}))
        progress("run", done + 1, rounds * len(sides))
    record = Runtimes(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=title,
        baseline=baseline or sides[0].name,
        threads=threads,
        settings=settings,
        bandwidth_bytes_per_second=speed,
        sides=tuple(_side(side, found[side.name], (perplexities or {}).get(side.name)) for side in sides),
        commands=(command,) if command else (),
        machine=machine(),
    )
    return sealed(record)


def settings_for(sides: Sequence[Side]) -> dict[str, int]:
    """SETTINGS, cut down to the shortest context."""
    longest = SETTINGS["prompt_tokens"] + 1
    contexts = [context for side in sides if (context := side.context) is not None]
    room = min([1.0, *(context / longest for context in contexts)])
    return {key: value if key == "repeats" else max(1, int(value * room)) for key, value in SETTINGS.items()}


def run(side: Side, settings: Mapping[str, int]) -> dict[str, Any]:
    """One process: what it printed last, and its memory where it paused.

    Raises:
        BackendError: it fails.
    """
    script = str(Path(probe.__file__).resolve())
    argv = [side.python, "-I", script, side.kind, str(side.path), json.dumps(dict(settings))]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise BackendError(f"{side.name} cannot be measured: {side.python}: {error.strerror}") from error
        with process:
            held, last = _listen(process)
        if process.returncode != 0:
            errors.seek(0)
            raise BackendError(f"{side.name} cannot be measured: {_last_line(errors.read(), side)}")
    answer: dict[str, Any] = json.loads(last)
    return answer | {"memory": held}


def _listen(process: subprocess.Popen[str]) -> tuple[dict[str, Resident | None], str]:
    """Read a process's memory whenever it pauses, until it ends; also what it said last."""
    held: dict[str, Resident | None] = {}
    last = ""
    assert process.stdin is not None  # they are pipes
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("at "):
            held[line.split()[1]] = resident(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
        last = line if line.strip() else last
    return held, last


def _last_line(text: str, side: Side) -> str:
    """What went wrong, and what to do where a package is missing."""
    last = (text.strip().splitlines() or ["it ended without a word"])[-1]
    if "No module named" in last:
        missing = last.partition("No module named")[2].strip()
        return f"{missing} is not in {side.python}: name an interpreter that has it, --python {side.name}=PATH"
    return last


def _side(side: Side, runs: Sequence[dict[str, Any]], perplexity: float | None) -> SideRuns:
    return SideRuns(
        name=side.name,
        kind=side.kind,
        file_bytes=side.file_bytes,
        bytes_per_token=side.bytes_per_token,
        versions=runs[0]["versions"],
        perplexity=perplexity,
        runs=tuple(_run(each) for each in runs),
    )


def _run(found: dict[str, Any]) -> Run:
    held = found["memory"]
    speeds = {key: value for key, value in found.items() if key not in ("memory", "versions")}
    return Run(**speeds, memory=memory_of(held) if all(held.values()) else None)


def memory_of(held: Mapping[str, Resident]) -> Memory:
    """Beyond what the process held before it loaded the model."""
    idle = asdict(held["idle"])
    beyond = {
        f"{when}_{kind}_bytes": asdict(held[when])[kind] - idle[kind]
        for when in ("loaded", "used")
        for kind in ("anon", "file", "total")
    }
    return Memory(idle_bytes=held["idle"].total, peak_bytes=held["done"].peak - held["idle"].total, **beyond)
