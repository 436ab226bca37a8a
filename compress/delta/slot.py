"""Deltas in a live model: attach, detach and switch in place, with exact undo.

Taking a sum back by subtraction is not exact in bf16: what a delta overwrites is kept, and put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.delta.checkpoint import TYPES, bits, same_bits
from compress.delta.package import Package
from compress.delta.parallel import in_order
from compress.errors import ConfigError


@dataclass(frozen=True)
class _Patch:
    """What a delta puts into one parameter.

    Attributes:
        parameter: the live one.
        index: int32 or int64 (n,): flat positions; None for all.
        values: what stands there, in the parameter's dtype.
        before: what the base has there.
    """

    parameter: Tensor
    index: Tensor | None
    values: Tensor
    before: Tensor

    def put(self, values: Tensor) -> None:
        """Overwrite the positions."""
        if self.index is None:
            self.parameter.copy_(values)
        else:
            self.parameter.view(-1).index_copy_(0, self.index.long(), values)


@dataclass(frozen=True)
class Prepared:
    """A delta that was checked against a model's base weights, and is ready to be put in.

    Attributes:
        name: of the package's folder.
        id: of the package.
        patches: one for each tensor that it changes.
    """

    name: str
    id: str
    patches: tuple[_Patch, ...]

    @property
    def bytes(self) -> int:
        """Memory that it holds."""
        tensors = [each for p in self.patches for each in (p.index, p.values, p.before) if each is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class DeltaSlot:
    """A model's place for one delta at a time.

    Nothing else may change the weights while the slot is in use, and only one thread may use it. Caches of keys and
    values belong to the weights that computed them: drop them at a switch.

    Attributes:
        model: its weights are those of the base while nothing is attached.
        attached: what is in it; None for the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.attached: Prepared | None = None

    @torch.no_grad()
    def prepare(self, path: Path) -> Prepared:
        """Read a package, and check it against the base, to the last bit of what will come out.

        The model is not touched, and may have another delta attached. The package's files are not needed afterwards.

        Raises:
            ArtifactError: it is no package, or a broken one.
            ConfigError: the model is not its base, or of another dtype, or the package changes its shape.
        """
        package = Package(path)
        live = self.model.state_dict(keep_vars=True)
        undo = {id(patch.parameter): patch for patch in (self.attached.patches if self.attached else ())}
        patches = []
        for name, entry in package.tensors.items():
            if name not in live or tuple(live[name].shape) != entry.shape:
                raise ConfigError(f"{path} changes the model's shape at {name}: use foldaway delta apply")
            parameter = live[name]
            base = parameter.detach().to("cpu", copy=True)
            if id(parameter) in undo:
                _restore(base, undo[id(parameter)])
            other = ConfigError(f"{path} has {name} as {entry.dtype}, and the model has it as {parameter.dtype}")
            if entry.dtype in TYPES and entry.torch_dtype != parameter.dtype:
                raise other  # before its bits are taken for those of another base
            found = package.result(name, base)
            if found.dtype != parameter.dtype:
                raise other
            if not same_bits(found, base):
                changed = (bits(found) != bits(base)).flatten().nonzero().flatten()
                patches.append(_patch(parameter, changed if 4 * len(changed) < found.numel() else None, found, base))
        return Prepared(path.name, package.description.id, tuple(patches))

    @torch.no_grad()
    def switch(self, delta: Prepared | None) -> None:
        """Take out what is attached, bit for bit, and put in another delta; None leaves the base.

        Raises:
            ConfigError: the delta was prepared for another model.
        """
        live = {id(parameter) for parameter in self.model.state_dict(keep_vars=True).values()}
        if delta is not None and any(id(patch.parameter) not in live for patch in delta.patches):
            raise ConfigError(f"{delta.name} was prepared for another model")
        work: dict[int, list[tuple[_Patch, Tensor]]] = {}
        for patch in self.attached.patches if self.attached is not None else ():
            work.setdefault(id(patch.parameter), []).append((patch, patch.before))
        for patch in delta.patches if delta is not None else ():
            work.setdefault(id(patch.parameter), []).append((patch, patch.values))
        for _ in in_order(_overwrite, work.values()):  # one parameter after the other, while it is in the cache
            pass
        self.attached = delta

    def detach(self) -> None:
        """Leave the base, bit for bit."""
        self.switch(None)


def attach(model: nn.Module, path: Path) -> DeltaSlot:
    """Put a delta into a model, which must be its base; the slot takes it out again, or puts others in.

    Raises:
        ArtifactError, ConfigError: as `DeltaSlot.prepare`; the model is not touched then.
    """
    slot = DeltaSlot(model)
    slot.switch(slot.prepare(path))
    return slot


@torch.no_grad()
def _overwrite(work: list[tuple[_Patch, Tensor]]) -> None:
    for patch, values in work:
        patch.put(values)


def _patch(parameter: Tensor, index: Tensor | None, found: Tensor, base: Tensor) -> _Patch:
    device = parameter.device
    if index is None:
        return _Patch(parameter, None, found.clone().to(device), base.to(device))
    values, before = (tensor.contiguous().view(-1)[index].to(device) for tensor in (found, base))
    small = index.to(torch.int32) if parameter.numel() < 1 << 31 else index
    return _Patch(parameter, small.to(device), values, before)


def _restore(base: Tensor, patch: _Patch) -> None:
    """Put what a patch overwrote back into a copy."""
    if patch.index is None:
        base.copy_(patch.before)
    else:
        base.view(-1).index_copy_(0, patch.index.long().cpu(), patch.before.cpu())
