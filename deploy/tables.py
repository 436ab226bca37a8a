"""Tables for a terminal."""

from __future__ import annotations

import math

from rich.markup import escape
from rich.table import Table

from benchmarks.evaluation import Evaluation, Retention, Subject
from benchmarks.intervals import Interval
from benchmarks.table import Grid
from benchmarks.tasks import TaskScore
from compress.delta.advise import Advice


def evaluation_table(found: Evaluation) -> Table:
    """One row per measurement; with a baseline its column and what has become of it."""
    table = Table(title=None, title_justify="left")
    table.add_column("")
    table.add_column(escape(found.subject.path), justify="right")
    if found.baseline is None:
        for row in _own_rows(found.subject):
            table.add_row(*map(escape, row))
        return table
    table.add_column(escape(found.baseline.path), justify="right")
    table.add_column("compared", justify="right")
    compared = _compared(found)
    for ours, theirs in zip(_own_rows(found.subject), _own_rows(found.baseline), strict=True):
        table.add_row(*map(escape, (*ours, theirs[1], compared.get(ours[0], ""))))
    for name, text in compared.items():
        if name not in {row[0] for row in _own_rows(found.subject)}:
            table.add_row(escape(name), "", "", escape(text))
    return table


def outlook_table(advice: Advice) -> Table:
    """What dropping more of a delta would do: one row per share dropped."""
    table = Table(title=None)
    for header in ("p", "int8 package", "output error, q = 1 - p", "output error, best q"):
        table.add_column(header, justify="right")
    for row in advice.outlook:
        errors = ("-" if error is None else f"{error:.0%}" for error in (row.dare_error, row.best_error))
        table.add_row(f"{row.p:g}", f"{row.bytes / 1e6:,.1f} MB", *errors)
    return table


def _own_rows(subject: Subject) -> list[tuple[str, str]]:
    rows = [
        ("form", subject.form),
        ("parameters", f"{subject.parameters:,}"),
        ("perplexity", _with_error(subject.perplexity.value, subject.perplexity.standard_error)),
    ]
    for task in subject.tasks:
        rows += _task_rows(task)
    return rows


def _task_rows(task: TaskScore) -> list[tuple[str, str]]:
    rows = [(f"{task.name}: acc", _percent(task.acc, task.acc_standard_error))]
    if task.acc_norm is not None:
        rows.append((f"{task.name}: acc_norm", _percent(task.acc_norm, task.acc_norm_standard_error)))
    return rows


def _compared(found: Evaluation) -> dict[str, str]:
    """By the name of the row."""
    both, ours = found.comparison, found.subject
    assert both is not None
    assert found.baseline is not None
    words = {
        "parameters": f"x {ours.parameters / found.baseline.parameters:.3f}",
        "perplexity": f"x {both.perplexity_ratio:.3f}{_interval(both.ratio_interval)}",
    }
    words |= {f"{kept.task}: acc": _kept(kept) for kept in found.retention if kept.task != "all"}
    words["KL to the baseline"] = f"{_with_error(both.kl, both.kl_standard_error)} nats a token"
    words["same first choice"] = f"{both.top1_agreement:.1%} of tokens"
    words["right on one side only"] = f"{both.flipped or 0.0:.1%} of tokens"
    words |= {f"{kept.task} tasks": _kept(kept) for kept in found.retention if kept.task == "all"}
    return words


def _kept(kept: Retention) -> str:
    """What is left of the skill above chance."""
    if kept.value is None:
        return "baseline is no better than chance"
    interval = kept.interval and Interval(100 * kept.interval.low, 100 * kept.interval.high, kept.interval.level, "")
    return f"keeps {kept.value:.1%}{_interval(interval, 0)}"


def _interval(interval: Interval | None, digits: int = 3) -> str:
    return "" if interval is None else f" ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:,.3f}" if error is None or math.isnan(error) else f"{value:,.3f} ± {error:.3f}"


def _percent(value: float, error: float | None) -> str:
    return f"{value:.1%}" if error is None or math.isnan(error) else f"{value:.1%} ± {100 * error:.1f}"


def plain_table(grid: Grid) -> Table:
    """A suite's table; all but the first column to the right."""
    table = Table()
    for place, header in enumerate(grid.headers):
        table.add_column(escape(header), justify="right" if place else "left")
    for row in grid.rows:
        table.add_row(*map(escape, row))
    return table
