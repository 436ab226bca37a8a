"""What the parameters of a model's blocks are made of while they learn: weights, low-rank pairs, donors.

Blocks are named by the number that they had when the model came, so that a removal renames nothing.

Source: FuseGPT, section 3.2 and equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.decoder import Block, Projection
from compress.lowrank import Graft, GraftedMatrix, GraftedVector
from compress.remote_code import linears, submodule
from compress.spill import Store

Made = dict[int, dict[str, list[int]]]
"""Block -> name of a parameter -> keys of the donors that it carries."""


@dataclass(frozen=True)
class Ranks:
    """How grafts are built.

    Attributes:
        coefficients: rank of the matrices that scale donors; 0: no donors.
        lora: rank of the pair that each linear has of its own; 0: none, and norms and biases stay as they are.
        narrow: what learns is bf16; otherwise fp32, or wider where the model is.
    """

    coefficients: int
    lora: int
    narrow: bool = False


class Grafts:
    """The parameters of a model that learn, block by block.

    Args:
        ranks: how they are built.
        store: where frozen weights and donors lie.
    """

    def __init__(self, ranks: Ranks, store: Store) -> None:
        self.ranks, self.store = ranks, store
        self.blocks: dict[int, dict[str, Graft]] = {}

    def donor(self, block: Block) -> dict[str, Tensor]:
        """What a block can give, as it is now: its matrices (out, in) and their biases, by name.

        A block that carries donors itself gives the sum. It is taken once and shared by all that receive it. Nothing is
        given where there are no donors.
        """
        if not self.ranks.coefficients:
            return {}
        found: dict[str, Tensor] = {}
        for path, module in linears(block.module):
            found[f"{path}.weight"] = self.store.keep(Projection(module).matrix)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                found[f"{path}.bias"] = self.store.keep(bias)
        return found

    def inject(
        self, block: Block, number: int, donor: Mapping[str, Tensor], key: int, generator: torch.Generator
    ) -> list[str]:
        """Give every linear of a block the donor's, scaled by zero for now, and a pair of its own; norms learn.

        Args:
            block: that receives; its own tensors are not touched.
            number: its name.
            donor: from `donor`.
            key: names the donor.
            generator: of the pairs, in the order of the block's modules.

        Returns:
            Names of matrices that have no twin in the donor.

        Source: FuseGPT, equation 3.
        """
        ranks, made, missing = self.ranks, self.blocks.setdefault(number, {}), []
        paths = []
        for path, module in linears(block.module):
            name, matrix = f"{path}.weight", Projection(module).matrix
            paths.append(name)
            twin = donor.get(name)
            if ranks.coefficients and (twin is None or twin.shape != matrix.shape):
                missing.append(name)
                twin = None
            if not ranks.lora and twin is None:
                continue
            graft = self._matrix(module, made, name)
            if ranks.lora and graft.lora is None:
                graft.add_lora(ranks.lora, matrix.device, generator)
            if twin is not None:
                graft.add_donor(twin, key, ranks.coefficients, matrix.device, generator)
                bias = donor.get(f"{path}.bias")
                if bias is not None and getattr(module, "bias", None) is not None:
                    self._vector(block, made, f"{path}.bias").add_donor(bias, key)
        if ranks.lora:
            for name, _ in block.module.named_parameters():
                if name not in paths:
                    self._vector(block, made, name)
        return missing

    def of(self, number: int) -> dict[str, Graft]:
        """The grafts of a block, by the names of its parameters."""
        return self.blocks.get(number, {})

    @torch.no_grad()
    def fold(self, block: Block, number: int) -> None:
        """Put the values of a block's grafts into it, as plain parameters.

        Source: FuseGPT, step 3: a sum in fp32, then the model's dtype.
        """
        for name, graft in self.of(number).items():
            path, _, leaf = name.rpartition(".")
            old = block.module.get_parameter(name)
            new = nn.Parameter(graft.folded().contiguous(), requires_grad=old.requires_grad)
            setattr(submodule(block.module, path), leaf, new)

    def tensors(self) -> tuple[dict[str, Tensor], Made]:
        """All that learnt and all donors, by name, and how to build it again."""
        found: dict[str, Tensor] = {}
        for number, grafts in self.blocks.items():
            for name, graft in grafts.items():
                for label, parameter in graft.named_parameters():
                    found[f"{number}/{name}/{label}"] = parameter.detach().contiguous()
                for key, donor in zip(graft.keys, graft.donors, strict=True):
                    found[f"donor/{key}/{name}"] = donor.contiguous()
        return found, {n: {name: graft.keys for name, graft in grafts.items()} for n, grafts in self.blocks.items()}

    @torch.no_grad()
    def restore(self, blocks: Mapping[int, Block], made: Made, tensor: Callable[[str], Tensor]) -> None:
        """Build again what `tensors` told, on blocks that are as they came, and fold it."""
        donors: dict[str, Tensor] = {}
        for number, names in made.items():
            block, grafts = blocks[number], self.blocks.setdefault(number, {})
            modules = {f"{path}.weight": module for path, module in linears(block.module)}
            for name, keys in names.items():
                device = block.module.get_parameter(name).device
                for label in (f"donor/{key}/{name}" for key in keys):
                    if label not in donors:
                        donors[label] = self.store.keep(tensor(label).to(device))
                if name in modules:
                    matrix = self._matrix(modules[name], grafts, name)
                    if self.ranks.lora:
                        matrix.add_lora(self.ranks.lora, device, None)
                    for key in keys:
                        matrix.add_donor(donors[f"donor/{key}/{name}"], key, self.ranks.coefficients, device, None)
                else:
                    vector = self._vector(block, grafts, name)
                    for key in keys:
                        vector.add_donor(donors[f"donor/{key}/{name}"], key)
                for label, parameter in grafts[name].named_parameters():
                    parameter.copy_(tensor(f"{number}/{name}/{label}"))
            self.fold(block, number)

    def _matrix(self, module: nn.Module, made: dict[str, Graft], name: str) -> GraftedMatrix:
        """The graft of a linear's weight, made if it is not there."""
        if name not in made:
            weight = module.weight
            assert isinstance(weight, Tensor)
            frozen, transposed = self.store.keep(weight), isinstance(module, Conv1D)
            made[name] = GraftedMatrix(frozen, transposed=transposed, dtype=self._learning(weight))
        found = made[name]
        assert isinstance(found, GraftedMatrix)
        return found

    def _vector(self, block: Block, made: dict[str, Graft], name: str) -> GraftedVector:
        """The graft of a bias or a norm parameter, made if it is not there."""
        if name not in made:
            value = block.module.get_parameter(name)
            learns = self.ranks.lora > 0
            # One that does not learn itself is not rounded either.
            dtype = self._learning(value) if learns else torch.promote_types(value.dtype, torch.float32)
            made[name] = GraftedVector(value, dtype=dtype, learns=learns)
        found = made[name]
        assert isinstance(found, GraftedVector)
        return found

    def _learning(self, value: Tensor) -> torch.dtype:
        return torch.bfloat16 if self.ranks.narrow else torch.promote_types(value.dtype, torch.float32)


def coefficients(graft: Graft) -> list[nn.Parameter]:
    """What scales donors."""
    return list(graft.coefficients.parameters())


def base(graft: Graft) -> list[nn.Parameter]:
    """What changes a parameter itself."""
    if isinstance(graft, GraftedVector):
        return [graft.value] if graft.value.requires_grad else []
    return [] if graft.lora is None else list(graft.lora.parameters())
