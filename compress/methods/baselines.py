"""The peers that a method must beat: each a short function over the shared mechanics. No weight is updated.

* shortgpt: the blocks that change their input least go, all at once (ShortGPT, Men et al. 2024).
* window: the run of blocks whose end is most like its start goes (Gromov et al. 2024, with a plain cosine).
* sleb: the block that perplexity misses least goes, again and again (SLEB, Song et al. 2024).
* blockpruner: the same with attentions and FFNs apart, freely mixed (BlockPruner, Zhong et al. 2024).
* magnitude, wanda: FFN neurons of small weights, or of small weights times activations (Wanda, Sun et al. 2024), the
  same number from every block.
* random: the shape that 2SSP gives, filled by chance: what a choice is worth beyond its shape.

Where we differ: ShortGPT and the window look at the last token of a row by default and never remove the first block, as
in the comparison of the 2SSP paper; SLEB and BlockPruner score one row by default, as 2SSP does; Wanda's score of a
weight is summed over a neuron's outputs, because whole neurons go.

Cost: none for magnitude and random; one pass per calibration row for shortgpt, window and wanda; for sleb and
blockpruner about half a pass per trial and scored row, with as many trials as candidates before each removal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_similarity, neuron_means, window_similarity
from compress.calibration import TokenRows
from compress.decoder import Block, Decoder
from compress.errors import BudgetError, ConfigError
from compress.gating import BlockForwards
from compress.layout import layout_of
from compress.methods import two_ssp
from compress.options import check_share
from compress.ranking import lowest_indices, top_indices
from compress.result import CompressedModel, Report, Run
from compress.surgery import (
    check_may_differ,
    clone,
    cut_ffn,
    drop_attention,
    drop_blocks,
    empty_blocks,
    keep_neurons,
)
from compress.trials import Candidates, Part, Removals, remove_greedily

# --- What every peer is asked, and how it answers


@dataclass(frozen=True)
class ShareConfig:
    """How much to remove.

    Attributes:
        sparsity: share of the blocks' parameters to remove, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)


@dataclass(frozen=True)
class SimilarityConfig(ShareConfig):
    """What a method that compares hidden states leaves to the user.

    Attributes:
        sparsity: share of the blocks to remove, in [0, 1), rounded up to whole blocks.
        tokens: where hidden states are compared: "last", the last token of each row, or "all".
    """

    tokens: str = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens not in ("last", "all"):
            raise ConfigError(f"tokens={self.tokens!r} is not known; give 'last' or 'all'")


@dataclass(frozen=True)
class GreedyConfig(ShareConfig):
    """What a greedy removal by perplexity leaves to the user.

    Attributes:
        sparsity: share to remove, in [0, 1), rounded up to what is removed whole.
        rows: calibration rows, the first ones, whose perplexity decides.
    """

    rows: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.rows) is not int or self.rows < 1:
            raise ConfigError(f"rows={self.rows!r} is not a positive whole number of calibration rows")


@dataclass(frozen=True)
class RandomConfig(ShareConfig):
    """What a random choice leaves to the user.

    Attributes:
        sparsity: share of the blocks' parameters to remove, in [0, 1).
        alpha: of the shape, as in 2SSP: higher removes more attentions.
        seed: of the choice.
    """

    alpha: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} is not positive; 2SSP uses 1.5")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} is not a whole number from 0 up")


def _start(model: PreTrainedModel, run: Run | None) -> tuple[PreTrainedModel, budget.Counts, Run]:
    """The model to cut, the sizes before, and how to run."""
    run = run or Run()
    return (model if run.consume else clone(model)), budget.count(model), run


def _finish(
    name: str,
    config: ShareConfig,
    pruned: PreTrainedModel,
    dense: budget.Counts,
    numbers: Mapping[str, Any],
    resumed_seconds: float = 0.0,
) -> CompressedModel:
    """The smaller model with its report."""
    sizes = budget.change(dense, budget.count(pruned), config.sparsity)
    return CompressedModel(pruned, Report(name, dataclasses.asdict(config), {**numbers, **sizes}, resumed_seconds))


# --- Blocks by similarity


def shortgpt(
    model: PreTrainedModel, calibration: TokenRows, config: SimilarityConfig, run: Run | None = None
) -> CompressedModel:
    """Remove the blocks of the least influence, BI_i = 1 - E[cos(input of block i, output of block i)].

    The first block is never removed.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: nothing but the first block would be left to remove.

    Source: Men et al. 2024, section 3.1 (block influence); the first block fixed as in the 2SSP comparison.
    """
    pruned, dense, run = _start(model, run)
    decoder = Decoder(pruned)
    goes = budget.blocks_to_remove(config.sparsity, len(decoder))
    with BlockForwards(decoder) as forwards:
        similarity = block_similarity(decoder, calibration, run, last_token_only=config.tokens == "last")
    influence = [1 - cosine for cosine in similarity]
    removed = sorted(lowest_indices([math.inf, *influence[1:]], goes))
    if removed:
        drop_blocks(pruned, removed)
    numbers = {"blocks_removed": removed, "block_influence": influence, "block_forwards": forwards.count}
    return _finish("shortgpt", config, pruned, dense, numbers)


def window(
    model: PreTrainedModel, calibration: TokenRows, config: SimilarityConfig, run: Run | None = None
) -> CompressedModel:
    """Remove the n consecutive blocks l+1 .. l+n whose last output is most like the output of block l.

    So the first block is never removed.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: all blocks would go.

    Source: Gromov et al. 2024, section 3.2, with the cosine itself in place of its angle, which orders alike.
    """
    pruned, dense, run = _start(model, run)
    decoder = Decoder(pruned)
    goes = budget.blocks_to_remove(config.sparsity, len(decoder))
    with BlockForwards(decoder) as forwards:
        similarity = window_similarity(decoder, calibration, goes, run, last_token_only=config.tokens == "last")
    first = 1 + max(range(len(similarity)), key=lambda i: (similarity[i], -i))
    removed = list(range(first, first + goes))
    if removed:
        drop_blocks(pruned, removed)
    numbers = {"blocks_removed": removed, "window_similarity": similarity, "block_forwards": forwards.count}
    return _finish("window", config, pruned, dense, numbers)


def similarity_outline(model: PreTrainedModel, rows: int, config: SimilarityConfig) -> float:
    """Cut ``model`` in place to the shape that `shortgpt` and `window` give it; returns their forward passes."""
    drop_blocks(model, range(1, 1 + budget.blocks_to_remove(config.sparsity, len(Decoder(model)))))
    return rows


# --- Greedily by perplexity


def sleb(
    model: PreTrainedModel, calibration: TokenRows, config: GreedyConfig, run: Run | None = None
) -> CompressedModel:
    """Remove whole blocks, one at a time, each time the one without which perplexity is lowest.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T); the first ``config.rows`` are scored.
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: all blocks would go, or there are fewer rows than asked for.

    Source: Song et al. 2024, section 3.2 and algorithm 1.
    """
    pruned, dense, run = _start(model, run)
    blocks = len(Decoder(pruned))
    goes = budget.blocks_to_remove(config.sparsity, blocks)
    attending = set(layout_of(pruned).attention_blocks)

    def candidates(gone: Sequence[Part]) -> list[Part]:
        left = set(range(blocks)) - {part.block for part in gone}
        allowed = left - (attending if len(attending & left) == 1 else set())
        return [Part(b, "block") for b in allowed] if len(gone) < goes else []

    removals = _remove(pruned, calibration, config, run, candidates, "sleb", two_ssp.trials(blocks, goes))
    numbers = {"blocks_removed": removals.blocks("block"), **_of_removals(removals)}
    return _finish("sleb", config, pruned, dense, numbers, removals.resumed_seconds)


def blockpruner(
    model: PreTrainedModel, calibration: TokenRows, config: GreedyConfig, run: Run | None = None
) -> CompressedModel:
    """Remove attentions and FFNs, one at a time, each time the one without which perplexity is lowest.

    It ends when the parameters removed, with those of the norms that go along, reach the share asked for.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T); the first ``config.rows`` are scored.
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: the share cannot be reached, or there are fewer rows than asked for.

    Source: Zhong et al. 2024, section 3.2 and algorithm 1.
    """
    pruned, dense, run = _start(model, run)
    sizes, target = _sizes_and_target(pruned, config)

    def candidates(gone: Sequence[Part]) -> list[Part]:
        if sum(sizes[part] for part in gone) >= target:
            return []
        left = sorted(set(sizes) - set(gone))
        attentions = [part for part in left if part.kind == "attention"]
        return [part for part in left if part.kind == "ffn" or len(attentions) > 1]

    removals = _remove(pruned, calibration, config, run, candidates, "blockpruner", _likely_trials(sizes, target))
    removed = [[each.part.kind, each.part.block] for each in removals.rounds]
    numbers = {"removed": removed, **_of_removals(removals)}
    return _finish("blockpruner", config, pruned, dense, numbers, removals.resumed_seconds)


def sleb_outline(model: PreTrainedModel, rows: int, config: GreedyConfig) -> float:
    """Cut ``model`` in place to the shape that `sleb` gives it; returns about how many passes `sleb` takes."""
    blocks = len(Decoder(model))
    goes = budget.blocks_to_remove(config.sparsity, blocks)
    drop_blocks(model, range(1, 1 + goes))
    return config.rows * (goes > 0) * (1 + two_ssp.trials(blocks, goes) / 2)


def blockpruner_outline(model: PreTrainedModel, rows: int, config: GreedyConfig) -> float:
    """Cut ``model`` in place to about the size that `blockpruner` gives it; returns about its forward passes.

    Which parts go depends on the model: the outline takes FFN and attention in turns.
    """
    sizes, target = _sizes_and_target(model, config)
    gone = _in_turns(sizes, target)
    if not gone:
        return 0.0
    blocks = Decoder(model).blocks
    for part in gone:
        if part.kind == "ffn":
            blocks[part.block].remove_ffn()
        else:
            blocks[part.block].remove_attention()
    drop_blocks(model, empty_blocks(model))
    return config.rows * (1 + _likely_trials(sizes, target) / 2)


def _remove(
    model: PreTrainedModel,
    calibration: TokenRows,
    config: GreedyConfig,
    run: Run,
    candidates: Candidates,
    name: str,
    trials: int,
) -> Removals:
    """Remove greedily; nothing is run where nothing goes."""
    if not candidates([]):
        return Removals()
    if config.rows > len(calibration.tokens):
        raise BudgetError(f"rows={config.rows}: there are {len(calibration.tokens)} calibration rows")
    rows = calibration.only_tokens()[: config.rows]
    return remove_greedily(model, rows, candidates, run, f"{name}: trial removals", trials)


def _of_removals(removals: Removals) -> dict[str, Any]:
    """What a greedy removal reports."""
    return {
        "perplexity_after_removal": removals.perplexities,
        "block_forwards": removals.block_forwards,
        "block_forwards_naive": removals.block_forwards_naive,
    }


def _sizes_and_target(model: PreTrainedModel, config: GreedyConfig) -> tuple[dict[Part, int], int]:
    """What every attention and FFN weighs, and how much must go.

    Raises:
        BudgetError: all that may go, which is all but one attention, is less.
        UnsupportedArchitecture: the model has no words for what would be left.
    """
    sizes = {part: size for block in Decoder(model) for part, size in _part_sizes(block).items()}
    target = round(config.sparsity * budget.count(model).blocks)
    if target > 0:
        check_may_differ(model, "removing attentions and FFNs apart")
    if sum(sizes.values()) - max(size for part, size in sizes.items() if part.kind == "attention") < target:
        raise BudgetError(f"sparsity {config.sparsity} would leave no attention; lower the sparsity")
    return sizes, target


def _part_sizes(block: Block) -> dict[Part, int]:
    """Parameters that go with the attention and with the FFN of a block."""
    sizes = {}
    if block.attention is not None:
        sizes[Part(block.index, "attention")] = budget.parameters_at(
            block, (block.arch.attention, *block.arch.attention_norms)
        )
    if block.has_ffn:
        sizes[Part(block.index, "ffn")] = budget.parameters_at(block, (*block.arch.ffn, *block.arch.ffn_norms))
    return sizes


def _in_turns(sizes: Mapping[Part, int], target: float) -> list[Part]:
    """FFNs and attentions in turns, from the last block down but for the first one, until the target is reached."""
    order = sorted((part for part in sizes if part.block > 0), key=lambda part: (part.block, part.kind), reverse=True)
    gone: list[Part] = []
    for part in order:
        if sum(sizes[each] for each in gone) >= target:
            break
        gone.append(part)
    return gone


def _likely_trials(sizes: Mapping[Part, int], target: float) -> int:
    return max(1, two_ssp.trials(len(sizes), len(_in_turns(sizes, target))))


# --- FFN neurons


def magnitude(
    model: PreTrainedModel, calibration: TokenRows, config: ShareConfig, run: Run | None = None
) -> CompressedModel:
    """Remove the FFN neurons of the smallest weights: the L2 norm of all weights that lead into and out of a neuron.

    Args:
        model: not changed unless ``run.consume``.
        calibration: not looked at.
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: the FFNs alone cannot reach the share.
    """
    pruned, dense, run = _start(model, run)
    scores = {block.index: _weight_norms(block) for block in Decoder(pruned) if block.has_ffn}
    return _keep_best(pruned, dense, scores, "magnitude", config, 0)


def wanda(
    model: PreTrainedModel, calibration: TokenRows, config: ShareConfig, run: Run | None = None
) -> CompressedModel:
    """Remove the FFN neurons of the lowest S_j = sum_i |W_ij| ||z_j||, with W the output linear and z its input.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: the FFNs alone cannot reach the share.

    Source: Sun et al. 2024, equation 1, summed over outputs.
    """
    pruned, dense, run = _start(model, run)
    decoder = Decoder(pruned)
    with BlockForwards(decoder) as forwards:
        squares = neuron_means(
            decoder, lambda z: z.float().square().sum(0), calibration.only_tokens(), run, "wanda: activation norms"
        )
    scores = {
        b: mean.mul(len(calibration.tokens)).sqrt() * decoder.blocks[b].ffn_out.matrix.abs().double().sum(0).cpu()
        for b, mean in squares.items()
    }
    return _keep_best(pruned, dense, scores, "wanda", config, forwards.count)


def _weight_norms(block: Block) -> Tensor:
    """L2 norm of all weights of each neuron, float64 (F,)."""
    into = [projection.matrix.double().square().sum(1) for projection in block.ffn_in]
    # Matrices fused into one lie on top of each other.
    squares = sum(each.view(p.fused, -1).sum(0) for each, p in zip(into, block.ffn_in, strict=True))
    return torch.sqrt(squares + block.ffn_out.matrix.double().square().sum(0)).cpu()


def _keep_best(
    pruned: PreTrainedModel,
    dense: budget.Counts,
    scores: Mapping[int, Tensor],
    name: str,
    config: ShareConfig,
    forwards: int,
) -> CompressedModel:
    """Keep the best neurons of every FFN, the same share everywhere."""
    widths = _widths(pruned, config)
    if config.sparsity > 0:
        keep_neurons(pruned, {b: top_indices(score, widths[b]) for b, score in scores.items()})
    return _finish(name, config, pruned, dense, {"ffn_widths": list(widths), "block_forwards": forwards})


def _widths(model: PreTrainedModel, config: ShareConfig) -> tuple[int, ...]:
    """FFN widths when all of the share comes from the FFNs."""
    widths, counts = [block.width for block in Decoder(model)], budget.count(model)
    if config.sparsity == 0:
        return tuple(widths)
    return budget.neurons_to_keep(round(config.sparsity * counts.blocks), counts.ffn, widths)


def magnitude_outline(model: PreTrainedModel, rows: int, config: ShareConfig) -> float:
    """Cut ``model`` in place to the shape that `magnitude` gives it, which takes no forward pass."""
    cut_ffn(model, _widths(model, config))
    return 0.0


def wanda_outline(model: PreTrainedModel, rows: int, config: ShareConfig) -> float:
    """Cut ``model`` in place to the shape that `wanda` gives it; returns the forward passes that `wanda` takes."""
    cut_ffn(model, _widths(model, config))
    return rows


# --- Chance


def random(
    model: PreTrainedModel, calibration: TokenRows, config: RandomConfig, run: Run | None = None
) -> CompressedModel:
    """Give a model the shape that 2SSP gives it, with neurons and attentions drawn by chance.

    Args:
        model: not changed unless ``run.consume``.
        calibration: not looked at.
        config: the choices.
        run: how to run.

    Raises:
        BudgetError: the share cannot be reached.
    """
    pruned, dense, run = _start(model, run)
    plan = two_ssp.plan_for(pruned, two_ssp.TwoSSPConfig(config.sparsity, alpha=config.alpha))
    generator = torch.Generator().manual_seed(config.seed)
    attending = layout_of(pruned).attention_blocks
    drawn = torch.randperm(len(attending), generator=generator)[: plan.attentions]
    removed = sorted(attending[place] for place in drawn.tolist())
    if config.sparsity > 0:
        scores = {b.index: torch.rand(b.width, generator=generator) for b in Decoder(pruned) if b.has_ffn}
        keep_neurons(pruned, {b: top_indices(score, plan.widths[b]) for b, score in scores.items()})
    if removed:
        drop_attention(pruned, removed)
    numbers = {"attentions_removed": removed, "ffn_widths": list(plan.widths), "block_forwards": 0}
    return _finish("random", config, pruned, dense, numbers)


def random_outline(model: PreTrainedModel, rows: int, config: RandomConfig) -> float:
    """Cut ``model`` in place to the shape that `random` gives it, which takes no forward pass."""
    two_ssp.outline(model, rows, two_ssp.TwoSSPConfig(config.sparsity, alpha=config.alpha))
    return 0.0
