"""What a search was asked for, checked as far as it can be without weights, and what it may try."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tasks
from compress.arch import check_text_model
from compress.calibration import check_length, context_length_of
from compress.errors import BudgetError, ConfigError
from compress.files import sha256_of
from compress.methods import METHODS, method_config
from compress.sources import skeleton
from compress.text import text_hash
from deploy.fit_record import amount, axis, describe_candidate
from deploy.grid import Grid, Space
from deploy.measured import header_bytes
from deploy.recipe import DISTILL, CalibrationSpec, EvaluationSpec
from deploy.ruler import Ruler, Size, Target, size_of
from deploy.search import Candidate, Mildest, Source, method_kind

CONTEXT = 2048
"""Tokens in the cache, where none are asked for and the model has room for so many."""


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        model: as for ``compress.sources.load``.
        target: what must not be exceeded; a context of None stands for `CONTEXT`, or the model's own if that is less.
        methods: names.
        options: of each method, those that were given.
        space: how far shapes are cut, and how finely.
        top: shapes that are tried.
        calibration: of every method.
        evaluation: the text that judges; None where tasks do.
        tasks: that judge.
        limit: items asked of each task; None for all.
        distill_rows: calibration rows that each candidate learns before it is judged; None: it does not learn.
        device: where PyTorch computes.
    """

    model: str
    target: Target
    methods: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]]
    space: Space
    top: int
    calibration: CalibrationSpec
    evaluation: EvaluationSpec | None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    distill_rows: int | None = None
    device: str = "cpu"


class Plan:
    """A request that was checked, beside the shape of the dense model.

    Attributes:
        asked: the request.
        target: with the context filled in.
        model: on the meta device.
        size: its counts.
        text_hashes: of calibration and evaluation text.
        judge_hashes: of the text, or the files of tasks, that judge.

    Raises:
        ConfigError: something cannot be meant.
        UnsupportedArchitecture: the model is none that a method can take.
    """

    def __init__(self, asked: Request) -> None:
        self.asked = asked
        _check_methods(asked)
        if asked.top < 1:
            raise ConfigError(f"--top {asked.top}: give 1 or more")
        if not asked.target.limit > 0:
            raise ConfigError(f"a target of {asked.target.limit:g} cannot be met: give one above 0")
        if asked.tasks:
            tasks.check(asked.tasks, asked.limit)
        self.model = skeleton(asked.model)
        self.size = size_of(self.model)
        self.target = self._with_context()
        check_length(asked.calibration.length, context_length_of(self.model))
        self._check_learning()
        self.judge_hashes = {file: sha256_of(Path(file)) for file in asked.tasks if Path(file).is_file()}
        self.text_hashes = {"calibration": text_hash(asked.calibration.source, "calibration")}
        if asked.evaluation is not None:
            self.text_hashes["evaluation"] = text_hash(asked.evaluation.source, "evaluation")
            if self.text_hashes["evaluation"] == self.text_hashes["calibration"]:
                raise ConfigError("a model is not judged on the text that it was calibrated on: give another --text")
            self.judge_hashes = {"text": self.text_hashes["evaluation"]}

    def _with_context(self) -> Target:
        target, most = self.asked.target, context_length_of(self.model)
        if target.kind in ("parameters", "bytes"):
            if target.context is not None:
                raise ConfigError(f"--context is for --target-memory and --target-latency: {target.kind} have none")
            return target
        context = min(CONTEXT, most) if target.context is None else target.context
        if not 2 <= context <= most:
            raise ConfigError(f"--context {context}: give 2 to {most} tokens, which is the model's own")
        return dataclasses.replace(target, context=context)

    def _check_learning(self) -> None:
        """Refuse rows to learn from that cannot be meant."""
        if self.asked.distill_rows is None:
            if self.asked.options.get(DISTILL):
                raise ConfigError("--set distill.NAME is for candidates that learn: say from how many --distill-rows")
            return
        check_text_model(self.model.config, "--distill-rows")
        config = method_config(DISTILL, self.asked.options.get(DISTILL, {}))
        METHODS[DISTILL].outline(self.model, self.asked.distill_rows, config)

    @property
    def ruler(self) -> Ruler:
        """How counts become values, as far as it is known before anything was measured."""
        more = header_bytes(self.model) if self.target.kind == "bytes" else 0
        return Ruler(self.model.dtype.itemsize, more)

    def sources(self, ruler: Ruler) -> list[Source]:
        """What each method has to offer.

        Raises:
            ConfigError: an option or a step that cannot be meant.
            UnsupportedArchitecture: a method that cannot cut this model.
        """
        rows = self.asked.calibration.rows

        def predict(size: Size) -> float:
            return ruler.predict(self.target, size)

        found: list[Source] = []
        for name in self.asked.methods:
            options = self.asked.options.get(name, {})
            if method_kind(name) == "grid":
                found.append(Grid(name, options, self.model, rows, self.asked.space, predict, self.asked.top))
            else:
                found.append(Mildest(name, options, self.model, rows, predict))
        return found

    def check_too_large(self, dense: float) -> None:
        """Raise BudgetError where the dense model is within the budget already."""
        target = self.target
        if dense <= target.limit:
            raise BudgetError(
                f"{self.asked.model} fits already: {axis(target)}, {amount(target.kind, dense)}, is within "
                f"{amount(target.kind, target.limit)}; give a lower target"
            )

    def check_reachable(self, sources: Sequence[Source]) -> None:
        """Raise BudgetError where no candidate of any method is predicted to fit."""
        target = self.target
        if any(source.fitting(target.limit) for source in sources):
            return
        least = [source.smallest for source in sources if source.smallest is not None]
        named = "; ".join(f"{amount(target.kind, each.predicted)} ({describe_candidate(each)})" for each in least)
        space, names = self.asked.space, set(self.asked.methods)
        ways = []
        if any(isinstance(source, Grid) for source in sources):
            ways.append(f"raise --max-width-cut ({space.max_width_cut:g}) or --max-depth-cut ({space.max_depth_cut:g})")
        if others := [name for name in METHODS if name not in names and name != DISTILL]:
            ways.append(f"add other --methods ({', '.join(others)})")
        ways.append("give a higher target")
        raise BudgetError(
            f"{amount(target.kind, target.limit)} ({axis(target)}) cannot be reached; the least is {named}: "
            + ", ".join(ways[:-1])
            + f", or {ways[-1]}"
        )

    def preview(self, sources: Sequence[Source]) -> list[Candidate]:
        """The candidates that would be tried, were every prediction right."""
        found = []
        for source in sources:
            taken: list[Candidate] = []
            while len(taken) < source.wanted and (each := source.next(self.target.limit, taken, taken)):
                taken.append(each)
            found += taken
        return found

    def settings(self) -> dict[str, Any]:
        """All that was asked for beside model and target, for a record."""
        asked = self.asked
        return {
            "methods": {name: dict(asked.options.get(name, {})) for name in asked.methods},
            "top": asked.top,
            **dataclasses.asdict(asked.space),
            "calibration": asked.calibration.model_dump(),
            "evaluation": None if asked.evaluation is None else asked.evaluation.model_dump(),
            "tasks": list(asked.tasks),
            "limit": asked.limit,
            "distill_rows": asked.distill_rows,
            "distill": dict(asked.options.get(DISTILL, {})),
            "device": asked.device,
        }

    def texts(self) -> dict[str, dict[str, Any]]:
        """What was looked at, with its hash, for a record."""
        sources = {"calibration": self.asked.calibration, "evaluation": self.asked.evaluation}
        return {
            name: {"source": spec.source, "sha256": self.text_hashes[name]}
            for name, spec in sources.items()
            if spec is not None
        }


def _check_methods(asked: Request) -> None:
    """Refuse methods that are not known, make nothing smaller or are named twice, and options of others."""
    if not asked.methods:
        raise ConfigError("--methods: name one or more")
    for name in asked.methods:
        method_kind(name)
    if len(set(asked.methods)) < len(asked.methods):
        raise ConfigError(f"--methods names {max(asked.methods, key=asked.methods.count)} twice")
    for name, options in asked.options.items():
        if name not in asked.methods and name != DISTILL:
            raise ConfigError(f"--set {name}.{next(iter(options), 'NAME')}: --methods has {', '.join(asked.methods)}")
        if "sparsity" in options:
            raise ConfigError(f"--set {name}.sparsity: the search finds it; leave it out")
