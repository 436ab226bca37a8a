"""Greedy removal by perplexity: try the model without each part, remove the cheapest, try the rest again.

A trial without a part of block b starts at block b, with what is known to enter it: nothing below can have changed.
What the cheapest trial of a round lets into the blocks above is kept, so that a removal itself costs no pass. That is
the least that exact re-evaluation needs: one pass that stops before the last block, and for each trial the blocks from
b upwards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.activations import block_inputs, inputs_seen
from compress.decoder import Decoder
from compress.evaluate import cross_entropy
from compress.files import write_file
from compress.gating import BlockForwards, starting_at, without_attention, without_ffn
from compress.result import Run
from compress.resume import identity
from compress.surgery import drop_blocks, empty_blocks


@dataclass(frozen=True, order=True)
class Part:
    """Something that can be removed. Parts are tried in their order, and ties go to the first."""

    block: int
    kind: Literal["attention", "block", "ffn"]


@dataclass(frozen=True)
class Removal:
    """One round of a greedy removal.

    Attributes:
        part: what went.
        costs: perplexity without each candidate of the round.
        block_forwards: block forward passes of its trials.
        seconds: how long it took.
    """

    part: Part
    costs: dict[Part, float]
    block_forwards: int
    seconds: float


@dataclass(frozen=True)
class Removals:
    """All rounds, in order.

    Attributes:
        rounds: one per removal.
        block_forwards: block forward passes, also those of rounds that an earlier run had done.
        block_forwards_naive: what full passes would have needed for the same trials.
        resumed_seconds: what the rounds that were taken over from an earlier run had cost it.
    """

    rounds: tuple[Removal, ...] = ()
    block_forwards: int = 0
    block_forwards_naive: int = 0
    resumed_seconds: float = 0.0

    def blocks(self, kind: str) -> list[int]:
        """The blocks that parts of a kind went from, in order."""
        return [each.part.block for each in self.rounds if each.part.kind == kind]

    @property
    def perplexities(self) -> list[float]:
        """Perplexity after each removal."""
        return [each.costs[each.part] for each in self.rounds]


Candidates = Callable[[Sequence[Part]], Sequence[Part]]
"""From what has gone so far to what may go next; an empty answer ends the removal."""


@torch.no_grad()
def remove_greedily(
    model: PreTrainedModel, rows: Tensor, candidates: Candidates, run: Run, what: str, trials: int
) -> Removals:
    """Remove the part without which perplexity is lowest, again and again; costs are taken anew after each removal.

    With ``run.scratch`` every finished round is kept there. A later call on the same model and rows goes on from what
    it finds, whichever of the two removes more.

    Args:
        model: changed in place; blocks that end up with neither attention nor FFN are deleted.
        rows: tokens (N, T) whose perplexity decides.
        candidates: what may go next.
        run: progress, device and scratch folder.
        what: the name under which progress is told and rounds are kept.
        trials: about how many trials there will be, for progress.
    """
    search = _Search(model, rows.to(run.device), run, what, trials)
    while allowed := sorted(candidates(search.gone)):
        search.next_round(allowed)
    run.progress(what, trials, trials)
    drop_blocks(model, empty_blocks(model))
    return Removals(tuple(search.rounds), search.block_forwards, search.naive, search.resumed_seconds)


class _Search:
    """The model so far, what enters each of its blocks, and the rounds done."""

    def __init__(self, model: PreTrainedModel, rows: Tensor, run: Run, what: str, trials: int) -> None:
        self.model, self.rows, self.run, self.what, self.trials = model, rows, run, what, trials
        self.decoder = Decoder(model)
        self.blocks = self.decoder.blocks
        self.rounds: list[Removal] = []
        self.resumed_seconds = 0.0
        self.naive = self._passes()
        with BlockForwards(self.decoder) as forwards:
            self.entering = self._enter()
        self.block_forwards = forwards.count
        self.trace = None
        if run.scratch is not None:
            seen = (self.rows, *(row[-1] for row in self.entering))
            self.trace = run.scratch / f"removals-{identity(self.decoder, what, seen)}.json"
        self.known = [] if self.trace is None else _read(self.trace)

    @property
    def gone(self) -> list[Part]:
        return [each.part for each in self.rounds]

    def next_round(self, allowed: Sequence[Part]) -> None:
        """Take over a round of an earlier run, or try every part that may go; then remove the cheapest."""
        self.naive += sum(self._passes(part) for part in allowed)
        place = len(self.rounds)
        if place < len(self.known) and set(self.known[place].costs) == set(allowed):
            found = self.known[place]
            self._remove(found.part)
            self.entering = []
            self.resumed_seconds += found.seconds
        else:
            self.known = []
            found = self._round(allowed)
        self.rounds.append(found)
        self.block_forwards += found.block_forwards
        if self.trace is not None and not self.known:
            _write(self.trace, self.rounds)

    def _round(self, allowed: Sequence[Part]) -> Removal:
        start = time.perf_counter()
        self.entering = self.entering or self._enter()
        tried = sum(len(each.costs) for each in self.rounds)
        costs: dict[Part, float] = {}
        cheapest = allowed[0]
        with BlockForwards(self.decoder) as forwards:
            for part in allowed:
                costs[part], entered = self._try(part)
                if part == allowed[0] or _comparable(costs[part]) < _comparable(costs[cheapest]):
                    cheapest, above = part, entered
                tried += 1
                self.run.progress(self.what, min(tried, self.trials - 1), self.trials)
        self._remove(cheapest)
        for states, changed in zip(self.entering, above, strict=True):
            states[cheapest.block + 1 :] = changed
        return Removal(cheapest, costs, forwards.count, time.perf_counter() - start)

    def _try(self, part: Part) -> tuple[float, list[list[Tensor]]]:
        """Perplexity without a part, and what then enters each block above it, for each row."""
        nll, above = 0.0, []
        for row, entering in zip(self.rows, self.entering, strict=True):
            with (
                starting_at(self.decoder, part.block, entering[part.block]),
                self._without(part),
                inputs_seen(self.decoder.block_list) as seen,
            ):
                nll += cross_entropy(self.model(input_ids=row[None], use_cache=False).logits[0], row)
            above.append(seen[part.block + 1 :])
        predicted = self.rows.shape[0] * (self.rows.shape[1] - 1)
        return float(torch.tensor(nll / predicted, dtype=torch.float64).exp()), above

    def _enter(self) -> list[list[Tensor]]:
        """What enters each block, for each row."""
        return [block_inputs(self.decoder, row[None]) for row in self.rows]

    @contextmanager
    def _without(self, part: Part) -> Iterator[None]:
        block = self.blocks[part.block]
        with ExitStack() as stack:
            if part.kind != "ffn":
                stack.enter_context(without_attention(block))
            if part.kind != "attention":
                stack.enter_context(without_ffn(block))
            yield

    def _remove(self, part: Part) -> None:
        block = self.blocks[part.block]
        if part.kind != "ffn":
            block.remove_attention()
        if part.kind != "attention":
            block.remove_ffn()

    def _passes(self, part: Part | None = None) -> int:
        """Block forward passes of the whole model over the rows, without a part."""
        if part is None:
            return (len(self.blocks) - len(empty_blocks(self.model))) * len(self.rows)
        with self._without(part):
            return self._passes()


def _comparable(cost: float) -> float:
    return math.inf if math.isnan(cost) else cost


def _write(file: Path, rounds: Sequence[Removal]) -> None:
    """Keep finished rounds; a kill leaves the old file or the new one."""
    rows = [
        {
            "part": [each.part.block, each.part.kind],
            "costs": [[part.block, part.kind, cost] for part, cost in each.costs.items()],
            "block_forwards": each.block_forwards,
            "seconds": each.seconds,
        }
        for each in rounds
    ]
    write_file(file, json.dumps(rows) + "\n")


def _read(file: Path) -> list[Removal]:
    """The rounds of an earlier run; none where there is no file, or one that cannot be read."""
    try:
        return [
            Removal(
                Part(*row["part"]),
                {Part(block, kind): cost for block, kind, cost in row["costs"]},
                row["block_forwards"],
                row["seconds"],
            )
            for row in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return []
