"""Pure losses: how far a student's hidden states are from a teacher's. Arithmetic is in fp32 or wider.

Every loss takes (B, T, D) tensors of B rows, T tokens and D channels, and gives one number.
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
