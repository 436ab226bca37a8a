"""The methods that 2SSP is compared with, once more from their definitions, slowly.

As in two_ssp.py nothing is shared with the library and nothing is ever sliced: an FFN goes by zeroing its last linear
(weight and bias), a block by zeroing both its parts. Every trial is a full forward pass in float64.

Source: Gromov et al. 2024 (a window of blocks); Song et al. 2024 (SLEB); Zhong et al. 2024 (BlockPruner); Sun et al.
2024 (Wanda), on neurons rather than weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference.two_ssp import Infeasible, Reference, _at, _matrix

Part = tuple[str, int]  # ("attention", b), ("ffn", b) or ("block", b)
Saved = list[tuple[nn.Parameter, Tensor]]

# The norms that only the attention needs, and those that only the FFN needs.
_LLAMA_NORMS = {"attention": ["input_layernorm"], "ffn": ["post_attention_layernorm"]}
NORMS = {
    **dict.fromkeys(["llama", "mistral", "phi3", "qwen2", "qwen3"], _LLAMA_NORMS),
    "gemma3_text": {
        "attention": ["input_layernorm", "post_attention_layernorm"],
        "ffn": ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
    },
    "opt": {"attention": ["self_attn_layer_norm"], "ffn": ["final_layer_norm"]},
    "gpt2": {"attention": ["ln_1"], "ffn": ["ln_2"]},
}


class Masked(Reference):
    """A reference that can also lose FFNs, have its FFN outputs replaced, and tell what a part weighs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.norms = NORMS[model.config.model_type]

    def last(self, b: int) -> nn.Module:
        module = _at(self.blocks[b], self.names.last)
        assert isinstance(module, nn.Module)
        return module

    def size(self, part: Part) -> int:
        """Parameters of an attention or an FFN of one block, with the norms that only it needs."""
        kind, b = part
        paths = [self.names.attention] if kind == "attention" else [*self.names.first, self.names.last]
        modules = [_at(self.blocks[b], path) for path in [*paths, *self.norms[kind]]]
        return sum(math.prod(p.shape) for module in modules for p in module.parameters())

    @torch.no_grad()
    def zero(self, part: Part) -> Saved:
        """Returns what `restore` needs."""
        kind, b = part
        if kind == "block":
            return [*self.zero(("attention", b)), *self.zero(("ffn", b))]
        if kind == "attention":
            return self.zero_attention(b)
        saved = [(p, p.detach().clone()) for p in self.last(b).parameters()]
        for p, _ in saved:
            p.zero_()
        return saved

    def keep_neurons(self, b: int, kept: Sequence[int]) -> None:
        self.zero_neurons(b, [j for j in range(self.I) if j not in kept])

    def perplexity_of_rows(self, rows: Tensor) -> float:
        """exp of the mean cross-entropy over all predicted tokens of all rows (N, T)."""
        nll, tokens = 0.0, 0
        for row in rows:
            predicted = len(row) - 1
            nll += math.log(self.perplexity(row)) * predicted
            tokens += predicted
        return math.exp(nll / tokens)


@dataclass(frozen=True)
class Removal:
    """One greedy step: what went, and the perplexity without each part that could have gone."""

    part: Part
    tried: dict[Part, float]

    @property
    def perplexity(self) -> float:
        return self.tried[self.part]


def remove_cheapest(masked: Masked, candidates: Iterable[Part], rows: Tensor) -> Removal:
    """Try all candidates, take out the one that leaves the lowest perplexity, the first of equals."""
    tried: dict[Part, float] = {}
    best: Part | None = None
    for part in candidates:
        saved = masked.zero(part)
        tried[part] = masked.perplexity_of_rows(rows)
        masked.restore(saved)
        if best is None or tried[part] < tried[best]:
            best = part
    assert best is not None
    masked.zero(best)
    return Removal(best, tried)


# --- whole blocks --------------------------------------------------------------------------------------------------


def blocks_for(s: float, B: int) -> int:
    """n = ceil(s B), where 0.3 of 30 is 9."""
    n = 0
    while n < s * B - 1e-9:
        n += 1
    if n >= B:
        raise Infeasible("no block would be left")
    return n


@dataclass(frozen=True)
class Window:
    """Similarity of the output of block l and that of block l + n, the blocks removed, and the masked model."""

    similarity: list[float]
    removed: list[int]
    masked: Masked


@torch.no_grad()
def block_outputs(reference: Reference, row: Tensor) -> list[np.ndarray]:
    """What leaves each block, (T, D), before any final norm."""
    seen: list[np.ndarray] = [np.empty(0)] * reference.B
    hooks = []
    for b, block in enumerate(reference.blocks):

        def hook(module: nn.Module, args: Any, output: Any, b: int = b) -> None:
            y = output[0] if isinstance(output, tuple) else output
            seen[b] = y[0].numpy().copy()

        hooks.append(block.register_forward_hook(hook))
    reference.model(input_ids=row[None], use_cache=False)
    for handle in hooks:
        handle.remove()
    return seen


def window(model: Any, rows: Tensor, s: float, *, all_tokens: bool = False) -> Window:
    """Remove the n blocks behind the block l whose output the n-th block after it changes least."""
    masked = Masked(model)
    n = blocks_for(s, masked.B)
    starts = range(masked.B - n)
    total = [0.0 for _ in starts]
    for row in rows:
        outputs = block_outputs(masked, row)
        places = range(len(row)) if all_tokens else [len(row) - 1]
        for l in starts:  # noqa: E741
            for t in places:
                x, y = outputs[l][t], outputs[l + n][t]
                total[l] += x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) / len(places)
    similarity = [value / len(rows) for value in total]
    start = max(starts, key=lambda l: (similarity[l], -l))  # noqa: E741
    removed = [start + k for k in range(1, n + 1)]
    for b in removed:
        masked.zero(("block", b))
    return Window(similarity, removed, masked)


@dataclass(frozen=True)
class Greedy:
    """Parts removed one at a time, and the masked model."""

    removals: list[Removal]
    masked: Masked

    @property
    def parts(self) -> list[Part]:
        return [removal.part for removal in self.removals]

    @property
    def perplexities(self) -> list[float]:
        return [removal.perplexity for removal in self.removals]


def sleb(model: Any, rows: Tensor, s: float, *, first: int = 1) -> Greedy:
    """Remove ceil(s B) blocks, each time the one that the first rows miss least."""
    masked = Masked(model)
    removals: list[Removal] = []
    left: list[Part] = [("block", b) for b in range(masked.B)]
    for _ in range(blocks_for(s, masked.B)):
        removals.append(remove_cheapest(masked, left, rows[:first]))
        left.remove(removals[-1].part)
    return Greedy(removals, masked)


def blockpruner(model: Any, rows: Tensor, s: float, *, first: int = 1) -> Greedy:
    """Remove attentions and FFNs, each time the one that the first rows miss least, until s P_blk has gone."""
    masked = Masked(model)
    left: list[Part] = []
    for b in range(masked.B):
        left += [("attention", b), ("ffn", b)]
    removals: list[Removal] = []
    gone = 0
    while gone < round(s * masked.P_blk):
        attentions = [part for part in left if part[0] == "attention"]
        candidates = [part for part in left if len(attentions) > 1 or part[0] == "ffn"]
        if not candidates:
            raise Infeasible("one attention must stay")
        removals.append(remove_cheapest(masked, candidates, rows[:first]))
        left.remove(removals[-1].part)
        gone += masked.size(removals[-1].part)
    return Greedy(removals, masked)


# --- neurons ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neurons:
    """Score of every neuron, the neurons kept, one array or list per block, and the masked model."""

    scores: list[np.ndarray]
    kept: list[list[int]]
    masked: Masked


def neurons_to_keep(reference: Reference, s: float) -> int:
    """I_keep when the FFNs bear all of s."""
    per_blk = round(round(s * reference.P_blk) / reference.B)
    I_keep = round(reference.I * (1 - per_blk / reference.f))
    if I_keep < 1:
        raise Infeasible("the FFNs are too small")
    return I_keep


def highest(values: np.ndarray, count: int) -> list[int]:
    """Indices of the highest values, the lowest index of equals, in ascending order."""
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))
    return sorted(order[:count])


def _cut(masked: Masked, S: list[np.ndarray], s: float) -> Neurons:
    kept = [highest(S[b], neurons_to_keep(masked, s)) for b in range(masked.B)]
    for b in range(masked.B):
        masked.keep_neurons(b, kept[b])
    return Neurons(S, kept, masked)


@torch.no_grad()
def magnitude(model: Any, s: float) -> Neurons:
    """S_b[j] = the L2 norm of all weights that neuron j has."""
    masked = Masked(model)
    S = []
    for block in masked.blocks:
        squares = np.zeros(masked.I)
        for path in masked.names.first:
            into = _matrix(_at(block, path)).numpy()
            for row in range(into.shape[0]):  # a fused matrix has the row of each neuron twice, I apart
                squares[row % masked.I] += (into[row] ** 2).sum()
        out = _matrix(_at(block, masked.names.last)).numpy()
        for j in range(masked.I):
            squares[j] += (out[:, j] ** 2).sum()
        S.append(np.sqrt(squares))
    return _cut(masked, S, s)


def stacked_neurons(reference: Reference, rows: Tensor) -> list[np.ndarray]:
    """Z of every block, (N * T, I), over all tokens of all rows."""
    by_row = [reference.hidden_neurons(row) for row in rows]
    return [np.concatenate([z[b] for z in by_row]) for b in range(reference.B)]


@torch.no_grad()
def wanda(model: Any, rows: Tensor, s: float) -> Neurons:
    """S_b[j] = sum_i |W[i, j]| * || z_b[:, j] ||, W the last linear."""
    masked = Masked(model)
    S = []
    for b, Z in enumerate(stacked_neurons(masked, rows)):
        W = _matrix(masked.last(b)).numpy()
        S.append(np.array([np.abs(W[:, j]).sum() * math.sqrt((Z[:, j] ** 2).sum()) for j in range(masked.I)]))
    return _cut(masked, S, s)
