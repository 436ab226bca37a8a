"""Serve every model, and drive the servers in turns."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.record import sealed
from benchmarks.servers import LAST_WORDS_SECONDS, Server
from benchmarks.throughput.load import drive
from benchmarks.throughput.prompts import numbered
from benchmarks.throughput.record import ENGINES, WARM_UP_REQUESTS, Measurement, Settings, Throughput
from benchmarks.throughput.servers import servers
from benchmarks.throughput.sides import Side, served
from compress.errors import BackendError
from compress.result import Progress, no_progress
from exporters.base import installed_versions

PACKAGES = (*ENGINES, "torch", "transformers")


@dataclass(frozen=True)
class Turn:
    """What one model is asked next.

    Attributes:
        model: place of the model among all.
        in_flight: requests that are open at the same time.
        repeat: the round, from 1 on; 0 does not count.
        first: number that the first prompt begins with.
        requests: how many prompts.
    """

    model: int
    in_flight: int
    repeat: int
    first: int
    requests: int


def turns(models: int, settings: Settings) -> list[Turn]:
    """All turns, in order. In a round the models get the same prompts; no model gets a number twice."""
    found, first = [], 0
    for repeat in range(settings.repeats + 1):
        for in_flight in settings.in_flight:
            requests = settings.requests(in_flight) if repeat else WARM_UP_REQUESTS * in_flight
            for place in range(models):
                model = (place + max(0, repeat - 1)) % models
                found.append(Turn(model, in_flight, repeat, first, requests))
            first += requests
    return found


def measure(
    sides: Sequence[Side],
    settings: Settings,
    *,
    log_of: Callable[[str], Path],
    title: str = "Throughput",
    command: str = "",
    progress: Progress = no_progress,
) -> Throughput:
    """Serve all models at once, and measure them in turns.

    Args:
        sides: the first is the baseline.
        settings: of all turns.
        log_of: where the log of a model's server goes.
        title: of the record.
        command: that repeats this.
        progress: told of each server and each turn.

    Raises:
        BackendError: a server ends, or a request fails; names the model.
        ConfigError: a folder holds no weights that are known.
        CorruptArtifact: a file of one cannot be read.
        MissingExtra: the packages of clients are not installed.
    """
    models = tuple(served(side) for side in sides)
    with servers(sides, settings, log_of, progress) as started:
        measurements = asyncio.run(drive_all(started, settings, progress))
    record = Throughput(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=title,
        settings=dataclasses.replace(settings, flags=tuple(map(portable, settings.flags))),
        models=models,
        measurements=tuple(measurements),
        versions=installed_versions(PACKAGES),
        gpus=_gpus(),
        commands=(command,) if command else (),
        machine=machine(),
    )
    return sealed(record)


async def drive_all(
    started: Sequence[Server], settings: Settings, progress: Progress = no_progress
) -> list[Measurement]:
    """Every turn, of which those of the first round are left out.

    Raises:
        BackendError: a server ends, or a request fails; names the model.
    """
    found = []
    planned = turns(len(started), settings)
    for done, turn in enumerate(planned, start=1):
        measurement = await _measured(started[turn.model], turn, settings.max_tokens)
        if turn.repeat:
            found.append(measurement)
        progress(f"{measurement.model}, {turn.in_flight} in flight", done, len(planned))
    return found


async def _measured(server: Server, turn: Turn, max_tokens: int) -> Measurement:
    prompts = numbered(turn.first, turn.requests)
    try:
        seconds, answers = await drive(
            server.url, server.name, prompts, in_flight=turn.in_flight, max_tokens=max_tokens
        )
    except BackendError:
        server.check(LAST_WORDS_SECONDS)  # one that ended has more to say
        raise
    return Measurement(
        model=server.name,
        in_flight=turn.in_flight,
        repeat=turn.repeat,
        seconds=round(seconds, 6),
        prompt_tokens=tuple(answer.prompt_tokens for answer in answers),
        output_tokens=tuple(answer.output_tokens for answer in answers),
        ttft_seconds=tuple(answer.ttft_seconds for answer in answers),
        e2e_seconds=tuple(answer.e2e_seconds for answer in answers),
    )


def portable(word: str) -> str:
    """A word of a command line; a path that leads out of the working folder, alone or behind a "=", is a mere name."""
    name, equals, path = word.rpartition("=")
    if not (Path(path).is_absolute() or path.startswith("..")):
        return word
    relative = os.path.relpath(path)
    return f"{name}{equals}{Path(path).name if relative.startswith('..') else relative}"


def _gpus() -> tuple[str, ...]:
    """The names of NVIDIA's GPUs, without loading what would take memory on them."""
    argv = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in said.splitlines() if line.strip())
