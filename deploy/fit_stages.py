"""What a search does with one model: make, judge and measure it, each a stage of the run's folder that is done once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedModel

from benchmarks import tasks
from benchmarks.record import Model
from benchmarks.scoring import torch_scorer
from benchmarks.tasks import TaskScore
from compress import artifact
from compress.artifact import write_model
from compress.calibration import context_length_of
from compress.errors import ConfigError
from compress.evaluate import logits_of, perplexity
from compress.files import new_folder
from compress.methods import METHODS, method_config
from compress.result import Progress
from compress.sources import Loaded, fingerprint, load
from compress.surgery import clone
from deploy.fit_plan import Plan
from deploy.fit_record import DENSE, Judged, Made, Measured, in_turns, measured
from deploy.measured import latencies, points_of_line, resident, stored_bytes
from deploy.recipe import DISTILL, StepSpec
from deploy.ruler import Ruler, Size, fit_line
from deploy.search import Candidate
from deploy.steps import compress_model, evaluation_windows
from deploy.workspace import Workspace, digest
from exporters.base import installed_versions

MODEL = "model"
"""The folder of the best artifact, in that of the run."""

MADE, JUDGED, MEASURED = TypeAdapter(Made), TypeAdapter(Judged), TypeAdapter(Measured)
POINTS = TypeAdapter(list[tuple[Size, float]])


class Stages:
    """The dense model and the candidates of one search.

    Args:
        plan: what to search.
        root: the folder of the run.
        progress: told of each step.
        say: told what takes time, in words.

    Raises:
        ConfigError: the folder holds something else.
    """

    def __init__(self, plan: Plan, root: Path, *, progress: Progress, say: Callable[[str], None]) -> None:
        self.asked, self.target, self.plan = plan.asked, plan.target, plan
        self.root, self.progress, self.say = root, progress, say
        self.model_hash = fingerprint(plan.asked.model)
        self.work = Workspace(root)
        self._loaded: Loaded | None = None
        self._opened: tuple[Path, Loaded] | None = None
        self._of_dense: tuple[Measured, Ruler] | None = None
        self._made: dict[str, Made] = {}

    def common(self) -> dict[str, Any]:
        """What every stage depends on."""
        return {"versions": installed_versions(), "dense": self.model_hash, "device": self.asked.device}

    # --- The dense model

    def dense(self, device: str | None = None) -> Loaded:
        """The dense model, loaded once and only when a stage needs it."""
        if self._loaded is None:
            self.say(f"Loading {self.asked.model}")
            self._loaded = load(self.asked.model)
        self._loaded.model.to(device or self.asked.device)  # type: ignore[arg-type]
        return self._loaded

    def origin(self) -> Model:
        """Where the dense model came from."""

        def compute() -> dict[str, Any]:
            origin = self.dense().origin
            return dataclasses.asdict(Model(origin.name, origin.licence, origin.quantised_from))

        return Model(**self.work.result("origin", {"dense": self.model_hash, "name": self.asked.model}, compute))

    def measure_dense(self) -> tuple[Measured, Ruler]:
        """The dense model's value, and how the values of others follow from counts."""
        if self._of_dense is None:
            self._of_dense = self._measure_dense()
        return self._of_dense

    def _measure_dense(self) -> tuple[Measured, Ruler]:
        ruler, kind, context = self.plan.ruler, self.target.kind, self.target.context
        inputs = {**self.common(), "kind": kind, "context": context}
        counted = ruler.predict(self.target, self.plan.size)
        if context is None:
            return measured([counted]), ruler
        if kind == "memory":
            kept = self.work.result("measure-dense", inputs, partial(self._memory_of_dense, context))
            found = MEASURED.validate_python(kept)
            return found, dataclasses.replace(ruler, more_bytes=max(0, round(found.value - counted)))
        kept = self.work.result("measure-dense", inputs, partial(self._line, context))
        points = POINTS.validate_python(kept["points"])
        return MEASURED.validate_python(kept["dense"]), fit_line(self.target, ruler, points)

    def _memory_of_dense(self, context: int) -> dict[str, Any]:
        """From a folder, as that of every candidate is."""
        folder = self.root / "dense"
        shutil.rmtree(folder, ignore_errors=True)
        dense = self.dense("cpu")
        with new_folder(folder) as path:
            write_model(dense.model, dense.tokenizer, path, dense.processor)
        runs, peak = resident(folder, context, progress=self.progress)
        shutil.rmtree(folder)
        return _dumped(MEASURED, measured(runs, peak_bytes=peak))

    def _line(self, context: int) -> dict[str, Any]:
        """Latencies of the dense model and of two that are smaller."""
        points, runs = points_of_line(self.dense().model, context, self.progress)
        return {"dense": _dumped(MEASURED, measured(runs)), "points": POINTS.dump_python(points, mode="json")}

    def judge_dense(self) -> Judged:
        """How good the dense model is."""
        return self._judge(DENSE, self.model_hash, self.dense)

    # --- A candidate

    def time_shape(self, candidate: Candidate) -> Measured | None:
        """Latency of a candidate's shape, on weights that were not chosen; None where another value is limited."""
        context = self.target.context
        if self.target.kind != "latency" or context is None:
            return None

        def compute() -> dict[str, Any]:
            trial = clone(self.dense().model)
            config = method_config(candidate.method, candidate.options)
            METHODS[candidate.method].outline(trial, self.asked.calibration.rows, config)
            return self._in_turns(trial, context)

        inputs = {**self._inputs(candidate), "context": context}
        return MEASURED.validate_python(self.work.result(f"time-{candidate.name}", inputs, compute))

    def is_made(self, candidate: Candidate) -> bool:
        """Whether a candidate was compressed before."""
        return self.work.has(*self._made_by(candidate))

    def make(self, candidate: Candidate) -> Made:
        """Compress, and learn where that was asked for."""
        if candidate.name not in self._made:
            found = self.work.result(*self._made_by(candidate), partial(self._make, candidate))
            self._made[candidate.name] = MADE.validate_python(found)
        return self._made[candidate.name]

    def _make(self, candidate: Candidate) -> dict[str, Any]:
        path = self.folder(candidate)
        shutil.rmtree(path, ignore_errors=True)
        asked, dense, start = self.asked, self.dense(), time.perf_counter()
        steps = [StepSpec(method=candidate.method, set=dict(candidate.options))]
        if asked.distill_rows is not None:
            lesson = asked.calibration.model_copy(update={"rows": asked.distill_rows})
            steps.append(StepSpec(method=DISTILL, set=dict(asked.options.get(DISTILL, {})), calibration=lesson))
        manifest = compress_model(
            dense,
            steps,
            asked.calibration,
            path,
            device=asked.device,
            progress=self.progress,
            consume=False,
            scratch=self.root / "scratch",
        )
        seconds = time.perf_counter() - start
        return _dumped(MADE, Made(manifest.id, manifest.layout.kind, manifest.parameters["total"], seconds))

    def judge(self, candidate: Candidate, made: Made) -> Judged:
        """How good a candidate's artifact is."""
        return self._judge(candidate.name, made.artifact, lambda: self._open(candidate))

    def _judge(self, name: str, identity: str, opened: Callable[[], Loaded]) -> Judged:
        asked, text = self.asked, self.asked.evaluation
        by = text.model_dump() if text is not None else {"tasks": asked.tasks, "limit": asked.limit}
        inputs = {**self.common(), "model": identity, "by": by, "hashes": self.plan.judge_hashes}

        def compute() -> dict[str, Any]:
            loaded, start = opened(), time.perf_counter()
            context, found = context_length_of(loaded.model), None
            scores: tuple[TaskScore, ...] = ()
            if text is not None:
                windows = evaluation_windows(text, loaded.tokenizer, context)
                logits = logits_of(loaded.model)
                found = perplexity(logits, windows.tokens, self.progress, predicted=windows.predicted)
            else:
                scorer, limit = torch_scorer(loaded.model), asked.limit
                scores = tasks.evaluate(
                    scorer, loaded.tokenizer, context, asked.tasks, limit=limit, progress=self.progress
                )
            return _dumped(JUDGED, Judged(found, scores, time.perf_counter() - start))

        return JUDGED.validate_python(self.work.result(f"judge-{name}", inputs, compute))

    def measure(self, candidate: Candidate, made: Made) -> Measured:
        """The value that the budget limits, of a candidate's artifact."""
        kind, context = self.target.kind, self.target.context
        inputs = {**self.common(), "model": made.artifact, "kind": kind, "context": context}

        def compute() -> dict[str, Any]:
            if context is None:
                return _dumped(MEASURED, measured([stored_bytes(self.path(candidate))]))
            if kind == "memory":
                runs, peak = resident(self.path(candidate), context, progress=self.progress)
                return _dumped(MEASURED, measured(runs, peak_bytes=peak))
            return self._in_turns(self._open(candidate).model, context)

        if kind == "parameters":
            return measured([made.parameters])
        return MEASURED.validate_python(self.work.result(f"measure-{candidate.name}", inputs, compute))

    def _in_turns(self, model: PreTrainedModel, context: int) -> dict[str, Any]:
        """Latency of a model beside that of the dense one."""
        of_dense, _ = self.measure_dense()
        theirs, ours = latencies([self.dense().model, model], context, progress=self.progress)
        return _dumped(MEASURED, in_turns(of_dense.value, theirs, ours))

    # --- Artifacts

    def _inputs(self, candidate: Candidate) -> dict[str, Any]:
        """What a candidate's artifact depends on."""
        calibration = {**self.asked.calibration.model_dump(), "text": self.plan.text_hashes["calibration"]}
        rows, options = self.asked.distill_rows, dict(self.asked.options.get(DISTILL, {}))
        made_by = {"method": candidate.method, "options": dict(candidate.options), "calibration": calibration}
        return {**self.common(), **made_by, "distill": None if rows is None else [rows, options]}

    def _made_by(self, candidate: Candidate) -> tuple[str, dict[str, Any]]:
        """The stage that makes a candidate."""
        return f"compress-{candidate.name}", self._inputs(candidate)

    def folder(self, candidate: Candidate) -> Path:
        """Where a candidate's artifact is made."""
        return self.root / f"artifact-{candidate.name}-{digest(self._inputs(candidate))}"

    def path(self, candidate: Candidate) -> Path:
        """Where a candidate's artifact lies; it is made again where it is not there any more.

        Raises:
            ConfigError: it came out otherwise.
        """
        final, made = self.root / MODEL, self.make(candidate).artifact
        if artifact.is_artifact(final) and artifact.read_manifest(final).id == made:
            return final
        folder = self.folder(candidate)
        if not artifact.is_artifact(folder) and MADE.validate_python(self._make(candidate)).artifact != made:
            raise ConfigError(
                f"{candidate.name} did not come out as before, although nothing has changed: search in another folder"
            )
        return folder

    def _open(self, candidate: Candidate) -> Loaded:
        """A candidate's artifact, loaded once while it is in work."""
        path = self.path(candidate)
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # before the next is loaded
            self._opened = path, load(str(path))
        self._opened[1].model.to(self.asked.device)  # type: ignore[arg-type]
        return self._opened[1]

    def close(self) -> None:
        """Let go of the artifact that is in memory."""
        self._opened = None

    def keep_only(self, candidate: Candidate | None) -> None:
        """Remove all artifacts but one."""
        kept = None if candidate is None else self.folder(candidate)
        for folder in self.root.glob("artifact-*"):
            if folder != kept:
                shutil.rmtree(folder)

    def deliver(self, candidate: Candidate | None) -> None:
        """Let an artifact take its place as a whole, and what lies there go; None: nothing is to lie there."""
        final, old = self.root / MODEL, self.root / f".{MODEL}.old"
        path = None if candidate is None else self.path(candidate)
        if path != final and final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        if path is not None and path != final:
            os.rename(path, final)
        for folder in (old, *self.root.glob("artifact-*"), *self.root.glob(".*partial-*"), self.root / "scratch"):
            shutil.rmtree(folder, ignore_errors=True)


def _dumped(adapter: TypeAdapter[Any], found: Any) -> dict[str, Any]:
    """A result as JSON has it."""
    dumped: dict[str, Any] = adapter.dump_python(found, mode="json")
    return dumped
