"""Minitron: compact models by pruning and knowledge distillation (Muralidharan et al., Sreenivas et al., 2024).

One pass over calibration rows scores FFN neurons, attention heads, hidden channels and blocks, without gradients. The
model is cut once to a smaller shape of the same kind, all blocks alike, so that the result is a plain model of its
architecture. What makes it good is what comes afterwards: it learns from the model that it was cut from (`distill`).

Where we differ: neurons are scored behind the activation, because that is what a gated FFN hands on, as NVIDIA's own
implementation has it; heads by the norm of what they give, as the paper has it; the formula that adds what pruned heads
did to kept ones is off by default, since the paper states neither to which weights it applies nor why its sign is as it
is: here it is taken as printed, on the queries. Two options are ours: norms that are told of the energy that went with
the channels, and, in architectures without keys and values for groups of heads, heads that go with their own.

Cost: one pass per calibration row and round, one more per row for norm compensation; ranking blocks in other ways than
block influence takes about half a pass per candidate and scored row. Scores are kept in ``run.scratch``, so that
further shapes of one model take no further pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_inputs
from compress.calibration import TokenRows
from compress.decoder import Decoder, Projection
from compress.errors import ConfigError
from compress.files import new_file
from compress.gating import BlockForwards
from compress.importance import AGGREGATORS, Importance, importance, kept_energy
from compress.influence import RANKINGS
from compress.options import check_flag, check_known, check_share, check_whole
from compress.ranking import lowest_indices, top_indices
from compress.result import CompressedModel, Report, Run
from compress.resume import identity
from compress.shape import NAMES, Shape, heads_follow, resize, shape_of
from compress.sizes import CUTS, target_shape, unit_of
from compress.surgery import (
    channels_of,
    clone,
    conform,
    drop_blocks,
    keep_neurons,
    scale_norm,
    settle,
    slice_channels,
    slice_heads,
    without_weights,
)


@dataclass(frozen=True)
class MinitronConfig:
    """What Minitron leaves to the user: a shape, and how it is chosen what fills it.

    Attributes:
        num_hidden_layers: decoder blocks to keep; this and the next three: None keeps all.
        hidden_size: channels of the residual stream to keep.
        intermediate_size: neurons of each FFN to keep.
        num_attention_heads: query heads of each attention to keep, a multiple of the KV heads, which stay.
        sparsity: share of the blocks' parameters to remove, in [0, 1); ``cut`` gives what the sizes above do not.
        cut: what gives way to the sparsity: "width" (neurons and channels by one ratio), "ffn", "hidden" or "depth".
        divisor: sizes that change become multiples of it (heads and blocks apart).
        batch_aggregator: rule over calibration rows: "l2" (the paper's), "mean" or "var".
        sequence_aggregator: rule over the tokens of a row: "mean" (the paper's), "l2" or "var".
        depth_ranking: which blocks go: by "block_influence", "macro_influence" or "loss", or by "score", a judgement
            from outside (``run.score``) of the model without them.
        contiguous: blocks go in one run, as the practice report advises.
        scoring_rows: calibration rows that rank blocks, the first ones, where it is not by block influence of single
            blocks; None: the first 32.
        rounds: score and cut in so many steps; the paper found no use in more than one.
        head_residual: add what pruned heads did to those kept (off: see the module).
        norm_compensation: let every norm make up for the energy of the channels that went (ours).
    """

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    sparsity: float = 0.0
    cut: str = "width"
    divisor: int = 8
    batch_aggregator: str = "l2"
    sequence_aggregator: str = "mean"
    depth_ranking: str = "block_influence"
    contiguous: bool = False
    scoring_rows: int | None = None
    rounds: int = 1
    head_residual: bool = False
    norm_compensation: bool = False

    def __post_init__(self) -> None:
        for name in NAMES:
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        check_share("sparsity", self.sparsity)
        check_known("cut", self.cut, CUTS)
        check_whole("divisor", self.divisor, 1)
        check_known("batch_aggregator", self.batch_aggregator, AGGREGATORS)
        check_known("sequence_aggregator", self.sequence_aggregator, AGGREGATORS)
        check_known("depth_ranking", self.depth_ranking, (*RANKINGS, "score"))
        check_flag("contiguous", self.contiguous)
        if self.scoring_rows is not None:
            check_whole("scoring_rows", self.scoring_rows, 1)
        check_whole("rounds", self.rounds, 1)
        check_flag("head_residual", self.head_residual)
        check_flag("norm_compensation", self.norm_compensation)
        if self.sparsity and (named := [name for name in CUTS[self.cut] if getattr(self, name) is not None]):
            raise ConfigError(
                f"cut={self.cut} is to find {named[0]}, which is given: give another cut, or leave it out"
            )


def compress(
    model: PreTrainedModel, calibration: TokenRows, config: MinitronConfig, run: Run | None = None
) -> CompressedModel:
    """Cut a model to a smaller shape.

    Args:
        model: of a plain layout; not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: the shape, and how to score.
        run: how to run; its ``score`` ranks blocks where the config says so.

    Raises:
        BudgetError: the sparsity cannot be reached.
        ConfigError: a size that the model cannot be cut to, with the nearest that it can.
        UnsupportedArchitecture: blocks differ or share weights, or the config has no words for the shape.

    Source: Muralidharan et al. 2024, sections 2.1 to 2.3 (single shot); Sreenivas et al. 2024 for runs of blocks.
    """
    run = run or Run()
    start, target = shape_of(model), _target(model, config)
    _check(start, target, calibration, config, run)
    if target != start:
        resize(without_weights(model), target)  # refuses what the architecture has no words for
    dense = budget.count(model)
    pruned = model if run.consume else clone(model)
    chosen = Chosen()
    with BlockForwards(Decoder(pruned)) as forwards:
        for place in range(config.rounds if target != start else 0):
            shape = between(pruned, start, target, place + 1, config.rounds)
            chosen = chosen.then(_cut(pruned, shape, calibration, config, run), start)
    numbers = {
        "shape_before": dataclasses.asdict(start),
        "shape_after": dataclasses.asdict(target),
        "ffn_widths": [target.intermediate_size] * start.num_hidden_layers,
        **dataclasses.asdict(chosen),
        **budget.change(dense, budget.count(pruned), config.sparsity),
        "block_forwards": forwards.count,
    }
    return CompressedModel(pruned, Report("minitron", dataclasses.asdict(config), numbers))


def outline(model: PreTrainedModel, rows: int, config: MinitronConfig) -> float:
    """Cut ``model`` in place to the shape that `compress` gives it; returns the forward passes `compress` takes."""
    start, target = shape_of(model), _target(model, config)
    if target == start:
        return 0.0
    blocks, goes = start.num_hidden_layers, start.num_hidden_layers - target.num_hidden_layers
    passes: float = rows * (1 + (config.norm_compensation and target.hidden_size != start.hidden_size))
    if goes and config.depth_ranking in ("macro_influence", "loss"):
        passes += scoring_rows(config, rows) * (1 + blocks / 2)
    elif goes and config.depth_ranking == "block_influence" and config.contiguous:
        passes += scoring_rows(config, rows)
    resize(model, target)
    return passes * config.rounds


# --- The shape


def _target(model: PreTrainedModel, config: MinitronConfig) -> Shape:
    """The shape that is asked for; see `target_shape`."""
    given = {name: size for name in NAMES if (size := getattr(config, name)) is not None}
    return target_shape(model, given, config.sparsity, config.cut, config.divisor)


def between(model: PreTrainedModel, start: Shape, target: Shape, done: int, rounds: int) -> Shape:
    """Where ``done`` of some rounds from one shape to another end.

    Source: Muralidharan et al. 2024, section 2.3 (iterative importance).
    """
    if done == rounds:
        return target
    decoder = Decoder(model)
    sizes = {}
    for name in NAMES:
        first, last = getattr(start, name), getattr(target, name)
        sizes[name] = first - round(done * (first - last) / rounds)
    step = unit_of(decoder, "num_attention_heads", 1)
    sizes["num_attention_heads"] = math.ceil(sizes["num_attention_heads"] / step) * step
    if heads_follow(decoder):
        sizes["hidden_size"] = sizes["num_attention_heads"] * decoder.head_dim
    return Shape(**sizes)


def _check(start: Shape, target: Shape, calibration: TokenRows, config: MinitronConfig, run: Run) -> None:
    """Refuse, before anything is scored, what the options cannot mean for this model."""
    if config.scoring_rows is not None and config.scoring_rows > len(calibration.tokens):
        raise ConfigError(f"scoring_rows={config.scoring_rows}: there are {len(calibration.tokens)} calibration rows")
    if config.depth_ranking == "score" and run.score is None and target.num_hidden_layers < start.num_hidden_layers:
        raise ConfigError("depth_ranking=score needs something that scores: give tasks, or another ranking")
    if config.head_residual and target.num_attention_heads * 2 < start.num_attention_heads:
        raise ConfigError(
            f"head_residual gives each pruned head to one that stays: keep at least half of the "
            f"{start.num_attention_heads} heads, or leave it out"
        )


def scoring_rows(config: MinitronConfig, rows: int) -> int:
    """How many of so many calibration rows rank blocks."""
    return min(rows, 32 if config.scoring_rows is None else config.scoring_rows)


# --- What fills it


@dataclass(frozen=True)
class Chosen:
    """What was kept and what went, by the places in the model that was given.

    Attributes:
        blocks_removed: ascending.
        block_scores: what ranked the blocks, or runs of them, in the last round; empty where none went in it.
        heads_kept: of each block; empty where all stayed.
        channels_kept: hidden channels; empty where all stayed.
    """

    blocks_removed: list[int] = field(default_factory=list)
    block_scores: list[float] = field(default_factory=list)
    heads_kept: list[list[int]] = field(default_factory=list)
    channels_kept: list[int] = field(default_factory=list)

    def then(self, later: Chosen, start: Shape) -> Chosen:
        """The same with another round, whose places are those of the model that this one left."""
        stayed = [b for b in range(start.num_hidden_layers) if b not in self.blocks_removed]
        heads = self.heads_kept
        if later.heads_kept:
            before = heads or [list(range(start.num_attention_heads))] * start.num_hidden_layers
            heads = [list(each) for each in before]
            for b, kept in zip(stayed, later.heads_kept, strict=True):
                heads[b] = [before[b][head] for head in kept]
        channels = later.channels_kept
        if self.channels_kept and channels:
            channels = [self.channels_kept[channel] for channel in channels]
        return Chosen(
            sorted([*self.blocks_removed, *(stayed[b] for b in later.blocks_removed)]),
            later.block_scores,
            heads,
            channels or self.channels_kept,
        )


def _cut(model: PreTrainedModel, shape: Shape, calibration: TokenRows, config: MinitronConfig, run: Run) -> Chosen:
    """One round: score every axis in one pass, and keep the best of each."""
    now, decoder = shape_of(model), Decoder(model)
    if shape == now:
        return Chosen()
    scores = _scores(decoder, calibration, config, run)
    removed, ranked = _blocks(
        decoder, now.num_hidden_layers - shape.num_hidden_layers, scores, calibration, config, run
    )
    channels = top_indices(scores.channels, shape.hidden_size) if shape.hidden_size != now.hidden_size else None
    energy = []
    if config.norm_compensation and channels is not None:
        energy = kept_energy(decoder, calibration, channels, run)
    neurons = [top_indices(each, shape.intermediate_size) for each in scores.neurons]
    heads = None
    if shape.num_attention_heads != now.num_attention_heads:
        heads = [best_heads(each, decoder.kv_heads, shape.num_attention_heads) for each in scores.heads]
        if config.head_residual:
            _add_residuals(decoder, scores.heads, shape.num_attention_heads)
    stay = [b for b in range(now.num_hidden_layers) if b not in removed]
    if removed:
        drop_blocks(model, removed)
    keep_neurons(model, {place: neurons[b] for place, b in enumerate(stay)})
    if heads is not None:
        slice_heads(model, {place: heads[b] for place, b in enumerate(stay)})
    if channels is not None:
        slice_channels(model, channels)
    for norm, factor in energy:
        scale_norm(norm, factor, decoder.arch.norm_offset)
    settle(model)
    conform(model)
    return Chosen(
        removed,
        ranked,
        [] if heads is None else [each.tolist() for each in heads],
        [] if channels is None else channels.tolist(),
    )


def _blocks(
    decoder: Decoder, goes: int, scores: Importance, calibration: TokenRows, config: MinitronConfig, run: Run
) -> tuple[list[int], list[float]]:
    """The blocks that go, and what each block, or run of as many as go, was found to be worth."""
    if not goes:
        return [], []
    size = goes if config.contiguous else 1
    if config.depth_ranking == "block_influence" and size == 1:
        ranked = scores.influence
    elif config.depth_ranking == "score":
        ranked = _scored_without(decoder, size, run)
    else:
        rows = scoring_rows(config, len(calibration.tokens))
        ranked = RANKINGS[config.depth_ranking](decoder, calibration, rows, run, size)
    if config.contiguous:
        (first,) = lowest_indices(ranked, 1)
        return list(range(first, first + goes)), ranked
    return sorted(lowest_indices(ranked, goes)), ranked


def _scored_without(decoder: Decoder, size: int, run: Run) -> list[float]:
    """What is lost without each run of blocks: minus the score from outside."""
    assert run.score is not None
    ranked, count = [], len(decoder) - size + 1
    for first in range(count):
        trial = clone(decoder.model)
        drop_blocks(trial, range(first, first + size))
        ranked.append(-run.score(trial))
        run.progress("score without each run of blocks", first + 1, count)
    return ranked


def best_heads(scores: Tensor, groups: int, count: int) -> Tensor:
    """The best heads of each KV group, as many of each, ascending; over the whole block where each has its own.

    Args:
        scores: (H,), of query heads, those of a group side by side.
        groups: K.
        count: how many to keep, a multiple of K unless H = K.
    """
    if len(scores) == groups:
        return top_indices(scores, count)
    size = len(scores) // groups
    return torch.cat(
        [top_indices(part, count // groups) + size * g for g, part in enumerate(scores.view(groups, size))]
    )


def _add_residuals(decoder: Decoder, scores: Sequence[Tensor], count: int) -> None:
    """Give what pruned heads asked for to heads that stay, inside each KV group, before they are cut.

    With L heads sorted by importance and K kept, q_i becomes 2 q_i - q_{2K-i+1} for i = 2K-L+1 .. K.

    Source: Muralidharan et al. 2024, section 2.3, in which the lowest i would name a head that is not there.
    """
    heads, width = decoder.heads, decoder.head_dim
    groups = 1 if decoder.heads_are_alone else decoder.kv_heads
    size, kept = heads // groups, count // groups
    for block, score in zip(decoder, scores, strict=True):
        index = torch.arange(heads)
        for g, part in enumerate(score.view(groups, size)):
            order = torch.sort(part, descending=True, stable=True).indices + g * size
            for i in range(2 * kept - size, kept):  # from 0
                index[order[i]] = order[2 * kept - 1 - i]
        _subtract_heads(block.attention_in[0], index, width)


def _subtract_heads(queries: Projection, index: Tensor, width: int) -> None:
    """q_i becomes 2 q_i - q_index[i] where that is another head."""
    rows = torch.arange(queries.outputs)
    rows[: len(index) * width] = channels_of(index, width)
    queries.change_outputs(lambda old: 2 * old - old.index_select(0, rows.to(old.device)))


# --- Scores, which are kept for further shapes of the same model


def _scores(decoder: Decoder, calibration: TokenRows, config: MinitronConfig, run: Run) -> Importance:
    """The scores of all axes, taken over from ``run.scratch`` where they are there."""

    def compute() -> Importance:
        return importance(decoder, calibration, config.batch_aggregator, config.sequence_aggregator, run)

    if run.scratch is None or calibration.recorded is not None:
        return compute()
    with torch.no_grad():
        seen = [calibration.tokens, block_inputs(decoder, calibration.tokens[:1].to(run.device))[-1]]
    name = identity(decoder, f"minitron {config.batch_aggregator} {config.sequence_aggregator}", seen)
    return _kept(run.scratch / f"minitron-importance-{name}.safetensors", compute)


def _kept(file: Path, compute: Callable[[], Importance]) -> Importance:
    """Read scores, or compute and write them."""
    try:
        tensors = load_file(file)
        return Importance(
            list(tensors["neurons"]), list(tensors["heads"]), tensors["channels"], tensors["influence"].tolist()
        )
    except (OSError, SafetensorError, LookupError):
        found = compute()
    stacked: dict[str, Any] = {
        "neurons": torch.stack(found.neurons),
        "heads": torch.stack(found.heads),
        "channels": found.channels,
        "influence": torch.tensor(found.influence, dtype=torch.float64),
    }
    with new_file(file) as partial:
        save_file(stacked, partial)
    return found
