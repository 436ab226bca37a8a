"""What goes into a method beside the model, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called by long work; ``done == total`` ends one stretch."""


def no_progress(what: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Run:
    """How to run a method: what the paper does not say.

    Attributes:
        progress: told of each step of long work.
        device: where the forward passes run.
        scratch: a folder for what an interrupted run can go on from; None keeps nothing. It may be removed any time.
        consume: the model given may be cut in place, so that a big one is not held twice. Without it the model given is
            not changed.
        teacher: the model that a method learns from, where it is not the model given: same tokens, on the same device
            and in eval mode. Not changed.
        score: judges a model for a method that asks for it, the higher the better; it must not change the model.
        spill_bytes: hidden states up to so many bytes are held in memory at a time, and as many bytes of weights beside
            the model; what is more lies in memory-mapped files in ``scratch``.
    """

    progress: Progress = no_progress
    device: str = "cpu"
    scratch: Path | None = None
    consume: bool = False
    teacher: PreTrainedModel | None = None
    score: Callable[[PreTrainedModel], float] | None = None
    spill_bytes: int = 2_000_000_000


@dataclass(frozen=True)
class Report:
    """What a method did, in numbers that a recount confirms.

    Attributes:
        method: name in METHODS.
        config: the method's configuration, JSON-ready.
        numbers: counts, scores and choices, JSON-ready; the same for the same model, rows and config.
        resumed_seconds: what work taken over from ``run.scratch`` had cost when it was done.
    """

    method: str
    config: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    resumed_seconds: float = 0.0


@dataclass(frozen=True)
class CompressedModel:
    """A smaller model and the report of how it became so."""

    model: PreTrainedModel
    report: Report
