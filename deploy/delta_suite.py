"""A suite of deltas: fine-tune, store what was added in many ways, bring each back, and measure what is left.

Every fine-tune, package and score is a stage of the run's folder: a suite that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, JsonValue, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import record as records
from benchmarks.answers import Item, read_items
from benchmarks.delta_table import DeltaCell, DeltaPair, DeltaTable, Score, Timing
from benchmarks.machine import machine
from compress.delta.advise import advise
from compress.delta.apply import apply
from compress.delta.checkpoint import Checkpoint, open_base, roles_of
from compress.delta.pack import Storage, pack
from compress.delta.package import Package
from compress.delta.slot import DeltaSlot
from compress.errors import ConfigError
from compress.files import new_folder, sha256_of
from compress.finetune import FinetuneConfig
from compress.methods.darex import DarexConfig
from compress.result import Progress
from compress.schema import Strict, configured, read_yaml
from compress.sources import fingerprint
from deploy.bench import now
from deploy.deltas import split_options
from deploy.learners import Learner, learner_for
from deploy.steps import data_file
from deploy.workspace import Workspace
from exporters.base import installed_versions

CELL, SCORE = TypeAdapter(DeltaCell), TypeAdapter(Score)
SPEED_P = 0.95
"""Share dropped of the packages whose speed is measured."""


class GridSpec(Strict):
    """One way to store a delta, at several p and value types; or low-rank pairs of several ranks."""

    label: str
    set: dict[str, JsonValue] = Field(default_factory=dict)
    p: tuple[float, ...] = ()
    values: tuple[str, ...] = ("int8",)
    ranks: tuple[int, ...] = ()


class PairSpec(Strict):
    """One fine-tune: of which model, on which examples, how, asked which items, stored in which ways."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    train: str
    test: str
    finetune: dict[str, JsonValue]
    grid: str


class DeltaProfile(Strict):
    """How much of everything.

    Attributes:
        items: test items of a pair; the first so many.
        window, windows: of the text that has nothing to do with the task.
        rows, length: of calibration, on the text of the training examples.
        repeats: of what is timed.
    """

    items: dict[str, Annotated[int, Field(ge=1)]]
    window: int = Field(ge=2)
    windows: int = Field(ge=1)
    rows: int = Field(ge=1)
    length: int = Field(ge=2)
    repeats: int = Field(ge=1)


class DeltaSuite(Strict):
    """What to measure; files have paths below the data folder."""

    kind: Literal["deltas"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    text: str
    pairs: tuple[PairSpec, ...] = Field(min_length=1)
    grids: dict[str, tuple[GridSpec, ...]]
    speed: str
    profiles: dict[str, DeltaProfile] = Field(min_length=1)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One cell: a way with its p and values, or a rank."""

    label: str
    config: DarexConfig | None
    storage: Storage
    rank: int = 0

    def inputs(self) -> dict[str, Any]:
        """What it depends on."""
        config = None if self.config is None else dataclasses.asdict(self.config)
        return {"config": config, "storage": dataclasses.asdict(self.storage), "rank": self.rank}

    @property
    def words(self) -> str:
        """For a person."""
        return (
            f"{self.label} {f'rank {self.rank}' if self.config is None else f'p={self.config.p}'} {self.storage.values}"
        )


class DeltaSuiteRun:
    """One run of a suite in a folder.

    Raises:
        ConfigError: the suite cannot be meant, or a file that it names is not there.
    """

    def __init__(
        self,
        file: Path,
        root: Path,
        *,
        data: Path | None,
        profile: str,
        device: str,
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.file, self.root, self.device, self.say, self.progress = file, root, device, say, progress
        self.suite = read_yaml(file, DeltaSuite, "suite")
        self.data = data
        if profile not in self.suite.profiles:
            raise ConfigError(f"{file} has no profile {profile!r}; it has {', '.join(self.suite.profiles)}")
        self.profile_name, self.profile = profile, self.suite.profiles[profile]
        names = [pair.name for pair in self.suite.pairs]
        if len(set(names)) < len(names) or self.suite.speed not in names:
            raise ConfigError(f"{file}: pairs need names that differ, and speed one of them")
        for pair in self.suite.pairs:
            if pair.grid not in self.suite.grids or pair.name not in self.profile.items:
                raise ConfigError(f"{file}: pair {pair.name!r} needs a grid, and a number of items in the profile")
            configured(FinetuneConfig, pair.finetune, "finetune")
            list(self._jobs(pair))
        paths = {self.suite.text, *(p for pair in self.suite.pairs for p in (pair.train, pair.test))}
        self.hashes = {path: sha256_of(self._path(path)) for path in sorted(paths)}
        for pair in self.suite.pairs:
            if self.hashes[pair.train] == self.hashes[pair.test]:
                raise ConfigError(f"{file}: pair {pair.name!r} is tested on what it is trained on")
            read_items(self._path(pair.train)), read_items(self._path(pair.test))
            fingerprint_of(pair.model, learner_for(pair.model, device, progress))
        self.work = Workspace(root)

    def _path(self, below: str) -> Path:
        return data_file(self.data, below, self.file)

    def _jobs(self, pair: PairSpec) -> Iterator[_Job]:
        for way in self.suite.grids[pair.grid]:
            for rank in way.ranks:
                yield _Job(way.label, None, Storage(values="bf16"), rank)
            for p in way.p:
                for values in way.values:
                    config, storage = split_options({**way.set, "p": p, "values": values})
                    yield _Job(way.label, config, storage)

    # --- The whole

    def run(self) -> DeltaTable:
        """Do what is left to do, and write the record."""
        pairs = tuple(_PairRun(self, spec).run() for spec in self.suite.pairs)
        timings = self._timings()
        words = ["foldaway", "suite", self.file.name, "--data", "DIR", "--profile", self.profile_name]
        table = DeltaTable(
            created=now(),
            title=self.suite.name,
            profile=self.profile_name,
            settings={**self.profile.model_dump(), "device": self.device},
            files=self.hashes,
            pairs=pairs,
            timings=timings,
            commands=(shlex.join([*words, "--device", self.device, "-o", "DIR"]),),
            machine=machine(),
        )
        return records.write(table, self.root / "record.json", indent=None)

    # --- Speed, beside loading and saving the same model

    def _timings(self) -> tuple[Timing, ...]:
        (spec,) = (pair for pair in self.suite.pairs if pair.name == self.suite.speed)
        pair = _PairRun(self, spec)
        inputs = {"versions": installed_versions(), "pair": pair.finetune_inputs, "repeats": self.profile.repeats}
        adapter = TypeAdapter(tuple[Timing, ...])

        def compute() -> dict[str, Any]:
            return {"timings": adapter.dump_python(self._measure(pair), mode="json")}

        return adapter.validate_python(self.work.result("timings", inputs, compute)["timings"])

    def _measure(self, pair: _PairRun) -> tuple[Timing, ...]:
        """Time packing, applying and switching, in turns with loading and saving the model through safetensors."""
        base, finetuned, scratch = Checkpoint(pair.base), Checkpoint(pair.finetuned), self.root / "speed"
        seconds: dict[str, list[float]] = {}

        def timed(what: str, work: Callable[[], Any]) -> None:
            start = time.perf_counter()
            work()
            seconds.setdefault(what, []).append(time.perf_counter() - start)

        def fresh(name: str) -> Path:
            shutil.rmtree(scratch / name, ignore_errors=True)
            return scratch / name

        def load_and_save() -> None:
            with new_folder(fresh("copy")) as folder:
                for file in sorted(pair.base.glob("*.safetensors")):
                    save_file(load_file(file), folder / file.name)

        def pack_one(p: float) -> None:
            pack(base, finetuned, fresh(f"delta-{p}"), DarexConfig(p=p, rescale="dare"))

        for turn in range(self.profile.repeats + 1):
            timed("load and save", load_and_save)
            timed("pack", lambda: pack_one(SPEED_P))
            timed("apply", lambda: apply(Package(scratch / f"delta-{SPEED_P}"), base, fresh("applied")))
            self.progress("timing pack and apply", turn + 1, self.profile.repeats + 1)
        pack(base, finetuned, fresh("other"), DarexConfig(p=SPEED_P, rescale="dare", seed=1))
        model = pair.learner.load(pair.base)
        slot = DeltaSlot(model)
        deltas = [slot.prepare(scratch / f"delta-{SPEED_P}"), slot.prepare(scratch / "other")]
        slot.switch(deltas[1])
        for turn in range(self.profile.repeats + 1):
            timed(
                "load",
                lambda: [{n: t.clone() for n, t in load_file(f).items()} for f in pair.base.glob("*.safetensors")],
            )
            timed("load a model", lambda: pair.learner.load(pair.finetuned))
            timed("switch", functools.partial(slot.switch, deltas[turn % 2]))
            self.progress("timing switches", turn + 1, self.profile.repeats + 1)
        shutil.rmtree(scratch)
        kept = {what: tuple(runs[1:]) for what, runs in seconds.items()}  # the first of each warms up
        beside = "safetensors load + save"
        return (
            Timing(f"pack, p = {SPEED_P:g}, int8, q = 1 - p", kept["pack"], beside, kept["load and save"]),
            Timing(f"apply, p = {SPEED_P:g}, int8", kept["apply"], beside, kept["load and save"]),
            Timing(f"switch between two, p = {SPEED_P:g}", kept["switch"], "safetensors load", kept["load"]),
            Timing(f"switch between two, p = {SPEED_P:g}", kept["switch"], "loading a model", kept["load a model"]),
        )


class _PairRun:
    """One pair of a run: its base and fine-tune as folders, and its cells."""

    def __init__(self, suite: DeltaSuiteRun, spec: PairSpec) -> None:
        self.suite, self.spec, self.profile, self.work = suite, spec, suite.profile, suite.work
        self.train: list[Item] = read_items(suite._path(spec.train))
        self.test = read_items(suite._path(spec.test))[: self.profile.items[spec.name]]
        self.learner: Learner = learner_for(spec.model, suite.device, suite.progress)
        self.config = configured(FinetuneConfig, spec.finetune, "finetune")
        self.base_inputs = {"model": fingerprint_of(spec.model, self.learner), "versions": installed_versions()}
        self.finetune_inputs = {
            "base": self.base_inputs,
            "train": suite.hashes[spec.train],
            "finetune": dataclasses.asdict(self.config),
        }
        self.base = self.work.folder(f"base-{self.learner.name}", self.base_inputs, self._write_base)
        self.finetuned = self.work.folder(f"finetuned-{spec.name}", self.finetune_inputs, self._finetune)

    def _write_base(self, path: Path) -> None:
        self.suite.say(f"Loading {self.spec.model}")
        with new_folder(path) as folder:
            self.learner.write_base(folder)

    def _finetune(self, path: Path) -> None:
        self.suite.say(f"Fine-tuning for {self.spec.name}")
        with new_folder(path) as folder:
            loss = self.learner.finetune(self.base, self.train, self.config, folder, self.suite.root / "scratch")
            (folder / "loss.json").write_text(json.dumps({"loss": loss}), encoding="utf-8")
        shutil.rmtree(self.suite.root / "scratch", ignore_errors=True)

    def run(self) -> DeltaPair:
        """All cells of the pair."""
        finetuned = self._score("finetuned", self.finetuned)
        base = self._score("base", self.base)
        cells = []
        jobs = list(self.suite._jobs(self.spec))
        for done, job in enumerate(jobs, start=1):
            cells.append(self._cell(job))
            self.suite.say(f"  {self.spec.name}: {job.words}: {cells[-1].score.answers.nll:.3f} nats per token")
            self.suite.progress(f"cells of {self.spec.name}", done, len(jobs))
        seen = self._inputs_stage()
        return DeltaPair(
            name=self.spec.name,
            model=self.spec.model,
            finetune=dataclasses.asdict(self.config),
            loss=json.loads((self.finetuned / "loss.json").read_text(encoding="utf-8"))["loss"],
            base=base,
            finetuned=finetuned,
            pruned_parameters=seen["parameters"],
            mean_abs_delta=seen["mean_abs_delta"],
            exact_zeros=seen["exact_zeros"],
            influence_ratio=seen["influence_ratio"],
            cells=tuple(cells),
        )

    # --- Stages

    def _evaluated(self) -> dict[str, Any]:
        spec, hashes = self.spec, self.suite.hashes
        sizes = [len(self.test), self.profile.window, self.profile.windows]
        return {"finetune": self.finetune_inputs, "test": [hashes[spec.test], hashes[self.suite.suite.text], *sizes]}

    def _score(self, what: str, folder: Path) -> Score:
        def compute() -> dict[str, Any]:
            dumped: dict[str, Any] = SCORE.dump_python(self._measured(folder), mode="json")
            return dumped

        stage = f"score-{self.spec.name}-{what}"
        return SCORE.validate_python(self.work.result(stage, self._evaluated(), compute))

    def _measured(self, folder: Path) -> Score:
        """Score a model folder against the fine-tune, which is run once for all cells."""
        if folder == self.finetuned:
            return self.learner.score(folder, self.test, self._text, None)
        return self.learner.score(folder, self.test, self._text, self._reference)

    @functools.cached_property
    def _text(self) -> tuple[str, int, int]:
        return str(self.suite._path(self.suite.suite.text)), self.profile.window, self.profile.windows

    @functools.cached_property
    def _reference(self) -> Any:
        return self.learner.reference(self.finetuned, self.test, self._text)

    @functools.cached_property
    def _calibration(self) -> Tensor:
        return self.learner.calibration_rows(self.base, self.train, self.profile.rows, self.profile.length)

    @functools.cached_property
    def _matrix_inputs(self) -> dict[str, Tensor]:
        return self.learner.matrix_inputs(self.finetuned, self._calibration)

    def _inputs_stage(self) -> dict[str, Any]:
        """What the delta is like."""

        def compute() -> dict[str, Any]:
            advice = advise(Checkpoint(self.base), Checkpoint(self.finetuned), self._matrix_inputs.get)
            return {
                "parameters": sum(matrix.parameters for matrix in advice.matrices),
                "mean_abs_delta": advice.mean_abs_delta,
                "exact_zeros": advice.exact_zeros,
                "influence_ratio": advice.influence_ratio,
            }

        rows = [self.profile.rows, self.profile.length]
        return self.work.result(f"delta-{self.spec.name}", {"finetune": self.finetune_inputs, "rows": rows}, compute)

    def _cell(self, job: _Job) -> DeltaCell:
        calibrated = [self.profile.rows, self.profile.length]
        inputs = {**self._evaluated(), **job.inputs(), "label": job.label, "calibrated": calibrated}

        def compute() -> dict[str, Any]:
            dumped: dict[str, Any] = CELL.dump_python(self._compute(job), mode="json")
            return dumped

        return CELL.validate_python(self.work.result(f"cell-{self.spec.name}", inputs, compute))

    def _compute(self, job: _Job) -> DeltaCell:
        scratch = self.suite.root / f"cell-{self.spec.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        if job.config is None:
            return self._low_rank(job, scratch)
        needs = job.config.needs_inputs or job.config.needs_search
        seen = self._matrix_inputs if needs else {}
        base, finetuned, config = open_base(str(self.base)), Checkpoint(self.finetuned), job.config
        start = time.perf_counter()
        if config.needs_search:
            config = self.learner.tuned(self.base, self.finetuned, config, job.storage, self._calibration, seen)
        description = pack(base, finetuned, scratch / "delta", config, job.storage, inputs=seen.get)
        seconds = time.perf_counter() - start
        apply(Package(scratch / "delta"), base, scratch / "model")
        sizes = description.sizes
        cell = DeltaCell(
            label=job.label,
            p=float(1 - config.density),
            values=job.storage.values,
            config=dataclasses.asdict(config),
            bytes=sizes.pruned + sizes.rows + sizes.dense,
            pruned_bytes=sizes.pruned,
            score=self._measured(scratch / "model"),
            seconds=seconds,
        )
        shutil.rmtree(scratch)
        return cell

    def _low_rank(self, job: _Job, scratch: Path) -> DeltaCell:
        """The peer: each matrix's delta as the product of two factors of a rank, in bf16, by SVD."""
        base, finetuned, roles = Checkpoint(self.base), Checkpoint(self.finetuned), roles_of(self.finetuned)
        start, tensors, pruned, other = time.perf_counter(), {}, 0, 0
        for name in finetuned.names:
            tensors[name] = finetuned.get(name)
            if name in roles.matrices and not torch.equal(tensors[name], base.get(name)):
                left, right = self._factors(name)
                left, right = left[:, : job.rank].bfloat16(), right[: job.rank].bfloat16()
                tensors[name] = (base.get(name).float() + left.float() @ right.float()).to(tensors[name].dtype)
                pruned += 2 * (left.numel() + right.numel())
            elif name not in base.names or not torch.equal(tensors[name], base.get(name)):
                other += tensors[name].numel() * tensors[name].element_size()
        shutil.copytree(self.finetuned, scratch / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, scratch / "model" / "model.safetensors", metadata={"format": "pt"})
        seconds = time.perf_counter() - start
        return DeltaCell(
            label=job.label,
            p=None,
            values="bf16",
            config={"rank": job.rank},
            bytes=pruned + other,
            pruned_bytes=pruned,
            score=self._measured(scratch / "model"),
            seconds=seconds,
        )

    @functools.cache  # noqa: B019  (a run has a handful of pairs, and lives as long as they do)
    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The delta of a matrix as two factors, the strongest directions first; singular values are split evenly."""
        delta = Checkpoint(self.finetuned).get(name).float() - Checkpoint(self.base).get(name).float()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        most = max(rank for way in self.suite.suite.grids[self.spec.grid] for rank in way.ranks)
        root = values[:most].sqrt()
        return left[:, :most] * root, root[:, None] * right[:most]


def fingerprint_of(model: str, learner: Learner) -> str:
    """What a base is made from."""
    return fingerprint(learner.source) if learner.source else fingerprint(model)


def is_delta_suite(file: Path) -> bool:
    """Whether a YAML file is a suite of deltas; a file that cannot be read is left to its own reader."""
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.get("kind") == "deltas"
