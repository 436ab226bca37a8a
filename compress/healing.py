"""What learns while a whole model heals: low-rank pairs beside its matrices, its norms and its biases.

Source: FoldGPT, distillation fine-tuning; LoRA, Hu et al. 2021, for the pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.decoder import Decoder, Projection
from compress.lowrank import GraftedVector, LowRank
from compress.remote_code import linears, merged, submodule


class Healing:
    """What learns while a model heals: each distinct parameter once, however many blocks use it.

    Attributes:
        pairs: each linear -> the pair that is added to it; linears that share a matrix have one in common.
        low_rank: pairs and adapters.
        direct: norms and biases.
    """

    def __init__(self, decoder: Decoder, rank: int, generator: torch.Generator) -> None:
        self.decoder = decoder
        self.pairs: dict[nn.Module, LowRank] = {}
        self.low_rank: list[nn.Parameter] = []
        self.direct: list[nn.Parameter] = []
        self._values: dict[str, GraftedVector] = {}
        self._users: dict[LowRank, list[Any]] = {}
        matrices: dict[int, LowRank] = {}
        for block in decoder:
            for _, module in linears(block.module):
                if rank:
                    key = id(module.weight)
                    if key not in matrices:
                        matrices[key] = _pair(module, rank, generator)
                    self.pairs[module] = matrices[key]
                    self._users.setdefault(matrices[key], []).append(module)
        self.low_rank += [parameter for pair in matrices.values() for parameter in pair.parameters()]
        weights = {id(module.weight) for block in decoder for _, module in linears(block.module)}
        for name, parameter in decoder.block_list.named_parameters():  # each distinct one once
            if id(parameter) in weights:
                continue
            wide = torch.promote_types(parameter.dtype, torch.float32)
            vector = GraftedVector(parameter, dtype=wide, learns=True)
            self._values[f"{decoder.arch.blocks}.{name}"] = vector
            (self.low_rank if ".lora_" in name else self.direct).append(vector.value)

    def values(self) -> dict[str, Tensor]:
        """The parameters that learn directly, by their names in the model, to compute with."""
        return {name: vector() for name, vector in self._values.items()}

    @torch.no_grad()
    def fold(self) -> None:
        """Put what was learnt into the model: pairs are merged into their matrices, and every user gets the new one."""
        for pair, modules in self._users.items():
            weight = merged(modules[0], pair.left, pair.right)
            for module in modules:
                module.weight = weight
        twins = dict[int, list[str]]()
        for name, parameter in self.decoder.block_list.named_parameters(remove_duplicate=False):
            twins.setdefault(id(parameter), []).append(name)
        for name, vector in self._values.items():
            old = self.decoder.model.get_parameter(name)
            new = nn.Parameter(vector(), requires_grad=old.requires_grad)
            for twin in twins[id(old)]:
                path, _, leaf = twin.rpartition(".")
                setattr(submodule(self.decoder.block_list, path), leaf, new)


def _pair(module: Any, rank: int, generator: torch.Generator) -> LowRank:
    matrix = Projection(module).matrix
    wide = torch.promote_types(matrix.dtype, torch.float32)
    outputs, inputs = matrix.shape
    return LowRank(outputs, inputs, rank, dtype=wide, device=matrix.device, generator=generator)
