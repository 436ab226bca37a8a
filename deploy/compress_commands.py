"""The commands that change a model and keep the result as an artifact: compress and distill."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from deploy.arguments import (
    MODEL_HELP,
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
    from compress.artifact import Manifest
    from deploy.recipe import CalibrationSpec, StepSpec


SPILL_BYTES = 2_000_000_000
LESSON = {"rows": 96, "length": 512}
"""What a distillation learns from unless it is told: short rows, for the activations of a step stay in memory."""


def add_compress(commands: Any) -> None:
    """The command compress."""
    parser = command(
        commands,
        "compress",
        _compress,
        "make a model smaller with one method and keep the result as an artifact",
        """
        The model is read, scored on calibration text, cut, and saved to DIR as an artifact: a folder that
        transformers can load, with a manifest that says how it was made. Removals one after the other are kept while
        they are found: the same call goes on where Ctrl-C stopped it. Methods:

          2ssp      first the same share of every block's FFN neurons, then whole attentions (Sandri et al. 2025)
            sparsity=S      share of the blocks' parameters to remove, for example 0.25 (needed)
            alpha=1.5       balance: higher removes more attentions
            neuron_norm=l2  how a neuron is scored: l2 or l1
            divisor=N       FFN widths become multiples of N (64 or 128 suit most kernels)

          fusegpt   whole blocks, one after the other; the neighbours of each learn to do without it, from its weights
                    and from what it did (Pei et al. 2024). The result is a plain model of fewer blocks
            sparsity=S      share of the blocks to remove, rounded up (needed)
            window=8        blocks that take part in a removal, with the removed one; even
            epochs=20       how often the calibration rows are learnt from at each removal
            batch=8         rows a step; --rows, less those held out, must be a multiple of it
            coefficient_rank=128, coefficient_lr=0.001    of what scales the removed block's weights; rank 0: no fusion
            lora_rank=128, base_lr=9.65e-6    of what else learns; rank 0: nothing else. Both 0: the block is deleted
            warmup=0        share of a removal's steps over which both rates rise
            loss=batch_kl   at the end of the window: batch_kl, mse, cosine or feature_kl
            precision=fp32  of what learns; bf16 as in the paper
            ranking=macro_influence    which block goes: macro_influence, block_influence (ShortGPT) or loss (SLEB)
            iterative=true  rank again after each removal; false: once
            scoring_rows=N  rows that rank (default: the first 32)
            blocks=[4,9]    remove these, in this order, in place of a ranking
            protect=[0,-1]  never remove these; negative ones count from the end
            rerank=0        fuse so many of the best candidates on trial, in a small window, and take the best
            rerank_window=4, rerank_epochs=1    of such a trial
            held_out=0      rows, the last ones, on which each removal's error is reported
            seed=0          of what learns and of the order of the rows
            The paper's learning rates (the defaults) belong to some 2,500 steps a removal; with fewer steps give
            higher ones, as the recipe fusegpt.yaml does.

          foldgpt   gates learn which blocks can go; of the others neighbours share one set of weights; then all heals
                    (Liu et al. 2024). Sharing makes a model smaller and no faster
            sparsity=S      share of the blocks to remove, rounded up; 0: none (needed)
            ranking=gates   what goes: gates, block_influence, macro_influence or loss; or blocks=[4,9]
            protect=[0,-1]  never remove these; negative ones count from the end
            gate_steps=300, gate_lr=0.02, gate_eps=0.0001    how gates learn
            flops_weight=200, polarisation_weight=10    of their constraints
            check=true      remove what block influence would, where that harms less
            group=2         blocks that share; 1: none do
            keep_ends=2     so many of the first and of the last blocks share with none
            boundaries=fixed    groups one after the other; greedy: those that harm least, groups=N of them
            parent=divergence   whose weights a group uses: divergence (the least harmful), first or mean
            own_biases=false, adapter_rank=0    what each block of a group keeps beside its norms
            epochs=1        how often healing takes all rows; 0: no healing
            batch=8         rows a step; --rows, less those held out, must be a multiple of it
            lora_rank=32, lora_lr=0.0001    of what heals the matrices; norm_lr=0.001 of norms and biases
            warmup=0.03, clip=1    of healing
            next_token=1, distil=1, tail=2, tail_weight=1    what healing goes by: the next token, the teacher's
                            predictions (softened with temperature=2), and its last hidden states
            held_out=8      rows, the last ones, that nothing learns from: they judge
            seed=0          of what learns and of the order of the rows
            group=1 with epochs=0 only removes, sparsity=0 with epochs=0 only shares, and sparsity=0 with group=1 only
            heals: by the next token, and held near itself unless --teacher names the model that this one came from.

          minitron  every axis scored in one pass, and one cut to a smaller model of the same kind (Muralidharan et al.
                    2024); let it learn from its parent afterwards (foldaway distill), and see foldaway fit for shapes
            num_hidden_layers=L, hidden_size=D, intermediate_size=F, num_attention_heads=H    to keep (else all)
            sparsity=S      and share of the blocks' parameters to remove, by
            cut=width       which sizes: width (neurons and channels by one ratio), ffn, hidden or depth
            divisor=8       sizes that change become multiples of it
            batch_aggregator=l2, sequence_aggregator=mean    rules over rows and tokens: l2, mean or var
            depth_ranking=block_influence    which blocks go: block_influence, macro_influence, loss, or score (--tasks)
            contiguous=false, scoring_rows=N    blocks in one run; rows that rank them (default: the first 32)
            rounds=1        score and cut in so many steps
            head_residual=false, norm_compensation=false    make up for pruned heads, and for the energy of channels

        and the peers it is judged against, all with sparsity=S:

          shortgpt     the blocks that change their input least (Men et al. 2024)
          window       the run of blocks whose end is most like its start (Gromov et al. 2024)
            tokens=last     both: where hidden states are compared, last or all
          sleb         one block after the other, by perplexity (Song et al. 2024)
          blockpruner  attentions and FFNs, one after the other, by perplexity (Zhong et al. 2024)
            rows=1          both: calibration rows whose perplexity decides
          magnitude    FFN neurons of small weights
          wanda        FFN neurons of small weights times activations (after Sun et al. 2024)
          random       the shape of 2ssp, filled by chance
            alpha=1.5       as for 2ssp
            seed=0          of the choice

        docs/choosing.md says which one when.
        """,
        "foldaway compress demo:smollm2 --method 2ssp --set sparsity=0.25 -o smol-25",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "--method", metavar="NAME", help="2ssp, fusegpt, foldgpt, minitron, or one of their peers, see above"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, see above; repeat for more",
    )
    parser.add_argument("--recipe", metavar="FILE", help="take MODEL, methods and calibration from a recipe instead")
    add_calibration(parser)
    parser.add_argument(
        "--teacher", metavar="MODEL", help="foldgpt: learn from this model, with the same tokenizer (default: MODEL)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="zero-shot tasks whose mean accuracy is the score that minitron may rank blocks by; as for foldaway eval",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first N items of each task (default: all)")
    add_device(parser, "; or auto: the blocks are spread over all GPUs")
    parser.add_argument(
        "--spill",
        type=int,
        default=SPILL_BYTES,
        metavar="BYTES",
        help="so many bytes each of hidden states and of weights beside the model stay in memory, more lie in files "
        f"(default {SPILL_BYTES})",
    )
    add_dry_run(parser, "say what would come out and what it would cost; write nothing")
    add_output(parser, "the artifact's folder; must not exist yet, or be empty")


def _compress(arguments: argparse.Namespace) -> int:
    from benchmarks.tasks import check as check_tasks
    from deploy.steps import check_taught

    model, steps, calibration = _what_to_compress(arguments)
    if arguments.teacher:
        check_taught([step.method for step in steps])
    if arguments.limit is not None and not arguments.tasks:
        raise ConfigError("--limit goes with --tasks")
    if arguments.tasks:
        if not any(step.set.get("depth_ranking") == "score" for step in steps):
            raise ConfigError("--tasks are for minitron with --set depth_ranking=score: add that, or leave them out")
        check_tasks(arguments.tasks, arguments.limit)
    return _make(arguments, model, steps, calibration)


def _make(arguments: argparse.Namespace, model: str, steps: list[StepSpec], calibration: CalibrationSpec) -> int:
    """Apply steps to a model, and say what came of it."""
    from compress.device import AUTO
    from compress.files import check_free
    from compress.sources import load
    from deploy.evaluation import accuracy_score
    from deploy.steps import compress_model

    if arguments.spill < 0:
        raise ConfigError(f"--spill {arguments.spill}: give 0 bytes or more")
    if arguments.dry_run:
        return predict_steps(model, steps, calibration, arguments.spill)
    device = arguments.device if arguments.device == AUTO else checked_device(arguments.device)
    out = output_folder(arguments)
    check_free(out)
    scratch = out.absolute().with_name(f".{out.name}.scratch")
    with open_terminal() as terminal:
        with terminal.working(f"Loading {model}"):
            loaded = load(model)
            teacher = load(arguments.teacher, dtype=loaded.model.dtype) if arguments.teacher else None
        manifest = compress_model(
            loaded,
            steps,
            calibration,
            out,
            device=device,
            progress=terminal.progress,
            consume=True,
            scratch=scratch,
            spill_bytes=arguments.spill,
            teacher=teacher,
            score=accuracy_score(loaded, arguments.tasks, arguments.limit) if arguments.tasks else None,
        )
        shutil.rmtree(scratch, ignore_errors=True)  # after an interruption it stays, for the next call
        for line in _words(manifest):
            terminal.say(line)
        terminal.say(f"Next: foldaway eval {out} --against {arguments.teacher or model}")
    numbers = manifest.steps[-1].numbers
    return finish({"artifact": manifest.id, "path": str(out), "layout": manifest.layout.kind, **numbers})


def _words(manifest: Manifest) -> list[str]:
    """What the last step did."""
    numbers = manifest.steps[-1].numbers
    if "tokens_learnt" in numbers:
        lines = [
            f"Learnt from {numbers['tokens_learnt']:,} tokens; mean loss of the last epoch {numbers['losses'][-1]:.3f}"
        ]
        if "held_out_after" in numbers:
            before, after = numbers["held_out_before"], numbers["held_out_after"]
            lines.append(
                f"On the rows held out: {before['divergence']:.3f} -> {after['divergence']:.3f} nats from the teacher, "
                f"next token {before['next_token']:.3f} -> {after['next_token']:.3f}"
            )
        return lines
    lines = [
        f"{numbers['parameters_before']:,} -> {numbers['parameters_after']:,} parameters; removed are "
        f"{numbers['sparsity_of_blocks']:.1%} of the blocks, {numbers['sparsity_of_model']:.1%} of the model"
    ]
    if manifest.layout.kind == "shared":
        lines.append(
            f"{numbers['blocks_stored']} of {numbers['blocks_executed']} blocks are stored and all are executed: "
            "smaller, and no faster"
        )
    for prefix in ("stage2_", ""):
        if naive := numbers.get(f"{prefix}block_forwards_naive"):
            made = numbers[f"{prefix}block_forwards"]
            lines.append(f"Trials took {made:,} block forward passes, {made / naive:.0%} of what full ones need")
    return lines


def _what_to_compress(arguments: argparse.Namespace) -> tuple[str, list[StepSpec], CalibrationSpec]:
    """Model, methods with their options, and calibration: from a recipe, or from the options."""
    from compress.methods import method_config
    from deploy.recipe import CalibrationSpec, StepSpec, read_recipe

    if arguments.recipe is not None:
        if arguments.model or arguments.method or arguments.set or calibration_options(arguments):
            raise ConfigError("--recipe brings its own model, methods and calibration: leave out all other options")
        recipe = read_recipe(Path(arguments.recipe))
        if recipe.is_ladder:
            raise ConfigError(f"{arguments.recipe} lists several values to try: use foldaway run, or name one value")
        return recipe.model, recipe.chains()[0], recipe.calibration
    if not arguments.model or not arguments.method:
        raise ConfigError("compress needs MODEL and --method, or --recipe; see foldaway compress --help")
    options = assignments(arguments.set)
    method_config(arguments.method, options)
    calibration = checked(CalibrationSpec, **calibration_options(arguments))
    return arguments.model, [StepSpec(method=arguments.method, set=options)], calibration


def predict_steps(
    model: str, steps: list[StepSpec], calibration: CalibrationSpec, spill_bytes: int = SPILL_BYTES
) -> int:
    """Say what steps would give and cost."""
    import dataclasses

    from deploy.predict import predict

    with open_terminal() as terminal:
        found = predict(model, steps, calibration, spill_bytes)
        terminal.say(
            f"{model} would become a {found.layout} model of {found.parameters:,} parameters, "
            f"{found.bytes / 1e6:,.0f} MB. That would take about {found.memory_bytes / 1e9:.1f} GB of memory "
            f"and {found.minutes:.1f} minutes here"
        )
    return finish({"model": model, **dataclasses.asdict(found)})


# --- distill


def add_distill(commands: Any) -> None:
    """The command distill."""
    parser = command(
        commands,
        "distill",
        _distill,
        "let a smaller model learn from the one that it came from",
        """
        All weights of STUDENT learn to predict what PARENT predicts at every token of the calibration rows, and the
        result is saved to DIR as an artifact. It heals what any method did to a model, of any layout. The more rows
        the better, in text like that of the task: rows x length x epochs is what is learnt from. Options (--set):

          epochs=1           how often all rows are taken
          batch=4            rows a step; --rows, less those held out, must be a multiple of it
          accumulate=1       parts that a step is taken in, for less memory
          learning_rate=2e-4    at its highest, behind warmup=0.05; it falls along a cosine to zero
          clip=1, weight_decay=0.1    of gradients, and of matrices (AdamW)
          distil=1, next_token=0    weights of the divergence from the teacher, softened with temperature=1, and of the
                             text itself
          intermediate=false    let hidden states follow the teacher's too, for students much shallower than it
          correction_epochs=0, correction_lr=2e-5    let a copy of the teacher adapt itself to the rows first
          top_tokens=0       keep the teacher's N most likely tokens on disk and learn from those: worth it from two
                             epochs on, with N of some hundreds
          precision=bf16     that matrices are multiplied in, where the device is fast at it; else, and with fp32, fp32
          held_out=0         rows, the last ones, that nothing learns from: they say how far it has come
          seed=0             of the order of the rows

        It keeps its state while it learns: the same call goes on where Ctrl-C stopped it. docs/minitron.md has what
        was measured.
        """,
        "foldaway distill smol-75 --teacher demo:smollm2 --rows 200 --length 256 -o smol-75-distilled",
    )
    parser.add_argument("model", metavar="STUDENT", help=MODEL_HELP)
    parser.add_argument("--teacher", metavar="PARENT", required=True, help="a model with the same tokenizer")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option, see above; repeat for more"
    )
    add_calibration(parser, **LESSON)
    add_device(parser)
    add_dry_run(parser, "say what it would cost; write nothing")
    add_output(parser, "the artifact's folder; must not exist yet, or be empty")
    parser.set_defaults(tasks=[], limit=None, spill=SPILL_BYTES)


def _distill(arguments: argparse.Namespace) -> int:
    from compress.methods import method_config
    from deploy.recipe import DISTILL, CalibrationSpec, StepSpec

    options = assignments(arguments.set)
    method_config(DISTILL, options)
    calibration = checked(CalibrationSpec, **{**LESSON, **calibration_options(arguments)})
    return _make(arguments, arguments.model, [StepSpec(method=DISTILL, set=options)], calibration)
