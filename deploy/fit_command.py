"""``foldaway fit``: the best model under a budget. Parse, one library call, print."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from deploy.arguments import (
    DONE,
    MODEL_HELP,
    TEXT_HELP,
    add_calibration,
    add_device,
    add_dry_run,
    add_output,
    assignments,
    calibration_options,
    checked,
    checked_device,
    command,
    finish,
    open_terminal,
    output_folder,
)

if TYPE_CHECKING:
    from deploy.fit_plan import Plan, Request
    from deploy.fit_record import FitRecord
    from deploy.ruler import Target

NOTHING_FITS = 3
"""Exit code: measured, but no candidate is within the budget."""

SCORED = {"rows": 16, "length": 512}
"""Calibration rows unless it is told: every candidate looks at them."""

FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def add_fit(commands: Any) -> None:
    """``foldaway fit``."""
    parser = command(
        commands,
        "fit",
        _fit,
        "find the best model under a budget of size, memory or time",
        """
        All shapes are counted without weights; of those that fit a few that are unlike each other are compressed,
        judged on text or on tasks, and measured. The best that fits becomes DIR/model, an artifact; DIR/fit.json and
        DIR/report.html say what was tried. The same call goes on where Ctrl-C stopped it. Give one target:

          --target-params N     distinct parameters
          --target-bytes N      bytes of the weight files on disk
          --target-memory N     bytes that a process holds for weights and a KV cache of --context tokens, with PyTorch
          --target-latency MS   milliseconds of a decoded token behind --context tokens, with PyTorch, on this machine

        N may end in K, M or G, which are powers of ten: 100M, 1.5G.

        Of minitron --top shapes are tried: blocks, channels, neurons and heads, each cut by as much as
        --max-width-cut and --max-depth-cut allow. Every other method that takes a sparsity adds one candidate, the
        mildest sparsity that fits: see foldaway compress --help for them and for the options that --set takes, here
        as METHOD.NAME=VALUE. With --distill-rows each candidate learns from MODEL before it is judged, which may
        change which one is best, and takes far longer; its options are those of the method distill.

        docs/fit.md explains what is predicted, measured and chosen.
        """,
        "foldaway fit demo:smollm2 --target-params 100M --methods minitron,2ssp --top 4 --windows 4 -o smol-100M",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    for name, (metavar, _, what) in TARGETS.items():
        parser.add_argument(f"--target-{name}", metavar=metavar, help=what)
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="in the KV cache, for memory and latency (default 2048, or all)"
    )
    parser.add_argument(
        "--methods", default="minitron", metavar="NAME,...", help="to take candidates from (default minitron)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="an option of a method, for all its candidates; repeat for more",
    )
    parser.add_argument("--top", type=int, default=6, metavar="N", help="shapes of minitron to try (default 6)")
    parser.add_argument(
        "--max-width-cut",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of channels, neurons and heads that may go (default 0.4)",
    )
    parser.add_argument(
        "--max-depth-cut", type=float, default=0.2, metavar="SHARE", help="of blocks that may go (default 0.2)"
    )
    parser.add_argument("--hidden-step", type=int, metavar="N", help="channels from one size to the next")
    parser.add_argument("--neuron-step", type=int, metavar="N", help="neurons from one size to the next")
    _add_texts(parser)
    add_device(parser)
    add_dry_run(parser, "say which candidates would be tried, and how large they would be; no weights are read")
    add_output(parser, "the folder of the search; the same one goes on where it was stopped")


TARGETS = {
    "params": ("N", "parameters", "parameters, at most"),
    "bytes": ("N", "bytes", "bytes on disk, at most"),
    "memory": ("N", "memory", "bytes of memory for weights and KV cache, at most"),
    "latency": ("MS", "latency", "milliseconds of a decoded token, at most"),
}
"""Word of the option -> metavar, kind, help."""


def _add_texts(parser: Any) -> None:
    """What methods calibrate on, and what candidates are judged on."""
    add_calibration(parser, **SCORED)
    parser.add_argument(
        "--distill-rows", type=int, metavar="N", help="let every candidate learn from so many rows before it is judged"
    )
    parser.add_argument("--text", metavar="SOURCE", help=f"that judges: {TEXT_HELP} (default builtin)")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="tokens per window (default 2048)")
    parser.add_argument("--windows", type=int, metavar="N", help="how many windows (default: all of the text)")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="that judge in place of text: .jsonl files or lm-eval's names"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N items of each task (default: all)")


def _fit(arguments: argparse.Namespace) -> int:
    from deploy.fit import Fit
    from deploy.fit_plan import Plan
    from deploy.fit_record import outcome

    asked = _request(arguments)
    if arguments.dry_run:
        return _preview(Plan(asked))
    out = output_folder(arguments)
    with open_terminal() as terminal:
        fit = Fit(Plan(asked), out, progress=terminal.progress, say=terminal.say)
        found = fit.run(arguments.command_line)
        if skipped := fit.stages.work.skipped:
            terminal.say(f"{len(skipped)} stages were skipped, because their inputs are unchanged")
        for line in outcome(found):
            terminal.say(line)
        if found.best is not None:
            terminal.say(f"Next: foldaway eval {fit.model_path} --against {arguments.model}")
    finish(_last_line(found, fit.model_path, fit.report_path))
    return DONE if found.best is not None else NOTHING_FITS


def _last_line(found: FitRecord, model: Path, report: Path) -> dict[str, Any]:
    """What a program that calls this wants to know."""
    best = found.best

    def values(row: Any) -> dict[str, Any]:
        judged = {found.judge: row.judged.value, "standard_error": row.judged.standard_error} if row.judged else {}
        return {"predicted": row.predicted, "measured": row.measured.value, **judged}

    return {
        "model": None if best is None else str(model),
        "artifact": None if best is None or best.made is None else best.made.artifact,
        "chosen": found.chosen,
        "target": {"kind": found.target.kind, "limit": found.target.limit, "context": found.target.context},
        "best": None if best is None else values(best),
        "dense": values(found.dense),
        "candidates": len(found.candidates),
        "report": str(report),
        "record": found.id,
    }


def _preview(plan: Plan) -> int:
    """The candidates that would be tried."""
    from benchmarks.table import Grid
    from deploy.fit_record import amount, axis, describe_candidate
    from deploy.measured import made_up, points_of_line
    from deploy.ruler import fit_line
    from deploy.tables import plain_table

    kind, ruler = plan.target.kind, plan.ruler
    with open_terminal() as terminal:
        if plan.target.context is not None and kind == "latency":
            terminal.say("Timing the model's shape, with weights that say nothing")
            points, _ = points_of_line(made_up(plan.asked.model), plan.target.context, terminal.progress)
            ruler = fit_line(plan.target, ruler, points)
        dense = ruler.predict(plan.target, plan.size)
        plan.check_too_large(dense)
        sources = plan.sources(ruler)
        plan.check_reachable(sources)
        candidates = plan.preview(sources)
        rows = [("dense", f"{plan.size.parameters:,}", amount(kind, dense))]
        rows += [
            (describe_candidate(each), f"{each.size.parameters:,}", amount(kind, each.predicted)) for each in candidates
        ]
        terminal.show(plain_table(Grid(("candidate", "parameters", f"predicted {kind}"), tuple(rows))))
        counted = sum(source.enumerated for source in sources)
        fitting = sum(source.fitting(plan.target.limit) for source in sources)
        terminal.say(
            f"{counted:,} candidates were counted, {fitting:,} are within {amount(kind, plan.target.limit)} "
            f"({axis(plan.target)}), and these {len(candidates)} would be tried"
        )
        if kind == "memory":
            terminal.say("A process holds a little more than weights and cache; a search measures how much and allows")
    return finish(
        {
            "model": plan.asked.model,
            "target": {"kind": kind, "limit": plan.target.limit, "context": plan.target.context},
            "dense": dense,
            "counted": counted,
            "fitting": fitting,
            "candidates": [
                {
                    "name": each.name,
                    "method": each.method,
                    "options": dict(each.options),
                    "parameters": each.size.parameters,
                    "predicted": each.predicted,
                }
                for each in candidates
            ],
        }
    )


# --- Reading what was given


def _request(arguments: argparse.Namespace) -> Request:
    from deploy.fit_plan import Request
    from deploy.grid import Space
    from deploy.recipe import CalibrationSpec, EvaluationSpec

    given = {"source": arguments.text, "window": arguments.window, "windows": arguments.windows}
    named = {name: value for name, value in given.items() if value is not None}
    if arguments.tasks and named:
        raise ConfigError(
            "candidates are judged on text or on tasks: leave out --text, --window and --windows, or --tasks"
        )
    if arguments.limit is not None and not arguments.tasks:
        raise ConfigError("--limit is for --tasks")
    calibration = checked(CalibrationSpec, **{**SCORED, **calibration_options(arguments)})
    return Request(
        model=arguments.model,
        target=_target(arguments),
        methods=tuple(name.strip() for name in arguments.methods.split(",") if name.strip()),
        options=_options(arguments.set),
        space=Space(arguments.max_width_cut, arguments.max_depth_cut, arguments.hidden_step, arguments.neuron_step),
        top=arguments.top,
        calibration=calibration,
        evaluation=None if arguments.tasks else checked(EvaluationSpec, **named),
        tasks=tuple(arguments.tasks or ()),
        limit=arguments.limit,
        distill_rows=arguments.distill_rows,
        device=checked_device(arguments.device),
    )


def _target(arguments: argparse.Namespace) -> Target:
    """The one target that was given.

    Raises:
        ConfigError: there is none, more than one, or no number.
    """
    from deploy.ruler import Target

    given = {name: value for name in TARGETS if (value := getattr(arguments, f"target_{name}")) is not None}
    if len(given) != 1:
        known = ", ".join(f"--target-{name}" for name in TARGETS)
        raise ConfigError(f"give one target, not {len(given)}: {known}")
    ((name, text),) = given.items()
    if name == "latency":
        return Target("latency", number(text, f"--target-{name}", plain=True) / 1000, arguments.context)
    kinds: dict[str, Any] = {word: kind for word, (_, kind, _) in TARGETS.items()}
    return Target(kinds[name], number(text, f"--target-{name}"), arguments.context)


def number(text: str, option: str, *, plain: bool = False) -> float:
    """100M, 1.5G or 250_000_000 as a number; a B behind it stands for bytes, or alone for 10^9.

    Args:
        text: as it was given.
        option: that it was given for.
        plain: no letters behind it.

    Raises:
        ConfigError: it is no positive number.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([KMGT]?)(B?)", text.strip().upper())
    if not found or (plain and (found[2] or found[3])):
        example = "25.5" if plain else "100M, 1.5G or 250_000_000"
        raise ConfigError(f"{option} {text}: give a number such as {example}")
    factor = 1e9 if found[3] and not found[2] else FACTORS[found[2]]
    value = float(found[1].replace("_", "").replace(",", "")) * factor
    if value <= 0:
        raise ConfigError(f"{option} {text}: give a number above 0")
    return value if plain else float(round(value))


def _options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["2ssp.alpha=1"]`` to ``{"2ssp": {"alpha": 1}}``."""
    options: dict[str, dict[str, Any]] = {}
    for item in given:
        method, dot, rest = item.partition(".")
        if not dot or "=" in method:
            raise ConfigError(f"--set {item}: write METHOD.NAME=VALUE, for example minitron.norm_compensation=true")
        options.setdefault(method, {}).update(assignments([rest]))
    return options
