"""FuseGPT: remove blocks one at a time, and graft what each knew onto its neighbours.

Pei et al. 2024, "FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers", arXiv 2411.14507.

Idea: the block that the model's last hidden states miss least goes (Macro Influence). Before it does, its matrices are
scaled elementwise by learnable matrices of low rank, zero at first, and added to the same matrices of its neighbours;
then the neighbours learn, with a LoRA of their own, to give together what the window gave with the block. The result
is a plain model of fewer blocks.

Where we differ: from the paper, in fp32 for what learns and for the loss (``precision=bf16`` brings the paper's
arithmetic back) and in batches that are composed anew each epoch. From the authors' code, in a bias for each donor
that survives saving, in a held-out error that starts from the window's own inputs, and in what it crashed on. Ours are
the other losses and rankings, `protect`, `blocks`, and one reading of the one-shot variant that the paper names; the
re-ranking by trial fusion is an idea of a fork.

Cost of a removal with L blocks, n rows and a window of S: about L / 2 passes for each scored row; half a pass for each
of the n; then 3 x epochs x n passes through S - 1 blocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_states, inputs_seen, through
from compress.calibration import TokenRows, parts
from compress.decoder import Decoder, Projection
from compress.device import autocast
from compress.errors import ConfigError
from compress.files import new_file
from compress.gating import evaluating
from compress.grafting import Grafts, Made, Ranks, base, coefficients
from compress.influence import RANKINGS, cosines
from compress.losses import LOSSES, wide
from compress.options import check_flag, check_known, check_positive, check_seed, check_share, check_whole, places
from compress.ranking import lowest_indices
from compress.remote_code import linears
from compress.result import CompressedModel, Report, Run
from compress.resume import identity
from compress.spill import Store
from compress.surgery import check_owns, clone, drop_blocks, drop_some, removable
from compress.training import Group, optimise

SCORING_ROWS = 32
"""The paper scores its first four batches of eight."""
SEED_STRIDE = 1_000_003
"""Each removal has a generator of its own, so that a run that goes on draws what an unbroken one does."""


@dataclass(frozen=True)
class FuseGPTConfig:
    """What the paper leaves to the user, with its values as defaults.

    Its learning rates belong to some 2,500 steps a removal; with few rows and epochs give higher ones.

    Attributes:
        sparsity: share of the blocks to remove, in [0, 1), rounded up to whole blocks.
        window: blocks that take part in a removal, the removed one included; even.
        ranking: what decides which block goes: "macro_influence" (what the last hidden states miss), "block_influence"
            (how much a block changes its input, as in ShortGPT) or "loss" (next-token loss without it, as in SLEB).
        iterative: rank the fused model anew before each removal; False ranks once.
        blocks: remove these, in this order, in place of a ranking; counted in the model as it came.
        protect: blocks that stay; negative ones count from the end.
        scoring_rows: calibration rows, the first ones, that rank; None: the first 32, or all where there are fewer.
        coefficient_rank: of the matrices that scale donors; 0: no fusion.
        lora_rank: of the pair that each linear has of its own; 0: none, and norms and biases stay as they are.
        batch: rows a step.
        epochs: how often each removal's tuning takes all rows.
        coefficient_lr: learning rate of what scales donors.
        base_lr: of LoRA, norms and biases.
        warmup: share of a removal's steps over which the rates rise; the paper has none.
        loss: between hidden states at the end of the window: "batch_kl", "mse", "cosine" or "feature_kl".
        precision: of what learns: "fp32", or the paper's "bf16".
        held_out: calibration rows, the last ones, kept from tuning, on which the error of what was tuned is reported.
        rerank: so many of the best candidates are fused on trial, and the one whose fused model is nearest goes; 0: no
            trials.
        rerank_window: window of a trial; even.
        rerank_epochs: epochs of a trial.
        seed: of the low-rank pairs and of the order of rows.

    Source: FuseGPT, sections 3 and 4.1, and the authors' code.
    """

    sparsity: float
    window: int = 8
    ranking: str = "macro_influence"
    iterative: bool = True
    blocks: tuple[int, ...] | None = None
    protect: tuple[int, ...] = ()
    scoring_rows: int | None = None
    coefficient_rank: int = 128
    lora_rank: int = 128
    batch: int = 8
    epochs: int = 20
    coefficient_lr: float = 1e-3
    base_lr: float = 9.65e-6
    warmup: float = 0.0
    loss: str = "batch_kl"
    precision: str = "fp32"
    held_out: int = 0
    rerank: int = 0
    rerank_window: int = 4
    rerank_epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sparsity", "warmup"):
            check_share(name, getattr(self, name))
        for name in ("window", "rerank_window"):
            size = getattr(self, name)
            if type(size) is not int or size < 2 or size % 2:
                raise ConfigError(f"{name}={size!r} is not even: it holds as many blocks before as after; give 8 or 4")
        for name in ("batch", "epochs", "rerank_epochs"):
            check_whole(name, getattr(self, name), 1)
        if self.scoring_rows is not None:
            check_whole("scoring_rows", self.scoring_rows, 1)
        check_seed(self.seed)
        for name in ("coefficient_rank", "lora_rank", "held_out", "rerank"):
            check_whole(name, getattr(self, name), 0)
        for name in ("coefficient_lr", "base_lr"):
            check_positive(name, getattr(self, name))
        check_known("ranking", self.ranking, RANKINGS)
        check_known("loss", self.loss, LOSSES)
        check_known("precision", self.precision, ("fp32", "bf16"))
        check_flag("iterative", self.iterative)
        if self.blocks is not None:
            object.__setattr__(self, "blocks", places("blocks", self.blocks))
        object.__setattr__(self, "protect", places("protect", self.protect))
        if self.tunes and self.loss == "batch_kl" and self.batch < 2:
            raise ConfigError(f"batch={self.batch}: batch_kl compares the rows of a batch; give 2 or more, or loss=mse")

    @property
    def tunes(self) -> bool:
        """Whether anything learns; otherwise blocks are deleted."""
        return self.coefficient_rank > 0 or self.lora_rank > 0


def compress(
    model: PreTrainedModel, calibration: TokenRows, config: FuseGPTConfig, run: Run | None = None
) -> CompressedModel:
    """Remove blocks with FuseGPT.

    With ``run.scratch`` the state after each removal is kept there. A later call on the same model, rows and options
    goes on from it, also to a higher sparsity; to one that it went beyond, it starts anew and keeps nothing.

    Args:
        model: not changed unless ``run.consume``.
        calibration: rows (N, T), from which the neighbours learn; the first ones rank.
        config: the paper's choices.
        run: how to run.

    Raises:
        BudgetError: all blocks would go, or those that may not.
        ConfigError: the window, the rows or the blocks named do not fit the model or each other.

    Source: FuseGPT, algorithm 1.
    """
    run = run or Run()
    dense = budget.count(model)
    plan = plan_for(model, len(calibration.tokens), config)
    if config.ranking == "loss" and config.blocks is None and calibration.recorded is not None:
        raise ConfigError("ranking=loss predicts tokens, and some of these rows' are images: take another ranking")
    pruned = model if run.consume else clone(model)
    with evaluating(pruned):
        fusion = _Fusion(pruned, calibration, config, plan, run)
        state = fusion.remove()
    numbers = {**state.numbers(), **budget.change(dense, budget.count(pruned), config.sparsity)}
    return CompressedModel(pruned, Report("fusegpt", dataclasses.asdict(config), numbers, fusion.resumed_seconds))


@dataclass(frozen=True)
class Plan:
    """What is known before anything is run.

    Attributes:
        goes: how many blocks go.
        protected: blocks that stay.
        scored: calibration rows that rank.
        tuned: calibration rows that are learnt from.
    """

    goes: int
    protected: frozenset[int]
    scored: int
    tuned: int


def plan_for(model: PreTrainedModel, rows: int, config: FuseGPTConfig) -> Plan:
    """Check that model, rows and options fit each other.

    Raises:
        BudgetError: all blocks would go, or too many are protected.
        ConfigError: the window, the rows or the blocks named do not fit.
        UnsupportedArchitecture: blocks share weights, and their neighbours would learn.
    """
    blocks = len(Decoder(model))
    goes = budget.blocks_to_remove(config.sparsity, blocks)
    if goes and config.tunes:
        check_owns(model, "fusing")
    protected = removable(model, goes, config.blocks, config.protect, config.sparsity)
    scored = min(SCORING_ROWS, rows) if config.scoring_rows is None else config.scoring_rows
    if goes:
        for name in ("window", *(["rerank_window"] if config.rerank else [])):
            if config.tunes and getattr(config, name) > blocks:
                raise ConfigError(
                    f"{name}={getattr(config, name)} is larger than the model, which has {blocks} blocks: "
                    f"give an even number up to {blocks}"
                )
        if scored > rows:
            raise ConfigError(f"scoring_rows={scored}: there are {rows} calibration rows; give fewer, or more rows")
        _check_rows(rows, config)
    return Plan(goes, protected, scored, rows - config.held_out)


def _check_rows(rows: int, config: FuseGPTConfig) -> None:
    tuned = rows - config.held_out
    if config.tunes and (tuned < config.batch or tuned % config.batch):
        held = f" besides the {config.held_out} held out" if config.held_out else ""
        raise ConfigError(
            f"{rows} calibration rows do not fill batches of {config.batch}: give "
            f"{max(1, math.ceil(tuned / config.batch)) * config.batch} rows{held}, or another batch"
        )


def outline(model: PreTrainedModel, rows: int, config: FuseGPTConfig) -> float:
    """Cut ``model`` in place to the shape that `compress` gives it; returns about how many passes of a row it takes.

    A step of learning counts as three passes through its window.
    """
    plan, blocks = plan_for(model, rows, config), len(Decoder(model))
    forwards = 0.0
    for gone in range(plan.goes):
        left = blocks - gone
        forwards += _ranking_forwards(left, gone, plan, config)
        if config.tunes:
            forwards += _tuning_forwards(left / 2, min(config.window, left), config.epochs, plan, config)
        if config.rerank > 1 and config.blocks is None:
            window = min(config.rerank_window, left)
            trial = _tuning_forwards(left / 2, window, config.rerank_epochs, plan, config) if config.tunes else 0
            forwards += plan.scored * left + config.rerank * (trial + plan.scored * (left - 1))
    drop_some(model, plan.goes, config.blocks, plan.protected)
    return forwards / blocks


def memory(model: PreTrainedModel, rows: int, length: int, config: FuseGPTConfig, spill_bytes: int) -> int:
    """About how many bytes `compress` holds at its peak beside the model; ``model`` may be on the meta device."""
    if not config.tunes:
        return 0
    decoder, item = Decoder(model), model.dtype.itemsize
    shapes = [tuple(Projection(module).matrix.shape) for _, module in linears(decoder.blocks[-1].module)]
    matrices, features = sum(math.prod(shape) for shape in shapes), sum(sum(shape) for shape in shapes)
    survivors = min(config.window, len(decoder)) - 1
    ranks = config.lora_rank + config.coefficient_rank * plan_for(model, rows, config).goes
    learning = 4 * features * ranks * survivors * (2 if config.precision == "bf16" else 4)
    graph = survivors * item * (matrices + 2 * config.batch * length * features)
    originals = min(len(decoder) * matrices * item, spill_bytes)
    states = min(2 * rows * length * int(decoder.config.hidden_size) * item, spill_bytes)
    return learning + graph + originals + states


def _ranking_forwards(blocks: int, gone: int, plan: Plan, config: FuseGPTConfig) -> int:
    """Block forward passes of ranking so many blocks."""
    if config.blocks is not None or (gone and not config.iterative):
        return 0
    trials = 0 if config.ranking == "block_influence" else blocks * (blocks - 1) // 2
    return plan.scored * (blocks + trials)


def _tuning_forwards(stop: float, window: int, epochs: int, plan: Plan, config: FuseGPTConfig) -> float:
    """Block forward passes of one removal, the window of which ends before block ``stop``."""
    survivors = window - 1
    return (plan.tuned + config.held_out) * stop + (3 * epochs * plan.tuned + 2 * config.held_out) * survivors


def window_of(p: int, size: int, blocks: int) -> range:
    """The blocks that take part in the removal of block p: half of them before it, moved inwards at the ends.

    Args:
        p: the block that goes.
        size: of the window, S, even.
        blocks: how many the model has now; where they are fewer than S, all take part.

    Source: FuseGPT, section 3.2, as the authors' code has it.
    """
    size = min(size, blocks)
    start = min(max(p - size // 2, 0), blocks - size)
    return range(start, start + size)


# --- How it goes


@dataclass
class _State:
    """How far a run has come.

    Attributes:
        left: blocks that are left, as the model counted them when it came.
        removed: those that are gone, in order.
        scores: of each ranking.
        windows: of each removal, in the numbering of its moment.
        tuning: losses and held-out errors of each removal.
        trials: re-ranking of each removal.
        not_grafted: matrices that found no twin in a survivor.
        block_forwards: passes of one row through one block; a step of learning counts as three.
        seconds: what it took.
    """

    left: list[int]
    removed: list[int] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    tuning: list[dict[str, float | None]] = field(default_factory=list)
    trials: list[dict[str, list[float]]] = field(default_factory=list)
    not_grafted: list[str] = field(default_factory=list)
    block_forwards: int = 0
    seconds: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """What the report says, under the names that they have here."""
        numbers = {"blocks_removed": self.removed, **vars(self)}
        return {name: value for name, value in numbers.items() if name not in ("left", "removed", "seconds")}


class _Fusion:
    """One run: the model so far, and what its parameters are made of."""

    def __init__(
        self, model: PreTrainedModel, calibration: TokenRows, config: FuseGPTConfig, plan: Plan, run: Run
    ) -> None:
        self.model, self.calibration, self.config, self.plan, self.run = model, calibration, config, plan, run
        self.decoder = Decoder(model)
        self.state = _State(list(range(len(self.decoder))))
        self.grafts = self._no_grafts()
        self.resumed_seconds = 0.0
        self.file: Path | None = None
        if run.scratch is not None and plan.goes:
            first = calibration.batch(slice(0, 1), run.device)
            seen = [*first.values(), block_states(self.decoder, first)[-2]]
            what = f"fusegpt {dataclasses.replace(config, sparsity=0.0)} {calibration.sha256}"
            self.file = run.scratch / f"fusegpt-{identity(self.decoder, what, seen)}.safetensors"

    def remove(self) -> _State:
        """Remove what is to go, from where an earlier run stopped."""
        self._go_on()
        while len(self.state.removed) < self.plan.goes:
            start = time.perf_counter()
            self._fuse(self._choose())
            self.state.seconds += time.perf_counter() - start
            if self.file is not None:
                _write(self.file, self.state, self.grafts)
        return self.state

    def _no_grafts(self) -> Grafts:
        ranks = Ranks(self.config.coefficient_rank, self.config.lora_rank, narrow=self.config.precision == "bf16")
        return Grafts(ranks, Store(self.run))

    def _go_on(self) -> None:
        """Take over what an earlier run did, if it did no more than is wanted now."""
        found = None if self.file is None else _read(self.file)
        if found is None:
            return
        state, made, tensor = found
        if len(state.removed) > self.plan.goes:
            self.file = None  # it stays for a run that wants as much
            return
        drop_blocks(self.model, state.removed)
        self.grafts.restore(dict(zip(state.left, self.decoder, strict=True)), made, tensor)
        self.state, self.resumed_seconds = state, state.seconds

    def _choose(self) -> int:
        """The place of the block that goes next.

        Source: FuseGPT, section 3.1: the scores are those of the current model.
        """
        state, config = self.state, self.config
        gone = len(state.removed)
        if config.blocks is not None:
            return state.left.index(config.blocks[gone])
        if config.iterative or not state.scores:
            score = RANKINGS[config.ranking]
            state.scores.append(score(self.decoder, self.calibration, self.plan.scored, self.run))
            state.block_forwards += _ranking_forwards(len(state.left), gone, self.plan, config)
            scores = state.scores[-1]
        else:
            scores = [state.scores[0][block] for block in state.left]
        order = lowest_indices([math.inf if math.isnan(s) else s for s in scores], len(scores))
        attending = [block.index for block in self.decoder if block.attention is not None]
        last = set(attending) if len(attending) == 1 else set()  # a model needs one that attends
        allowed = [place for place in order if place not in last and state.left[place] not in self.plan.protected]
        candidates = allowed[: config.rerank]
        return self._try(candidates) if len(candidates) > 1 else allowed[0]

    def _fuse(self, place: int) -> None:
        """Remove a block; its neighbours learn to do without it."""
        state, config = self.state, self.config
        window = window_of(place, config.window, len(self.decoder))
        if config.tunes:
            what = f"fusegpt: tuning, removal {len(state.removed) + 1} of {self.plan.goes}"
            found, missing = self._learn(self.decoder, self.grafts, place, window, config.epochs, what)
            state.tuning.append(found)
            state.not_grafted += [name for name in missing if name not in state.not_grafted]
        else:
            drop_blocks(self.model, [place])
        state.windows.append([window.start, window.stop])
        state.removed.append(state.left.pop(place))

    def _learn(
        self, decoder: Decoder, grafts: Grafts, place: int, window: range, epochs: int, what: str
    ) -> tuple[dict[str, float | None], list[str]]:
        """Steps b to g of the algorithm: what the window gives with the block, its survivors learn to give without.

        Args:
            decoder: a model with the blocks that are left; changed in place.
            grafts: what its parameters are made of; added to.
            place: the block that goes.
            window: the blocks that take part.
            epochs: how often all rows are taken.
            what: the name under which progress is told.

        Returns:
            Losses of the first and the last epoch with the window's errors on the rows held out; and the matrices that
            found no twin.
        """
        config, left, device = self.config, self.state.left, self.run.device
        entering, leaving = self._around(decoder, window)
        key = len(self.state.removed)
        generator = torch.Generator().manual_seed(config.seed * SEED_STRIDE + key)
        donor = grafts.donor(decoder.blocks[place])
        grafts.blocks.pop(left[place], None)  # what it was made of is in the sum
        survivors = {i: decoder.blocks[i] for i in window if i != place}
        missing = [
            f"block {left[i]}: {name}"
            for i, block in survivors.items()
            for name in grafts.inject(block, left[i], donor, key, generator)
        ]
        drop_blocks(decoder.model, [place])
        here = {f"{decoder.arch.blocks}.{window.start + n}": grafts.of(left[i]) for n, i in enumerate(survivors)}

        def student(rows: slice | Tensor) -> Tensor:
            values = {f"{block}.{name}": graft() for block, of in here.items() for name, graft in of.items()}
            inputs, hidden = self.calibration.batch(rows, device), entering[rows].to(device)
            with autocast(self.model, self.run.device):
                return through(decoder, inputs, hidden, window.start, window.stop - 1, values)

        def loss(rows: Tensor, step: int) -> Tensor:
            ours = student(rows)
            return LOSSES[config.loss](ours, leaving[rows].to(ours.device))

        learning = [graft for of in here.values() for graft in of.values()]
        groups = [
            Group([p for graft in learning for p in coefficients(graft)], config.coefficient_lr),
            Group([p for graft in learning for p in base(graft)], config.base_lr),
        ]
        losses: list[float | None] = [None]
        before = self._held_out_error(student, leaving)
        if any(group.parameters for group in groups):
            losses[:] = optimise(
                groups,
                loss,
                rows=self.plan.tuned,
                batch=config.batch,
                epochs=epochs,
                generator=generator,
                progress=self.run.progress,
                what=what,
                warmup=config.warmup,
            ).losses
        after = self._held_out_error(student, leaving)
        for i, block in survivors.items():
            grafts.fold(block, left[i])
        self.state.block_forwards += int(_tuning_forwards(window.stop, len(window), epochs, self.plan, config))
        found = {"loss_first": losses[0], "loss_last": losses[-1], "held_out_before": before, "held_out_after": after}
        return found, missing

    @torch.no_grad()
    def _around(self, decoder: Decoder, window: range) -> tuple[Tensor, Tensor]:
        """What enters a window and what leaves it, (N, T, D) each, for all rows."""
        rows, length = self.calibration.tokens.shape
        store = Store(self.run)
        sets: list[Tensor] = []
        for part in parts(rows, length):
            inputs = self.calibration.batch(part, self.run.device)
            with inputs_seen([decoder.block_list[window.start]]) as seen, autocast(self.model, self.run.device):
                after = through(decoder, inputs, None, 0, window.stop)
            for place, states in enumerate((seen[0], after)):
                if len(sets) == place:
                    sets.append(store.room((rows, *states.shape[1:]), states.dtype))
                sets[place][part] = states.cpu()
            self.run.progress("fusegpt: around the window", part.stop, rows)
        entering, leaving = sets
        return entering, leaving

    @torch.no_grad()
    def _held_out_error(self, student: Callable[[slice | Tensor], Tensor], leaving: Tensor) -> float | None:
        """|| student - teacher ||^2 / || teacher ||^2 over the rows held out."""
        if not self.config.held_out:
            return None
        error, norm = 0.0, 0.0
        for part in parts(len(leaving), leaving.shape[1], first=self.plan.tuned):
            ours = wide(student(part))
            theirs = wide(leaving[part].to(ours.device))
            error += (ours - theirs).double().square().sum().item()
            norm += theirs.double().square().sum().item()
        return error / norm

    def _try(self, candidates: Sequence[int]) -> int:
        """The candidate whose fused model is nearest to the present one: each is fused on trial, in a small window.

        Source: an idea of a fork of the authors' code.
        """
        config, rows, left = self.config, self.plan.scored, len(self.decoder)
        inputs = [
            self.calibration.batch(part, self.run.device) for part in parts(rows, self.calibration.tokens.shape[1])
        ]
        whole = [block_states(self.decoder, each)[-1].cpu() for each in inputs]
        change = []
        for done, place in enumerate(candidates):
            trial = Decoder(clone(self.model))
            window = window_of(place, config.rerank_window, left)
            if config.tunes:
                self._learn(trial, self._no_grafts(), place, window, config.rerank_epochs, "fusegpt: trial fusion")
            else:
                drop_blocks(trial.model, [place])
            with torch.no_grad():
                ends = [through(trial, each, None, 0, left - 1).cpu() for each in inputs]
            similar = torch.cat([cosines(*pair) for pair in zip(whole, ends, strict=True)]).mean()
            change.append(1 - similar.item())
            self.run.progress("fusegpt: candidates tried", done + 1, len(candidates))
        self.state.block_forwards += rows * (left + len(candidates) * (left - 1))
        self.state.trials.append({"blocks": [self.state.left[place] for place in candidates], "change": change})
        return candidates[lowest_indices(change, 1)[0]]


# --- The state on disk: one safetensors file, with the numbers in its header


def _write(file: Path, state: _State, grafts: Grafts) -> None:
    """Keep the state; a kill leaves the old file or the new one."""
    tensors, made = grafts.tensors()
    with new_file(file) as partial:
        save_file(tensors, partial, {"state": json.dumps(vars(state)), "made": json.dumps(made)})


def _read(file: Path) -> tuple[_State, Made, Callable[[str], Tensor]] | None:
    """The state of an earlier run, how to build its grafts, and its tensors by name; None where none can be read."""
    try:
        found = safe_open(file, "pt")
        header = found.metadata()  # type: ignore[no-untyped-call]
        made = {int(number): names for number, names in json.loads(header["made"]).items()}
        return _State(**json.loads(header["state"])), made, found.get_tensor
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None
