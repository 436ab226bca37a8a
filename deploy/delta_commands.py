"""The commands about fine-tunes: ``foldaway finetune`` and ``foldaway delta``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from deploy.arguments import (
    MODEL_HELP,
    TEXT_HELP,
    add_check,
    add_device,
    add_output,
    assignments,
    checked,
    checked_device,
    command,
    finish,
    open_terminal,
    output_folder,
)

if TYPE_CHECKING:
    from compress.finetune import Example
    from deploy.deltas import Pair
    from deploy.terminal import Terminal

FOLDER_HELP = "a folder of safetensors or a hub id"
CALIBRATION_ROWS, CALIBRATION_LENGTH = 4, 256
"""Enough for one factor per output: a thousand tokens, in one forward pass each."""


def add_finetune(commands: Any) -> None:
    """``foldaway finetune``."""
    parser = command(
        commands,
        "finetune",
        _finetune,
        "fine-tune a model on examples, so that its delta stays small if wanted",
        """
        FILE is .jsonl with rows of prompt and response (the response is learnt), of messages (the last answer is
        learnt) or of text (all of it is), or a text file. The model's chat template is put around prompts and responses
        unless --plain is given. The result is an ordinary Hugging Face folder. Options, by --set:

          steps=N              optimiser steps (default: once through the examples, or epochs=N times)
          batch=16             examples per step
          learning_rate=2e-5   peak; schedule=linear, cosine or constant; warmup=0.06 of the steps
          optimizer=adamw      or adamr-l2, adamr-l1: Adam with a pull towards the base weights (DAREx), so that most
                               of the delta can be dropped: l2 before random dropping, l1 before dropping by importance
          strength=1e-2        of that pull
          lora_rank=0          train pairs of this rank and merge them; 0 trains the weights (LoRA needs peft)
          train_embeddings=true   false keeps the delta to the matrices of the blocks
          autocast=false       true computes in bf16
          max_length=512, weight_decay=0, seed=0

        The same call goes on from the last tenth of the steps where Ctrl-C stopped it.
        """,
        "foldaway finetune demo:smollm2 --data train.jsonl --set steps=200 --set optimizer=adamr-l2 -o smol-tuned",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="SOURCE", help=f"examples: {TEXT_HELP}")
    parser.add_argument("--plain", action="store_true", help="join prompt and response without the chat template")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option, see above")
    parser.add_argument("--dtype", metavar="TYPE", help="of the weights: bf16, fp16 or fp32 (default: the model's)")
    add_device(parser)
    add_output(parser, "the fine-tune's folder; must not exist yet, or be empty")


def _finetune(arguments: argparse.Namespace) -> int:
    from compress.files import check_free
    from compress.finetune import FinetuneConfig
    from compress.schema import configured
    from compress.sources import load
    from deploy.finetunes import finetune_model, weight_type

    config = configured(FinetuneConfig, assignments(arguments.set), "finetune")
    out = output_folder(arguments)
    dtype, device = weight_type(arguments.dtype), checked_device(arguments.device)
    check_free(out)
    with open_terminal() as terminal:
        with terminal.working(f"Loading {arguments.model}"):
            loaded = load(arguments.model, dtype=dtype)
        loss = finetune_model(
            loaded, arguments.data, out, config, chat=not arguments.plain, device=device, progress=terminal.progress
        )
        terminal.say(f"Loss over the last tenth of the steps: {loss:.3f} nats per token")
        terminal.say(f"Next: foldaway delta advise BASE {out}, with the folder of {arguments.model} for BASE")
    return finish({"path": str(out), "loss": loss})


def add_delta(commands: Any) -> None:
    """``foldaway delta``, and the commands under it."""
    parser = commands.add_parser(
        "delta",
        help="store fine-tunes as pruned deltas of their base: pack, inspect, verify, apply, export, diff, advise",
        description="Store a fine-tune as what it adds to its base, most of it dropped (DAREx, Deng et al. 2024).",
        epilog="Example:\n  foldaway delta pack BASE FINETUNED --set p=0.95 -o tuned.delta\n"
        "  foldaway delta apply BASE tuned.delta -o tuned",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=lambda arguments: _which(parser))
    under = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_advise(under)
    _add_pack(under)
    _add_inspect(under)
    _add_verify(under)
    _add_apply(under)
    _add_export(under)
    _add_diff(under)


def _which(parser: argparse.ArgumentParser) -> int:
    raise ConfigError(f"say which: {parser.prog} advise, pack, inspect, verify, apply, export or diff; see --help")


def _add_pack(commands: Any) -> None:
    parser = command(
        commands,
        "pack",
        _pack,
        "store what a fine-tune adds to its base",
        """
        Matrices of the blocks are pruned; changed rows of embeddings are stored as rows, and norms, biases and new
        heads as they are. FINETUNED may also be a folder with a LoRA adapter of peft's: its product is packed.
        Options, by --set:

          p=0.95               share dropped, as a number or a fraction
          values=int8          what kept elements are stored as: bf16, int8, int4 or sign (p=0 with sign is BitDelta)
          keep=random          what stays: random elements (positions cost nothing: a seed brings them back), those of
                               largest magnitude, or by wanda (magnitude times input norm)
          rescale=dare         how the rest is scaled: dare (1 / (1 - p)), none, fixed (with q=NUMBER), search (one
                               q, by --labelled or else by the change of the outputs), paper-bound, analytic-mse (a q
                               for each matrix), least-squares (a factor for each output, for the mask drawn)
          scale=row            or tensor: what shares a scale (default: tensor beyond p = 0.95)
          scheme=one-of-m      or bernoulli, columns (whole inputs go)
          rows=int8            or exact: changed rows of embeddings
          seed=0               of the mask
          per_row=true, eta=NUMBER   of least-squares, and of paper-bound (default: searched)

        dare, none and fixed read the two checkpoints tensor by tensor; the others load the fine-tune and look at
        calibration text.
        """,
        "foldaway delta pack base tuned --set p=0.95 --set values=int8 -o tuned.delta",
    )
    _pair(parser)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option, see above")
    _calibration(parser, "builtin")
    parser.add_argument("--labelled", metavar="FILE", help="rescale=search: .jsonl with prompt and response")
    parser.add_argument("--plain", action="store_true", help="--labelled: join them without the chat template")
    add_device(parser)
    add_output(parser, "the package's folder; must not exist yet, or be empty")


def _pack(arguments: argparse.Namespace) -> int:
    from deploy.deltas import pack_delta, split_options, summary

    config, storage = split_options(assignments(arguments.set))
    calibration, out = _calibration_spec(arguments), output_folder(arguments)
    if arguments.labelled and config.rescale != "search":
        raise ConfigError("--labelled is for --set rescale=search")
    with open_terminal() as terminal:
        pair = _opened(arguments, terminal)
        examples = _examples(arguments, pair) if arguments.labelled else None
        description = pack_delta(pair, out, config, storage, calibration, examples)
        for line in summary(description):
            terminal.say(line)
        terminal.say(f"Next: foldaway delta apply {arguments.base} {out} -o DIR")
    return finish(
        {
            "path": str(out),
            "id": description.id,
            "sizes": description.sizes.model_dump(),
            "measured": description.measured.model_dump(),
            "config": description.config,
        }
    )


def _add_inspect(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        lambda arguments: _show(arguments, None),
        "say what a package holds, and where its bytes go",
        """
        The package's files are checked against its description.
        """,
        "foldaway delta inspect tuned.delta",
    )
    parser.add_argument("package", metavar="PACKAGE", help="a folder with delta.json")


def _add_verify(commands: Any) -> None:
    parser = command(
        commands,
        "verify",
        lambda arguments: _show(arguments, arguments.base),
        "check a package, with its base down to the last bit of what will come out",
        """
        Without --base, the files are checked against the package's description. With it, every tensor is brought back
        and compared with the checksum of what was packed; nothing is written.
        """,
        "foldaway delta verify tuned.delta --base base",
    )
    parser.add_argument("package", metavar="PACKAGE", help="a folder with delta.json")
    parser.add_argument("--base", help=FOLDER_HELP)


def _show(arguments: argparse.Namespace, base: str | None) -> int:
    from deploy.deltas import summary, verify

    with open_terminal() as terminal:
        description = verify(Path(arguments.package), base, terminal.progress)
        for line in summary(description):
            terminal.say(line)
        terminal.say("everything is as it was packed" + ("" if base is None else ", and comes out bit for bit"))
    return finish({"path": arguments.package, **description.model_dump(exclude={"tensors", "files"})})


def _add_apply(commands: Any) -> None:
    parser = command(
        commands,
        "apply",
        _apply,
        "bring a fine-tune back as an ordinary Hugging Face folder",
        """
        Tensors are read, checked and written file by file, so that about one file of weights is in memory.
        """,
        "foldaway delta apply base tuned.delta -o tuned",
    )
    parser.add_argument("base", metavar="BASE", help=FOLDER_HELP)
    parser.add_argument("package", metavar="PACKAGE", help="a folder with delta.json")
    add_output(parser, "the model's folder; must not exist yet, or be empty")


def _apply(arguments: argparse.Namespace) -> int:
    from compress.delta.apply import apply
    from compress.delta.checkpoint import open_base
    from compress.delta.package import Package

    out = output_folder(arguments)
    with open_terminal() as terminal:
        package = Package(Path(arguments.package))
        apply(package, open_base(arguments.base), out, terminal.progress)
        terminal.say(f"Next: foldaway eval {out}, or foldaway serve {out}")
    return finish({"path": str(out), "delta": package.description.id, "tensors": len(package.tensors)})


def _add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        _export,
        "make the ONNX export of a fine-tune from that of its base",
        """
        EXPORT is the base's, as foldaway export --to onnx wrote it, in any dtype. What the package changes is computed,
        and quantised, anew and written into a copy; the weights come out bit for bit as in an export of the fine-tune
        itself. The result is compared with the fine-tune on real text before it appears.
        """,
        "foldaway delta export base-onnx tuned.delta --base base -o tuned-onnx",
    )
    parser.add_argument("export", metavar="EXPORT", help="an ONNX export of the base")
    parser.add_argument("package", metavar="PACKAGE", help="a folder with delta.json")
    parser.add_argument("--base", required=True, help=f"the base itself: {FOLDER_HELP}")
    add_check(parser)
    add_output(parser, "the export's folder; must not exist yet, or be empty")


def _export(arguments: argparse.Namespace) -> int:
    import dataclasses

    from deploy.deltas import export_delta

    out, export, package = output_folder(arguments), Path(arguments.export), Path(arguments.package)
    with open_terminal() as terminal:
        made = export_delta(
            export, package, arguments.base, out, arguments.text, arguments.check_tokens, terminal.progress
        )
        terminal.say(
            f"{made.bytes / 1e6:.1f} MB of graph and weights; on {made.parity.tokens} tokens the first choice is that "
            f"of the fine-tune at {made.parity.argmax_agreement:.1%}"
        )
        terminal.say(f"Next: foldaway serve {out}")
    parity = dataclasses.asdict(made.parity)
    return finish({"path": str(out), "dtype": made.dtype, "bytes": made.bytes, "parity": parity})


def _add_diff(commands: Any) -> None:
    parser = command(
        commands,
        "diff",
        _diff,
        "say what is different between two packages",
        """
        Options that differ, tensors that come out otherwise, and how many bytes each has.
        """,
        "foldaway delta diff tuned-90.delta tuned-95.delta",
    )
    parser.add_argument("one", metavar="PACKAGE")
    parser.add_argument("other", metavar="PACKAGE")


def _diff(arguments: argparse.Namespace) -> int:
    from deploy.deltas import difference

    found = difference(Path(arguments.one), Path(arguments.other))
    with open_terminal() as terminal:
        terminal.say("Both belong to the same base" if found["same_base"] else "They belong to different bases")
        for key, (ours, theirs) in found["options"].items():
            terminal.say(f"  {key}: {ours} | {theirs}")
        terminal.say(f"{len(found['tensors_that_differ'])} of {found['tensors']} tensors come out otherwise")
    return finish(found)


def _add_advise(commands: Any) -> None:
    parser = command(
        commands,
        "advise",
        _advise,
        "measure a delta, and recommend how to pack it",
        """
        Measured are the mean magnitude of the delta, how much of it is exactly zero, and, on calibration text, R of
        each matrix: near 1 / inputs the inputs of an output pull the same way, and DARE's 1 / (1 - p) is right; near 1
        they cancel, and rescaling does harm. From R follows how far a matrix's output would be off for several p.
        """,
        "foldaway delta advise base tuned",
    )
    _pair(parser)
    _calibration(parser, "builtin; none looks at the weights alone")
    parser.add_argument("--labels", action="store_true", help="labelled examples are at hand")
    add_device(parser)


def _advise(arguments: argparse.Namespace) -> int:
    import dataclasses

    from deploy.deltas import advise_delta
    from deploy.tables import outlook_table

    calibration = None if arguments.calibration == "none" else _calibration_spec(arguments)
    with open_terminal() as terminal:
        advice = advise_delta(_opened(arguments, terminal), calibration, labels=arguments.labels)
        ratio = "" if advice.influence_ratio is None else f", R {advice.influence_ratio:.3g}"
        terminal.say(
            f"mean magnitude {advice.mean_abs_delta:.3g}, {advice.exact_zeros:.1%} exact zeros{ratio}; "
            f"{advice.changed_rows[0]:,} of {advice.changed_rows[1]:,} embedding rows changed"
        )
        terminal.show(outlook_table(advice))
        for reason in advice.reasons:
            terminal.say(f"* {reason}")
        options = " ".join(f"--set {name}={value}" for name, value in advice.options.items())
        if arguments.calibration not in ("none", "builtin"):
            options += f" --calibration {arguments.calibration}"
        terminal.say(f"Next: foldaway delta pack {arguments.base} {arguments.finetuned} {options} -o DIR")
    return finish(dataclasses.asdict(advice))


# --- shared pieces


def _pair(parser: Any) -> None:
    parser.add_argument("base", metavar="BASE", help=f"the model that was fine-tuned: {FOLDER_HELP}")
    parser.add_argument("finetuned", metavar="FINETUNED", help=f"{FOLDER_HELP}, or a folder with a LoRA adapter")


def _opened(arguments: argparse.Namespace, terminal: Terminal) -> Pair:
    from deploy.deltas import Pair

    device = checked_device(arguments.device)
    return Pair(arguments.base, arguments.finetuned, device=device, progress=terminal.progress)


def _calibration(parser: Any, default: str) -> None:
    parser.add_argument("--calibration", default="builtin", metavar="SOURCE", help=f"{TEXT_HELP} (default {default})")
    parser.add_argument("--rows", type=int, default=CALIBRATION_ROWS, metavar="N", help="calibration rows (default 4)")
    parser.add_argument(
        "--length", type=int, default=CALIBRATION_LENGTH, metavar="TOKENS", help="tokens per row (default 256)"
    )


def _calibration_spec(arguments: argparse.Namespace) -> Any:
    from deploy.recipe import CalibrationSpec

    return checked(CalibrationSpec, source=arguments.calibration, rows=arguments.rows, length=arguments.length)


def _examples(arguments: argparse.Namespace, pair: Pair) -> list[Example]:
    from compress.delta.checkpoint import model_folder
    from compress.finetune import read_examples
    from compress.sources import read_tokenizer

    tokenizer = read_tokenizer(str(model_folder(pair.base, pair.finetuned)))
    return read_examples(arguments.labelled, tokenizer, chat=not arguments.plain)
