"""A suite: many methods and sparsities on one model, each measured alike, into one record.

Every cell is computed in a process of its own, so that its peak of memory is its own, and leaves its result under a
name that holds the hash of what went into it: a suite that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, TypeAdapter, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import prepacking, tasks
from benchmarks import record as records
from benchmarks.latency import latency_pair
from benchmarks.machine import machine
from benchmarks.memory import PeakMemory
from benchmarks.record import Model
from benchmarks.scoring import torch_scorer
from benchmarks.servers import child_environment, last_words
from benchmarks.table import Cell, Distilled, ExportedCell, Table
from benchmarks.tasks import TaskScore
from compress import budget
from compress.artifact import write_model
from compress.calibration import TokenRows, context_length_of, draw, windows
from compress.device import DTYPES
from compress.errors import ConfigError, FoldawayError
from compress.evaluate import logits_of, perplexity
from compress.files import new_folder, sha256_of
from compress.layout import layout_of
from compress.methods import METHODS, distill, method_config
from compress.result import Progress, Run
from compress.schema import Strict, read_yaml
from compress.sources import Loaded, fingerprint, load, skeleton
from compress.text import text_hash
from deploy.bench import now
from deploy.recipe import DISTILL
from deploy.sides import open_side
from deploy.steps import CHECK_TOKENS, data_file
from deploy.workspace import Workspace, digest
from exporters import export
from exporters.base import ExportOptions, installed_versions
from exporters.to_onnx import complete

RESIDENT_REPEATS = 3
USER_ERROR = 2
"""Exit code of a process that refuses what it was asked."""

CELL = TypeAdapter(Cell)
EXPORTED = TypeAdapter(ExportedCell)


class DistilSpec(Strict):
    """What the model of a row learns from the dense one after it was cut: ``set`` as for distill.

    ``source`` is another text than the suite's calibration text, by its logical name, or ``self``.
    """

    rows: int = Field(ge=1)
    source: str | None = None
    set: dict[str, JsonValue] = Field(default_factory=dict)


class MethodSpec(Strict):
    """One row of the table, at sparsities of its own or at those of the suite.

    With ``same_blocks_as`` the method is given, as its option ``blocks``, the blocks that the row of that label removed
    at the same sparsity. ``rows`` are calibration rows of its own in number, and without ``tasks`` only perplexity is
    measured. With ``distil`` the model learns from the dense one before it is measured.
    """

    label: str
    method: str
    set: dict[str, JsonValue] = Field(default_factory=dict)
    sparsities: tuple[float, ...] | None = Field(default=None, min_length=1)
    same_blocks_as: str | None = None
    rows: int | None = Field(default=None, ge=1)
    tasks: bool = True
    distil: DistilSpec | None = None


class DrawSpec(Strict):
    """One source of calibration text, and the seeds to draw from it with."""

    source: str
    seeds: tuple[int, ...] = (0,)


class CalibrationsSpec(Strict):
    """One method and sparsity, calibrated in several ways."""

    label: str
    sparsity: float
    draws: tuple[DrawSpec, ...] = Field(min_length=1)


class ExportsSpec(Strict):
    """Cells that are exported as well, and measured beside the dense model's export, one after the other."""

    dtype: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    sparsities: tuple[float, ...] = Field(min_length=1)
    labels: tuple[str, ...] = Field(min_length=1)
    prompt_tokens: int = Field(default=128, ge=1)
    decode_tokens: int = Field(default=64, ge=1)
    repeats: int = Field(default=9, ge=5)


class Profile(Strict):
    """How much of everything (None takes all), and what the model computes in."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    rows: int = Field(ge=1)
    length: int = Field(ge=2)
    window: int = Field(ge=2)
    windows: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)


class Suite(Strict):
    """What to measure. Texts and tasks have logical names, and paths below the data folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    texts: dict[str, str] = Field(default_factory=dict)
    tasks: dict[str, str] = Field(default_factory=dict)
    calibration: str
    evaluation: str
    sparsities: tuple[float, ...] = Field(min_length=1)
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    calibrations: CalibrationsSpec | None = None
    exports: ExportsSpec | None = None
    profiles: dict[str, Profile] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_run(self) -> Suite:
        labels = [method.label for method in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"methods: two have the label {max(labels, key=labels.count)!r}")
        for method in self.methods:
            if "sparsity" in method.set:
                raise ValueError(f"methods: {method.label!r} sets a sparsity: list it under sparsities")
            if "blocks" in method.set and method.same_blocks_as is not None:
                raise ValueError(f"methods: {method.label!r} has blocks of its own and those of another row: give one")
            for sparsity in method.sparsities or self.sparsities:
                method_config(method.method, {**method.set, "sparsity": sparsity})
            self._check_same_blocks(method)
            if method.distil is not None:
                distill.learnt_rows(method.distil.rows, method_config(DISTILL, method.distil.set))
        if self.exports is not None:
            for label in self.exports.labels:
                named = [m for m in self.methods if m.label == label]
                if not named or not set(self.exports.sparsities) & set(named[0].sparsities or self.sparsities):
                    wanted = ", ".join(map(str, self.exports.sparsities))
                    raise ValueError(f"exports: no method {label!r} at sparsity {wanted}")
            exported = [m for m in self.methods if m.label in self.exports.labels]
            there = {sparsity for m in exported for sparsity in m.sparsities or self.sparsities}
            if stray := set(self.exports.sparsities) - there:
                raise ValueError(f"exports: none of the labels has sparsity {min(stray)}")
        if self.calibrations is not None:
            if self.calibrations.label not in labels:
                raise ValueError(f"calibrations: no method has the label {self.calibrations.label!r}")
            method = self.methods[labels.index(self.calibrations.label)]
            if method.same_blocks_as is not None:
                raise ValueError(f"calibrations: {method.label!r} removes the blocks of another row: name that one")
            method_config(method.method, {**method.set, "sparsity": self.calibrations.sparsity})
        return self

    def _check_same_blocks(self, method: MethodSpec) -> None:
        """Raise unless the row whose blocks a method removes is there, at all its sparsities."""
        if method.same_blocks_as is None:
            return
        others = [m for m in self.methods if m.label == method.same_blocks_as and m.same_blocks_as is None]
        if not others or set(method.sparsities or self.sparsities) - set(others[0].sparsities or self.sparsities):
            raise ValueError(
                f"methods: {method.label!r} removes the blocks of {method.same_blocks_as!r}, which is no method with "
                "blocks of its own at all its sparsities"
            )
        method_config(method.method, {**method.set, "sparsity": 0.5, "blocks": []})


@dataclass(frozen=True)
class _Job:
    """One cell to compute: a method at a sparsity, calibrated on a source; no method for the dense model."""

    label: str
    spec: MethodSpec | None
    sparsity: float
    source: str
    seed: int
    with_tasks: bool

    @property
    def name(self) -> str:
        """In words, and as a file name."""
        if self.spec is None:
            return "dense"
        words = "".join(c if c.isalnum() else "-" for c in self.label.lower())
        calibrated = "" if self.with_tasks else f"-{self.source}-{self.seed}"
        return f"{words}-{self.sparsity}{calibrated}"


class SuiteRun:
    """One run of a suite in a folder."""

    def __init__(
        self,
        file: Path,
        root: Path,
        *,
        data: Path | None,
        profile: str,
        device: str,
        jobs: int,
        say: Callable[[str], None],
    ) -> None:
        self.file, self.root, self.data, self.device, self.jobs, self.say = file, root, data, device, jobs, say
        self.suite = read_yaml(file, Suite, "suite")
        if profile not in self.suite.profiles:
            raise ConfigError(f"{file} has no profile {profile!r}; it has {', '.join(self.suite.profiles)}")
        if jobs < 1:
            raise ConfigError(f"--jobs {jobs}: give 1 or more")
        self.profile_name, self.profile = profile, self.suite.profiles[profile]
        learnt = (job.spec.distil.source for job in self._all_jobs() if job.spec is not None and job.spec.distil)
        sources = {self.suite.calibration, *(job.source for job in self._all_jobs()), *filter(None, learnt)}
        self.hashes = {source: text_hash(self._text(source), "calibration") for source in sorted(sources)}
        self.evaluation_hash = text_hash(self._text(self.suite.evaluation), "evaluation")
        if self.evaluation_hash in self.hashes.values():
            raise ConfigError(f"{file}: a model is not judged on the text that it was calibrated on")
        names = [job.name for job in self._all_jobs()]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise ConfigError(f"{file}: two cells are called {twice!r}: give labels that differ, and each value once")
        self.task_files = {name: str(self._path(path)) for name, path in self.suite.tasks.items()}
        if self.task_files:
            tasks.check(list(self.task_files.values()), self.profile.limit)
        self.task_hashes = {name: sha256_of(Path(path)) for name, path in self.task_files.items()}
        self.model_hash = fingerprint(self.suite.model)
        self.work = Workspace(root)

    # --- What there is to do

    def _all_jobs(self) -> list[_Job]:
        table = self._table_jobs()
        return [*table, *(job for job in self._calibration_jobs() if job not in table)]

    def _table_jobs(self) -> list[_Job]:
        """The dense model, then every method at its sparsities."""
        suite = self.suite
        jobs = [_Job("dense", None, 0.0, suite.calibration, 0, True)]
        for method in suite.methods:
            sparsities = sorted(method.sparsities or suite.sparsities)
            jobs += [_Job(method.label, method, s, suite.calibration, 0, True) for s in sparsities]
        return jobs

    def _calibration_jobs(self) -> list[_Job]:
        """One method at one sparsity, calibrated in several ways; what stands in the table as well is that cell."""
        wanted = self.suite.calibrations
        if wanted is None:
            return []
        (method,) = (each for each in self.suite.methods if each.label == wanted.label)
        there = {(job.label, job.sparsity, job.source, job.seed) for job in self._table_jobs()}
        return [
            _Job(
                wanted.label,
                method,
                wanted.sparsity,
                drawn.source,
                seed,
                with_tasks=(wanted.label, wanted.sparsity, drawn.source, seed) in there,
            )
            for drawn in wanted.draws
            for seed in drawn.seeds
        ]

    def _path(self, below: str) -> Path:
        return data_file(self.data, below, self.file)

    def _text(self, name: str) -> str:
        """The source behind a logical name."""
        return str(self._path(self.suite.texts[name])) if name in self.suite.texts else name

    def _inputs(self, job: _Job) -> dict[str, Any]:
        """What a cell depends on."""
        profile = self.profile
        inputs: dict[str, Any] = {
            "versions": installed_versions(),
            "model": self.model_hash,
            "method": job.spec and job.spec.model_dump(include={"method", "set"}),
            "sparsity": job.sparsity,
            "evaluation": [self.evaluation_hash, profile.window, profile.windows],
            "tasks": [self.task_hashes, profile.limit] if self._is_scored(job) else None,
            "computed": [profile.dtype, self.device],
        }
        if job.spec is not None:
            inputs["calibration"] = [self.hashes[job.source], self._rows(job), profile.length, job.seed]
            if job.spec.distil is not None:
                learnt = job.spec.distil
                inputs["distil"] = [learnt.model_dump(), self.hashes[learnt.source or job.source]]
            inputs["blocks"] = None if job.spec.same_blocks_as is None else self._inputs(self._twin(job))
        if self._is_exported(job):
            inputs["saved"] = True
        return inputs

    def _twin(self, job: _Job) -> _Job:
        """The cell whose blocks a cell removes."""
        assert job.spec is not None
        (twin,) = (
            other
            for other in self._table_jobs()
            if other.label == job.spec.same_blocks_as and other.sparsity == job.sparsity
        )
        return twin

    def _is_exported(self, job: _Job) -> bool:
        wanted = self.suite.exports
        if wanted is None or not job.with_tasks:
            return False
        return job.spec is None or (job.label in wanted.labels and job.sparsity in wanted.sparsities)

    def _is_scored(self, job: _Job) -> bool:
        """Whether the tasks are asked of a cell's model."""
        return job.with_tasks and (job.spec is None or job.spec.tasks)

    def _rows(self, job: _Job) -> int:
        """How many calibration rows a cell draws."""
        return self.profile.rows if job.spec is None or job.spec.rows is None else job.spec.rows

    # --- All cells

    def run(self, progress: Progress) -> Table:
        """Compute what is left to compute, side by side, and write the record."""
        self._prepare()
        todo = self._all_jobs()
        groups: dict[str, list[_Job]] = {}
        for job in todo:
            # A greedy removal goes on from the rounds of a milder one, so the cells of a row take turns; and a row that
            # removes the blocks of another comes after it.
            row = job.label if job.spec is None else job.spec.same_blocks_as or job.label
            groups.setdefault(f"{row} {job.source} {job.seed} {job.with_tasks}", []).append(job)
        for group in groups.values():
            group.sort(key=lambda job: (job.spec is not None and job.spec.same_blocks_as is not None, job.sparsity))
        # The rows that try every part again after each removal, or learn, take longest: they start first.
        order = sorted(groups.values(), key=lambda group: -max(self._passes(job) for job in group))
        stop = threading.Event()
        done = 0
        lock = threading.Lock()

        def work(group: list[_Job]) -> None:
            nonlocal done
            for job in group:
                if stop.is_set():
                    return
                cell = self._in_a_process(job, stop)
                with lock:
                    done += 1
                    self.say(f"  {_words(cell)}")
                    progress("cells", done, len(todo))

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work, group) for group in order]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return self._table(progress)

    def _prepare(self) -> None:
        """The dense model as a folder, which loads faster than what it may come from."""

        def make(path: Path) -> None:
            self.say(f"Loading {self.suite.model}")
            loaded = load(self.suite.model)
            with new_folder(path) as folder:
                write_model(loaded.model, loaded.tokenizer, folder, loaded.processor)
                origin = Model(loaded.origin.name, loaded.origin.licence, loaded.origin.quantised_from)
                (folder / "origin.json").write_text(json.dumps(dataclasses.asdict(origin)), encoding="utf-8")

        self.dense_path = self.work.folder("dense", {"model": self.model_hash, "versions": installed_versions()}, make)

    def _passes(self, job: _Job) -> float:
        """About how many forward passes a cell takes."""
        if job.spec is None:
            return 0.0
        config = method_config(job.spec.method, {**job.spec.set, "sparsity": job.sparsity})
        passes = METHODS[job.spec.method].outline(skeleton(str(self.dense_path)), self._rows(job), config)
        if job.spec.distil is None:
            return passes
        learning = method_config(DISTILL, job.spec.distil.set)
        return passes + METHODS[DISTILL].outline(skeleton(str(self.dense_path)), job.spec.distil.rows, learning)

    def _config(self, job: _Job) -> Any:
        """The method's configuration for a cell."""
        assert job.spec is not None
        options = {**job.spec.set, "sparsity": job.sparsity}
        if job.spec.same_blocks_as is not None:
            twin = CELL.validate_python(self.work.result(*self._stage(self._twin(job)), _not_there))
            options["blocks"] = twin.numbers["blocks_removed"]
        return method_config(job.spec.method, options)

    def _in_a_process(self, job: _Job, stop: threading.Event) -> Cell:
        """Compute a cell in a process of its own, unless its result is there.

        Raises:
            FoldawayError: the process refused, with what it said; or its inputs have changed.
            RuntimeError: it ended otherwise than it should.
            KeyboardInterrupt: it was stopped.
        """
        stage = self._stage(job)
        if not self.work.has(*stage):
            log = self.root / "logs" / f"{job.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as output:
                # In a group of its own, so that Ctrl-C reaches it through us, once. Our end of its stdin closes when
                # this process ends, however it ends, and the cell with it.
                process = subprocess.Popen(
                    self._cell_command(job),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=child_environment(),
                    start_new_session=True,
                )
                try:
                    while process.poll() is None and not stop.wait(0.2):
                        pass
                finally:
                    process.kill()
                    process.wait()
            if stop.is_set():
                raise KeyboardInterrupt
            if process.returncode != 0:
                said = f"{job.name}: {last_words(log).removeprefix('foldaway: ')} (all of it is in {log})"
                if process.returncode == USER_ERROR:
                    raise FoldawayError(said)
                raise RuntimeError(f"the process of a cell ended with code {process.returncode}; {said}")
        return CELL.validate_python(self.work.result(*stage, _not_there))

    def _cell_command(self, job: _Job) -> list[str]:
        command = [sys.executable, "-P", "-m", "deploy", "suite", str(self.file), "--profile", self.profile_name]
        command += ["--device", self.device, "--jobs", str(self.jobs), "-o", str(self.root)]
        command += ["--data", str(self.data)] if self.data else []
        return [*command, "--cell", job.name, "--until-stdin-closes"]

    def _stage(self, job: _Job) -> tuple[str, dict[str, Any]]:
        return f"cell-{job.name}", self._inputs(job)

    def _command(self) -> str:
        """The call that repeats this run; where the data lie is another matter on each machine."""
        words = ["foldaway", "suite", self.file.name, *(["--data", "DIR"] if self.data else [])]
        words += ["--profile", self.profile_name, "--device", self.device, "--jobs", str(self.jobs), "-o", "DIR"]
        return shlex.join(words)

    def _table(self, progress: Progress) -> Table:
        cells = {
            job.name: CELL.validate_python(self.work.result(*self._stage(job), _not_there)) for job in self._all_jobs()
        }
        cells = self._timed(cells, progress)
        dense, *table = (cells[job.name] for job in self._table_jobs())
        origin = json.loads((self.dense_path / "origin.json").read_text("utf-8"))
        return records.write(
            Table(
                created=now(),
                title=self.suite.name,
                model=Model(**origin),
                profile=self.profile_name,
                settings={**self.profile.model_dump(), "device": self.device},
                jobs=self.jobs,
                texts={
                    "calibration": self.suite.calibration,
                    "evaluation": self.suite.evaluation,
                    **self.hashes,
                    self.suite.evaluation: self.evaluation_hash,
                },
                dense=dense,
                cells=tuple(table),
                calibrations=tuple(cells[job.name] for job in self._calibration_jobs()),
                commands=(self._command(),),
                machine=machine(),
            ),
            self.root / "record.json",
        )

    # --- One cell

    def compute(self, name: str, progress: Progress) -> Cell:
        """Compute one cell in this process, and keep its result.

        Raises:
            ConfigError: no cell has this name.
        """
        jobs = {job.name: job for job in self._all_jobs()}
        if name not in jobs:
            raise ConfigError(f"{self.file} has no cell {name!r}; it has {', '.join(jobs)}")
        self._prepare()
        torch.set_num_threads(max(1, torch.get_num_threads() // self.jobs))
        job = jobs[name]

        def compute() -> dict[str, Any]:
            dumped: dict[str, Any] = CELL.dump_python(self._compute(job, progress), mode="json")
            return dumped

        found = CELL.validate_python(self.work.result(*self._stage(job), compute))
        shutil.rmtree(self._lesson_path(job), ignore_errors=True)
        return found

    def _compute(self, job: _Job, progress: Progress) -> Cell:
        seconds, rows, numbers, distilled = None, None, {}, None
        with PeakMemory(os.getpid(), interval_seconds=0.5) as peak:
            loaded = load(str(self.dense_path), dtype=DTYPES[self.profile.dtype])
            loaded.model.to(self.device)  # type: ignore[arg-type]
            judged_on = self._evaluation_rows(loaded.tokenizer, context_length_of(loaded.model))
            if job.spec is not None:
                rows = self._draw(job, loaded, progress)
                start = time.perf_counter()
                compressed = METHODS[job.spec.method].compress(
                    loaded.model,
                    rows,
                    self._config(job),
                    Run(progress=progress, device=self.device, scratch=self.root / "scratch", consume=True),
                )
                seconds = time.perf_counter() - start + compressed.report.resumed_seconds
                loaded = dataclasses.replace(loaded, model=compressed.model)
                numbers = dict(compressed.report.numbers)
                if job.spec.distil is not None:
                    loaded, distilled = self._distil(job, job.spec.distil, loaded, judged_on, progress)
        if self._is_exported(job) and job.spec is not None:
            self._save(job, loaded)
        return Cell(
            label=job.label,
            method=job.spec.method if job.spec else None,
            options=job.spec.set if job.spec else {},
            sparsity=job.sparsity,
            calibration=rows.record() if rows else None,
            parameters=budget.count(loaded.model).total,
            layout=layout_of(loaded.model).kind,
            perplexity=perplexity(logits_of(loaded.model), judged_on, progress),
            tasks=self._score(loaded, progress) if self._is_scored(job) else (),
            compression_seconds=seconds,
            peak_rss_bytes=peak.bytes,
            numbers=numbers,
            costs=budget.costs(loaded.model),
            distilled=distilled,
        )

    def _distil(
        self, job: _Job, spec: DistilSpec, loaded: Loaded, judged_on: Tensor, progress: Progress
    ) -> tuple[Loaded, Distilled]:
        """Let the model of a cell learn from the dense one."""
        before = perplexity(logits_of(loaded.model), judged_on, progress)
        teacher = load(str(self.dense_path), dtype=DTYPES[self.profile.dtype])
        teacher.model.to(self.device)  # type: ignore[arg-type]
        rows = self._draw(dataclasses.replace(job, source=spec.source or job.source), teacher, progress, spec.rows)
        start = time.perf_counter()
        run = Run(
            progress=progress,
            device=self.device,
            scratch=self._lesson_path(job),
            consume=True,
            teacher=teacher.model,
        )
        learnt = METHODS[DISTILL].compress(loaded.model, rows, method_config(DISTILL, spec.set), run)
        numbers = learnt.report.numbers
        return dataclasses.replace(loaded, model=learnt.model), Distilled(
            spec.set,
            rows.record(),
            numbers["tokens_learnt"],
            time.perf_counter() - start + learnt.report.resumed_seconds,
            before,
            tuple(numbers["losses"]),
        )

    def _lesson_path(self, job: _Job) -> Path:
        """What a lesson that was stopped leaves: large, and of no use to other cells."""
        return self.root / "scratch" / f"lesson-{job.name}-{digest(self._inputs(job))}"

    def _save(self, job: _Job, loaded: Loaded) -> None:
        """Keep the model of a cell that is exported."""
        path = self._model_path(job)
        shutil.rmtree(path, ignore_errors=True)
        with new_folder(path) as folder:
            write_model(loaded.model, loaded.tokenizer, folder)

    def _model_path(self, job: _Job) -> Path:
        return self.dense_path if job.spec is None else self.root / f"model-{job.name}-{digest(self._inputs(job))}"

    # --- Exports, timed one after the other

    def _timed(self, cells: dict[str, Cell], progress: Progress) -> dict[str, Cell]:
        """The cells, with size and speed of their exports where those are asked for."""
        wanted = self.suite.exports
        if wanted is None:
            return cells
        jobs = {job.name: job for job in self._table_jobs() if self._is_exported(job)}
        folders = {name: self._export(job, wanted, progress) for name, job in jobs.items()}
        timed = dict(cells)
        for name, job in jobs.items():
            inputs = {"cell": self._inputs(job), "exports": wanted.model_dump(exclude={"labels", "sparsities"})}
            measure = functools.partial(self._measure, folders["dense"], folders[name], wanted, progress)
            found = self.work.result(f"measured-{name}", inputs, measure)
            timed[name] = dataclasses.replace(cells[name], exported=EXPORTED.validate_python(found))
        return timed

    def _export(self, job: _Job, wanted: ExportsSpec, progress: Progress) -> Path:
        options = complete(ExportOptions(wanted.dtype))

        def make(path: Path) -> None:
            self.say(f"Exporting {job.name} to {wanted.dtype} ONNX")
            loaded = load(str(self._model_path(job)), dtype=torch.float32)
            tokens = self._evaluation_rows(loaded.tokenizer, context_length_of(loaded.model))[:1, :CHECK_TOKENS]
            export(loaded, path, to="onnx", options=options, check_tokens=tokens, progress=progress)

        inputs = {"cell": self._inputs(job), "options": dataclasses.asdict(options)}
        return self.work.folder(f"export-{job.name}", inputs, make)

    def _measure(self, dense: Path, candidate: Path, wanted: ExportsSpec, progress: Progress) -> dict[str, Any]:
        """Size, memory, perplexity and decode speed of an export, speed beside the dense one's, taking turns."""
        (runs,) = prepacking.measure({"export": candidate}, ("default",), RESIDENT_REPEATS)["default"].values()
        ours, theirs = open_side(str(dense)), open_side(str(candidate))
        assert ours.session is not None
        assert theirs.session is not None
        pair = latency_pair(
            ours.session,
            theirs.session,
            prompt_tokens=wanted.prompt_tokens,
            decode_tokens=wanted.decode_tokens,
            repeats=wanted.repeats,
            progress=progress,
        )
        rows = self._evaluation_rows(theirs.tokenizer, theirs.context_length)
        found = ExportedCell(
            wanted.dtype,
            theirs.size_bytes,
            pair.decode,
            int(median(run["used_total_bytes"] for run in runs)),
            perplexity(theirs.session.logits, rows, progress),
        )
        dumped: dict[str, Any] = EXPORTED.dump_python(found, mode="json")
        return dumped

    def _draw(self, job: _Job, loaded: Loaded, progress: Progress, rows: int | None = None) -> TokenRows:
        profile, source = self.profile, self._text(job.source)
        drawn = draw(
            source,
            loaded.tokenizer,
            rows=self._rows(job) if rows is None else rows,
            length=profile.length,
            seed=job.seed,
            model=loaded.model,
            progress=progress,
        )
        return dataclasses.replace(drawn, source=job.source)  # its name, and no path of this machine

    def _evaluation_rows(self, tokenizer: PreTrainedTokenizerBase, context: int) -> Tensor:
        profile, text = self.profile, self._text(self.suite.evaluation)
        rows = windows(text, tokenizer, length=profile.window, count=profile.windows, context_length=context)
        return rows.tokens

    def _score(self, loaded: Loaded, progress: Progress) -> tuple[TaskScore, ...]:
        scores = tasks.evaluate(
            torch_scorer(loaded.model),
            loaded.tokenizer,
            context_length_of(loaded.model),
            list(self.task_files.values()),
            limit=self.profile.limit,
            progress=progress,
        )
        named = zip(scores, self.suite.tasks.items(), strict=True)
        # Their logical names, and no path of this machine.
        return tuple(dataclasses.replace(score, name=name, source=path) for score, (name, path) in named)


def _not_there() -> dict[str, Any]:
    """A cell is asked for that should be there."""
    raise FoldawayError("a text, a task or the model was changed while the suite ran: run it again")


def _words(cell: Cell) -> str:
    """A cell in one line."""
    accuracy = "" if cell.accuracy is None else f", accuracy {cell.accuracy:.1%}"
    seconds = "" if cell.compression_seconds is None else f", {cell.compression_seconds:,.0f} s"
    drawn = f" ({cell.calibration['source']}, seed {cell.calibration['seed']})" if cell.calibration else ""
    return f"{cell.label} {cell.sparsity:.1%}{drawn}: perplexity {cell.perplexity.value:,.2f}{accuracy}{seconds}"
