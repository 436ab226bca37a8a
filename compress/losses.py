"""Pure losses: how far a student's hidden states or predictions are from a teacher's. Arithmetic is in fp32 or wider.

Losses on hidden states take (B, T, D) tensors of B rows, T tokens and D channels, those on predictions take logits
(B, T, V); all give one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(student, teacher)``."""


def batch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the batch: how the rows compare with each other at each token and channel.

    P = softmax_b(teacher), Q = softmax_b(student); (1 / B) sum_{b,t,d} P (log P - log Q). An offset that all rows
    share is not seen, and with one row it is zero whatever the student does.

    Raises:
        ConfigError: there is only one row.

    Source: FuseGPT, equations 5 and 6.
    """
    if student.shape[0] < 2:
        raise ConfigError("batch_kl compares the rows of a batch, and there is one: give 2 or more, or loss=mse")
    return _kl(student, teacher, dim=0).sum() / student.shape[0]


def feature_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the channels of each token, averaged over tokens."""
    return _kl(student, teacher, dim=-1).sum(-1).mean()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return (wide(student) - wide(teacher)).square().mean()


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of each token, averaged over tokens."""
    return 1 - functional.cosine_similarity(wide(student), wide(teacher), dim=-1).mean()


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over the mean square of the teacher's states."""
    return mse(student, teacher) / wide(teacher).square().mean()


def logit_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats, the mean over tokens.

    The gradient flows to the student alone.

    Source: Hinton et al. 2015, with the factor that keeps gradients alike over temperatures.
    """
    kl: Tensor = _LogitKL.apply(student, teacher.detach(), temperature)  # type: ignore[no-untyped-call]
    return kl


class _LogitKL(torch.autograd.Function):
    """The divergence with its gradient, (softmax(student / T) - softmax(teacher / T)) T / tokens, made at once.

    A vocabulary is large: written as a chain of operations it would be read and written three times as often.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q, log_p = (_log_softmax(logits, temperature) for logits in (student, teacher))
        tokens = student.numel() // student.shape[-1]
        difference = log_p - log_q
        p = log_p.exp_()
        total = torch.dot(p.flatten(), difference.flatten())
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).mul_(temperature / tokens).to(student.dtype))
        return temperature**2 / tokens * total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.to(gradient) * gradient, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In fp32 or wider; a tensor of its own."""
    softened = wide(logits) if temperature == 1.0 else wide(logits) / temperature
    return functional.log_softmax(softened, dim=-1)


def top_logit_kl(student: Tensor, indices: Tensor, log_p: Tensor, temperature: float = 1.0) -> Tensor:
    """`logit_kl` where only a teacher's K most likely tokens are known: all others count as one.

    It is never more than the divergence over all tokens, and equal to it with K = V.

    Args:
        student: logits (B, T, V).
        indices: int64 (B, T, K), tokens.
        log_p: (B, T, K), what the teacher gives them at this temperature, in nats.
        temperature: T.
    """
    log_p = wide(log_p)
    log_q = _log_softmax(student, temperature).gather(-1, indices)
    tiny = torch.finfo(log_q.dtype).tiny
    p_rest = (1 - log_p.exp().sum(-1)).clamp_min(0)
    q_rest = (1 - log_q.exp().sum(-1)).clamp_min(torch.finfo(log_q.dtype).eps)
    of_rest = p_rest * (p_rest.clamp_min(tiny).log() - q_rest.log())
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) + of_rest
    return temperature**2 * kl.mean()


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) with the tokens that come next, int64 (B, T), in nats."""
    return functional.cross_entropy(wide(logits).flatten(0, 1), targets.flatten())


def by_chunks(
    states: Tensor, loss: Callable[[Tensor, int], Tensor], size: int, learning: Sequence[Tensor] = ()
) -> Tensor:
    """A loss that is a sum over tokens, computed with its gradient so many tokens at a time.

    What lies between the states and the loss, such as logits over a large vocabulary, is never held for all tokens.

    Args:
        states: (B, T, D).
        loss: of a part (B, t, D) that begins at a token.
        size: tokens t a part.
        learning: what else the loss depends on and is to learn, such as the weights of a head.

    Returns:
        The sum over all parts, from which gradients flow to ``states`` and to what learns.
    """
    total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
    gradients: list[Tensor] = []
    learnt: list[Tensor] = []
    for start in range(0, states.shape[1], size):
        part = states[:, start : start + size].detach().requires_grad_()
        value = loss(part, start)
        total = total + value.detach()
        if not value.requires_grad:  # a part may have nothing to say: behind the last token that is predicted
            gradients.append(torch.zeros_like(part))
            continue
        gradient, *others = torch.autograd.grad(value, (part, *learning))
        gradients.append(gradient)
        learnt = [sum_.add_(other) for sum_, other in zip(learnt, others, strict=True)] if learnt else others
    given = [torch.cat(gradients, dim=1), *(learnt or map(torch.zeros_like, learning))]
    result: Tensor = _WithGradients.apply(total, given, states, *learning)  # type: ignore[no-untyped-call]
    return result


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # A tied head may lie on another device than the last block.
        return None, None, *(upstream.to(gradient) * gradient for gradient in ctx.saved_tensors)


LOSSES: dict[str, Loss] = {"batch_kl": batch_kl, "mse": mse, "cosine": cosine, "feature_kl": feature_kl}
"""The losses on hidden states, by name."""


def _kl(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """The terms of KL(teacher || student), softmax along ``dim``."""
    q = functional.log_softmax(wide(student), dim=dim)
    p = functional.log_softmax(wide(teacher), dim=dim)
    return functional.kl_div(q, p, reduction="none", log_target=True)


def wide(states: Tensor) -> Tensor:
    """In fp32, or wider where it is."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
