"""The command line: parse, one library call, print.

Human words, tables and progress bars go to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 a
bug, 2 the user's mistake, 3 measured, but the gate failed or could not decide, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError, FoldawayError
from deploy.arguments import (
    DONE,
    INTERRUPTED,
    MODEL_HELP,
    USER_ERROR,
    add_check,
    add_device,
    add_dry_run,
    add_evaluation,
    add_output,
    checked_device,
    command,
    evaluation_spec,
    finish,
    open_terminal,
    output_folder,
)
from deploy.compress_commands import add_compress, add_distill, predict_steps
from deploy.delta_commands import add_delta, add_finetune
from deploy.fit_command import add_fit

if TYPE_CHECKING:
    from deploy.terminal import Terminal

# torch takes seconds to import: handlers import what they need, so that --help and mistakes answer at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    if not hasattr(arguments, "handler"):
        build_parser().print_help(sys.stderr)
        return USER_ERROR
    command_line = shlex.join(["foldaway", *given])
    return call(arguments.handler, arguments, command_line)


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Read a command line; what follows ``--`` behind serve is for vLLM, as ``flags``."""
    ours = given[: given.index("--")] if given[:1] == ["serve"] and "--" in given else given
    arguments = build_parser().parse_args(ours)
    arguments.flags = list(given[len(ours) + 1 :])
    return arguments


def call(handler: Callable[[argparse.Namespace], int], arguments: argparse.Namespace, command_line: str) -> int:
    """Run the handler of a command; what the user got wrong becomes one line on stderr. Returns the exit code."""
    arguments.command_line = command_line
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars; read when they are imported
    try:
        return handler(arguments)
    except FoldawayError as error:
        print(f"foldaway: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"foldaway: {error.strerror or error}{where}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("foldaway: interrupted; what was finished is kept", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="foldaway",
        description="Fold a language model until it fits, prove that it still works, ship it.",
        epilog="Start with:  foldaway run deploy/recipes/demo.yaml -o runs/demo\n\n"
        "The last line of stdout is one JSON object; words and progress bars go to stderr.\n"
        "Exit codes: 0 done, 1 a bug, 2 your mistake, 3 the gate failed or could not decide, 130 Ctrl-C.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"foldaway {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_compress(commands)
    add_distill(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_serve(commands)
    _add_bench(commands)
    _add_run(commands)
    _add_suite(commands)
    add_fit(commands)
    add_finetune(commands)
    add_delta(commands)
    _add_show(commands)
    return parser


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("foldaway")


# --- eval


def _add_eval(commands: Any) -> None:
    parser = command(
        commands,
        "eval",
        _eval,
        "measure perplexity and zero-shot accuracy, and divergence from a baseline",
        """
        Perplexity says how well the model predicts held-out text; lower is better. With --tasks, lm-eval asks it
        multiple-choice questions: from .jsonl files with rows of query, choices and gold, or of context_options,
        continuation and gold; or tasks of lm-eval's own, by name (those come from a hub).

        With --against, both are measured on the same text and items: the ratio of the perplexities, how far the
        predictions have moved (KL, first choices), and how much of the baseline's accuracy above chance is kept. An
        ONNX export is scored through its graph, so that what rounding costs is seen. docs/evaluation.md explains
        every number.
        """,
        "foldaway eval smol-25 --against demo:smollm2 --window 1024 --windows 8 --tasks arc_easy.jsonl --limit 200",
    )
    parser.add_argument("path", metavar="PATH", help=f"an ONNX export, {MODEL_HELP}")
    parser.add_argument("--against", metavar="BASELINE", help="also measure this one, and how far PATH is from it")
    add_evaluation(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="zero-shot tasks: .jsonl files or lm-eval's names"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N items of each task (default: all)")
    add_device(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the record there; must not exist yet")


def _eval(arguments: argparse.Namespace) -> int:
    from compress.files import check_new_file, write_file
    from deploy.evaluation import evaluate
    from deploy.tables import evaluation_table

    spec, device = evaluation_spec(arguments), checked_device(arguments.device)
    if arguments.output:
        check_new_file(Path(arguments.output))
    with open_terminal() as terminal:
        found = evaluate(
            arguments.path,
            arguments.against,
            spec,
            arguments.tasks,
            limit=arguments.limit,
            device=device,
            progress=terminal.progress,
            command=arguments.command_line,
        )
        terminal.show(evaluation_table(found))
        if arguments.output:
            write_file(Path(arguments.output), found.model_dump_json(indent=2) + "\n")
    return finish(found.model_dump())


# --- export


def _add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        export_command,
        "write another runtime's files, and check that they compute the same",
        """
        The export is compared with its source on real text, as a whole and token by token with a cache. If it does
        not compute the same, nothing is written.
        """,
        "foldaway export smol-25 --to onnx --dtype int4 -o smol-25-onnx",
    )
    add_export_options(parser)


def add_export_options(parser: Any) -> None:
    """The options of `foldaway export`, which optimum-cli has too."""
    parser.add_argument("path", metavar="PATH", help=MODEL_HELP)
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="onnx (onnxruntime and what builds on it), hf (transformers) or vllm",
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="of the weights. onnx: fp32 (default), fp16, int8 or int4. hf and vllm: fp32, fp16 or bf16 (default: as "
        "they are)",
    )
    quantised = parser.add_argument_group("int8 and int4 (docs/exporters.md says what each costs)")
    quantised.add_argument("--algorithm", metavar="NAME", help="how weights are rounded: rtn (default), k-quant or hqq")
    quantised.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="weights that share a scale: 16, 32, 64, 128 or 256 (default 32)",
    )
    quantised.add_argument(
        "--int8",
        default=(),
        type=lambda parts: tuple(parts.split(",")),
        metavar="PART,...",
        help="int4: parts that are stored in int8 all the same, of qkv, o, gate, up, down; for example qkv,down",
    )
    quantised.add_argument(
        "--smooth",
        type=float,
        metavar="STRENGTH",
        help="even out activations (1), weights (near 0) or both (0.5) first; loses less, takes longer (default: off)",
    )
    quantised.add_argument(
        "--embeddings", metavar="TYPE", help="of embedding and LM head: int4, int8 or fp32 (default int8)"
    )
    quantised.add_argument(
        "--accuracy-level",
        type=int,
        metavar="N",
        help="what activations are computed in: 4 = int8 (default on the cpu), 1 = fp32, 0 = the runtime's choice",
    )
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument(
        "--layout",
        default="flat",
        metavar="NAME",
        help="flat (default): one folder for all runtimes; transformersjs: the graph in onnx/, named after its dtype",
    )
    onnx.add_argument(
        "--ep",
        default="cpu",
        metavar="NAME",
        help="execution provider to make the graph for: cpu (default), cuda, webgpu or dml; it is checked on the cpu",
    )
    onnx.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="refuse an export that diverges by more per token (default: by dtype)",
    )
    parser.add_argument(
        "--expand",
        action="store_true",
        help="hf: give blocks that share weights copies of their own, for runtimes that cannot share",
    )
    vllm = parser.add_argument_group("vllm (docs/vllm.md says which models need what)")
    vllm.add_argument(
        "--divisor", type=int, metavar="N", help="pad FFN widths to multiples of 64 or 256, as GPU kernels want them"
    )
    vllm.add_argument(
        "--no-plugin",
        dest="plugin",
        action="store_false",
        help="write no folder that needs foldaway beside vLLM: copy and pad blocks instead, where it comes to that",
    )
    add_check(parser)
    add_dry_run(parser, "say whether the format takes the model, and how large it would be; write nothing")
    add_output(parser, "the export's folder; must not exist yet, or be empty")


def export_command(arguments: argparse.Namespace) -> int:
    """The handler of `foldaway export`."""
    import dataclasses

    from compress.calibration import context_length_of, windows
    from compress.files import check_free
    from compress.layout import layout_of
    from compress.sources import load
    from exporters import export, exporter_named
    from exporters.base import ExportOptions

    exporter_named(arguments.to)
    options = ExportOptions(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ExportOptions)}
    )
    if arguments.dry_run:
        return _predict_export(arguments.path, arguments.to, options)
    out = output_folder(arguments)
    check_free(out)
    with open_terminal() as terminal:
        with terminal.working(f"Loading {arguments.path}"):
            loaded = load(arguments.path)
        context = context_length_of(loaded.model)
        length = min(arguments.check_tokens, context)
        tokens = windows(arguments.text, loaded.tokenizer, length=length, count=1, context_length=context).tokens
        made = export(loaded, out, to=arguments.to, options=options, check_tokens=tokens, progress=terminal.progress)
        parity = made.parity
        terminal.say(
            f"{made.bytes / 1e6:.1f} MB of graph and weights; on {parity.tokens} tokens the first choice is the same "
            f"at {parity.argmax_agreement:.1%}, and the worst logit difference {parity.max_abs_difference:.2g}; it "
            f"diverges by {parity.kl:.2g} nats per token"
        )
        _note(terminal, made.notes)
        layout = layout_of(loaded.model)
        if arguments.expand and layout.kind == "shared":
            terminal.say(
                f"Expanded: {len(layout.blocks)} blocks are stored in place of {layout.distinct}, and nothing is left "
                "of what sharing had saved"
            )
        terminal.say(f"Next: foldaway serve {out}")
    return finish(
        {
            "path": str(made.path),
            "format": made.format,
            "dtype": made.dtype,
            "bytes": made.bytes,
            "parameters": made.parameters,
            "parity": dataclasses.asdict(parity),
        }
    )


def _note(terminal: Terminal, notes: Sequence[str]) -> None:
    for note in notes:
        terminal.say(note)


def _predict_export(path: str, to: str, options: Any) -> int:
    from deploy.predict import predict_export

    with open_terminal() as terminal:
        parameters, size, notes = predict_export(path, to, options)
        terminal.say(f"{to} takes {path}: {parameters:,} parameters, about {size / 1e6:,.0f} MB of weights")
        _note(terminal, notes)
    return finish({"path": path, "to": to, "parameters": parameters, "bytes": size})


# --- serve


def _add_serve(commands: Any) -> None:
    parser = command(
        commands,
        "serve",
        _serve,
        "serve a model behind an OpenAI-compatible endpoint until Ctrl-C",
        """
        Routes: /v1/models, /v1/chat/completions, /v1/completions, /health. Use it with any OpenAI client:

          OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

        Ctrl-C and SIGTERM let running answers finish.

        --backend vllm runs vLLM's own server on the model, ragged and shared ones included; flags of vLLM follow
        after --, as in:  foldaway serve smol-25 --backend vllm -- --tensor-parallel-size 2
        docs/vllm.md says what it takes, docs/scaling.md how to use several GPUs and machines.
        """,
        "foldaway serve smol-25-onnx --port 8000",
    )
    parser.add_argument("path", metavar="PATH", help=f"an ONNX or vLLM export, {MODEL_HELP}")
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="onnx, torch or vllm (default: onnx for an ONNX export, vllm for one for vLLM, else torch)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in the API (default: PATH's name)"
    )
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="prompt and answer together, at most")
    parser.add_argument("--api-key-file", metavar="FILE", help="require this bearer key (or FOLDAWAY_API_KEY)")
    parser.add_argument(
        "--delta",
        action="append",
        default=[],
        metavar="NAME=PACKAGE",
        help="vllm: merge a fine-tune's delta into PATH while loading, and serve it under this name",
    )
    _until_stdin_closes(parser)
    add_device(parser)


def _serve(arguments: argparse.Namespace) -> int:
    from serving.service import serve

    deltas = [_name_and_package(each) for each in arguments.delta]
    terminal = open_terminal()
    terminal.say(f"Loading {arguments.path}")
    _stop_with_parent(arguments)
    serve(
        arguments.path,
        backend=arguments.backend,
        host=arguments.host,
        port=arguments.port,
        served_model_name=arguments.served_model_name,
        max_model_len=arguments.max_model_len,
        api_key=_api_key(arguments.api_key_file),
        device=checked_device(arguments.device),
        deltas=deltas,
        flags=arguments.flags,
        ready=lambda url: terminal.say(f"Serving at {url}/v1 until Ctrl-C"),
        say=terminal.say,
        quiet=terminal.console.is_terminal,
        progress=terminal.progress,
    )
    return finish({"path": arguments.path, "stopped": True})


def _name_and_package(text: str) -> tuple[str, str]:
    name, equals, package = text.partition("=")
    if not (name and equals and package):
        raise ConfigError(f"--delta {text}: give NAME=PACKAGE, the name towards clients and the package's folder")
    return name, package


def _until_stdin_closes(parser: Any) -> None:
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="also stop when standard input ends: for a parent program"
    )


def _stop_with_parent(arguments: argparse.Namespace) -> None:
    if arguments.until_stdin_closes:
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()


def _stop_at_end_of_stdin() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock the interpreter wants at its end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _api_key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get("FOLDAWAY_API_KEY") or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the key file {file}: {error}") from error
    if not key:
        raise ConfigError(f"the key file {file} is empty")
    return key


# --- bench


SUITES = {
    "quick": {"repeats": 5, "decode_tokens": 32, "max_tokens": 32},
    "full": {"repeats": 15, "decode_tokens": 128, "max_tokens": 96},
}


def _add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        _bench,
        "compare a candidate with its baseline: quality, speed, memory, size; judge it by a gate",
        """
        Both sides are measured in one run, taking turns: perplexity and divergence on held-out text, speed in this
        process and through a server, memory, size. DIR gets record.json and report.html. With a gate, the exit code
        is 0 when every limit holds and 3 when one does not, or when the measurements cannot tell.
        """,
        "foldaway bench smol-25-onnx --baseline smol-onnx --gate gate.yaml -o runs/compare",
    )
    parser.add_argument("candidate", metavar="CANDIDATE", help=f"an ONNX export, {MODEL_HELP}")
    parser.add_argument("--baseline", required=True, help="the same, of the uncompressed model")
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick", help="how long to measure (default quick)")
    parser.add_argument("--gate", metavar="FILE", help="YAML with limits, such as {metric: perplexity, max_ratio: 1.1}")
    add_evaluation(parser)
    add_output(parser, "folder for record.json, report.html and the servers' logs")


def _bench(arguments: argparse.Namespace) -> int:
    from benchmarks.gate import EXIT_CODES, read_gate
    from deploy.bench import bench
    from deploy.recipe import BenchmarkSpec

    limits = read_gate(Path(arguments.gate)).limits if arguments.gate else ()
    with open_terminal() as terminal:
        record, report = bench(
            arguments.baseline,
            arguments.candidate,
            output_folder(arguments),
            limits=limits,
            evaluation=evaluation_spec(arguments),
            spec=BenchmarkSpec.model_validate(SUITES[arguments.suite]),
            progress=terminal.progress,
            command=arguments.command_line,
        )
        _tell(terminal, record, report)
    print(json.dumps(record.last_line(report)))
    return EXIT_CODES[record.verdict] if record.verdict else DONE


# --- run


def _add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        _run,
        "the whole way of a recipe: compress, export, serve, measure, judge, report",
        """
        A recipe names a model, the methods to apply, the text to judge on, and the limits to keep. Every stage leaves
        its result in DIR; a stage whose inputs have not changed is skipped the next time. report.html in DIR is the
        page to look at. To measure again, remove record-*.json from DIR.
        """,
        "foldaway run deploy/recipes/demo.yaml -o runs/demo",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; docs/formats.md describes it")
    add_device(parser)
    add_dry_run(parser, "say what each value of the recipe would give and cost; write nothing")
    add_output(parser, "the run's folder; run again with the same one to go on where it stopped")


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.gate import EXIT_CODES
    from deploy.pipeline import Pipeline
    from deploy.recipe import read_recipe

    recipe = read_recipe(Path(arguments.recipe))
    if arguments.dry_run:
        for chain in recipe.chains():
            predict_steps(recipe.model, chain, recipe.calibration)
        return DONE
    with open_terminal() as terminal:
        pipeline = Pipeline(
            recipe,
            output_folder(arguments),
            device=checked_device(arguments.device),
            progress=terminal.progress,
            say=terminal.say,
        )
        record = pipeline.run(arguments.command_line)
        if pipeline.work.skipped:
            terminal.say(f"Skipped, because their inputs are unchanged: {', '.join(pipeline.work.skipped)}")
        _tell(terminal, record, pipeline.report_path)
        terminal.say(f"Try it: foldaway serve {pipeline.candidate_path}")
    print(json.dumps(record.last_line(pipeline.report_path)))
    return EXIT_CODES[record.verdict] if record.verdict else DONE


def _tell(terminal: Terminal, record: Any, report: Path) -> None:
    """The outcome in words."""
    from deploy.show import outcome

    for line in outcome(record):
        terminal.say(line)
    terminal.say(f"Report: {report}")


# --- suite


def _add_suite(commands: Any) -> None:
    parser = command(
        commands,
        "suite",
        _suite,
        "compress one model with many methods and sparsities, and measure all alike",
        """
        A suite names a model, methods, sparsities, texts and tasks. Every cell of the table is computed in a process
        of its own and kept in DIR, so that a suite that was stopped goes on where it was. DIR/record.json is the
        result; its tables are printed at the end. A suite of kind deltas fine-tunes models, and stores what was added
        in many ways.
        """,
        "foldaway suite benchmarks/suites/quality.yaml --data DIR -o runs/quality",
    )
    parser.add_argument("suite", metavar="SUITE", help="a YAML file; docs/formats.md describes it")
    parser.add_argument("--data", metavar="DIR", help="folder with the texts and tasks that the suite names")
    parser.add_argument("--profile", default="cpu", metavar="NAME", help="how much of everything (default cpu)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells side by side, sharing the cores")
    parser.add_argument("--cell", metavar="NAME", help="compute this cell alone, in this process")
    _until_stdin_closes(parser)
    add_device(parser)
    add_output(parser, "the suite's folder; run again with the same one to go on where it stopped")


def _suite(arguments: argparse.Namespace) -> int:
    from benchmarks.table import GRIDS
    from deploy.delta_suite import is_delta_suite
    from deploy.suite import SuiteRun
    from deploy.tables import plain_table

    _stop_with_parent(arguments)
    if is_delta_suite(Path(arguments.suite)):
        return _delta_suite(arguments)
    with open_terminal() as terminal:
        run = SuiteRun(
            Path(arguments.suite),
            output_folder(arguments),
            data=Path(arguments.data) if arguments.data else None,
            profile=arguments.profile,
            device=checked_device(arguments.device),
            jobs=arguments.jobs,
            say=terminal.say,
        )
        if arguments.cell is not None:
            cell = run.compute(arguments.cell, terminal.progress)
            return finish({"cell": arguments.cell, "perplexity": cell.perplexity.value, "accuracy": cell.accuracy})
        table = run.run(terminal.progress)
        for name, grid in GRIDS.items():
            if name != "calibration" or table.calibrations:
                terminal.show(plain_table(grid(table)))
    return finish({"record": str(run.root / "record.json"), "id": table.id, "cells": len(table.cells)})


def _delta_suite(arguments: argparse.Namespace) -> int:
    from benchmarks.delta_table import bytes_grid, pairs_grid, timings_grid
    from deploy.delta_suite import DeltaSuiteRun
    from deploy.tables import plain_table

    if arguments.cell is not None or arguments.jobs != 1:
        raise ConfigError("a suite of deltas runs in one process: leave out --cell and --jobs")
    with open_terminal() as terminal:
        run = DeltaSuiteRun(
            Path(arguments.suite),
            output_folder(arguments),
            data=Path(arguments.data) if arguments.data else None,
            profile=arguments.profile,
            device=checked_device(arguments.device),
            say=terminal.say,
            progress=terminal.progress,
        )
        table = run.run()
        for grid in (pairs_grid(table), *map(bytes_grid, table.pairs), timings_grid(table)):
            terminal.show(plain_table(grid))
    cells = sum(len(pair.cells) for pair in table.pairs)
    return finish({"record": str(run.root / "record.json"), "id": table.id, "cells": cells})


# --- show


def _add_show(commands: Any) -> None:
    parser = command(
        commands,
        "show",
        _show,
        "say what an artifact, an export or a record is",
        """
        An artifact's files are checked against its manifest.
        """,
        "foldaway show smol-25",
    )
    parser.add_argument("path", metavar="PATH", help="a folder or a record.json")


def _show(arguments: argparse.Namespace) -> int:
    from deploy.show import describe

    kind, words, content = describe(Path(arguments.path))
    with open_terminal() as terminal:
        for line in words:
            terminal.say(line)
    return finish({"kind": kind, **content})
