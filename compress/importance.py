"""What neurons, heads, hidden channels and blocks of a model contribute, from one pass over calibration rows.

Activations of a row are (T, X). They are aggregated over its tokens first, by one rule, and what comes of the rows is
aggregated by another: the order and the rules matter (Minitron, table of aggregators). All sums are in fp32 or wider.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.activations import block_states
from compress.calibration import TokenRows
from compress.decoder import Decoder
from compress.influence import cosines
from compress.losses import wide
from compress.remote_code import submodule
from compress.result import Run

AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(0),
    "l2": lambda x: x.square().sum(0).sqrt(),
    "var": lambda x: x.var(0, unbiased=False),
}
"""From activations (T, X) to (X,), over tokens."""


class Aggregate:
    """Aggregates activations over tokens, then over rows, one row at a time.

    mean: (1 / n) sum |x|; l2: sqrt(sum x^2); var: the population variance.

    Args:
        batch: the rule over rows.
        sequence: the rule over the tokens of a row.

    Source: Minitron, section 2.1.
    """

    def __init__(self, batch: str, sequence: str) -> None:
        self.batch, self._over_tokens = batch, AGGREGATORS[sequence]
        self._rows = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take the activations of one row, (T, X)."""
        value = self._over_tokens(wide(x)).double().cpu()
        self._rows += 1
        self._sum = self._sum + (value.abs() if self.batch == "mean" else value)
        self._squares = self._squares + value.square()

    def value(self) -> Tensor:
        """The aggregate of the rows so far, float64 (X,)."""
        total, squares = torch.as_tensor(self._sum), torch.as_tensor(self._squares)
        if self.batch == "mean":
            return total / self._rows
        if self.batch == "l2":
            return squares.sqrt()
        return (squares / self._rows - (total / self._rows).square()).clamp_min(0)


@dataclass(frozen=True)
class Importance:
    """Scores of everything that can be cut; the higher, the more it matters.

    Attributes:
        neurons: of each block, float64 (F,): of the inputs of its last FFN linear.
        heads: of each block, float64 (H,): of the L2 norm of what each query head gives.
        channels: float64 (D,): of what the norms before attentions and FFNs give, summed over all of them.
        influence: 1 - cosine of what enters and what leaves each block.
    """

    neurons: list[Tensor]
    heads: list[Tensor]
    channels: Tensor
    influence: list[float]


@torch.no_grad()
def importance(decoder: Decoder, calibration: TokenRows, batch: str, sequence: str, run: Run) -> Importance:
    """Score all axes of a model at once.

    Args:
        decoder: the model; every block has an attention and an FFN.
        calibration: rows (N, T); N passes are made, one row at a time.
        batch: rule over rows, a name in `AGGREGATORS`.
        sequence: rule over tokens, likewise.
        run: progress and device.

    Source: Minitron, sections 2.1 and 2.2. Neurons are scored behind the activation, where a gated FFN has what it
        hands on, and not in front of it.
    """
    blocks, heads = decoder.blocks, decoder.heads
    points: list[tuple[nn.Module, bool, Callable[[Tensor], Tensor]]] = []  # module, whether its output, what is scored
    norms = []
    for block in blocks:
        points.append((block.ffn_out.module, False, lambda x: x))
        points.append((block.attention_out.module, False, lambda x: wide(x).view(len(x), heads, -1).norm(dim=-1)))
        norms += [submodule(block.module, path[0]) for path in (block.arch.attention_norms, block.arch.ffn_norms)]
    points += [(norm, True, lambda x: x) for norm in norms]
    aggregates = [Aggregate(batch, sequence) for _ in points]
    similarity = torch.zeros(len(blocks), dtype=torch.float64)
    count = len(calibration.tokens)
    with ExitStack() as stack:
        for (module, output, view), aggregate in zip(points, aggregates, strict=True):
            stack.callback(_watch(module, output, view, aggregate).remove)
        for row in range(count):
            states = block_states(decoder, calibration.batch(slice(row, row + 1), run.device))
            pairs = itertools.pairwise(states)
            similarity += torch.stack([cosines(before, after).mean().cpu() for before, after in pairs])
            run.progress("importance", row + 1, count)
    values = [aggregate.value() for aggregate in aggregates]
    width = 2 * len(blocks)
    channels = torch.stack(values[width:]).sum(0)
    return Importance(values[0:width:2], values[1:width:2], channels, (1 - similarity / count).tolist())


def _watch(module: nn.Module, output: bool, view: Callable[[Tensor], Tensor], aggregate: Aggregate) -> Any:
    """Let an aggregate see what enters or leaves a module."""

    def see(x: Tensor) -> None:
        # Some architectures flatten (1, T, X) to (T, X) before their FFN.
        aggregate.add(view(x.reshape(-1, x.shape[-1])))

    if output:
        return module.register_forward_hook(lambda module, args, out: see(out))
    return module.register_forward_pre_hook(lambda module, args: see(args[0]))


@torch.no_grad()
def kept_energy(decoder: Decoder, calibration: TokenRows, kept: Tensor, run: Run) -> list[tuple[nn.Module, float]]:
    """How large the kept channels are beside all, where a norm reads them.

    Args:
        decoder: the model before it is cut.
        calibration: rows (N, T).
        kept: hidden channels that will stay, int64.
        run: progress and device.

    Returns:
        Every norm over hidden channels with sqrt(mean energy of the kept channels / mean energy of all channels) of
        what enters it. Energy is the mean square over tokens and channels; for a LayerNorm, which subtracts the mean
        of each token's channels, the mean of their variance.
    """
    norms: list[nn.Module] = [
        submodule(block.module, path)
        for block in decoder
        for path in (*block.arch.attention_norms, *block.arch.ffn_norms)
    ]
    norms.append(submodule(decoder.model, decoder.arch.final_norm))
    sums = torch.zeros(len(norms), 2, dtype=torch.float64)

    def see(place: int, x: Tensor) -> None:
        centred = _subtracts_mean(norms[place])
        for side, channels in enumerate((wide(x)[..., kept.to(x.device)], wide(x))):
            energy = channels.var(-1, unbiased=False) if centred else channels.square().mean(-1)
            sums[place, side] += energy.double().sum().cpu()

    def watching(place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(place, args[0])

    count = len(calibration.tokens)
    with ExitStack() as stack:
        for place, norm in enumerate(norms):
            stack.callback(norm.register_forward_pre_hook(watching(place)).remove)
        for row in range(count):
            decoder.model(**calibration.batch(slice(row, row + 1), run.device), use_cache=False)
            run.progress("energy of the kept channels", row + 1, count)
    return [(norm, float((ours / whole).sqrt())) for norm, (ours, whole) in zip(norms, sums, strict=True)]


def _subtracts_mean(norm: nn.Module) -> bool:
    """Whether it is a LayerNorm and no RMSNorm."""
    return isinstance(norm, nn.LayerNorm)
