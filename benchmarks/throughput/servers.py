"""A server for each model, all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.servers import Server, server
from benchmarks.throughput.record import Settings
from benchmarks.throughput.sides import Side
from compress.result import Progress, no_progress


@contextmanager
def servers(
    sides: Sequence[Side],
    settings: Settings,
    log_of: Callable[[str], Path],
    progress: Progress = no_progress,
) -> Iterator[list[Server]]:
    """Start a server for each model, one after the other: what each finds of free memory must not change meanwhile.

    Args:
        sides: what is served.
        settings: what serves, and how.
        log_of: where the log of a model's server goes.
        progress: told of each that answers.

    Yields:
        The servers, in the order of the sides, once all of them answer.

    Raises:
        BackendError: one ends before it answers, or does not answer in time.
    """
    with ExitStack() as running:
        started: list[Server] = []
        for side in sides:
            log = log_of(side.name)
            serving = server(side.name, str(side.path), log, options_of(side, settings), settings.flags)
            started.append(running.enter_context(serving))
            progress(f"{side.name} is served", len(started), len(sides))
        yield started


def options_of(side: Side, settings: Settings) -> list[str]:
    """Of ``foldaway serve``."""
    options = ["--backend", settings.backend, "--served-model-name", side.name]
    return options if settings.max_model_len is None else [*options, "--max-model-len", str(settings.max_model_len)]
