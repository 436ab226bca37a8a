"""2SSP and ShortGPT's block influence once more, from the equations, slowly.

Nothing here is shared with the library. Weights are never sliced: a neuron goes by zeroing the weights that read it, an
attention by zeroing its output projection (weight and bias), a block by handing its input on. Every trial is a full
forward pass in float64, and sums are plain loops.

Source: Sandri, Cunegatti, Iacca 2025 (2SSP); Men et al. 2024 (ShortGPT) as compared there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Infeasible(Exception):
    """The target cannot be met with the number of attentions that the formula gives."""


# --- the balance of the stages -----------------------------------------------------------------------------------


def balance(B: int, I: int, a: int, f: int, P_blk: int, s: float, alpha: float = 1.5) -> tuple[int, int]:  # noqa: E741
    """(N_attn, I_keep) for B blocks of I neurons, attentions of a, FFNs of f and blocks of P_blk parameters in all."""
    N_attn = round(B * s ** ((f / a) / alpha))
    if N_attn * a / P_blk > s:
        raise Infeasible("attention alone exceeds the target")
    if (N_attn * a + B * f) / P_blk < s:
        raise Infeasible("all FFNs and the chosen attentions do not reach the target")
    target = round(s * P_blk)
    per_blk = round((target - N_attn * a) / B)
    return N_attn, round(I * (1 - per_blk / f))


@dataclass(frozen=True)
class Shape:
    """A dense gated decoder (llama, mistral, phi3, qwen2, qwen3) as far as parameters go."""

    B: int
    D: int
    I: int  # noqa: E741
    H: int
    K: int
    d: int
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def a(self) -> int:
        q, kv = self.H * self.d, self.K * self.d
        matrices = self.D * q + 2 * self.D * kv + q * self.D
        return matrices + (q + 2 * kv if self.qkv_bias else 0) + (2 * self.d if self.qk_norm else 0)

    @property
    def f(self) -> int:
        return 3 * self.D * self.I

    @property
    def P_blk(self) -> int:  # noqa: N802
        return self.B * (self.a + self.f + 2 * self.D)  # two norms a block


# --- where a stock model keeps what the equations speak of ---------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Attribute paths of one architecture."""

    blocks: str
    attention: str
    attention_out: str
    ffn: str  # "gated", "gate over up" or "plain"
    first: tuple[str, ...]
    last: str
    activation: str


LLAMA = Names(
    "model.layers",
    "self_attn",
    "self_attn.o_proj",
    "gated",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    "hidden_act",
)
NAMES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": Names(**{**vars(LLAMA), "activation": "hidden_activation"}),
    "phi3": Names(**{**vars(LLAMA), "ffn": "gate over up", "first": ("mlp.gate_up_proj",)}),
    "opt": Names(
        "model.decoder.layers", "self_attn", "self_attn.out_proj", "plain", ("fc1",), "fc2", "activation_function"
    ),
    "gpt2": Names("transformer.h", "attn", "attn.c_proj", "plain", ("mlp.c_fc",), "mlp.c_proj", "activation_function"),
}


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _is_conv(module: nn.Module) -> bool:
    """gpt2 stores its matrices the other way round: (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def _matrix(module: nn.Module) -> Tensor:
    return module.weight.T if _is_conv(module) else module.weight  # (outputs, inputs)


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    y = x @ _matrix(module).T
    return y if module.bias is None else y + module.bias


class Reference:
    """A float64 copy of a stock model, with a mask over its neurons, attentions and blocks."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.names = NAMES[model.config.model_type]
        self.blocks = list(_at(self.model, self.names.blocks))
        self.act = ACT2FN[getattr(model.config, self.names.activation)]

    # counts, from shapes

    @property
    def B(self) -> int:  # noqa: N802
        return len(self.blocks)

    @property
    def I(self) -> int:  # noqa: E743, N802
        return int(_matrix(_at(self.blocks[0], self.names.last)).shape[1])

    @property
    def a(self) -> int:
        return sum(math.prod(p.shape) for p in _at(self.blocks[0], self.names.attention).parameters())

    @property
    def f(self) -> int:
        parts = [_at(self.blocks[0], path) for path in (*self.names.first, self.names.last)]
        return sum(math.prod(p.shape) for part in parts for p in part.parameters())

    @property
    def P_blk(self) -> int:  # noqa: N802
        return sum(math.prod(p.shape) for block in self.blocks for p in block.parameters())

    # what is computed

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> np.ndarray:
        """(N, T, V), one row at a time."""
        return np.stack([self.model(input_ids=row[None], use_cache=False).logits[0].numpy() for row in tokens])

    def perplexity(self, row: Tensor) -> float:
        """exp of the mean cross-entropy of the T - 1 predicted tokens of one row (T,)."""
        logits = self.logits(row[None])[0]
        nll = 0.0
        for t in range(len(row) - 1):
            x = logits[t] - logits[t].max()
            nll -= x[row[t + 1]] - math.log(np.exp(x).sum())
        return math.exp(nll / (len(row) - 1))

    @torch.no_grad()
    def hidden_neurons(self, row: Tensor) -> list[np.ndarray]:
        """z of every block, (T, I): the activation of the gate times the up projection, from what enters the FFN."""
        entering: list[Tensor] = [torch.empty(0)] * self.B
        hooks = []
        for b, block in enumerate(self.blocks):

            def hook(module: nn.Module, args: tuple[Tensor, ...], b: int = b) -> None:
                entering[b] = args[0].reshape(len(row), -1)

            hooks.append(_at(block, self.names.first[0]).register_forward_pre_hook(hook))
        self.model(input_ids=row[None], use_cache=False)
        for handle in hooks:
            handle.remove()
        return [self._z(block, x).numpy() for block, x in zip(self.blocks, entering, strict=True)]

    def _z(self, block: nn.Module, x: Tensor) -> Tensor:
        first = [_at(block, path) for path in self.names.first]
        if self.names.ffn == "gated":
            return self.act(_apply(first[0], x)) * _apply(first[1], x)
        y = _apply(first[0], x)
        if self.names.ffn == "plain":
            return self.act(y)
        half = y.shape[1] // 2
        return self.act(y[:, :half]) * y[:, half:]

    # masks

    @torch.no_grad()
    def zero_neurons(self, b: int, gone: Sequence[int]) -> None:
        last = _at(self.blocks[b], self.names.last)
        for j in gone:
            if _is_conv(last):
                last.weight[j, :] = 0
            else:
                last.weight[:, j] = 0

    @torch.no_grad()
    def zero_attention(self, b: int) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns what `restore` needs."""
        out = _at(self.blocks[b], self.names.attention_out)
        saved = [(p, p.detach().clone()) for p in out.parameters()]
        for p, _ in saved:
            p.zero_()
        return saved

    @torch.no_grad()
    def restore(self, saved: list[tuple[nn.Parameter, Tensor]]) -> None:
        for p, values in saved:
            p.copy_(values)

    def skip_block(self, b: int) -> None:
        def hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        self.blocks[b].register_forward_hook(hand_on, with_kwargs=True)


# --- 2SSP ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoSSP:
    """All that 2SSP decides on the way, and the masked model at its end."""

    N_attn: int
    I_keep: int
    scores: list[np.ndarray]
    kept: list[list[int]]
    trials: list[dict[int, float]]
    removed: list[int]
    masked: Reference


def scores(reference: Reference, rows: Tensor, norm: str = "l2") -> list[np.ndarray]:
    """S_b[j] = (1 / N) sum_c || z_b^c[:, j] ||, one array (I,) per block, all from the dense model."""
    total = [np.zeros(reference.I) for _ in range(reference.B)]
    for row in rows:
        for b, z in enumerate(reference.hidden_neurons(row)):
            for j in range(reference.I):
                total[b][j] += np.abs(z[:, j]).sum() if norm == "l1" else math.sqrt((z[:, j] ** 2).sum())
    return [t / len(rows) for t in total]


def two_ssp(model: Any, rows: Tensor, s: float, alpha: float = 1.5, norm: str = "l2") -> TwoSSP:
    """Both stages on a stock model, with calibration tokens (N, T); stage 2 looks at the first row only."""
    masked = Reference(model)
    N_attn, I_keep = balance(masked.B, masked.I, masked.a, masked.f, masked.P_blk, s, alpha)

    S = scores(masked, rows, norm)
    kept = [sorted(sorted(range(masked.I), key=lambda j: (-S[b][j], j))[:I_keep]) for b in range(masked.B)]
    for b in range(masked.B):
        masked.zero_neurons(b, [j for j in range(masked.I) if j not in kept[b]])

    removed: list[int] = []
    trials: list[dict[int, float]] = []
    for _ in range(N_attn):
        tried: dict[int, float] = {}
        best = -1
        for b in range(masked.B):
            if b in removed:
                continue
            saved = masked.zero_attention(b)
            tried[b] = masked.perplexity(rows[0])
            masked.restore(saved)
            if best < 0 or tried[b] < tried[best]:
                best = b
        masked.zero_attention(best)
        removed.append(best)
        trials.append(tried)
    return TwoSSP(N_attn, I_keep, S, kept, trials, removed, masked)


# --- ShortGPT --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShortGPT:
    """The influence of each block, the blocks removed from the least influential up, and the masked model."""

    influence: list[float]
    removed: list[int]
    masked: Reference


@torch.no_grad()
def influence(reference: Reference, rows: Tensor, *, all_tokens: bool = False) -> list[float]:
    """1 - cos(what enters the block, what leaves it): at the last token, or the mean over tokens; mean over rows."""
    seen: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0), np.empty(0))] * reference.B
    hooks = []
    for b, block in enumerate(reference.blocks):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, b: int = b) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            seen[b] = (x[0].numpy().copy(), y[0].numpy().copy())

        hooks.append(block.register_forward_hook(hook, with_kwargs=True))
    total = [0.0] * reference.B
    for row in rows:
        reference.model(input_ids=row[None], use_cache=False)
        for b, (x, y) in enumerate(seen):
            places = range(len(row)) if all_tokens else [len(row) - 1]
            cosines = [x[t] @ y[t] / (np.linalg.norm(x[t]) * np.linalg.norm(y[t])) for t in places]
            total[b] += 1 - sum(cosines) / len(cosines)
    for handle in hooks:
        handle.remove()
    return [t / len(rows) for t in total]


def shortgpt(model: Any, rows: Tensor, s: float, *, all_tokens: bool = False) -> ShortGPT:
    """Remove ceil(s B) blocks, s rounded up to the next multiple of 1 / B; block 0 is never a candidate."""
    masked = Reference(model)
    found = influence(masked, rows, all_tokens=all_tokens)
    count = 0
    while count / masked.B < s - 1e-12:
        count += 1
    removed = sorted(range(1, masked.B), key=lambda b: (found[b], b))[:count]
    for b in removed:
        masked.skip_block(b)
    return ShortGPT(found, removed, masked)
