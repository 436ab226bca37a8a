"""Search the best model under a budget: predict, compress, judge, measure, choose. A stage that is done is skipped.

Each candidate leaves its result under a name that holds the hash of what went into it, so a search that was stopped
loses the candidate in work at most. Of the artifacts only the best so far is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks import record as records
from benchmarks.machine import machine
from compress.errors import ConfigError
from compress.result import Progress
from deploy import fit_record, fit_report
from deploy.bench import now
from deploy.fit_plan import Plan
from deploy.fit_record import (
    DENSE,
    FILE,
    FitRecord,
    Judged,
    Made,
    Measured,
    Row,
    Searched,
    amount,
    choose,
    described,
    judgement,
)
from deploy.fit_stages import MODEL, Stages
from deploy.ruler import Ruler
from deploy.search import Candidate, Source

REPORT = "report.html"
MOST_TRIES = 3
"""Shapes that are timed for each that is wanted, before the search ends with fewer."""


class Fit:
    """One search in a folder.

    Args:
        plan: what to search.
        root: the folder of the run.
        progress: told of each step.
        say: told what was found, in words.

    Raises:
        BudgetError: the dense model fits already, or nothing can, as far as counting can say.
        ConfigError: an option that cannot be meant; or the folder holds something else, or a search for another target.
    """

    def __init__(self, plan: Plan, root: Path, *, progress: Progress, say: Callable[[str], None]) -> None:
        self.plan, self.target, self.root, self.say = plan, plan.target, root, say
        if (root / FILE).is_file() and (found := fit_record.read(root / FILE)).target != self.target:
            raise ConfigError(
                f"{root} holds a search for at most {amount(found.target.kind, found.target.limit)} "
                f"({fit_record.axis(found.target)}): name another folder"
            )
        if self.target.context is None:
            plan.check_too_large(plan.ruler.predict(self.target, plan.size))
        plan.check_reachable(plan.sources(plan.ruler))
        self.stages = Stages(plan, root, progress=progress, say=say)  # last: a mistake leaves nothing behind
        self._rows: list[Row] = []
        self._candidates: dict[str, Candidate] = {}

    @property
    def model_path(self) -> Path:
        """Where the best model lies."""
        return self.root / MODEL

    @property
    def report_path(self) -> Path:
        """Where the report lies."""
        return self.root / REPORT

    def run(self, command: str) -> FitRecord:
        """Do what is left to do; leaves the best model, the record and the report.

        Args:
            command: the call that repeats this, for the record.

        Raises:
            BudgetError: the dense model fits already, or no candidate is predicted to fit.
        """
        found, ruler = self.stages.measure_dense()
        self.plan.check_too_large(found.value)
        sources = self.plan.sources(ruler)
        self.plan.check_reachable(sources)
        predicted = ruler.predict(self.target, self.plan.size)
        judged = self.stages.judge_dense()
        dense = Row(DENSE, None, {}, None, self.plan.size, predicted, None, found, False, judged)
        self.say(
            f"{self.plan.asked.model}: {self._amount(found.value)}, {judgement(judged)}; wanted are at most "
            f"{self._amount(self.target.limit)}"
        )
        for source in sources:
            self._try(source)
        best = choose(self._rows)
        self.stages.deliver(None if best is None else self._candidates[best.name])
        return self._write(command, ruler, dense, sources, best)

    def _amount(self, value: float) -> str:
        return amount(self.target.kind, value)

    # --- Candidates

    def _try(self, source: Source) -> None:
        """Try the candidates of one method, and keep the best artifact of all so far."""
        if not source.fitting(self.target.limit):
            least = "" if source.smallest is None else f": the least is {self._amount(source.smallest.predicted)}"
            self.say(f"{source.method} cannot reach the target{least}")
            return
        taken: list[Candidate] = []
        tried: list[Candidate] = []
        ratios: list[float] = []
        while len(taken) < source.wanted and len(tried) < MOST_TRIES * source.wanted:
            # What was timed so far says by how much predictions are off.
            limit = self.target.limit / (median(ratios) if ratios else 1.0)
            candidate = source.next(limit, taken, tried)
            if candidate is None:
                break
            tried.append(candidate)
            early = self.stages.time_shape(candidate)
            if early is not None:
                ratios.append(early.value / candidate.predicted)
            if early is not None and early.value > self.target.limit:
                self._rows.append(_row(candidate, None, early, None, fits=False))
            else:
                taken.append(candidate)
                self._rows.append(self._done(candidate))
            self._tell(self._rows[-1])

    def _done(self, candidate: Candidate) -> Row:
        """A candidate that is compressed, judged and measured, as far as that was not done before."""
        self._candidates[candidate.name] = candidate
        is_new = not self.stages.is_made(candidate)
        made = self.stages.make(candidate)
        judged, found = self.stages.judge(candidate, made), self.stages.measure(candidate, made)
        row = _row(candidate, made, found, judged, fits=found.value <= self.target.limit)
        self.stages.close()
        if is_new:  # of those done before the best may be still to come, and its artifact is there
            best = choose([*self._rows, row])
            self.stages.keep_only(None if best is None else self._candidates[best.name])
        return row

    def _tell(self, row: Row) -> None:
        """A row in words."""
        values = f"predicted {self._amount(row.predicted)}, measured {self._amount(row.measured.value)}"
        verdict = "" if row.fits else ", which is too much"
        made = "" if row.made is None else f"; {judgement(row.judged)}; made in {row.made.seconds:,.0f} s"
        self.say(f"{len(self._rows)}. {described(row.method, row.shape, row.options)}: {values}{verdict}{made}")

    # --- The record

    def _write(self, command: str, ruler: Ruler, dense: Row, sources: Sequence[Source], best: Row | None) -> FitRecord:
        """The record and the report."""
        unsealed = FitRecord(
            created=now(),
            model=self.stages.origin(),
            target=self.target,
            ruler=ruler,
            judge="perplexity" if self.plan.asked.evaluation is not None else "accuracy",
            dense=dense,
            searched=tuple(_searched(source, self.target.limit) for source in sources),
            candidates=tuple(self._rows),
            chosen=None if best is None else best.name,
            settings=self.plan.settings(),
            texts=self.plan.texts(),
            commands=(command,),
            machine=machine(),
        )
        # The same search has the same record, whenever it is called again.
        found = unsealed.model_dump(mode="json", exclude={"id", "created", "commands", "machine"})
        kept = self.stages.work.result(
            "fit",
            {**self.stages.common(), **found},
            lambda: records.sealed(unsealed).model_dump(mode="json"),
        )
        sealed = records.write(FitRecord.model_validate(kept), self.root / FILE)
        fit_report.write(sealed, self.report_path)
        return sealed


def _row(candidate: Candidate, made: Made | None, found: Measured, judged: Judged | None, *, fits: bool) -> Row:
    """A candidate and what came of it."""
    return Row(
        candidate.name,
        candidate.method,
        candidate.options,
        candidate.shape,
        candidate.size,
        candidate.predicted,
        made,
        found,
        fits,
        judged,
    )


def _searched(source: Source, limit: float) -> Searched:
    """What a method had to offer."""
    least = None if source.smallest is None else source.smallest.predicted
    return Searched(source.method, source.options, source.enumerated, source.fitting(limit), least)
