"""Minitron's scores, ranking and trimming once more, from the equations, slowly.

Nothing here is shared with the library. No weight is ever sliced: every number comes from whole passes of the stock
model at its full size, in float64, with hooks that leave out what was cut. A block hands on what enters it, neurons and
heads are zero where the last linear reads them, hidden channels are zero wherever something writes them, and each norm
is written out and takes its statistic over the channels that are left.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (arXiv 2407.14679),
sections 2.1 to 2.3; Sreenivas et al. 2024 (arXiv 2408.11796) for contiguous runs of blocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


class Infeasible(Exception):
    """Fewer than half of the heads stay, which leaves nothing that the others could be paired with."""


@dataclass(frozen=True)
class Settings:
    """What a run is told; None is the size that the model has."""

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    batch_aggregator: str = "l2"
    sequence_aggregator: str = "mean"
    depth_ranking: str = "block_influence"
    contiguous: bool = False
    scoring_rows: int | None = None
    rounds: int = 1
    head_residual: bool = False
    norm_compensation: bool = False


# --- where a stock model keeps what the equations speak of -----------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Attribute paths of one architecture; those of embeddings and of the final norm start at the model."""

    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    norm_before_attention: str = "input_layernorm"
    norm_before_ffn: str = "post_attention_layernorm"
    other_norms: tuple[str, ...] = ()
    queries: str = "self_attn.q_proj"  # or what has the queries in its first rows
    attention_out: str = "self_attn.o_proj"
    ffn_out: str = "mlp.down_proj"


NAMES = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], Names()),
    "gemma3_text": Names(
        norm_before_ffn="pre_feedforward_layernorm",
        other_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "phi3": Names(queries="self_attn.qkv_proj"),
    "opt": Names(
        blocks="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        norm_before_attention="self_attn_layer_norm",
        norm_before_ffn="final_layer_norm",
        attention_out="self_attn.out_proj",
        ffn_out="fc2",
    ),
    "gpt2": Names(
        blocks="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        final_norm="transformer.ln_f",
        norm_before_attention="ln_1",
        norm_before_ffn="ln_2",
        queries="attn.c_attn",
        attention_out="attn.c_proj",
        ffn_out="mlp.c_proj",
    ),
}


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


# --- aggregators -----------------------------------------------------------------------------------------------------


def aggregate(x: Array, how: str) -> Array:
    """One value for each column of x (n, X)."""
    n = len(x)
    if how == "mean":
        return sum(abs(x[k]) for k in range(n)) / n
    if how == "l2":
        return np.sqrt(sum(x[k] ** 2 for k in range(n)))
    assert how == "var"
    mean = sum(x[k] for k in range(n)) / n
    return sum((x[k] - mean) ** 2 for k in range(n)) / n


def importance(rows: Sequence[Array], batch: str, sequence: str) -> Array:
    """(X,) from one x (T, X) for each row: over its T tokens first, over the rows after that."""
    return aggregate(np.stack([aggregate(x, sequence) for x in rows]), batch)


def highest(scores: dict[int, float], count: int) -> list[int]:
    """The names of the highest scores, in the order of their scores; of equal ones the lowest name first."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:count]


# --- a model of which only some parts count --------------------------------------------------------------------------


@dataclass
class Seen:
    """What went through each place in one pass of one row; keys are blocks, norms have names."""

    entered: dict[int, Array] = field(default_factory=dict)  # (T, D)
    left: dict[int, Array] = field(default_factory=dict)  # (T, D)
    heads: dict[int, Array] = field(default_factory=dict)  # (T, H head_dim), before the output projection
    neurons: dict[int, Array] = field(default_factory=dict)  # (T, F)
    norm_in: dict[str, Array] = field(default_factory=dict)  # (T, D)
    norm_out: dict[str, Array] = field(default_factory=dict)  # (T, D)
    logits: Array = field(default_factory=lambda: np.empty(0))  # (T, V)


class Masked:
    """A float64 copy of a stock model at its full size, and which of its parts are left.

    Attributes:
        blocks: that are left.
        channels: hidden channels that are left.
        neurons: that are left, for each block of the stock model, whether it is left or not.
        heads: query heads that are left, likewise.
        scale: of each norm: what its weight is multiplied with.
    """

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        config = model.config
        self.names = NAMES[config.model_type]
        self.modules = list(_at(self.model, self.names.blocks))
        self.L, self.D, self.H = len(self.modules), config.hidden_size, config.num_attention_heads
        self.K = self.H if config.model_type in ("opt", "gpt2") else config.num_key_value_heads
        last = _at(self.modules[0], self.names.ffn_out).weight
        self.F = last.shape[0] if config.model_type == "gpt2" else last.shape[1]
        out = _at(self.modules[0], self.names.attention_out).weight
        self.head_dim = (out.shape[0] if config.model_type == "gpt2" else out.shape[1]) // self.H

        self.blocks = list(range(self.L))
        self.channels = list(range(self.D))
        self.neurons = [list(range(self.F)) for _ in range(self.L)]
        self.heads = [list(range(self.H)) for _ in range(self.L)]
        self.norms = {"final": _at(self.model, self.names.final_norm)}
        own = (self.names.norm_before_attention, self.names.norm_before_ffn, *self.names.other_norms)
        for b, module in enumerate(self.modules):
            self.norms |= {f"{b} {path}": _at(module, path) for path in own}
        self.scale = dict.fromkeys(self.norms, 1.0)
        self.seen = Seen()
        self._hook()

    # hooks

    def _hook(self) -> None:
        for path in self.names.embeddings:
            _at(self.model, path).register_forward_hook(lambda module, args, output: self._only_channels(output))
        for name, norm in self.norms.items():
            norm.register_forward_hook(self._norm_hook(name))
        for b, module in enumerate(self.modules):
            module.register_forward_hook(self._block_hook(b), with_kwargs=True)
            for path, hook in (
                (self.names.attention_out, self._heads_hook(b)),
                (self.names.ffn_out, self._neurons_hook(b)),
            ):
                linear = _at(module, path)
                linear.register_forward_pre_hook(hook)
                linear.register_forward_hook(lambda module, args, output: self._only_channels(output))

    def _only_channels(self, x: Tensor) -> Tensor:
        return x * _ones(self.D, self.channels)

    def _block_hook(self, b: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            if b not in self.blocks:
                y = x
            self.seen.entered[b], self.seen.left[b] = _rows(x), _rows(y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _heads_hook(self, b: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            self.seen.heads[b] = _rows(args[0])
            places = [h * self.head_dim + k for h in self.heads[b] for k in range(self.head_dim)]
            return args[0] * _ones(args[0].shape[-1], places)

        return hook

    def _neurons_hook(self, b: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            self.seen.neurons[b] = _rows(args[0])
            return args[0] * _ones(self.F, self.neurons[b])

        return hook

    def _norm_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            y = self._norm(name, args[0])
            self.seen.norm_in[name], self.seen.norm_out[name] = _rows(args[0]), _rows(y)
            return y

        return hook

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The norm's own equation on the channels that are left; the others are zero."""
        module, kind, C = self.norms[name], type(self.norms[name]).__name__, self.channels
        w, x = module.weight[C] * self.scale[name], x[..., C]
        if kind == "Gemma3RMSNorm":
            stored = (1 + module.weight[C]) * self.scale[name] - 1
            w = 1 + stored.float()
        if kind == "LayerNorm":
            x = x - x.mean(-1, keepdim=True)
        else:
            x = x.float()  # as stock RMSNorms do, whatever the model is in
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        x = x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps)
        inside = (w * x).double()
        if kind == "LayerNorm":
            inside = inside + module.bias[C]
        y = torch.zeros(*inside.shape[:-1], self.D, dtype=torch.float64)
        y[..., C] = inside
        return y

    # what is computed

    @torch.no_grad()
    def run(self, row: Tensor) -> Seen:
        """One row (T,)."""
        self.seen = Seen()
        logits = self.model(input_ids=row[None], use_cache=False).logits
        self.seen.logits = logits[0].numpy()
        return self.seen

    def logits(self, tokens: Tensor) -> Array:
        """(N, T, V)."""
        return np.stack([self.run(row).logits for row in tokens])

    @contextmanager
    def without(self, blocks: Sequence[int]) -> Iterator[None]:
        """Some blocks are left out for a while."""
        before = self.blocks
        self.blocks = [b for b in before if b not in blocks]
        yield
        self.blocks = before


def _rows(x: Tensor) -> Array:
    return x.detach().reshape(-1, x.shape[-1]).numpy().copy()  # of one row; opt's FFN has no batch dimension


def _ones(size: int, places: Sequence[int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.float64)
    mask[list(places)] = 1
    return mask


# --- importance ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """All scores of one pass over the rows, of what is left."""

    neurons: dict[int, dict[int, float]]  # block -> neuron -> score
    heads: dict[int, dict[int, float]]
    channels: dict[int, float]


def score(masked: Masked, passes: Sequence[Seen], batch: str, sequence: str) -> Scores:
    """Scores of neurons, heads and hidden channels, from a pass of each row."""
    neurons: dict[int, dict[int, float]] = {}
    heads: dict[int, dict[int, float]] = {}
    channels = np.zeros(masked.D)
    for b in masked.blocks:
        F_neuron = importance([seen.neurons[b] for seen in passes], batch, sequence)
        neurons[b] = {i: F_neuron[i] for i in masked.neurons[b]}
        lengths = []
        for seen in passes:
            split = seen.heads[b].reshape(-1, masked.H, masked.head_dim)
            lengths.append(np.sqrt((split**2).sum(2)))  # (T, H)
        F_head = importance(lengths, batch, sequence)
        heads[b] = {h: F_head[h] for h in masked.heads[b]}
        for path in (masked.names.norm_before_attention, masked.names.norm_before_ffn):
            channels = channels + importance([seen.norm_out[f"{b} {path}"] for seen in passes], batch, sequence)
    return Scores(neurons, heads, {i: channels[i] for i in masked.channels})


def cosine(x: Array, y: Array) -> float:
    """Mean over tokens."""
    found = [x[t] @ y[t] / (np.linalg.norm(x[t]) * np.linalg.norm(y[t])) for t in range(len(x))]
    return float(sum(found) / len(found))


def cross_entropy(logits: Array, row: Tensor) -> float:
    """The next token's, mean over the T - 1 tokens that are predicted."""
    total = 0.0
    for t in range(len(row) - 1):
        x = logits[t] - logits[t].max()
        total -= x[row[t + 1]] - math.log(np.exp(x).sum())
    return total / (len(row) - 1)


def influence(masked: Masked, rows: Tensor, passes: Sequence[Seen], run: Sequence[int]) -> float:
    """1 - cos(what enters the first of the blocks, what leaves the last)."""
    cosines = [cosine(seen.entered[run[0]], seen.left[run[-1]]) for seen in passes]
    return 1 - sum(cosines) / len(cosines)


def macro_influence(masked: Masked, rows: Tensor, passes: Sequence[Seen], run: Sequence[int]) -> float:
    """1 - cos(what leaves the last block of the model, the same without the blocks)."""
    cosines, last = [], masked.L - 1
    with masked.without(run):
        for row, whole in zip(rows, passes, strict=True):
            cosines.append(cosine(whole.left[last], masked.run(row).left[last]))
    return 1 - sum(cosines) / len(cosines)


def loss_without(masked: Masked, rows: Tensor, passes: Sequence[Seen], run: Sequence[int]) -> float:
    """The mean cross-entropy without the blocks."""
    with masked.without(run):
        losses = [cross_entropy(masked.run(row).logits, row) for row in rows]
    return sum(losses) / len(losses)


RANKINGS: dict[str, Callable[[Masked, Tensor, Sequence[Seen], Sequence[int]], float]] = {
    "block_influence": influence,
    "macro_influence": macro_influence,
    "loss": loss_without,
}


def blocks_to_remove(masked: Masked, rows: Tensor, passes: Sequence[Seen], count: int, s: Settings) -> list[int]:
    """The blocks of the lowest scores, or the run of consecutive blocks of the lowest score."""
    if count == 0:
        return []
    rows, passes, left = rows[: s.scoring_rows], passes[: s.scoring_rows], masked.blocks
    length = count if s.contiguous else 1
    runs = [left[start : start + length] for start in range(len(left) - length + 1)]
    scores = {run[0]: RANKINGS[s.depth_ranking](masked, rows, passes, run) for run in runs}
    runs.sort(key=lambda run: (scores[run[0]], run[0]))
    return sorted(b for run in runs[: count // length] for b in run)


# --- trimming --------------------------------------------------------------------------------------------------------


def groups(masked: Masked, heads: Sequence[int]) -> list[list[int]]:
    """Query heads that are ranked among themselves: those of a KV head, or all where each has K and V of its own."""
    if masked.H == masked.K:
        return [list(heads)]
    size = masked.H // masked.K
    return [[h for h in heads if g * size <= h < (g + 1) * size] for g in range(masked.K)]


@torch.no_grad()
def add_residual(masked: Masked, b: int, ranked: Sequence[int], K: int) -> None:
    """head_i += head_i - head_{2K - i + 1} for i = 2K - L + 1 .. K, of heads 1 .. L in the order of importance."""
    L, linear, d = len(ranked), _at(masked.modules[b], masked.names.queries), masked.head_dim
    if 2 * K < L:
        raise Infeasible(f"{K} of {L} heads")
    W = linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight  # (outputs, inputs), a view
    tensors = [W] if linear.bias is None else [W, linear.bias]
    for x in tensors:
        old = x.clone()
        for i in range(2 * K - L + 1, K + 1):
            one, other = ranked[i - 1], ranked[2 * K - i + 1 - 1]
            x[one * d : (one + 1) * d] = 2 * old[one * d : (one + 1) * d] - old[other * d : (other + 1) * d]


def energies(masked: Masked, passes: Sequence[Seen], channels: Sequence[int]) -> dict[str, float]:
    """Mean square of what enters each norm, over some channels; a LayerNorm's without their mean."""
    total = dict.fromkeys(masked.norms, 0.0)
    for seen in passes:
        for name, norm in masked.norms.items():
            if name != "final" and int(name.split()[0]) not in masked.blocks:
                continue
            x = seen.norm_in[name][:, channels]
            if type(norm).__name__ == "LayerNorm":
                x = x - x.mean(1, keepdims=True)
            total[name] += float((x**2).mean()) / len(passes)
    return total


def sizes_of_round(start: Sequence[int], target: Sequence[int], i: int, T: int, K: int) -> list[int]:
    """d_s - (i + 1)(d_s - d_t) / T of each size, rounded; heads up to a multiple of K. Order of the settings."""
    sizes = [s - round((i + 1) * (s - t) / T) for s, t in zip(start, target, strict=True)]
    sizes[3] = math.ceil(sizes[3] / K) * K
    return sizes


def minitron(model: Any, rows: Tensor, s: Settings) -> Masked:
    """Score, rank and trim, once or in rounds; calibration tokens (N, T)."""
    masked = Masked(model)
    start = [masked.L, masked.D, masked.F, masked.H]
    wanted = [s.num_hidden_layers, s.hidden_size, s.intermediate_size, s.num_attention_heads]
    target = [has if size is None else size for has, size in zip(start, wanted, strict=True)]
    unit = 1 if masked.H == masked.K else masked.K
    for i in range(s.rounds):
        L, D, F, H = sizes_of_round(start, target, i, s.rounds, unit)
        passes = [masked.run(row) for row in rows]
        scores = score(masked, passes, s.batch_aggregator, s.sequence_aggregator)
        gone = blocks_to_remove(masked, rows, passes, len(masked.blocks) - L, s)
        channels = sorted(highest(scores.channels, D))
        if s.norm_compensation and len(masked.channels) > D:
            before, after = energies(masked, passes, masked.channels), energies(masked, passes, channels)
            for name in masked.scale:
                if before[name] > 0:
                    masked.scale[name] *= math.sqrt(after[name] / before[name])
        for b in masked.blocks:
            masked.neurons[b] = sorted(highest(scores.neurons[b], F))
            kept = []
            for group in groups(masked, masked.heads[b]):
                ranked = highest({h: scores.heads[b][h] for h in group}, len(group))
                count = H * len(group) // len(masked.heads[b])
                if s.head_residual:
                    add_residual(masked, b, ranked, count)
                kept += ranked[:count]
            masked.heads[b] = sorted(kept)
        masked.channels = channels
        masked.blocks = [b for b in masked.blocks if b not in gone]
    return masked


def removed(masked: Masked) -> list[int]:
    """Blocks that are gone."""
    return [b for b in range(masked.L) if b not in masked.blocks]
