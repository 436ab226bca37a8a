"""Pure losses: how far a student's hidden states or predictions are from a teacher's. Arithmetic is in fp32 or wider.

Losses on hidden states take (B, T, D) tensors of B rows, T tokens and D channels, those on predictions take logits
(B, T, V); all give one number.
"""

from __future__ import annotations

from collections.abc import Callable

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

    Source: Hinton et al. 2015, with the factor that keeps gradients alike over temperatures.
    """
    q = functional.log_softmax(wide(student) / temperature, dim=-1)
    p = functional.log_softmax(wide(teacher) / temperature, dim=-1)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * kl.mean()


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, T, V) with the tokens that come next, int64 (B, T), in nats."""
    return functional.cross_entropy(wide(logits).flatten(0, 1), targets.flatten())


def by_chunks(states: Tensor, loss: Callable[[Tensor, int], Tensor], size: int) -> Tensor:
    """A loss that is a sum over tokens, computed with its gradient so many tokens at a time.

    What lies between the states and the loss, such as logits over a large vocabulary, is never held for all tokens.

    Args:
        states: (B, T, D).
        loss: of a part (B, t, D) that begins at a token.
        size: tokens t a part.

    Returns:
        The sum over all parts, from which gradients flow to ``states``.
    """
    total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
    gradients: list[Tensor] = []
    for start in range(0, states.shape[1], size):
        part = states[:, start : start + size].detach().requires_grad_()
        value = loss(part, start)
        # A part may have nothing to say: behind the last token that is predicted.
        gradients += torch.autograd.grad(value, part) if value.requires_grad else [torch.zeros_like(part)]
        total = total + value.detach()
    slope = (states * torch.cat(gradients, dim=1)).sum()
    return total + (slope - slope.detach())


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
