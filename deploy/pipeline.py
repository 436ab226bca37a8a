"""Run a recipe: compress, export, serve, measure, judge, report. A stage whose inputs are unchanged is skipped."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record as records
from benchmarks import report
from benchmarks.gate import Limit, Verdict, judge
from benchmarks.intervals import Interval, exponential_of_mean
from benchmarks.machine import machine
from benchmarks.measures import Intervals, Measures, Quality
from benchmarks.quality import quality
from benchmarks.record import Ladder, Record, Variant
from compress import artifact, budget
from compress.calibration import TokenRows, context_length_of
from compress.errors import ConfigError
from compress.evaluate import Perplexity, logits_of, perplexity
from compress.result import Progress
from compress.sources import Loaded, fingerprint, load, skeleton
from compress.surgery import without_weights
from compress.text import text_hash
from deploy.bench import all_runs, model_of, now
from deploy.comparison import Measured, measure
from deploy.recipe import DISTILL, Recipe, StepSpec
from deploy.sides import form_of, open_side
from deploy.steps import CHECK_TOKENS, compress_model, evaluation_windows, try_on_shapes
from deploy.workspace import Workspace
from exporters import export
from exporters.base import installed_versions
from exporters.to_onnx import check_layout


@dataclass
class _Rung:
    """One value of the ladder: where its artifact lies, and how good it is."""

    options: dict[str, Any]
    path: Path
    manifest: artifact.Manifest
    perplexity: Perplexity
    ratio_interval: Interval | None
    passed: bool | None


class Pipeline:
    """One run of a recipe in a folder."""

    def __init__(self, recipe: Recipe, root: Path, *, device: str, progress: Progress, say: Callable[[str], None]):
        self.recipe = recipe
        self.device = device
        self.progress = progress
        self.say = say
        self.model_hash = fingerprint(recipe.model)
        shape = skeleton(recipe.model)
        check_layout(shape)  # better now than after the compression
        drawn = {(step.calibration or recipe.calibration).source for step in recipe.steps}
        self.source_hashes = {
            source: text_hash(source, "calibration") for source in sorted({*drawn, recipe.calibration.source})
        }
        self.text_hashes = {
            "calibration": self.source_hashes[recipe.calibration.source],
            "evaluation": text_hash(recipe.evaluation.source, "evaluation"),
        }
        for step in recipe.steps:
            learnt = self.source_hashes[(step.calibration or recipe.calibration).source]
            if learnt == self.text_hashes["evaluation"]:
                raise ConfigError(f"{step.method}: a model is not judged on the text that it was calibrated on")
        for chain in recipe.chains():
            try_on_shapes(without_weights(shape), chain, recipe.calibration)
        self.work = Workspace(root)  # last: a mistake leaves nothing behind
        self.candidate_path = root
        self._loaded: Loaded | None = None

    def run(self, command: str) -> Record:
        """Do what is left to do, and return the record.

        Args:
            command: the call that repeats this run, for the report.
        """
        self.say(f"The dense model: {self.recipe.model}")
        dense = self._perplexity("evaluate-dense", self.model_hash, self.recipe.model)
        rungs = self._climb(dense)
        chosen = next((rung for rung in reversed(rungs) if rung.passed), rungs[0])
        baseline = self._export("export-dense", self.model_hash, self.recipe.model)
        self.candidate_path = self._export("export-candidate", chosen.manifest.id, str(chosen.path))
        return self._judge(command, dense, rungs, chosen, baseline)

    # --- Compression

    def _climb(self, dense: Perplexity) -> list[_Rung]:
        """Try the values of one step from mild to strong; stop at the first that misses the quality limits."""
        parent, parent_hash = self.recipe.model, self.model_hash
        rung_at, rungs = self.recipe.rung, []
        for place, step in enumerate(self.recipe.steps[:rung_at], start=1):
            path = self._compress(f"step{place}-{step.method}", parent, parent_hash, step)
            parent, parent_hash = str(path), artifact.read_manifest(path).id
        for chain in self.recipe.chains():
            tried = chain[rung_at]
            self.say(f"{tried.method} with {_options(tried.set)}")
            path = self._compress(f"artifact-{tried.method}", parent, parent_hash, tried)
            for step in chain[rung_at + 1 :]:
                self.say(f"  then {step.method}" + (f" with {_options(step.set)}" if step.set else ""))
                path = self._compress(f"artifact-{step.method}", str(path), artifact.read_manifest(path).id, step)
            rung = self._rung(dict(tried.set), path, dense)
            rungs.append(rung)
            self.say(
                f"  perplexity {rung.perplexity.value:.2f}, {_times(rung.perplexity.value, dense.value)} the dense"
            )
            if not rung.passed:
                break
        return rungs

    @property
    def _behind(self) -> int:
        """How many steps come behind the one of which several values are tried."""
        return len(self.recipe.steps) - 1 - self.recipe.rung

    def _compress(self, stage: str, parent: str, parent_hash: str, step: StepSpec) -> Path:
        calibration = step.calibration or self.recipe.calibration
        inputs = {**_common(), "parent": parent_hash, "method": step.method, "options": step.set}
        inputs["calibration"] = {**calibration.model_dump(), "text": self.source_hashes[calibration.source]}
        distils = step.method == DISTILL and parent != self.recipe.model
        if distils:
            inputs["teacher"] = self.model_hash

        def make(path: Path) -> None:
            # The dense model serves every rung; a model in between is loaded for this step alone.
            consume = parent != self.recipe.model
            loaded = load(parent) if consume else self._dense()
            scratch = self.work.root / "scratch"
            if step.method == DISTILL:
                scratch /= path.name  # large, and of no use to other stages
            compress_model(
                loaded,
                [step],
                calibration,
                path,
                device=self.device,
                progress=self.progress,
                consume=consume,
                scratch=scratch,
                teacher=self._dense() if distils else None,
            )
            if step.method == DISTILL:
                shutil.rmtree(scratch, ignore_errors=True)

        return self.work.folder(stage, inputs, make)

    def _rung(self, options: dict[str, Any], path: Path, dense: Perplexity) -> _Rung:
        manifest = artifact.read_manifest(path)
        found = self._perplexity("evaluate-artifact", manifest.id, str(path))
        differences = list(map(operator.sub, found.window_nll, dense.window_nll))
        interval = exponential_of_mean(differences, "Student's t on paired window losses")
        limits = self._quality_limits()
        passed: bool | None = True
        if limits:
            own = exponential_of_mean(found.window_nll, "Student's t on window losses")
            intervals = Intervals(
                ratio={"perplexity": interval} if interval else {}, candidate={"perplexity": own} if own else {}
            )
            verdict = judge(limits, Measures(perplexity=dense.value), Measures(perplexity=found.value), intervals)
            passed = {"pass": True, "fail": False, "undecided": None}[verdict.verdict]
        return _Rung(options, path, manifest, found, interval, passed)

    def _quality_limits(self) -> list[Limit]:
        return [limit for limit in self.recipe.gate.limits if limit.metric == "perplexity"]

    # --- Measurements

    def _perplexity(self, stage: str, model_hash: str, name: str) -> Perplexity:
        """Perplexity of a PyTorch model on the evaluation windows."""
        inputs = {**_common(), "model": model_hash, "evaluation": self._evaluation_inputs()}

        def compute() -> dict[str, Any]:
            loaded = self._dense() if name == self.recipe.model else load(name)
            loaded.model.to(self.device)  # type: ignore[arg-type]
            rows = self._windows(loaded)
            found = perplexity(logits_of(loaded.model), rows.tokens, self.progress, predicted=rows.predicted)
            return dataclasses.asdict(found)

        found = self.work.result(stage, inputs, compute)
        return Perplexity(**{**found, "window_nll": tuple(found["window_nll"])})

    def _evaluation_inputs(self) -> dict[str, Any]:
        return {**self.recipe.evaluation.model_dump(), "text": self.text_hashes["evaluation"]}

    def _windows(self, loaded: Loaded) -> TokenRows:
        return evaluation_windows(self.recipe.evaluation, loaded.tokenizer, context_length_of(loaded.model))

    def _export(self, stage: str, model_hash: str, name: str) -> Path:
        spec = self.recipe.export
        inputs = {**_common(), "model": model_hash, "export": dataclasses.asdict(spec.options())}
        if spec.smooth:
            inputs["smoothed on"] = text_hash("builtin", "calibration")

        def make(path: Path) -> None:
            self.say(f"Exporting {name} to {spec.dtype} ONNX")
            loaded = self._dense() if name == self.recipe.model else load(name)
            loaded.model.to("cpu")  # type: ignore[arg-type]
            tokens = self._windows(loaded).tokens[:1, :CHECK_TOKENS]
            export(loaded, path, to=spec.to, options=spec.options(), check_tokens=tokens, progress=self.progress)

        return self.work.folder(stage, inputs, make)

    def _dense(self) -> Loaded:
        """The dense model, loaded once and only when a stage needs it."""
        if self._loaded is None:
            self._loaded = load(self.recipe.model)
        return self._loaded

    # --- Judgement

    def _judge(self, command: str, dense: Perplexity, rungs: list[_Rung], chosen: _Rung, baseline: Path) -> Record:
        path = self.work.root / "record.json"
        inputs = {
            **_common(),
            "texts": self.text_hashes,
            "recipe": self.recipe.model_dump(mode="json"),
            "exports": [baseline.name, self.candidate_path.name],
            "rungs": [rung.manifest.id for rung in rungs],
        }

        def compute() -> dict[str, Any]:
            self.say("Measuring both sides: quality, speed, memory")
            sealed = records.write(self._measure(command, dense, rungs, chosen, baseline), path)
            dumped: dict[str, Any] = json.loads(sealed.model_dump_json())
            return dumped

        found = Record.model_validate_json(json.dumps(self.work.result("record", inputs, compute)))
        sealed = records.write(found, path)
        report.write(sealed, self.report_path)
        return sealed

    @property
    def report_path(self) -> Path:
        """Where the report of this run lies."""
        return self.work.root / "report.html"

    def _measure(self, command: str, dense: Perplexity, rungs: list[_Rung], chosen: _Rung, baseline: Path) -> Record:
        loaded = self._dense()
        rows = self._windows(loaded)
        ours, theirs = open_side(str(baseline)), open_side(str(self.candidate_path))
        loaded.model.to("cpu")  # type: ignore[arg-type]
        against_dense = quality(logits_of(loaded.model), ours.logits, rows, self.progress)
        dense_parameters, form = budget.count(loaded.model), form_of(loaded.model)
        dense_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        self._loaded = None
        measured = measure(ours, theirs, rows, self.recipe.benchmark, self.work.root / "logs", self.progress)
        verdict = judge(
            self.recipe.gate.limits,
            measured.comparison.baseline,
            measured.comparison.candidate,
            measured.comparison.intervals,
        )
        if chosen.passed is False:
            # Even the mildest missed the quality limits in fp32: no export of it can stand.
            verdict = Verdict("fail", verdict.gates)
        as_stored = Measures(dense_parameters.total, dense_bytes, dense.value)
        return Record(
            kind="run",
            created=now(),
            title=f"{self.recipe.model}, {_options(chosen.options)} by {_methods(self.recipe)}",
            model=model_of(ours),
            artifacts={"baseline": None, "candidate": chosen.manifest.id},
            measured=f"{theirs.form}, on the CPU",
            baseline=measured.comparison.baseline,
            candidate=measured.comparison.candidate,
            ratio=measured.comparison.ratio,
            intervals=measured.comparison.intervals,
            verdict=verdict.verdict,
            gates=verdict.gates,
            ladder=self._ladder(dense, dense_parameters, rungs, chosen, form),
            variants=(
                Variant(
                    f"dense, {form}", "baseline", "torch", form.split()[0], as_stored, _finite(dense.standard_error)
                ),
                *_exported_variants(measured, self.recipe.export.dtype),
            ),
            quality=self._qualities(against_dense, measured, form),
            runs=all_runs(measured),
            recipe=self.recipe.model_dump(mode="json"),
            texts={**self._looked_at(chosen), "evaluation": rows.record()},
            commands=(command,),
            machine=machine(),
        )

    def _qualities(self, against_dense: Quality, measured: Measured, form: str) -> dict[str, Quality]:
        dtype = self.recipe.export.dtype
        return {
            f"dense {dtype} against dense {form.split()[0]}": against_dense,
            f"candidate {dtype} against dense {dtype}": measured.quality,
        }

    def _step_of(self, rung: _Rung) -> artifact.Step:
        """What the step did of which several values are tried."""
        return rung.manifest.steps[-1 - self._behind]

    def _looked_at(self, rung: _Rung) -> dict[str, dict[str, Any]]:
        """The calibration rows of the tried step, and by their methods those of the steps behind it."""
        behind = rung.manifest.steps[len(rung.manifest.steps) - self._behind :]
        return {
            "calibration": dict(self._step_of(rung).calibration or {}),
            **{step.method: dict(step.calibration or {}) for step in behind},
        }

    def _ladder(self, dense: Perplexity, counts: budget.Counts, rungs: list[_Rung], chosen: _Rung, form: str) -> Ladder:
        ratios = [limit.max_ratio for limit in self._quality_limits() if limit.max_ratio is not None]
        first = records.Step(
            sparsity=0.0,
            artifact=None,
            parameters=counts.total,
            block_sparsity=0.0,
            model_sparsity=0.0,
            perplexity=dense.value,
            perplexity_standard_error=_finite(dense.standard_error),
            perplexity_ratio=1.0,
        )
        steps = [_ladder_step(rung, self._step_of(rung), dense, counts, rung is chosen) for rung in rungs]
        return Ladder(form, min(ratios, default=None), (first, *steps))


def _methods(recipe: Recipe) -> str:
    """The methods in words: that of which several values are tried, and what comes behind it."""
    return " and ".join(step.method for step in recipe.steps[recipe.rung :])


def _ladder_step(
    rung: _Rung, step: artifact.Step, dense: Perplexity, counts: budget.Counts, chosen: bool
) -> records.Step:
    parameters = rung.manifest.parameters
    return records.Step(
        sparsity=step.numbers["sparsity_wanted"],
        artifact=rung.manifest.id,
        parameters=parameters["total"],
        block_sparsity=1 - parameters["blocks"] / counts.blocks,
        model_sparsity=1 - parameters["total"] / counts.total,
        perplexity=rung.perplexity.value,
        perplexity_standard_error=_finite(rung.perplexity.standard_error),
        perplexity_ratio=rung.perplexity.value / dense.value,
        ratio_interval=rung.ratio_interval,
        passed=rung.passed,
        chosen=chosen,
    )


def _exported_variants(measured: Measured, dtype: str) -> tuple[Variant, Variant]:
    found, both = measured.quality, measured.comparison
    return (
        Variant(
            f"dense, {dtype} ONNX", "baseline", "onnx", dtype, both.baseline, _finite(found.baseline_standard_error)
        ),
        Variant(
            f"candidate, {dtype} ONNX",
            "candidate",
            "onnx",
            dtype,
            both.candidate,
            _finite(found.candidate_standard_error),
        ),
    )


def _common() -> dict[str, Any]:
    """What every stage depends on."""
    return {"versions": installed_versions()}


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _times(value: float, reference: float) -> str:
    return f"{value / reference:.2f} x"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
