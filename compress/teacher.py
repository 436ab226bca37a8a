"""A model that another learns from: its hidden states, kept, and how far predictions are from its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from compress.activations import logits_from, output_seen, through
from compress.calibration import TokenRows, parts
from compress.decoder import Decoder
from compress.device import autocast
from compress.errors import ConfigError
from compress.losses import by_chunks, logit_kl, next_token
from compress.result import Run
from compress.spill import Store

CHUNK_TOKENS = 512
"""Logits are made of so many tokens at once."""


class Teacher:
    """A model as it is now, which may change afterwards: what it gives on calibration rows is kept.

    Only what leaves its last block is kept, and logits are made of that when they are needed: its final norm and its
    head must stay as they are.

    Args:
        decoder: the model.
        calibration: rows (N, T).
        first: the first row that is looked at.
        run: progress, device, and how much of what is kept lies in memory.
        also: what leaves these of its blocks is kept as well.

    Attributes:
        also: (N, T, D) each.
        last: what leaves its last block, (N, T, D); rows before ``first`` are empty.
        block_forwards: passes of one row through one block so far.
    """

    def __init__(
        self, decoder: Decoder, calibration: TokenRows, first: int, run: Run, also: Sequence[int] = ()
    ) -> None:
        self.decoder, self.calibration, self.first, self.run = decoder, calibration, first, run
        self.block_forwards = 0
        self._store = Store(run)
        *self.also, self.last = self.states([*also, len(decoder) - 1])

    @torch.no_grad()
    def states(self, blocks: Sequence[int]) -> list[Tensor]:
        """What leaves some of its blocks, (N, T, D) each. To be asked before the model changes."""
        rows, length = self.calibration.tokens.shape
        found: list[Tensor] = []
        for part in parts(rows, length, first=self.first):
            with ExitStack() as stack:
                stack.enter_context(autocast(self.decoder.model, self.run.device))
                seen = [stack.enter_context(output_seen(self.decoder.block_list[block])) for block in blocks]
                through(self.decoder, self.calibration.batch(part, self.run.device), None, 0, max(blocks) + 1)
            for place, (states,) in enumerate(seen):
                if len(found) == place:
                    found.append(self._store.room((rows, *states.shape[1:]), states.dtype))
                found[place][part] = states.cpu()
            self.run.progress("what the teacher gives", part.stop, rows)
        self.block_forwards += (rows - self.first) * (max(blocks) + 1)
        return found

    @torch.no_grad()
    def divergence(self, student: Decoder, first: int) -> float:
        """KL(teacher || student) in nats, the mean over the tokens of the rows from ``first`` on."""
        rows, length = self.calibration.tokens.shape
        total = 0.0
        for part in parts(rows, length, first=first):
            with autocast(self.decoder.model, self.run.device):  # as its own states were made
                last = through(student, self.calibration.batch(part, self.run.device), None, 0, len(student))
            total += self.kl(student, last, part)
        return total / ((rows - first) * length)

    @torch.no_grad()
    def kl(self, student: Decoder, last: Tensor, rows: slice) -> float:
        """The sum of KL(teacher || student) over the tokens of some rows, from what leaves the student's last block."""
        total = 0.0
        for ours, theirs in zip(last, self.last[rows], strict=True):
            logits = logits_from(student, ours[None])
            wanted = logits_from(self.decoder, theirs[None].to(ours.device))
            total += logit_kl(logits, wanted.to(logits.device)).item() * len(ours)
        return total

    def loss(
        self,
        student: Decoder,
        last: Tensor,
        rows: Tensor,
        *,
        next_token_weight: float = 0.0,
        distil: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """next_token_weight CE + distil T^2 KL(teacher / T || student / T), each a mean over tokens.

        Args:
            student: whose head makes predictions of ``last``.
            last: what leaves its last block, (B, T, D).
            rows: places of the rows, int64 (B,).
            next_token_weight: of the cross-entropy with the tokens of the rows.
            distil: weight of the divergence.
            temperature: that both predictions are softened with.
        """
        return prediction_loss(
            student,
            last,
            self.calibration.tokens[rows],
            divergence_from(self.decoder, self.last[rows], temperature, last.device),
            next_token_weight=next_token_weight,
            distil=distil,
        )


def divergence_from(
    teacher: Decoder, states: Tensor, temperature: float, device: torch.device
) -> Callable[[Tensor, int], Tensor]:
    """How far predictions of some tokens are from a teacher's.

    Args:
        teacher: whose final norm and head make predictions of ``states``.
        states: what leaves its last block, (B, T, D), wherever it lies.
        temperature: that both predictions are softened with.
        device: where the teacher's predictions are made.

    Returns:
        From logits (B, t, V) of the tokens from one on, and that token's place, to `logit_kl`.
    """

    def divergence(logits: Tensor, start: int) -> Tensor:
        with torch.no_grad():
            wanted = logits_from(teacher, states[:, start : start + logits.shape[1]].to(device))
        return logit_kl(logits, wanted.to(logits.device), temperature)

    return divergence


def prediction_loss(
    student: Decoder,
    last: Tensor,
    tokens: Tensor,
    divergence: Callable[[Tensor, int], Tensor],
    *,
    next_token_weight: float,
    distil: float,
    learning: Sequence[Tensor] = (),
) -> Tensor:
    """next_token_weight CE + distil D of what a student predicts, each a mean over tokens, some tokens at a time.

    Args:
        student: whose final norm and head make predictions of ``last``.
        last: what leaves its last block, (B, T, D).
        tokens: of the rows, int64 (B, T).
        divergence: from logits (B, t, V) of the tokens from one on, and that token's place, to D, their mean.
        next_token_weight: of the cross-entropy with the tokens of the rows.
        distil: weight of the divergence.
        learning: weights of the final norm and the head, where those learn as well.
    """
    length = tokens.shape[1]

    def loss(part: Tensor, start: int) -> Tensor:
        stop = start + part.shape[1]
        logits = logits_from(student, part)
        value = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        if distil:
            value = value + distil * divergence(logits, start) * (stop - start) / length
        targets = tokens[:, start + 1 : stop + 1].to(logits.device)  # one fewer at the end of the rows
        if next_token_weight and targets.numel():
            share = targets.shape[1] / (length - 1)
            value = value + next_token_weight * next_token(logits[:, : targets.shape[1]], targets) * share
        return value

    return by_chunks(last, loss, max(1, CHUNK_TOKENS // len(tokens)), learning)


def check_teacher(student: Decoder, teacher: Decoder, tail: int) -> None:
    """Refuse a teacher that cannot be followed.

    Args:
        student: that learns.
        teacher: that it learns from.
        tail: so many of the last blocks are compared.

    Raises:
        ConfigError: other tokens, or blocks that cannot be compared.
    """
    vocabulary, theirs = student.config.vocab_size, teacher.config.vocab_size
    if vocabulary != theirs:
        raise ConfigError(f"the teacher predicts {theirs} tokens and the model {vocabulary}: give one with as many")
    if tail and student.config.hidden_size != teacher.config.hidden_size:
        raise ConfigError("the teacher's hidden states have another width: give tail=0")
    if tail > 1 and len(student) != len(teacher):
        raise ConfigError(
            f"the teacher has {len(teacher)} blocks and the model {len(student)}, so that only their last ones can be "
            "compared: give tail=1 or tail=0"
        )
