"""FoldGPT: learn which blocks can go, let the others share one set of weights, and heal what that did.

Liu et al. 2024, "FoldGPT: Simple and Effective Large Language Model Compression Scheme", arXiv 2407.00928.

Idea: a gate for each block, learnt together with the others, says which blocks the model needs least, and those go. Of
the blocks that stay, neighbours form groups that compute with the weights of one of them, each with norms of its own.
Sharing makes a model smaller and no faster: every block is still executed and keeps a KV cache. Then the matrices
learn, through one low-rank pair each that is merged at the end, to do the work of all the blocks that use them.

The structure is the paper's. Its equations, settings and tables could not be obtained and no code was published: the
form of the gates, the losses, the choice of groups and parents and all defaults are our own, as the docstrings below
state them. Each stage can be run alone: ``group=1, epochs=0`` only removes, ``sparsity=0, epochs=0`` only shares, and
``sparsity=0, group=1`` only heals.

Cost with L blocks: gates, three passes of ``batch`` rows a step; parents, about half a pass of the rows held out for
each block that may be one; healing, three passes of each row an epoch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_states, output_seen, through
from compress.calibration import TokenRows, parts
from compress.decoder import Decoder, Projection
from compress.device import autocast
from compress.errors import ConfigError
from compress.files import write_file
from compress.gating import added, evaluating, scaled, sharing
from compress.grouping import all_runs, fixed_runs, greedy_runs, stretches
from compress.healing import Healing
from compress.influence import RANKINGS, block_influence
from compress.layout import layout_of
from compress.losses import relative_mse
from compress.options import (
    check_flag,
    check_known,
    check_positive,
    check_seed,
    check_share,
    check_weight,
    check_whole,
    places,
)
from compress.ranking import lowest_indices
from compress.remote_code import linears
from compress.result import CompressedModel, Report, Run
from compress.resume import identity
from compress.surgery import (
    block_kinds,
    check_may_share,
    check_owns,
    clone,
    drop_blocks,
    drop_some,
    removable,
    share_blocks,
)
from compress.teacher import CHUNK_TOKENS, Teacher, check_teacher
from compress.training import Group, optimise

GATES = "gates"
FIRST_EPS = 0.1
NOT_POLARISED = (0.05, 0.95)
"""A gate between these is neither shut nor open."""


@dataclass(frozen=True)
class FoldGPTConfig:
    """What is left to the user. The paper's own values are not known: all defaults are ours.

    Attributes:
        sparsity: share of the blocks to remove, in [0, 1), rounded up to whole blocks.
        ranking: what decides which blocks go: "gates", which are learnt, or without learning "block_influence",
            "macro_influence" or "loss", once (see compress/influence.py).
        blocks: remove these in place of a ranking; counted in the model as it came.
        protect: blocks that are not removed; negative ones count from the end.
        check: remove what block influence would, where that harms less on the rows held out than the gates' choice.
        gate_steps: steps that gates learn.
        gate_lr: their learning rate.
        gate_eps: what makes gates polarise, at the end; it starts at 0.1.
        flops_weight: of the constraint that gates leave as much as is to stay.
        polarisation_weight: of the mean of g (1 - g) at the end; it starts at 0.
        group: blocks that share one set of weights; 1: none do.
        keep_ends: so many of the first and of the last blocks share with none.
        boundaries: "fixed" cuts the others into groups one after the other, "greedy" takes the groups that harm least
            with the best of their parents.
        groups: how many groups; None: as many as there is room for.
        parent: whose weights a group uses: "divergence", the member's with which the model changes least, "first", the
            first one's, or "mean", their average.
        own_biases: members keep the biases of their linears as well as their norms.
        adapter_rank: rank of a low-rank product that each member but the parent adds to every matrix; 0: none.
        epochs: how often healing takes all rows; 0: it is left out.
        batch: rows a step, of gates and of healing.
        lora_rank: of the pairs that heal and are merged; 0: matrices do not learn.
        lora_lr: learning rate of the pairs and of adapters.
        norm_lr: learning rate of norms and biases.
        warmup: share of healing's steps over which the rates rise.
        clip: the largest norm of all gradients of a healing step.
        next_token: weight of the next-token loss.
        distil: weight of the divergence from the teacher's predictions.
        temperature: that both are softened with.
        tail: so many of the last blocks are compared with the teacher's.
        tail_weight: of that, for each block.
        held_out: calibration rows, the last ones, that nothing learns from: they judge removals, parents and healing.
        seed: of pairs, adapters and the order of rows.

    Source: FoldGPT for the three stages; the rest is ours.
    """

    sparsity: float
    ranking: str = GATES
    blocks: tuple[int, ...] | None = None
    protect: tuple[int, ...] = ()
    check: bool = True
    gate_steps: int = 300
    gate_lr: float = 2e-2
    gate_eps: float = 1e-4
    flops_weight: float = 200.0
    polarisation_weight: float = 10.0
    group: int = 2
    keep_ends: int = 2
    boundaries: str = "fixed"
    groups: int | None = None
    parent: str = "divergence"
    own_biases: bool = False
    adapter_rank: int = 0
    epochs: int = 1
    batch: int = 8
    lora_rank: int = 32
    lora_lr: float = 1e-4
    norm_lr: float = 1e-3
    warmup: float = 0.03
    clip: float = 1.0
    next_token: float = 1.0
    distil: float = 1.0
    temperature: float = 2.0
    tail: int = 2
    tail_weight: float = 1.0
    held_out: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sparsity", "warmup"):
            check_share(name, getattr(self, name))
        check_known("ranking", self.ranking, (GATES, *RANKINGS))
        check_known("boundaries", self.boundaries, ("fixed", "greedy"))
        check_known("parent", self.parent, ("divergence", "first", "mean"))
        for name in ("gate_steps", "group", "batch"):
            check_whole(name, getattr(self, name), 1)
        for name in ("keep_ends", "adapter_rank", "epochs", "lora_rank", "tail", "held_out"):
            check_whole(name, getattr(self, name), 0)
        check_seed(self.seed)
        for name in ("gate_lr", "lora_lr", "norm_lr", "clip", "temperature"):
            check_positive(name, getattr(self, name))
        for name in ("flops_weight", "polarisation_weight", "next_token", "distil", "tail_weight"):
            check_weight(name, getattr(self, name))
        for name in ("check", "own_biases"):
            check_flag(name, getattr(self, name))
        if not 0 < self.gate_eps <= FIRST_EPS:
            raise ConfigError(f"gate_eps={self.gate_eps} is not in (0, {FIRST_EPS}], from where it falls")
        if self.blocks is not None:
            object.__setattr__(self, "blocks", places("blocks", self.blocks))
        object.__setattr__(self, "protect", places("protect", self.protect))
        if self.groups is not None:
            check_whole("groups", self.groups, 1)
            if self.boundaries == "fixed":
                raise ConfigError(f"groups={self.groups} are chosen by their harm: give boundaries=greedy as well")
        if self.boundaries == "greedy" and self.parent != "divergence":
            raise ConfigError(
                f"boundaries=greedy tries parents, and parent={self.parent} does not: give parent=divergence"
            )
        if self.epochs and not (self.next_token or self.distil or (self.tail and self.tail_weight)):
            raise ConfigError("healing has no loss: give next_token, distil or tail_weight above 0, or epochs=0")

    @property
    def ranks(self) -> bool:
        """Whether blocks to remove are chosen."""
        return self.sparsity > 0 and self.blocks is None

    @property
    def learns_gates(self) -> bool:
        """Whether gates are learnt."""
        return self.ranks and self.ranking == GATES

    @property
    def learns(self) -> bool:
        """Whether calibration rows are learnt from."""
        return self.learns_gates or self.epochs > 0

    @property
    def tries_sharing(self) -> bool:
        """Whether groups or their parents are chosen by trial."""
        return self.group > 1 and self.parent == "divergence"


def compress(
    model: PreTrainedModel, calibration: TokenRows, config: FoldGPTConfig, run: Run | None = None
) -> CompressedModel:
    """Remove blocks, let others share weights, and heal.

    With ``run.scratch`` each stage leaves there what it found, and what learns a state once a minute; a later call on
    the same model, rows and options goes on from there.

    Args:
        model: of any layout; not changed unless ``run.consume``.
        calibration: rows (N, T): the last ``held_out`` judge, the others are learnt from.
        config: the choices.
        run: how to run; ``run.teacher`` is learnt from in place of the model given.

    Raises:
        BudgetError: all blocks would go, or those that may not.
        ConfigError: the rows, the groups or the blocks named do not fit the model or each other.
        UnsupportedArchitecture: blocks share weights already, or the model's config has no words for it.

    Source: FoldGPT, its three stages.
    """
    run = run or Run()
    dense, before = budget.count(model), budget.costs(model)
    plan = plan_for(model, len(calibration.tokens), config)
    if config.epochs and config.next_token and calibration.recorded is not None:
        raise ConfigError("healing predicts tokens, and some of these rows' are images: give next_token=0")
    pruned = model if run.consume else clone(model)
    with evaluating(pruned), evaluating(run.teacher or pruned):
        folding = _Folding(pruned, calibration, config, plan, run)
        folding.remove()
        folding.share()
        folding.heal()
    folding.count_teacher()
    layout, after = layout_of(pruned), budget.costs(pruned)
    numbers = {
        **folding.numbers,
        "blocks_executed": len(layout.blocks),
        "blocks_stored": layout.distinct,
        "flops_per_token": [before.flops_per_token, after.flops_per_token],
        "kv_per_token": [before.kv_per_token, after.kv_per_token],
        **budget.change(dense, budget.count(pruned), config.sparsity),
    }
    return CompressedModel(pruned, Report("foldgpt", dataclasses.asdict(config), numbers, folding.resumed_seconds))


# --- What is known before anything is run


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        goes: how many blocks go.
        protected: blocks that stay.
        learnt: calibration rows that are learnt from.
    """

    goes: int
    protected: frozenset[int]
    learnt: int


def plan_for(model: PreTrainedModel, rows: int, config: FoldGPTConfig) -> Plan:
    """Check that model, rows and options fit each other.

    Raises:
        BudgetError: all blocks would go, or too many are protected.
        ConfigError: the rows, the groups or the blocks named do not fit.
        UnsupportedArchitecture: blocks share weights already.
    """
    blocks = len(Decoder(model))
    goes = budget.blocks_to_remove(config.sparsity, blocks)
    protected = removable(model, goes, config.blocks, config.protect, config.sparsity)
    if config.group > 1:
        check_may_share(model)
        check_owns(model, "sharing again")
        room = blocks - goes - 2 * config.keep_ends
        if config.group > room:
            raise ConfigError(
                f"group={config.group} is larger than the {max(0, room)} blocks that may share, of {blocks - goes} "
                f"with {config.keep_ends} kept at each end: give a smaller group or keep_ends"
            )
        if not (config.ranks and goes):  # otherwise it depends on which go
            _room([kind for i, kind in enumerate(block_kinds(model)) if i not in (config.blocks or ())], config)
    judges = config.ranks or config.tries_sharing
    if judges and not config.held_out:
        raise ConfigError("held_out=0: removals and parents are judged on rows held out; give 1 or more, 8 say")
    if config.held_out > rows:
        raise ConfigError(f"held_out={config.held_out}: there are {rows} calibration rows; hold out fewer")
    if config.learns and model.dtype == torch.float16:
        raise ConfigError("gradients of single tokens are lost in fp16: load the model in bf16 or fp32")
    learnt = rows - config.held_out
    if config.learns and (learnt < config.batch or learnt % config.batch):
        raise ConfigError(
            f"{rows} calibration rows do not fill batches of {config.batch}: give "
            f"{max(1, math.ceil(learnt / config.batch)) * config.batch} rows besides the {config.held_out} held out, "
            "or another batch"
        )
    return Plan(goes, protected, learnt)


def outline(model: PreTrainedModel, rows: int, config: FoldGPTConfig) -> float:
    """Cut ``model`` in place to the shape that `compress` gives it; returns about how many passes of a row it takes.

    A step of learning counts as three passes. Which blocks go and which share depends on the model: the outline takes
    the first that may.
    """
    plan, blocks = plan_for(model, rows, config), len(Decoder(model))
    passes = float(rows if config.learns else config.held_out)
    if config.learns_gates:
        passes += 3.0 * config.gate_steps * config.batch
    if config.ranks:
        passes += config.held_out * (3 if config.ranking in (GATES, "block_influence") else 1 + blocks / 2)
    drop_some(model, plan.goes, config.blocks, plan.protected)
    kept = (blocks - plan.goes) / blocks
    if config.group > 1:
        found = _room(block_kinds(model), config)
        runs = fixed_runs(found, config.group)[: config.groups]
        trials = len(all_runs(found, config.group) if config.boundaries == "greedy" else runs)
        passes += kept * config.held_out * (1 + (trials * config.group / 2 if config.tries_sharing else 0))
        share_blocks(
            model,
            {each[0]: each[1:] for each in runs},
            own_biases=config.own_biases,
            adapter_rank=config.adapter_rank,
        )
    return passes + kept * 3.0 * config.epochs * plan.learnt


def memory(model: PreTrainedModel, rows: int, length: int, config: FoldGPTConfig, spill_bytes: int) -> int:
    """About how many bytes `compress` holds at its peak beside the model; ``model`` may be on the meta device."""
    decoder, item = Decoder(model), model.dtype.itemsize
    width = int(decoder.config.hidden_size)
    states = min(rows * length * width * item * (1 + (config.tail if config.epochs else 0)), spill_bytes)
    if not config.learns:
        return states
    shapes = [Projection(module).matrix.shape for block in decoder for _, module in linears(block.module)]
    features = sum(sum(shape) for shape in shapes)
    learning = 16 * features * config.lora_rank if config.epochs else 0
    graph = 2 * item * config.batch * length * (features + 4 * width * len(decoder))
    logits = 4 * 4 * CHUNK_TOKENS * int(decoder.config.vocab_size)
    return states + learning + graph + logits


def _tail(config: FoldGPTConfig) -> int:
    """How many of the last blocks are compared with the teacher's."""
    return config.tail if config.epochs and config.tail_weight else 0


# --- Which blocks may share


def _room(kinds: Sequence[object], config: FoldGPTConfig) -> list[range]:
    """Stretches of like blocks that may share, of blocks of some kinds.

    Raises:
        ConfigError: none has room for a group.
    """
    found = stretches(kinds, config.keep_ends)
    if not fixed_runs(found, config.group):
        raise ConfigError(
            f"no {config.group} neighbours have the same kind of attention and the same shapes, which sharing needs: "
            "give a smaller group or keep_ends"
        )
    if config.groups is not None and config.groups > len(fixed_runs(found, config.group)):
        raise ConfigError(
            f"groups={config.groups}: there is room for {len(fixed_runs(found, config.group))} of {config.group}"
        )
    return found


# --- How it goes


class _Folding:
    """One run: the model so far, and what is known of its teacher.

    Attributes:
        numbers: what the report says.
        resumed_seconds: what was taken over from ``run.scratch`` had cost.
        teacher: the model as it came, or ``run.teacher``; None where nothing is learnt or judged.
        tail: what the last survivors are compared with, (N, T, D) each, in their order.
    """

    def __init__(
        self, model: PreTrainedModel, calibration: TokenRows, config: FoldGPTConfig, plan: Plan, run: Run
    ) -> None:
        self.model, self.calibration, self.config, self.plan, self.run = model, calibration, config, plan, run
        self.decoder = Decoder(model)
        self.numbers: dict[str, Any] = {"blocks_removed": [], "divergence": {}, "block_forwards": 0}
        self.resumed_seconds = 0.0
        self.tail: list[Tensor] = []
        self._teacher: Teacher | None = None
        parent = self.decoder if run.teacher is None else Decoder(run.teacher)
        check_teacher(self.decoder, parent, _tail(config))
        self._parent = parent

    @property
    def teacher(self) -> Teacher:
        """What is learnt from."""
        assert self._teacher is not None
        return self._teacher

    # --- Stage 1: which blocks go

    def remove(self) -> None:
        """Remove what the model needs least."""
        config, removed = self.config, sorted(self.config.blocks or ())
        if config.ranks and self.plan.goes:
            self._learn_from(0 if config.learns_gates else self.plan.learnt, ())
            found = self._stage("removal", _removal_options(config), self._choose)
            self.numbers |= found
            removed = found["blocks_removed"]
        self.numbers["blocks_removed"] = removed
        self._remember_tail(removed)
        if removed:
            drop_blocks(self.model, removed)
            self._judge("removed")

    def _choose(self, kept: Path | None) -> dict[str, Any]:
        """The blocks that go, with what was found on the way."""
        config, blocks = self.config, len(self.decoder)
        held_out = self.calibration.rows(slice(self.plan.learnt, None))
        if config.ranking != GATES:
            scores = RANKINGS[config.ranking](self.decoder, held_out, config.held_out, self.run)
            whole = config.ranking != "block_influence"  # then a trial for each block runs those above it
            self._count(config.held_out * (blocks + whole * blocks * (blocks - 1) // 2))
            return {"blocks_removed": self._lowest(scores), "scores": scores}
        gates, losses = self._learn_gates(kept)
        influence = block_influence(self.decoder, held_out, config.held_out, self.run)
        self._count(config.held_out * blocks)
        low, high = NOT_POLARISED
        by_influence = self._lowest(influence)
        found: dict[str, Any] = {
            "gates": gates,
            "gate_losses": losses,
            "unpolarised": sum(low <= gate <= high for gate in gates) / blocks,
            "block_influence": influence,
            "blocks_removed": self._lowest(list(zip(gates, influence, strict=True))),
        }
        if config.check:
            choices = {GATES: found["blocks_removed"], "block_influence": by_influence}
            harm = {name: self._without(choice) for name, choice in choices.items()}
            better = min(harm, key=lambda name: (harm[name], name != GATES))
            found |= {"removal_divergence": harm, "removal_kept": better, "blocks_removed": choices[better]}
        return found

    def _lowest(self, scores: Sequence[Any]) -> list[int]:
        """The blocks of the lowest scores that may go."""
        attending = set(layout_of(self.model).attention_blocks)
        goes: list[int] = []
        for block in lowest_indices(scores, len(scores)):
            if len(goes) < self.plan.goes and block not in self.plan.protected and attending - {*goes, block}:
                goes.append(block)
        return sorted(goes)

    def _learn_gates(self, kept: Path | None) -> tuple[list[float], list[float]]:
        """Learn one gate a block, all together.

        g = theta^2 / (theta^2 + eps), theta 1 at first and eps falling, so that gates end near 0 or 1. The loss is
        KL(model || gated model) + flops_weight max(0, sum(g c) / sum(c) - share to stay)^2 + w mean(g (1 - g)), with c
        the weights of each block.

        Source: FoldGPT, "gated block removal"; the form of the gates is that of differentiable polarisation.
        """
        config, decoder, device = self.config, self.decoder, self.run.device
        wide = torch.promote_types(self.model.dtype, torch.float32)
        thetas = nn.Parameter(torch.ones(len(decoder), dtype=wide, device=self.model.device))
        costs = torch.tensor([budget.block_weights(block) for block in decoder], dtype=wide, device=thetas.device)
        stays = 1 - self.plan.goes / len(decoder)

        def gates(eps: float) -> Tensor:
            return thetas.square() / (thetas.square() + eps)

        def loss(rows: Tensor, step: int) -> Tensor:
            progress = step / max(1, config.gate_steps - 1)
            g = gates(FIRST_EPS * (config.gate_eps / FIRST_EPS) ** progress)
            with scaled(decoder, g), autocast(self.model, device):
                last = through(decoder, self.calibration.batch(rows, device), None, 0, len(decoder))
            value = self.teacher.loss(decoder, last, rows)
            excess = torch.relu((g * costs).sum() / costs.sum() - stays)
            soft = config.polarisation_weight * progress * (g * (1 - g)).mean()
            extra = config.flops_weight * excess.square() + soft
            return value + extra.to(value.device)

        learnt = optimise(
            [Group([thetas], config.gate_lr)],
            loss,
            rows=self.plan.learnt,
            batch=config.batch,
            epochs=1,
            steps=config.gate_steps,
            generator=torch.Generator().manual_seed(config.seed),
            progress=self.run.progress,
            what="foldgpt: gates",
            kept=kept,
        )
        # The first block is not learnt through: only what it gives counts for its gate.
        self._count(config.gate_steps * config.batch * (3 * len(decoder) - 2))
        self.resumed_seconds += learnt.resumed_seconds
        return gates(config.gate_eps).tolist(), list(learnt.losses)

    @torch.no_grad()
    def _without(self, blocks: Sequence[int]) -> float:
        """The divergence on the rows held out of the model without some blocks."""
        trial = Decoder(clone(self.model))
        drop_blocks(trial.model, blocks)
        return self._divergence(trial)

    # --- Stage 2: which blocks share

    def share(self) -> None:
        """Let neighbours share weights."""
        if self.config.group == 1:
            return
        found = self._stage("sharing", _sharing_options(self.config), self._choose_groups)
        self.numbers |= found
        config, parents = self.config, {}
        for group, parent in zip(found["groups"], found["parents"], strict=True):
            if parent is None:
                parent = group[0]
                self._average(group)
            parents[parent] = [block for block in group if block != parent]
        share_blocks(
            self.model,
            parents,
            own_biases=config.own_biases,
            adapter_rank=config.adapter_rank,
            generator=torch.Generator().manual_seed(config.seed),
        )
        self._judge("shared")

    def _choose_groups(self, kept: Path | None) -> dict[str, Any]:
        """Groups, and whose weights each uses.

        Source: FoldGPT, "grouped parameter sharing"; how groups and parents are chosen is ours.
        """
        config = self.config
        room = _room(block_kinds(self.model), config)
        runs = fixed_runs(room, config.group)
        harm: dict[int, list[float]] = {}
        parents: list[int | None] = [None if config.parent == "mean" else each.start for each in runs]
        if config.tries_sharing:
            harm = self._try(all_runs(room, config.group) if config.boundaries == "greedy" else runs)
            if config.boundaries == "greedy":
                least = {start: min(found) for start, found in harm.items()}
                runs = greedy_runs(least, room, config.group, config.groups or len(runs))
            parents = [each[lowest_indices(harm[each.start], 1)[0]] for each in runs]
        return {
            "groups": [list(each) for each in runs],
            "parents": parents,
            "sharing_divergence": [harm[each.start] for each in runs if harm],
        }

    @torch.no_grad()
    def _try(self, runs: Sequence[range]) -> dict[int, list[float]]:
        """The divergence on the rows held out when one group shares the weights of each of its members in turn.

        Nothing changes below a group: a trial starts with what enters it.
        """
        decoder, blocks = self.decoder, self.decoder.blocks
        length = self.calibration.tokens.shape[1]
        total = {each.start: [0.0] * len(each) for each in runs}
        trials, rows = sum(len(each) for each in runs), self.config.held_out
        looked_at = list(parts(self.plan.learnt + rows, length, first=self.plan.learnt))
        for done, part in enumerate(looked_at):
            inputs = self.calibration.batch(part, self.run.device)
            with autocast(self.model, self.run.device):  # as the teacher's states were made
                entering = block_states(decoder, inputs)
            tried = 0
            for group in runs:
                members = [blocks[i] for i in group]
                for place, owner in enumerate(members):
                    others = [member for member in members if member is not owner]
                    with (
                        sharing(others, owner, own_biases=self.config.own_biases),
                        autocast(self.model, self.run.device),
                    ):
                        last = through(decoder, inputs, entering[group.start], group.start, len(decoder))
                    total[group.start][place] += self.teacher.kl(decoder, last, part)
                    tried += 1
                    self.run.progress("foldgpt: parents tried", done * trials + tried, len(looked_at) * trials)
        passes = sum(len(each) * (len(decoder) - each.start) for each in runs)
        self._count(rows * (len(decoder) + passes))
        return {start: [kl / (rows * length) for kl in found] for start, found in total.items()}

    @torch.no_grad()
    def _average(self, group: Sequence[int]) -> None:
        """Give the first block of a group the mean of the members' weights, and of their biases if those are shared."""
        members = [dict(linears(self.decoder.blocks[i].module)) for i in group]
        names = ["weight"] if self.config.own_biases else ["weight", "bias"]
        for path, module in members[0].items():
            for name in names:
                old = getattr(module, name)
                if old is not None:
                    wide = torch.promote_types(old.dtype, torch.float32)
                    mean = torch.stack([getattr(each[path], name).to(wide) for each in members]).mean(0)
                    setattr(module, name, nn.Parameter(mean.to(old.dtype), requires_grad=old.requires_grad))

    # --- Stage 3: healing

    def heal(self) -> None:
        """Let matrices, norms and biases learn to give what the teacher gives.

        next_token CE + distil T^2 KL(teacher / T || student / T) + tail_weight sum over the last survivors of
        |h - h_teacher|^2 / |h_teacher|^2.

        Source: FoldGPT, distillation fine-tuning with a tail-layer loss; the form of the losses is ours.
        """
        config, decoder, device = self.config, self.decoder, self.run.device
        if not config.epochs:
            return
        generator = torch.Generator().manual_seed(config.seed)
        healing = Healing(decoder, config.lora_rank, generator)
        ends = [decoder.block_list[i] for i in range(len(decoder) - len(self.tail), len(decoder))]

        def loss(rows: Tensor, step: int) -> Tensor:
            inputs = self.calibration.batch(rows, device)
            with ExitStack() as stack:
                stack.enter_context(added(healing.pairs))
                stack.enter_context(autocast(self.model, device))
                seen = [stack.enter_context(output_seen(module)) for module in ends]
                last = through(decoder, inputs, None, 0, len(decoder), healing.values())
            value = self.teacher.loss(
                decoder,
                last,
                rows,
                next_token_weight=config.next_token,
                distil=config.distil,
                temperature=config.temperature,
            )
            for (ours,), theirs in zip(seen, self.tail, strict=True):
                value = value + config.tail_weight * relative_mse(ours, theirs[rows].to(ours.device)).to(value.device)
            return value

        kept = None
        if self.run.scratch is not None:
            kept = self.run.scratch / f"foldgpt-healing-{self._identity(str(config))}.safetensors"
        learnt = optimise(
            [Group(healing.low_rank, config.lora_lr), Group(healing.direct, config.norm_lr)],
            loss,
            rows=self.plan.learnt,
            batch=config.batch,
            epochs=config.epochs,
            generator=generator,
            progress=self.run.progress,
            what="foldgpt: healing",
            warmup=config.warmup,
            clip=config.clip,
            kept=kept,
        )
        self.resumed_seconds += learnt.resumed_seconds
        healing.fold()
        self._count(3 * config.epochs * self.plan.learnt * len(decoder))
        self.numbers["healing_losses"] = list(learnt.losses)
        self._judge("healed")

    # --- What the stages have in common

    def _stage(self, name: str, what: str, work: Callable[[Path | None], dict[str, Any]]) -> dict[str, Any]:
        """What a stage finds, taken over from an earlier run if there was one alike."""
        if self.run.scratch is None:
            return work(None)
        stem = f"foldgpt-{name}-{self._identity(what)}"
        file = self.run.scratch / f"{stem}.json"
        try:
            kept = json.loads(file.read_text("utf-8"))
            found: dict[str, Any] = kept["found"]
            self._count(kept["block_forwards"])
            self.resumed_seconds += kept["seconds"]
        except (OSError, ValueError, LookupError, TypeError):
            start, forwards = time.monotonic(), self.numbers["block_forwards"]
            resumed = self.resumed_seconds
            found = work(self.run.scratch / f"{stem}.safetensors")
            forwards = self.numbers["block_forwards"] - forwards
            seconds = time.monotonic() - start + self.resumed_seconds - resumed
            write_file(file, json.dumps({"found": found, "block_forwards": forwards, "seconds": seconds}))
        return found

    def _identity(self, what: str) -> str:
        first = self.calibration.batch(slice(0, 1), self.run.device)
        seen = [*first.values(), block_states(self.decoder, first)[-2]]
        if self._teacher is not None:
            seen.append(self._teacher.last[-1:])
        if self.run.teacher is not None:
            seen += _around(self._parent)
        return identity(self.decoder, f"foldgpt {what} {self.calibration.sha256}", seen)

    def _count(self, block_forwards: int) -> None:
        self.numbers["block_forwards"] += block_forwards

    def count_teacher(self) -> None:
        """Add the passes of the teacher to the report."""
        if self._teacher is not None:
            self._count(self._teacher.block_forwards)

    def _judge(self, stage: str) -> None:
        """Write down the divergence on the rows held out."""
        if self.config.held_out:
            self.numbers["divergence"][stage] = self._divergence(self.decoder)

    def _divergence(self, decoder: Decoder) -> float:
        """KL(teacher || model) on the rows held out."""
        self._count(self.config.held_out * len(decoder))
        return self.teacher.divergence(decoder, self.plan.learnt)

    def _remember_tail(self, removed: Sequence[int]) -> None:
        """Ask the teacher what healing needs, before the model changes.

        The last survivors are compared with the teacher's states where the next survivor begins.
        """
        config = self.config
        survivors = [block for block in range(len(self.decoder)) if block not in removed]
        ends = [*(block - 1 for block in survivors[1:]), len(self._parent) - 1]
        inner = ends[-_tail(config) : -1] if _tail(config) else []
        first = 0 if config.epochs else self.plan.learnt
        if self._teacher is not None and self._teacher.first <= first:
            states = self._teacher.states(inner) if inner else []
        elif config.epochs or config.held_out:
            states = self._learn_from(first, inner)
        else:
            return
        self.tail = [*states, self.teacher.last] if _tail(config) else []

    def _learn_from(self, first: int, blocks: Sequence[int]) -> list[Tensor]:
        """Let the teacher read the rows from ``first`` on; returns what leaves some of its blocks."""
        self.count_teacher()
        self._teacher = Teacher(self._parent, self.calibration, first, self.run, blocks)
        return self._teacher.also


def _around(decoder: Decoder) -> list[Tensor]:
    """The parameters of a model that lie outside its blocks: embeddings, final norm and head."""
    inside = {id(parameter) for parameter in decoder.block_list.parameters()}
    return [parameter for parameter in decoder.model.parameters() if id(parameter) not in inside]


def _removal_options(config: FoldGPTConfig) -> str:
    """The options that a removal depends on."""
    of_gates = ("gate_steps", "gate_lr", "gate_eps", "flops_weight", "polarisation_weight", "batch", "seed")
    names = ("sparsity", "ranking", "blocks", "protect", "check", "held_out", *of_gates)
    return str({name: getattr(config, name) for name in names})


def _sharing_options(config: FoldGPTConfig) -> str:
    """The options that groups and parents depend on."""
    names = ("group", "keep_ends", "boundaries", "groups", "parent", "own_biases", "held_out")
    return str({name: getattr(config, name) for name in names})
