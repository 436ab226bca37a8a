"""Low-rank pairs on the parameters of a block, and what a parameter is worth with them.

The model itself always holds plain tensors. While it learns, its forward pass is called with the values of these
modules in their places (``torch.func.functional_call``); afterwards the values are put into it, and that is all there
is to folding.

Source: FuseGPT, equations 3 and 4; LoRA, Hu et al. 2021, for the additive pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A matrix of low rank, ``left @ right``, which is zero at first.

    Args:
        outputs: rows of the matrix.
        inputs: its columns.
        rank: of the matrix.
        dtype: of both factors, which learn.
        device: where they lie.
        generator: of the CPU; ``right`` is drawn from U(-1/sqrt(inputs), 1/sqrt(inputs)), Kaiming's rule with
            a = sqrt(5). None leaves it empty, to be loaded.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        right, bound = torch.empty(rank, inputs), 1 / math.sqrt(inputs)
        if generator is not None:
            right.uniform_(-bound, bound, generator=generator)
        self.left = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))
        self.right = nn.Parameter(right.to(device, dtype))

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix (outputs, inputs), multiplied in a dtype; None: in that of the factors."""
        return self.left.to(dtype=dtype) @ self.right.to(dtype=dtype)


class GraftedMatrix(nn.Module):
    """A frozen weight, with an additive pair of its own and donors that are scaled elementwise and added.

        W + B A + sum_k (U_k V_k) * D_k

    Attributes:
        frozen: W as it is stored; not a parameter.
        transposed: whether W is stored as (in, out).
        dtype: of what learns.
        lora: B A, or None.
        coefficients: U_k V_k, one for each donor.
        donors: D_k (out, in), shared among the survivors that carry it.
        keys: names each donor, so that it can be stored once.
    """

    def __init__(self, frozen: Tensor, *, transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen, self.transposed, self.dtype = frozen.detach(), transposed, dtype
        self.lora: LowRank | None = None
        self.coefficients = nn.ModuleList()
        self.donors: list[Tensor] = []
        self.keys: list[int] = []

    def add_lora(self, rank: int, device: torch.device, generator: torch.Generator | None) -> None:
        """Add the additive pair."""
        self.lora = self._pair(rank, device, generator)

    def add_donor(
        self, donor: Tensor, key: int, rank: int, device: torch.device, generator: torch.Generator | None
    ) -> None:
        """Add a donor (out, in), scaled by zero for now."""
        self.coefficients.append(self._pair(rank, device, generator))
        self.donors.append(donor)
        self.keys.append(key)

    def _pair(self, rank: int, device: torch.device, generator: torch.Generator | None) -> LowRank:
        outputs, inputs = self.frozen.T.shape if self.transposed else self.frozen.shape
        return LowRank(outputs, inputs, rank, dtype=self.dtype, device=device, generator=generator)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it is stored, in the dtype that it is stored in.

        The sum is taken in a dtype; None: in the widest of what learns, what is frozen and what is given.
        """
        frozen = self.frozen.T if self.transposed else self.frozen
        device = next(self.parameters()).device
        value = frozen.to(device=device, dtype=dtype)
        if self.lora is not None:
            value = value + self.lora(dtype)
        for pair, donor in zip(self.coefficients, self.donors, strict=True):
            value = value + pair(dtype) * donor.to(device)
        value = value.to(self.frozen.dtype)
        return value.T if self.transposed else value

    def folded(self) -> Tensor:
        """The weight with its sum taken in fp32 or wider, whatever learns."""
        return self.forward(torch.promote_types(self.frozen.dtype, torch.float32))


class GraftedVector(nn.Module):
    """A bias or a norm weight: it can learn itself, and donors of a bias are scaled elementwise and added.

        b + sum_k c_k * d_k

    Attributes:
        value: b, in the dtype of what learns.
        stored: the dtype of the parameter that it stands for.
        coefficients: c_k, zero at first, one for each donor.
        donors: d_k, of the same shape.
        keys: names each donor.
    """

    def __init__(self, value: Tensor, *, dtype: torch.dtype, learns: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=learns)
        self.stored = value.dtype
        self.coefficients = nn.ParameterList()
        self.donors: list[Tensor] = []
        self.keys: list[int] = []

    def add_donor(self, donor: Tensor, key: int) -> None:
        """Add a donor, scaled by zero for now."""
        self.coefficients.append(nn.Parameter(torch.zeros_like(self.value)))
        self.donors.append(donor)
        self.keys.append(key)

    def forward(self) -> Tensor:
        """The parameter, in the dtype that it is stored in."""
        value: Tensor = self.value
        for scale, donor in zip(self.coefficients, self.donors, strict=True):
            value = value + scale * donor.to(value.device)
        return value.to(self.stored)

    def folded(self) -> Tensor:
        """The same: nothing is multiplied here that a wider sum would help."""
        return self.forward()


Graft = GraftedMatrix | GraftedVector
