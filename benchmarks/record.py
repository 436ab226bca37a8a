"""One result is one JSON file: what was measured, on what, where, how sure, and what the gate said. Schema version 1.

Units are seconds, bytes and tokens; a ratio is candidate / baseline. Records are written once and never edited: `id` is
a hash of everything else in the file, and reading checks it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import JsonValue, ValidationError

from benchmarks.gate import GateLine, Outcome
from benchmarks.intervals import Interval
from benchmarks.machine import Machine
from benchmarks.measures import Intervals, Measures, Metric, PairedRuns, Quality
from compress.errors import ConfigError
from compress.files import write_file
from compress.schema import Strict, complaint

FORMAT: Final = "foldaway-record"
VERSION: Final = 1


@dataclass(frozen=True)
class Model:
    """The dense model that both sides come from.

    Attributes:
        name: as it was asked for, for example "demo:smollm2".
        licence: of its weights, None when unknown.
        quantised_from: the format its weights were dequantised from, for example "Q4_1"; None for weights as trained.
    """

    name: str
    licence: str | None = None
    quantised_from: str | None = None


@dataclass(frozen=True)
class Variant:
    """One form of the model, for the table that tells compression and number format apart.

    Attributes:
        name: for example "dense, int4 ONNX".
        side: whose form it is.
        format: "torch" or "onnx".
        dtype: of the weights, for example "fp32" or "int4".
        measures: what is known of it.
        perplexity_standard_error: of its perplexity.
    """

    name: str
    side: Literal["baseline", "candidate"]
    format: str
    dtype: str
    measures: Measures
    perplexity_standard_error: float | None = None


@dataclass(frozen=True)
class Step:
    """One rung of the sparsity ladder. The dense model is the rung with sparsity 0.

    Attributes:
        sparsity: asked for, of the blocks' parameters.
        artifact: its id; None for the dense model.
        parameters: distinct weights.
        block_sparsity: share of the blocks' parameters that went.
        model_sparsity: share of all parameters that went.
        perplexity: on the evaluation text.
        perplexity_standard_error: of that.
        perplexity_ratio: to the dense model.
        ratio_interval: of that ratio.
        passed: whether it met the quality limit; None when undecided.
        chosen: whether it is the candidate.
    """

    sparsity: float
    artifact: str | None
    parameters: int
    block_sparsity: float
    model_sparsity: float
    perplexity: float
    perplexity_standard_error: float | None
    perplexity_ratio: float
    ratio_interval: Interval | None = None
    passed: bool | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Ladder:
    """Compressions tried from mild to strong.

    Attributes:
        measured: what the perplexities belong to, for example "fp32, PyTorch".
        max_perplexity_ratio: the quality limit of a rung; None without one.
        steps: in the order tried, the dense model first.
    """

    measured: str
    max_perplexity_ratio: float | None
    steps: tuple[Step, ...]


class Record(Strict):
    """Everything one run or one benchmark found out.

    Attributes:
        id: hash of the rest of the record; `write` fills it in.
        kind: "run" compressed a model first, "bench" compared two things that were there.
        created: ISO 8601, UTC.
        title: what was compared, in words.
        model: the dense model.
        artifacts: side -> artifact id; None for a side that is no artifact.
        measured: what `baseline` and `candidate` are, for example "int4 ONNX, served on the CPU".
        baseline, candidate: the metrics.
        ratio: of every metric; None where it was not measured on both sides.
        intervals: of ratios and of the candidate's values.
        verdict: of the gate; None when no gate was given.
        gates: its lines.
        ladder: the compressions tried; None for a "bench".
        variants: forms of the model, the dense one as it came first.
        quality: what was compared, for example "int4 candidate against int4 baseline" -> paired quality.
        runs: raw runs of everything that was timed.
        recipe: as it was run, with defaults filled in; None without one.
        texts: "calibration", "evaluation" -> source, hash and size.
        commands: that repeat this, in order.
        machine: where.
    """

    format: Literal["foldaway-record"] = FORMAT
    version: Literal[1] = VERSION
    id: str = ""
    kind: Literal["run", "bench"]
    created: str
    title: str
    model: Model
    artifacts: dict[Literal["baseline", "candidate"], str | None]
    measured: str
    baseline: Measures
    candidate: Measures
    ratio: dict[Metric, float | None]
    intervals: Intervals
    verdict: Outcome | None
    gates: tuple[GateLine, ...]
    ladder: Ladder | None
    variants: tuple[Variant, ...]
    quality: dict[str, Quality]
    runs: tuple[PairedRuns, ...]
    recipe: dict[str, JsonValue] | None
    texts: dict[str, dict[str, JsonValue]]
    commands: tuple[str, ...]
    machine: Machine

    def last_line(self, report: Path) -> dict[str, Any]:
        """The JSON object that a command prints last."""
        content = json.loads(self.model_dump_json())
        return {
            "verdict": self.verdict,
            "artifact": self.artifacts.get("candidate"),
            "report": str(report),
            "baseline": content["baseline"],
            "candidate": content["candidate"],
            "ratio": content["ratio"],
            "gates": [
                {"name": line.name, "limit": line.limit, "value": written["value"], "passed": line.passed}
                for line, written in zip(self.gates, content["gates"], strict=True)
            ],
        }


def content_id(content: Mapping[str, Any]) -> str:
    """Hash of everything in a record but its `id`: 16 hexadecimal digits."""
    rest = {key: value for key, value in content.items() if key != "id"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


Sealed = TypeVar("Sealed", bound=Strict)


def sealed(record: Sealed) -> Sealed:
    """The record with its id filled in."""
    return record.model_copy(update={"id": content_id(json.loads(record.model_dump_json()))})


def write(record: Sealed, path: Path, *, indent: int | None = 2) -> Sealed:
    """Fill in a record's id and write it, whole or not at all; returns the record as written.

    Without an indent it is one line, for records with so many numbers that nobody reads them line by line.
    """
    record = sealed(record)
    write_file(path, record.model_dump_json(indent=indent) + "\n")
    return record


def format_of(path: Path) -> str:
    """The format that a JSON file says it has; empty where it says none.

    Raises:
        ConfigError: no such file, or no JSON.
    """
    return str(_content(path).get("format", ""))


def read(path: Path) -> Record:
    """Read and check a record of a run or a benchmark; see `read_as`."""
    return read_as(Record, FORMAT, path)


def read_as(schema: type[Sealed], format: str, path: Path) -> Sealed:
    """Read and check a record.

    Args:
        schema: what it must follow.
        format: what its `format` must say.
        path: of the file.

    Raises:
        ConfigError: no such file, no such record, another schema version, unknown or missing keys, or edited by hand.
    """
    content = _content(path)
    if content.get("format") != format:
        raise ConfigError(f"{path} is not a benchmark record: its format is not {format!r}")
    if content.get("version") != VERSION:
        raise ConfigError(
            f"{path} has schema version {content.get('version')!r}; this foldaway reads version {VERSION}"
        )
    try:
        record = schema.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ConfigError(f"record {path}: {complaint(error)}") from error
    # As it was written: a schema that has grown since adds keys with defaults.
    if content.get("id") != content_id(content):
        raise ConfigError(f"the record {path} was changed after it was written: its content is not that of its id")
    return record


def _content(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the record {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the record {path} is not JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} is not a benchmark record: it is no JSON object")
    return content
