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
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_inputs, mean_over_rows
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.errors import BudgetError, ConfigError
from compress.evaluate import cross_entropy
from compress.gating import BlockForwards, starting_at, without_attention
from compress.layout import layout_of
from compress.ranking import Removal, remove_greedily, top_indices
from compress.result import CompressedModel, Report, Run
from compress.surgery import clone, drop_attention, keep_neurons


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
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} is not a share; give one from 0 up to, not including, 1")
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
    dense = budget.count(model)
    pruned = model if run.consume else clone(model)
    plan = plan_for(model, config)
    removals: list[Removal] = []
    forwards = naive = 0
    if config.sparsity > 0:
        scores = neuron_scores(pruned, calibration.tokens, config.neuron_norm, run)
        keep_neurons(pruned, {b: top_indices(scores[b], width) for b, width in enumerate(plan.widths)})
        removals, forwards, naive = remove_attentions(pruned, calibration.tokens[:1], plan.attentions, run)
    now = budget.count(pruned)
    numbers = {
        "attentions_removed": [removal.index for removal in removals],
        "perplexity_after_removal": [removal.costs[removal.index] for removal in removals],
        "ffn_widths": list(plan.widths),
        "parameters_before": dense.total,
        "parameters_after": now.total,
        "sparsity_wanted": config.sparsity,
        "sparsity_of_blocks": budget.sparsity(dense, now)["blocks"],
        "sparsity_of_model": budget.sparsity(dense, now)["model"],
        "stage2_block_forwards": forwards,
        "stage2_block_forwards_naive": naive,
    }
    return CompressedModel(pruned, Report("2ssp", dataclasses.asdict(config), numbers))


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
    keep_neurons(model, {b: torch.arange(width, device=model.device) for b, width in enumerate(plan.widths)})
    if plan.attentions:
        drop_attention(model, attending[: plan.attentions])
    return rows + (plan.attentions > 0) + sum(len(attending) - k for k in range(plan.attentions)) / 2


def plan_for(model: PreTrainedModel, config: TwoSSPConfig) -> Plan:
    """Split the budget between the stages, for the model as it is.

    Raises:
        BudgetError: the target cannot be reached.
    """
    widths = [block.ffn_out.inputs for block in Decoder(model)]
    return balance(budget.count(model), widths, config) if config.sparsity > 0 else Plan(0, tuple(widths))


def balance(dense: budget.Counts, widths: list[int], config: TwoSSPConfig) -> Plan:
    """The closed form.

    N_attn = round(B * s^((f / a) / alpha)); the FFNs give up what is left of s * P_blk, the same share in every block.
    ``a`` and ``f`` are means over the blocks that have the part; in a dense model all blocks agree.

    Raises:
        BudgetError: attentions alone exceed the target, or all FFNs with the chosen attentions do not reach it.

    Source: equation 5; steps 1 to 3 of the algorithm.
    """
    blocks, attending = len(dense.ffn), [size for size in dense.attention if size]
    a, f = sum(attending) / len(attending), sum(dense.ffn) / blocks
    target = round(config.sparsity * dense.blocks)
    attentions = round(blocks * config.sparsity ** ((f / a) / config.alpha))
    if attentions * a > target or attentions >= len(attending):
        raise BudgetError(
            f"sparsity {config.sparsity} would remove {attentions} of {len(attending)} attentions, more than the "
            f"target or all of them; raise the sparsity or lower alpha={config.alpha}"
        )
    kept = _widths(target - attentions * a, f, blocks, widths, config)
    if config.divisor is not None:
        freed = sum(f * (1 - keep / width) for keep, width in zip(kept, widths, strict=True))
        attentions = round((target - freed) / a)
        if not 0 <= attentions < len(attending):
            raise BudgetError(
                f"sparsity {config.sparsity} cannot be reached with FFN widths in multiples of {config.divisor}: "
                "give a smaller divisor or another sparsity"
            )
    return Plan(attentions, kept)


def _widths(ffn_target: float, f: float, blocks: int, widths: list[int], config: TwoSSPConfig) -> tuple[int, ...]:
    """FFN widths that free ``ffn_target`` parameters over all blocks."""
    share = round(ffn_target / blocks) / f
    unit = config.divisor or 1
    kept = tuple(round(width * (1 - share) / unit) * unit for width in widths)
    if min(kept) < 1:
        raise BudgetError(
            f"sparsity {config.sparsity} cannot be reached: it needs {share:.0%} of every FFN; lower the sparsity"
        )
    return tuple(min(keep, width) for keep, width in zip(kept, widths, strict=True))


def neuron_scores(model: PreTrainedModel, rows: Tensor, norm: str, run: Run) -> list[Tensor]:
    """Score the neurons of all blocks from one dense pass per row.

    S_b[j] = mean over rows of || z_b[:, j] ||, with z_b (T, F) the input of the block's last FFN linear.

    Returns:
        One tensor (F,) per block, float64.

    Source: section 3.1, step 4 of the algorithm.
    """
    decoder = Decoder(model)
    points = [block.ffn_out.module for block in decoder]

    def statistic(z: Tensor) -> Tensor:
        z = z.float()
        return z.abs().sum(0) if norm == "l1" else z.square().sum(0).sqrt()

    return mean_over_rows(decoder, points, statistic, rows, run, "2ssp stage 1: neuron scores")


@torch.no_grad()
def remove_attentions(model: PreTrainedModel, row: Tensor, count: int, run: Run) -> tuple[list[Removal], int, int]:
    """Remove attentions greedily by the perplexity of one sequence.

    A trial without the attention of block b starts at block b, with what is known to enter it. After a removal only
    what enters the blocks above is computed again.

    Args:
        model: changed in place.
        row: tokens (1, T).
        count: how many attentions to remove.
        run: progress and device.

    Returns:
        The removals; the block forward passes done; what full passes would have needed.

    Source: section 3.2, steps 6 and 7 of the algorithm.
    """
    if count == 0:
        return [], 0, 0
    decoder = Decoder(model)
    blocks, candidates = decoder.blocks, layout_of(model).attention_blocks
    row = row.to(run.device)
    total = sum(len(candidates) - k for k in range(count))
    tried = 0

    def perplexity_without(index: int) -> float:
        nonlocal tried
        with starting_at(decoder, index, entering[index]), without_attention(blocks[index]):
            nll = cross_entropy(model(input_ids=row, use_cache=False).logits[0], row[0])
        tried += 1
        run.progress("2ssp stage 2: trial removals", tried, total)
        return float(torch.tensor(nll / (row.shape[1] - 1), dtype=torch.float64).exp())

    def remove(index: int) -> None:
        blocks[index].remove_attention()
        if tried == total:
            return  # no trial will ask what enters the blocks above
        with starting_at(decoder, index, entering[index]):
            entering[index + 1 :] = block_inputs(decoder, row)[index + 1 :]

    with BlockForwards(decoder) as forwards:
        entering = block_inputs(decoder, row)
        steps = remove_greedily(candidates, count, perplexity_without, remove)
    drop_attention(model, [step.index for step in steps])
    return steps, forwards.count, (1 + total) * len(decoder)
