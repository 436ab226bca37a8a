"""FuseGPT once more, from the equations, slowly.

Nothing here is shared with the library. No module is ever changed or swapped: a block is a stock module that is called
with the weights that the equations give (W + B A + sum_k (U_k V_k) (*) D_k, worked out anew at every pass), a model is
a Python list of such blocks, and removing one takes it off the list. Every score is the outcome of full passes, one row
after the other, and a loop over tokens. Adam and its schedule are written out. All in float64; only random draws are
made in float32.

Source: Pei et al. 2024, "FuseGPT" (arXiv 2411.14507), and ShortGPT's block influence as compared there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

# Where a stock model keeps its blocks, and the norm behind the last of them.
_LLAMA = ("model.layers", "model.norm")
PLACES = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"], _LLAMA),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "gpt2": ("transformer.h", "transformer.ln_f"),
}


class Infeasible(Exception):
    """The share takes every block."""


# --- what a run is told ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The paper's letters, with sizes that suit tiny models."""

    sparsity: float
    S: int = 4
    ranking: str = "macro_influence"
    iterative: bool = True
    blocks: tuple[int, ...] | None = None
    protect: tuple[int, ...] = ()
    scoring_rows: int = 32
    r_coefficient: int = 3
    r_lora: int = 2
    B: int = 4
    epochs: int = 2
    lr_coefficient: float = 1e-3
    lr_base: float = 9.65e-6
    loss: str = "batch_kl"
    held_out: int = 0
    rerank: int = 0
    rerank_window: int = 4
    rerank_epochs: int = 1
    seed: int = 0


def removals(sparsity: float, L: int) -> int:
    """N = ceil(L * sparsity), with the sparsity as the decimal number that was meant."""
    N = math.ceil(Fraction(str(round(sparsity, 9))) * L)
    if N >= L:
        raise Infeasible(f"{N} of {L} blocks")
    return N


def window(p: int, S: int, L: int) -> list[int]:
    """Blocks p - S/2 ... p + S/2 - 1; at the borders shifted, not shortened; all of them where there are too few."""
    if L < S:
        return list(range(L))
    if p < S // 2:
        return list(range(S))
    if p + S // 2 - 1 > L - 1:
        return list(range(L - S, L))
    return list(range(p - S // 2, p + S // 2))


# --- losses ----------------------------------------------------------------------------------------------------------


def _softmax(x: Tensor, dim: int) -> Tensor:
    e = torch.exp(x - x.detach().amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def batch_kl(h: Tensor, y: Tensor) -> Tensor:
    """(1 / B) sum_{b,t,c} P (log P - log Q), P = softmax_b(y), Q = softmax_b(h)."""
    P, Q = _softmax(y, 0), _softmax(h, 0)
    return (P * (P.log() - Q.log())).sum() / len(h)


def mse(h: Tensor, y: Tensor) -> Tensor:
    """Mean of the squared differences."""
    return ((h - y) ** 2).sum() / h.numel()


def cosine(h: Tensor, y: Tensor) -> Tensor:
    """Mean over samples and tokens of 1 - cos, cosine along d."""
    cosines = (h * y).sum(2) / ((h**2).sum(2).sqrt() * (y**2).sum(2).sqrt())
    return (1 - cosines).sum() / cosines.numel()


def feature_kl(h: Tensor, y: Tensor) -> Tensor:
    """Mean over samples and tokens of KL(softmax_d(y) || softmax_d(h))."""
    P, Q = _softmax(y, 2), _softmax(h, 2)
    return (P * (P.log() - Q.log())).sum() / (h.shape[0] * h.shape[1])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch_kl": batch_kl,
    "mse": mse,
    "cosine": cosine,
    "feature_kl": feature_kl,
}


def loss_by_loops(name: str, h: np.ndarray, y: np.ndarray) -> float:
    """The same four, one number at a time."""
    B, T, D = h.shape

    def share(x: np.ndarray, i: int) -> float:
        return math.exp(x[i]) / sum(math.exp(value) for value in x)

    total = 0.0
    for t in range(T):
        if name == "batch_kl":
            for c in range(D):
                for b in range(B):
                    P, Q = share(y[:, t, c], b), share(h[:, t, c], b)
                    total += P * (math.log(P) - math.log(Q)) / B
            continue
        for b in range(B):
            x, z = h[b, t], y[b, t]
            if name == "mse":
                total += sum((x[c] - z[c]) ** 2 for c in range(D)) / (B * T * D)
            elif name == "cosine":
                total += (1 - _cos(x, z)) / (B * T)
            else:
                pairs = [(share(z, c), share(x, c)) for c in range(D)]
                total += sum(P * (math.log(P) - math.log(Q)) for P, Q in pairs) / (B * T)
    return total


def _cos(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y) / (math.sqrt(float(x @ x)) * math.sqrt(float(y @ y)))


# --- fused layers ----------------------------------------------------------------------------------------------------


@dataclass
class Graft:
    """(U V) (*) D, and c (*) d where there are biases."""

    U: Tensor
    V: Tensor
    D: Tensor
    c: Tensor | None
    d: Tensor | None


@dataclass
class FusedLinear:
    """One linear of a block. W (out, in) is as it was in the stock model, for ever."""

    W: Tensor
    b: Tensor | None
    transposed: bool  # gpt2 stores (in, out)
    B: Tensor | None = None
    A: Tensor | None = None
    grafts: list[Graft] = field(default_factory=list)

    def W_eff(self) -> Tensor:  # noqa: N802
        total = self.W.clone()
        if self.A is not None and self.B is not None:
            total = total + self.B @ self.A
        for graft in self.grafts:
            total = total + (graft.U @ graft.V) * graft.D
        return total

    def b_eff(self) -> Tensor | None:
        if self.b is None:
            return None
        total = self.b.clone()
        for graft in self.grafts:
            if graft.c is not None and graft.d is not None:
                total = total + graft.c * graft.d
        return total


class FusedBlock:
    """One block: a stock module that lends its forward, its linears as above, and all its other parameters (norms)."""

    def __init__(self, index: int, module: nn.Module) -> None:
        self.index = index  # in the model given
        self.module = module
        self.linears: dict[str, FusedLinear] = {}
        of_linears: set[str] = set()
        for name, part in module.named_modules():
            kind = type(part).__name__
            if kind not in ("Linear", "Conv1D"):
                continue
            W, b = part.weight.detach(), part.bias
            assert isinstance(W, Tensor)
            self.linears[name] = FusedLinear(
                (W.T if kind == "Conv1D" else W).clone(),
                None if b is None else b.detach().clone(),
                kind == "Conv1D",
            )
            of_linears |= {f"{name}.weight", f"{name}.bias"}
        self.norms = {n: p.detach().clone() for n, p in module.named_parameters() if n not in of_linears}

    def weights(self) -> dict[str, Tensor]:
        """What a folded block would hold, under stock names."""
        found = dict(self.norms)
        for name, linear in self.linears.items():
            W, b = linear.W_eff(), linear.b_eff()
            found[f"{name}.weight"] = W.T if linear.transposed else W
            if b is not None:
                found[f"{name}.bias"] = b
        return found

    def collapsed(self) -> FusedBlock:
        """The same block with its effective weights as frozen ones."""
        twin = copy.copy(self)
        twin.norms = {name: p.clone() for name, p in self.norms.items()}
        twin.linears = {n: FusedLinear(x.W_eff(), x.b_eff(), x.transposed) for n, x in self.linears.items()}
        return twin


class Fused:
    """A float64 copy of a stock model as a list of blocks."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().eval()
        places = PLACES[model.config.model_type]
        modules = self.model.get_submodule(places[0])
        self.norm = self.model.get_submodule(places[1])
        self.modules = list(modules)  # all of them, whatever is taken off the list of blocks
        self.blocks = [FusedBlock(i, module) for i, module in enumerate(modules)]
        self._embedded: dict[str, Tensor] = {}
        self._asides: dict[tuple[int, int, int], tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """What enters block 0 of the stock model, (N, T, D); what else each block is given is noted on the way."""
        name = repr(tokens.tolist())
        if name not in self._embedded:
            hooks = []
            for index, stock in enumerate(self.modules):

                def note(module: nn.Module, args: Any, kwargs: dict[str, Any], i: int = index) -> None:
                    kwargs = dict(kwargs)
                    x = args[0] if args else kwargs.pop("hidden_states")
                    self._embedded.setdefault(name, x.clone())
                    self._asides[i, len(x), x.shape[1]] = (args[1:], kwargs)

                hooks.append(stock.register_forward_pre_hook(note, with_kwargs=True))
            self.model(input_ids=tokens, use_cache=False)
            for hook in hooks:
                hook.remove()
        return self._embedded[name]

    def step(self, block: FusedBlock, x: Tensor) -> Tensor:
        """One block, with the weights that it has now; it keeps the attention mask of its own kind."""
        args, kwargs = self._asides[block.index, len(x), x.shape[1]]
        y = functional_call(block.module, block.weights(), (x, *args), kwargs)
        return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

    def through(self, blocks: Sequence[FusedBlock], x: Tensor) -> Tensor:
        for block in blocks:
            x = self.step(block, x)
        return x

    def head(self, H: Tensor) -> Tensor:
        """Final norm and head of the stock model, on what the last block hands out."""
        logits: Tensor = self.model.get_output_embeddings()(self.norm(H))
        return logits

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> np.ndarray:
        """(N, T, V), one row at a time."""
        found = []
        for row in tokens:
            H = self.through(self.blocks, self.embed(row[None]))
            found.append(self.head(H)[0].numpy())
        return np.stack(found)


# --- scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def macro_influence(fused: Fused, rows: Tensor) -> list[float]:
    """MI_i = 1 - mean over samples and tokens of cos(H_t, H(-i)_t), H what the last block hands out."""
    whole = [fused.through(fused.blocks, fused.embed(row[None]))[0].numpy() for row in rows]
    scores = []
    for i in range(len(fused.blocks)):
        cosines = []
        for row, H in zip(rows, whole, strict=True):
            X = fused.embed(row[None])
            H_i = fused.through(fused.blocks[:i] + fused.blocks[i + 1 :], X)[0].numpy()
            cosines += [_cos(H[t], H_i[t]) for t in range(len(row))]
        scores.append(1 - sum(cosines) / len(cosines))
    return scores


@torch.no_grad()
def block_influence(fused: Fused, rows: Tensor) -> list[float]:
    """BI_i = 1 - mean over samples and tokens of cos(what enters block i, what leaves it)."""
    scores = []
    for i in range(len(fused.blocks)):
        cosines = []
        for row in rows:
            x = fused.through(fused.blocks[:i], fused.embed(row[None]))
            y = fused.step(fused.blocks[i], x)
            cosines += [_cos(x[0, t].numpy(), y[0, t].numpy()) for t in range(len(row))]
        scores.append(1 - sum(cosines) / len(cosines))
    return scores


@torch.no_grad()
def loss_without(fused: Fused, rows: Tensor) -> list[float]:
    """The mean cross-entropy of the next token with block i skipped."""
    scores = []
    for i in range(len(fused.blocks)):
        nll = 0.0
        for row in rows:
            H = fused.through(fused.blocks[:i] + fused.blocks[i + 1 :], fused.embed(row[None]))
            logits = fused.head(H)[0].numpy()
            for t in range(len(row) - 1):
                x = logits[t] - logits[t].max()
                nll -= x[row[t + 1]] - math.log(np.exp(x).sum())
        scores.append(nll / (len(rows) * (rows.shape[1] - 1)))
    return scores


SCORES = {"macro_influence": macro_influence, "block_influence": block_influence, "loss": loss_without}


# --- one removal -----------------------------------------------------------------------------------------------------


@dataclass
class Tuning:
    """Mean losses of the first and the last epoch, and ||s - t||^2 / ||t||^2 on the rows kept from tuning."""

    loss_first: float
    loss_last: float
    held_out_before: float | None
    held_out_after: float | None


def inject(survivor: FusedBlock, donor: FusedBlock, s: Settings, g: torch.Generator) -> list[str]:
    """Make every linear fusable and graft the collapsed donor on it; returns the matrices without a twin in it."""
    alone: list[str] = []

    def drawn(r: int, inputs: int) -> Tensor:
        bound = 1 / math.sqrt(inputs)
        return torch.empty(r, inputs).uniform_(-bound, bound, generator=g).double()

    for name, linear in survivor.linears.items():
        outputs, inputs = linear.W.shape
        if s.r_lora and linear.A is None:
            linear.A = drawn(s.r_lora, inputs)
            linear.B = torch.zeros(outputs, s.r_lora, dtype=torch.float64)
        if not s.r_coefficient:
            continue
        twin = donor.linears.get(name)
        if twin is None or twin.W.shape != linear.W.shape:
            alone.append(f"block {survivor.index}: {name}.weight")
            continue
        V = drawn(s.r_coefficient, inputs)
        U = torch.zeros(outputs, s.r_coefficient, dtype=torch.float64)
        d = twin.b_eff()
        c = None if d is None or linear.b is None else torch.zeros(outputs, dtype=torch.float64)
        linear.grafts.append(Graft(U, V, twin.W_eff(), c, d))
    return alone


def trainables(block: FusedBlock, s: Settings) -> tuple[list[Tensor], list[Tensor]]:
    """The coefficient group and the base group of one survivor."""
    coefficients, base = [], []
    for linear in block.linears.values():
        for graft in linear.grafts:
            coefficients += [x for x in (graft.U, graft.V, graft.c) if x is not None]
        if s.r_lora:
            base += [x for x in (linear.A, linear.B, linear.b) if x is not None]
    if s.r_lora:
        base += block.norms.values()
    return coefficients, base


def tune(fused: Fused, survivors: list[FusedBlock], X: Tensor, Y: Tensor, s: Settings, g: torch.Generator) -> Tuning:
    """Adam on the survivors of a window, so that on X they give Y."""
    n = len(X) - s.held_out
    groups = [trainables(block, s) for block in survivors]
    thetas = [(x, s.lr_coefficient) for coefficients, _ in groups for x in coefficients]
    thetas += [(x, s.lr_base) for _, base in groups for x in base]
    first = [torch.zeros_like(x) for x, _ in thetas]
    second = [torch.zeros_like(x) for x, _ in thetas]

    before = held_out_error(fused, survivors, X[n:], Y[n:])
    total = s.epochs * (n // s.B)
    step = 0
    means: list[float] = []
    for _ in range(s.epochs):
        order = torch.randperm(n, generator=g).tolist()
        losses = []
        for start in range(0, n, s.B):
            batch = order[start : start + s.B]
            for x, _ in thetas:
                x.requires_grad_(True)
            loss = LOSSES[s.loss](fused.through(survivors, X[batch]), Y[batch])
            gradients = torch.autograd.grad(loss, [x for x, _ in thetas])
            losses.append(loss.item())
            schedule = (1 + math.cos(math.pi * step / total)) / 2
            step += 1
            for k, ((x, lr), gradient) in enumerate(zip(thetas, gradients, strict=True)):
                x.requires_grad_(False)
                first[k] = 0.9 * first[k] + 0.1 * gradient
                second[k] = 0.95 * second[k] + 0.05 * gradient**2
                m, v = first[k] / (1 - 0.9**step), second[k] / (1 - 0.95**step)
                x -= lr * schedule * m / (v.sqrt() + 1e-8)
        means.append(sum(losses) / len(losses))
    after = held_out_error(fused, survivors, X[n:], Y[n:])
    return Tuning(means[0], means[-1], before, after)


@torch.no_grad()
def held_out_error(fused: Fused, survivors: list[FusedBlock], X: Tensor, Y: Tensor) -> float | None:
    wrong = whole = 0.0
    for x, y in zip(X, Y, strict=True):
        wrong += float(((fused.through(survivors, x[None])[0] - y) ** 2).sum())
        whole += float((y**2).sum())
    return wrong / whole if whole else None


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class FuseGPT:
    """All that is decided and measured on the way, and the model at its end."""

    removed: list[int]
    scores: list[list[float]]
    windows: list[tuple[int, int]]
    tuning: list[Tuning]
    trials: list[dict[int, float]]  # by block: 1 - mean cosine of the last hidden states after its trial fusion
    not_grafted: set[str]
    fused: Fused


def fusegpt(model: Any, rows: Tensor, s: Settings) -> FuseGPT:
    """Remove blocks one at a time and fuse each into its window, with calibration tokens (N, T)."""
    fused = Fused(model)
    L = len(fused.blocks)
    N = removals(s.sparsity, L)
    protected = {p % L for p in s.protect}
    scored = rows[: s.scoring_rows]

    result = FuseGPT([], [], [], [], [], set(), fused)
    plan = list(s.blocks) if s.blocks is not None else []
    once: dict[int, float] = {}
    for k in range(N):
        numbers = [block.index for block in fused.blocks]
        if s.blocks is not None:
            remove(fused, numbers.index(plan[k]), rows, s, k, result)
            continue
        if s.iterative or not once:
            result.scores.append(SCORES[s.ranking](fused, scored))
            once = dict(zip(numbers, result.scores[-1], strict=True))
        order = sorted((p for p, i in enumerate(numbers) if i not in protected), key=lambda p: (once[numbers[p]], p))
        p = order[0]
        if s.rerank:
            change = {q: trial(fused, q, rows, s, k) for q in order[: s.rerank]}
            p = min(order[: s.rerank], key=lambda q: (change[q], order.index(q)))
            result.trials.append({numbers[q]: value for q, value in change.items()})
        remove(fused, p, rows, s, k, result)
    return result


def trial(fused: Fused, p: int, rows: Tensor, s: Settings, k: int) -> float:
    """How far the last hidden states turn when block p is fused on trial, in a small window and for a short time.

    What the blocks are at this moment is the frozen W of the trial: pairs, coefficients and LoRA begin anew.
    """
    copied = copy.copy(fused)
    copied.blocks = [block.collapsed() for block in fused.blocks]
    short = replace(s, S=s.rerank_window, epochs=s.rerank_epochs)
    remove(copied, p, rows, short, k, FuseGPT([], [], [], [], [], set(), copied))
    cosines = []
    with torch.no_grad():
        for row in rows[: s.scoring_rows]:
            X = fused.embed(row[None])
            H, H_p = fused.through(fused.blocks, X)[0].numpy(), fused.through(copied.blocks, X)[0].numpy()
            cosines += [_cos(H[t], H_p[t]) for t in range(len(row))]
    return 1 - sum(cosines) / len(cosines)


def remove(fused: Fused, p: int, rows: Tensor, s: Settings, k: int, result: FuseGPT) -> None:
    """One removal, number k: window, its inputs, the teacher, injection, tuning."""
    donor = fused.blocks[p]
    places = window(p, s.S, len(fused.blocks))
    whole = [fused.blocks[i] for i in places]
    with torch.no_grad():
        embedded = [fused.embed(row[None]) for row in rows]
        X = torch.cat([fused.through(fused.blocks[: places[0]], x) for x in embedded])
        Y = torch.cat([fused.through(whole, x[None]) for x in X])
    fused.embed(rows[: s.B])  # so that blocks can be called with whole batches, too

    survivors = [block for block in whole if block is not donor]
    g = torch.Generator().manual_seed(s.seed * 1_000_003 + k)
    for survivor in survivors:
        result.not_grafted |= set(inject(survivor, donor, s, g))
    fused.blocks.remove(donor)
    result.removed.append(donor.index)
    result.windows.append((places[0], places[-1] + 1))
    if s.r_coefficient or s.r_lora:
        result.tuning.append(tune(fused, survivors, X, Y, s, g))


def deleted(model: Any, removed: Sequence[int]) -> Fused:
    """A model without some of its blocks, and nothing else changed."""
    fused = Fused(model)
    fused.blocks = [block for block in fused.blocks if block.index not in removed]
    return fused
