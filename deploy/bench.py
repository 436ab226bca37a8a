"""Compare two things that are there, and judge the comparison."""

from __future__ import annotations

import datetime
from pathlib import Path

from benchmarks import record as records
from benchmarks import report
from benchmarks.gate import Limit, judge
from benchmarks.machine import machine
from benchmarks.measures import PairedRuns
from benchmarks.record import Model, Record
from compress.arch import check_text_model
from compress.files import check_free
from compress.result import Progress
from compress.sources import config_of
from deploy.comparison import Measured, measure
from deploy.recipe import BenchmarkSpec, EvaluationSpec
from deploy.sides import Side, check_comparable, open_side
from deploy.steps import evaluation_windows
from exporters.base import is_export


def bench(
    baseline: str,
    candidate: str,
    out: Path,
    *,
    limits: tuple[Limit, ...],
    evaluation: EvaluationSpec,
    spec: BenchmarkSpec,
    progress: Progress,
    command: str,
) -> tuple[Record, Path]:
    """Compare two things that are there: exports, artifacts or models. Writes record.json and report.html.

    Returns:
        The record and the path of the report.
    """
    check_free(out)
    for path in (baseline, candidate):
        if not is_export(path):
            check_text_model(config_of(path), "foldaway bench")  # better now than when its server starts
    ours, theirs = open_side(baseline), open_side(candidate)
    check_comparable(ours, theirs)
    rows = evaluation_windows(evaluation, ours.tokenizer, min(ours.context_length, theirs.context_length))
    measured = measure(ours, theirs, rows, spec, out / "logs", progress)
    both = measured.comparison
    verdict = judge(limits, both.baseline, both.candidate, both.intervals) if limits else None
    sealed = records.write(
        Record(
            kind="bench",
            created=now(),
            title=f"{candidate} against {baseline}",
            model=model_of(ours),
            artifacts={"baseline": ours.origin.artifact_id, "candidate": theirs.origin.artifact_id},
            measured=theirs.form if ours.form == theirs.form else f"{theirs.form} against {ours.form}",
            baseline=both.baseline,
            candidate=both.candidate,
            ratio=both.ratio,
            intervals=both.intervals,
            verdict=verdict.verdict if verdict else None,
            gates=verdict.gates if verdict else (),
            ladder=None,
            variants=(),
            quality={"candidate against baseline": measured.quality},
            runs=all_runs(measured),
            recipe=None,
            texts={"evaluation": rows.record()},
            commands=(command,),
            machine=machine(),
        ),
        out / "record.json",
    )
    report.write(sealed, out / "report.html")
    return sealed, out / "report.html"


def model_of(side: Side) -> Model:
    """The dense model behind a side."""
    return Model(side.origin.name, side.origin.licence, side.origin.quantised_from)


def all_runs(measured: Measured) -> tuple[PairedRuns, ...]:
    """The raw runs of everything that was timed."""
    in_process = (measured.latency.prefill, measured.latency.decode) if measured.latency else ()
    return (*in_process, measured.served.ttft, measured.served.decode, measured.served.e2e)


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
