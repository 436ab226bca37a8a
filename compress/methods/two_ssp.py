"""2SSP: a two-stage framework for structured pruning of LLMs (Sandri, Cunegatti, Iacca, 2025).

Stage 1 cuts width: the same number of FFN neurons goes from every block, those with the lowest mean activation norm.
Stage 2 cuts depth: whole attentions go, one at a time, each time the one whose removal leaves the lowest perplexity on
one calibration sequence. A closed formula says how many attentions; the FFNs take the rest of the budget. No weight is
updated.

Where we differ from the authors' code: norms and cross-entropy are accumulated in fp32 or wider; parameter counts are
summed over the real blocks rather than read from block 0; the norm that fed a removed attention goes with it; what a
removal cannot change is not computed again; an optional divisor keeps widths friendly to GEMM kernels.

Cost: N forward passes for stage 1 with N calibration rows; for stage 2 at most 1 + sum over the removals of the
candidates left, each from its own block upwards only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.activations import neuron_means
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError
from compress.gating import BlockForwards
from compress.layout import layout_of
from compress.options import check_share
from compress.ranking import top_indices
from compress.result import CompressedModel, Report, Run
from compress.surgery import check_may_differ, clone, cut_ffn, drop_attention, keep_neurons
from compress.trials import Part, Removals, remove_greedily


@dataclass(frozen=True)
class TwoSSPConfig:
    """What 2SSP leaves to the user.

    Attributes:
        sparsity: share of the blocks' parameters to remove, in [0, 1); embeddings, final norm and head do not count.
        alpha: balance of the stages; higher removes more attentions. The paper's value is 1.5.
        neuron_norm: norm over tokens that scores a neuron, "l2" (the paper's) or "l1" (its ablation).
        divisor: FFN widths become multiples of it, and the number of attentions makes up the difference.
    """

    sparsity: float
    alpha: float = 1.5
    neuron_norm: str = "l2"
    divisor: int | None = None

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} is not positive; the paper uses 1.5")
        if self.neuron_norm not in ("l1", "l2"):
            raise ConfigError(f"neuron_norm={self.neuron_norm!r} is not known; give 'l2' or 'l1'")
        if self.divisor is not None and (type(self.divisor) is not int or self.divisor < 1):
            raise ConfigError(f"divisor={self.divisor} is not a positive whole number; 64 or 128 suit most kernels")


def compress(
    model: PreTrainedModel, calibration: TokenRows, config: TwoSSPConfig, run: Run | None = None
) -> CompressedModel:
    """Prune a model with 2SSP.

    Args:
        model: dense, or pruned before; not changed unless ``run.consume``.
        calibration: rows (N, T); stage 1 uses all, stage 2 the first.
        config: the paper's choices.
        run: how to run.

    Raises:
        BudgetError: the sparsity cannot be reached.
        UnsupportedArchitecture: the parts of the model are not known.

    Source: Sandri et al. 2025, sections 3.1 to 3.3, equation 5 for the balance.
    """
    run = run or Run()
    dense, tokens = budget.count(model), calibration.only_tokens()
    pruned = model if run.consume else clone(model)
    plan = plan_for(model, config)
    removals, forwards = Removals(), 0
    if config.sparsity > 0:
        with BlockForwards(Decoder(pruned)) as stage_1:
            scores = neuron_scores(pruned, tokens, config.neuron_norm, run)
        keep_neurons(pruned, {b: top_indices(score, plan.widths[b]) for b, score in scores.items()})
        forwards = stage_1.count
        removals = remove_attentions(pruned, tokens[:1], plan.attentions, run)
    numbers = {
        "attentions_removed": removals.blocks("attention"),
        "perplexity_after_removal": removals.perplexities,
        "ffn_widths": list(plan.widths),
        **budget.change(dense, budget.count(pruned), config.sparsity),
        "block_forwards": forwards + removals.block_forwards,
        "stage2_block_forwards": removals.block_forwards,
        "stage2_block_forwards_naive": removals.block_forwards_naive,
    }
    report = Report("2ssp", dataclasses.asdict(config), numbers, removals.resumed_seconds)
    return CompressedModel(pruned, report)


@dataclass(frozen=True)
class Plan:
    """How the budget is split: attentions to remove, and the FFN width to keep in each block."""

    attentions: int
    widths: tuple[int, ...]


def outline(model: PreTrainedModel, rows: int, config: TwoSSPConfig) -> float:
    """Cut ``model`` in place to the shape that `compress` gives it; returns the forward passes `compress` takes.

    A trial removal costs half a pass on average: it starts at its own block.
    """
    plan = plan_for(model, config)
    if config.sparsity == 0:
        return 0.0
    attending = layout_of(model).attention_blocks
    cut_ffn(model, plan.widths)
    if plan.attentions:
        drop_attention(model, attending[: plan.attentions])
    return rows + (plan.attentions > 0) + trials(len(attending), plan.attentions) / 2


def trials(candidates: int, count: int) -> int:
    """How many trials it takes to remove ``count`` of so many candidates, one after the other."""
    return sum(candidates - k for k in range(count))


def plan_for(model: PreTrainedModel, config: TwoSSPConfig) -> Plan:
    """Split the budget between the stages, for the model as it is.

    Raises:
        BudgetError: the target cannot be reached.
        UnsupportedArchitecture: the model has no words for blocks without an attention.
    """
    widths = [block.width for block in Decoder(model)]
    plan = balance(budget.count(model), widths, config) if config.sparsity > 0 else Plan(0, tuple(widths))
    if plan.attentions:
        check_may_differ(model, "removing attentions")
    return plan


def balance(dense: budget.Counts, widths: list[int], config: TwoSSPConfig) -> Plan:
    """The closed form.

    N_attn = round(B * s^((f / a) / alpha)); the FFNs give up what is left of s * P_blk, the same share in every block.
    ``a`` and ``f`` are means over the blocks that have the part; in a dense model all blocks agree.

    Raises:
        BudgetError: attentions alone exceed the target, or all FFNs with the chosen attentions do not reach it.

    Source: equation 5; steps 1 to 3 of the algorithm.
    """
    attending, feeding = [size for size in dense.attention if size], [size for size in dense.ffn if size]
    if not feeding:
        raise BudgetError("no block has an FFN any more: 2ssp has nothing to cut")
    a, f = sum(attending) / len(attending), sum(feeding) / len(feeding)
    target = round(config.sparsity * dense.blocks)
    attentions = round(len(widths) * config.sparsity ** ((f / a) / config.alpha))
    if attentions * a > target or attentions >= len(attending):
        raise BudgetError(
            f"sparsity {config.sparsity} would remove {attentions} of {len(attending)} attentions, more than the "
            f"target or all of them; raise the sparsity or lower alpha={config.alpha}"
        )
    kept = budget.neurons_to_keep(target - attentions * a, dense.ffn, widths, config.divisor or 1)
    if config.divisor is not None:
        sizes = zip(dense.ffn, kept, widths, strict=True)
        freed = sum(size * (1 - keep / width) for size, keep, width in sizes if width)
        attentions = round((target - freed) / a)
        if not 0 <= attentions < len(attending):
            raise BudgetError(
                f"sparsity {config.sparsity} cannot be reached with FFN widths in multiples of {config.divisor}: "
                "give a smaller divisor or another sparsity"
            )
    return Plan(attentions, kept)


def neuron_scores(model: PreTrainedModel, rows: Tensor, norm: str, run: Run) -> dict[int, Tensor]:
    """Score the neurons of all blocks from one dense pass per row.

    S_b[j] = mean over rows of || z_b[:, j] ||, with z_b (T, F) the input of the block's last FFN linear.

    Returns:
        Block index -> one score per neuron (F,), float64; blocks without an FFN are left out.

    Source: section 3.1, step 4 of the algorithm.
    """

    def statistic(z: Tensor) -> Tensor:
        z = z.float()
        return z.abs().sum(0) if norm == "l1" else z.square().sum(0).sqrt()

    return neuron_means(Decoder(model), statistic, rows, run, "2ssp stage 1: neuron scores")


def remove_attentions(model: PreTrainedModel, row: Tensor, count: int, run: Run) -> Removals:
    """Remove attentions greedily by the perplexity of one sequence.

    Args:
        model: changed in place.
        row: tokens (1, T).
        count: how many attentions to remove.
        run: how to run.

    Source: section 3.2, steps 6 and 7 of the algorithm.
    """
    if count == 0:
        return Removals()
    attending = layout_of(model).attention_blocks

    def candidates(gone: Sequence[Part]) -> list[Part]:
        left = [Part(b, "attention") for b in attending if Part(b, "attention") not in gone]
        return left if len(gone) < count else []

    total = trials(len(attending), count)
    return remove_greedily(model, row, candidates, run, "2ssp stage 2: trial removals", total)
