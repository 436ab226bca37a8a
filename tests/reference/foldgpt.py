"""FoldGPT once more, from the equations, slowly.

Nothing here is shared with the library. Every number comes from whole passes of the stock model, all of whose L places
stay where they are: a block that was removed hands on what enters it, and a block that shares is a stock module that is
called with the weights that the equations give, worked out anew at every pass. Weights are shared by being the same
Python object. Adam, clipping and schedules are written out. All in float64; only random draws are made in float32.

Source: Liu et al. 2024, "FoldGPT" (arXiv 2407.00928), in whose structure the equations are our own.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# Where a stock model keeps its blocks.
_LLAMA = "model.layers"
PLACES = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"], _LLAMA),
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
}


class Infeasible(Exception):
    """The share takes every block."""


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    sparsity: float
    ranking: str = "gates"
    blocks: tuple[int, ...] | None = None
    protect: tuple[int, ...] = ()
    check: bool = True
    gate_steps: int = 300
    gate_lr: float = 2e-2
    gate_eps: float = 1e-4
    flops_weight: float = 200.0
    polarisation_weight: float = 10.0
    group: int = 2
    keep_ends: int = 2
    boundaries: str = "fixed"
    groups: int | None = None
    parent: str = "divergence"
    own_biases: bool = False
    adapter_rank: int = 0
    epochs: int = 1
    batch: int = 8
    lora_rank: int = 32
    lora_lr: float = 1e-4
    norm_lr: float = 1e-3
    warmup: float = 0.03
    clip: float = 1.0
    next_token: float = 1.0
    distil: float = 1.0
    temperature: float = 2.0
    tail: int = 2
    tail_weight: float = 1.0
    held_out: int = 8
    seed: int = 0


# --- a model whose weights are told at every pass --------------------------------------------------------------------


@dataclass(eq=False)
class Matrix:
    """W (out, in), which several places may use, and the pair that heals it."""

    W: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def effective(self) -> Tensor:
        if self.left is None or self.right is None:
            return self.W
        return self.W + self.left @ self.right


@dataclass
class Linear:
    """What one linear of one place computes with."""

    matrix: Matrix
    bias: Tensor | None
    transposed: bool  # gpt2 stores (in, out)
    adapter: tuple[Tensor, Tensor] | None = None  # (out, r), (r, in): of this place alone


@dataclass
class Place:
    """One of the L places of the stock model."""

    module: nn.Module
    kind: tuple[Any, ...]
    linears: dict[str, Linear]
    others: dict[str, Tensor]  # norms, and whatever else is no linear's
    gate: Tensor | float = 1.0
    gone: bool = False

    def weights(self) -> dict[str, Tensor]:
        """All weights under stock names, adapters added."""
        found = dict(self.others)
        for name, linear in self.linears.items():
            W = linear.matrix.effective()
            if linear.adapter is not None:
                W = W + linear.adapter[0] @ linear.adapter[1]
            found[f"{name}.weight"] = W.T if linear.transposed else W
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias
        return found

    def stored(self) -> dict[str, Tensor]:
        """All weights under stock names, adapters beside them."""
        found = dict(self.others)
        for name, linear in self.linears.items():
            W = linear.matrix.effective()
            found[f"{name}.weight"] = W.T if linear.transposed else W
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias
            if linear.adapter is not None:
                found[f"{name}.lora_left"], found[f"{name}.lora_right"] = linear.adapter
        return found


class Stand(nn.Module):
    """Takes a block's seat in the stock model, and runs whatever place it is told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.place: list[Place] = []
        self.entered: list[Tensor] = []
        self.left: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)  # such as the kind of its attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (place,) = self.place
        h: Tensor = args[0] if args else kwargs["hidden_states"]
        output = functional_call(place.module, place.weights(), args, kwargs)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        if place.gone:
            y = h
        elif isinstance(place.gate, Tensor):
            y = h + place.gate * (y - h)
        self.entered, self.left = [h], [y]
        return (y, *output[1:]) if isinstance(output, tuple) else y


class Stock:
    """A float64 copy of a stock model that is run with places."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        architecture = getattr(model.config, "base_model_type", model.config.model_type)
        name, _, attribute = PLACES[architecture].rpartition(".")
        modules = list(getattr(self.model.get_submodule(name), attribute))
        types = getattr(model.config, "layer_types", None) or [None] * len(modules)
        self.places = [_place(module, kind) for module, kind in zip(modules, types, strict=True)]
        self.stands = [Stand(module) for module in modules]
        self._known: dict[tuple[int, ...], Tensor] = {}
        setattr(self.model.get_submodule(name), attribute, nn.ModuleList(self.stands))

    def run(self, places: Sequence[Place], tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (B, T, V), what enters each place, and what leaves each."""
        for stand, place in zip(self.stands, places, strict=True):
            stand.place = [place]
        logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits, [s.entered[0] for s in self.stands], [s.left[0] for s in self.stands]

    def itself(self, row: Tensor) -> Tensor:
        """Logits (1, T, V) of the stock model, noted for the next time."""
        name = tuple(row.tolist())
        if name not in self._known:
            self._known[name] = self.run(self.places, row[None])[0]
        return self._known[name]


def _place(module: nn.Module, attention_type: str | None) -> Place:
    linears: dict[str, Linear] = {}
    for name, part in module.named_modules():
        kind = type(part).__name__
        if kind in ("Linear", "Conv1D"):
            W, b = part.weight.detach(), part.bias
            assert isinstance(W, Tensor)
            stored = (W.T if kind == "Conv1D" else W).clone()
            linears[name] = Linear(Matrix(stored), None if b is None else b.detach().clone(), kind == "Conv1D")
    of_linears = {f"{name}.{what}" for name in linears for what in ("weight", "bias")}
    others = {name: p.detach().clone() for name, p in module.named_parameters() if name not in of_linears}
    shapes = tuple((name, tuple(x.matrix.W.shape), x.bias is None) for name, x in linears.items())
    return Place(module, (attention_type, *shapes), linears, others)


# --- measures --------------------------------------------------------------------------------------------------------


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student), its mean over all tokens; logits (B, T, V)."""
    P = (teacher / temperature).log_softmax(2)
    Q = (student / temperature).log_softmax(2)
    return (P.exp() * (P - Q)).sum() / (P.shape[0] * P.shape[1])


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """The next token's, mean over B (T - 1)."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(tokens)):
        for t in range(tokens.shape[1] - 1):
            total = total - logits[b, t].log_softmax(0)[tokens[b, t + 1]]
    return total / (len(tokens) * (tokens.shape[1] - 1))


@torch.no_grad()
def divergence(stock: Stock, places: Sequence[Place], teacher: Stock, rows: Tensor) -> float:
    """Mean KL(teacher || places) per token, one row after the other; nan without rows."""
    found = [kl(teacher.itself(row), stock.run(places, row[None])[0]).item() for row in rows]
    return sum(found) / len(found) if found else math.nan


def _cos(x: Tensor, y: Tensor) -> float:
    return float(x @ y) / (math.sqrt(float(x @ x)) * math.sqrt(float(y @ y)))


@torch.no_grad()
def block_influence(stock: Stock, rows: Tensor) -> list[float]:
    """1 - mean over tokens of cos(what enters the block, what leaves it)."""
    cosines: list[list[float]] = [[] for _ in stock.places]
    for row in rows:
        _, entered, left = stock.run(stock.places, row[None])
        for i, (x, y) in enumerate(zip(entered, left, strict=True)):
            cosines[i] += [_cos(x[0, t], y[0, t]) for t in range(len(row))]
    return [1 - sum(each) / len(each) for each in cosines]


@torch.no_grad()
def macro_influence(stock: Stock, rows: Tensor) -> list[float]:
    """1 - mean over tokens of cos(what leaves the last block, the same without the block)."""
    scores = []
    for i in range(len(stock.places)):
        cosines = []
        for row in rows:
            x = stock.run(stock.places, row[None])[2][-1]
            y = stock.run(without(stock.places, [i]), row[None])[2][-1]
            cosines += [_cos(x[0, t], y[0, t]) for t in range(len(row))]
        scores.append(1 - sum(cosines) / len(cosines))
    return scores


@torch.no_grad()
def loss_without(stock: Stock, rows: Tensor) -> list[float]:
    """The mean cross-entropy of the next token without the block."""
    scores = []
    for i in range(len(stock.places)):
        losses = [cross_entropy(stock.run(without(stock.places, [i]), r[None])[0], r[None]).item() for r in rows]
        scores.append(sum(losses) / len(losses))
    return scores


SCORES = {"block_influence": block_influence, "macro_influence": macro_influence, "loss": loss_without}


def without(places: Sequence[Place], gone: Sequence[int]) -> list[Place]:
    """The same places, some of them only handing on what enters them."""
    return [replace(place, gone=place.gone or i in gone) for i, place in enumerate(places)]


# --- Adam ------------------------------------------------------------------------------------------------------------


class Adam:
    """Betas 0.9 and 0.95, eps 1e-8, no decay."""

    def __init__(self, parameters: Sequence[tuple[Tensor, float]]) -> None:
        self.parameters = list(parameters)
        self.first = [torch.zeros_like(x) for x, _ in parameters]
        self.second = [torch.zeros_like(x) for x, _ in parameters]
        self.steps = 0

    def step(self, loss: Tensor, share: float = 1.0, clip: float = math.inf) -> None:
        gradients = torch.autograd.grad(loss, [x for x, _ in self.parameters])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        scale = min(1.0, clip / (norm + 1e-6))
        self.steps += 1
        for k, ((x, lr), gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            g = gradient * scale
            self.first[k] = 0.9 * self.first[k] + 0.1 * g
            self.second[k] = 0.95 * self.second[k] + 0.05 * g**2
            m, v = self.first[k] / (1 - 0.9**self.steps), self.second[k] / (1 - 0.95**self.steps)
            with torch.no_grad():
                x -= lr * share * m / (v.sqrt() + 1e-8)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Epoch after epoch, each row once an epoch."""
    while True:
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, size):
            yield order[start : start + size]


def drawn(r: int, inputs: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(inputs)
    return torch.empty(r, inputs).uniform_(-bound, bound, generator=generator).double()


# --- stage 1: gates --------------------------------------------------------------------------------------------------


def removals(sparsity: float, L: int) -> int:
    """ceil(sparsity L), with the sparsity as the decimal number that was meant."""
    N = math.ceil(Fraction(str(round(sparsity, 9))) * L)
    if N >= L:
        raise Infeasible(f"{N} of {L} blocks")
    return N


def learn_gates(stock: Stock, rows: Tensor, s: Settings) -> tuple[list[float], list[float]]:
    """The final g of each block, and the loss of each step."""
    L = len(stock.places)
    goal = 1 - removals(s.sparsity, L) / L
    costs = [float(sum(x.matrix.W.numel() for x in place.linears.values())) for place in stock.places]
    theta = torch.ones(L, dtype=torch.float64, requires_grad=True)
    adam = Adam([(theta, s.gate_lr)])
    order = batches(len(rows), s.batch, torch.Generator().manual_seed(s.seed))
    losses = []
    for step in range(s.gate_steps):
        way = step / max(1, s.gate_steps - 1)
        eps = 0.1 * (s.gate_eps / 0.1) ** way
        tokens = rows[next(order)]
        with torch.no_grad():
            teacher = stock.run(stock.places, tokens)[0]
        g = theta**2 / (theta**2 + eps)
        gated = [replace(place, gate=g[i]) for i, place in enumerate(stock.places)]
        loss = kl(teacher, stock.run(gated, tokens)[0])
        stays = sum((g[i] * costs[i] for i in range(L)), torch.zeros(())) / sum(costs)
        loss = loss + s.flops_weight * (stays - goal).clamp(min=0) ** 2
        loss = loss + s.polarisation_weight * way * (g * (1 - g)).sum() / L
        losses.append(loss.item())
        adam.step(loss, (1 + math.cos(math.pi * step / s.gate_steps)) / 2)
    with torch.no_grad():
        return (theta**2 / (theta**2 + s.gate_eps)).tolist(), losses


def lowest(scores: Sequence[Any], N: int, protected: set[int]) -> list[int]:
    order = sorted((i for i in range(len(scores)) if i not in protected), key=lambda i: (scores[i], i))
    return sorted(order[:N])


# --- stage 2: sharing ------------------------------------------------------------------------------------------------


def runs_of(places: Sequence[Place], s: Settings) -> list[list[int]]:
    """Every run of blocks that could be a group, in order. Blocks are numbered as they are left."""
    n = len(places)
    found = []
    for start in range(s.keep_ends, n - s.keep_ends - s.group + 1):
        members = list(range(start, start + s.group))
        if all(places[m].kind == places[start].kind for m in members):
            found.append(members)
    return found


def fixed_groups(places: Sequence[Place], s: Settings) -> list[list[int]]:
    """Cut each stretch of one kind from its start."""
    groups: list[list[int]] = []
    open_group: list[int] = []
    for i in range(s.keep_ends, len(places) - s.keep_ends):
        if open_group and places[i].kind != places[open_group[0]].kind:
            open_group = []  # left over
        open_group = [*open_group, i]
        if len(open_group) == s.group:
            groups.append(open_group)
            open_group = []
    return groups


def most(runs: Sequence[list[int]], taken: Sequence[list[int]]) -> int:
    """The most groups that can be had along with those taken, by trying all sets."""
    free = [run for run in runs if not any(set(run) & set(other) for other in taken)]
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(free, count):
            if len({m for run in chosen for m in run}) == sum(len(run) for run in chosen):
                return len(taken) + count
    return len(taken)


def least_harmful(possible: Sequence[list[int]], harm: dict[int, float], count: int | None) -> list[list[int]]:
    """Groups taken one after the other, as many as are wanted, or (None) as there is room for."""
    wanted = most(possible, []) if count is None else count
    taken: list[list[int]] = []
    while len(taken) < wanted:
        apart = [run for run in possible if not any(set(run) & set(other) for other in taken)]
        fit = [run for run in apart if most(possible, [*taken, run]) >= wanted]
        taken.append(min(fit, key=lambda run: (harm[run[0]], run[0])))
    return sorted(taken)


def shared(places: Sequence[Place], members: Sequence[int], parent: int | None, own_biases: bool) -> list[Place]:
    """The places with one group that computes with the parent's matrices, or (None) with their means."""
    source = places[members[0] if parent is None else parent]
    matrices: dict[str, Matrix] = {}
    biases: dict[str, Tensor | None] = {}
    for name, linear in source.linears.items():
        matrices[name], biases[name] = linear.matrix, linear.bias
        if parent is None:
            twins = [places[m].linears[name] for m in members]
            matrices[name] = Matrix(sum((x.matrix.W for x in twins), torch.zeros(())) / len(twins))
            if linear.bias is not None:
                biases[name] = sum((x.bias for x in twins if x.bias is not None), torch.zeros(())) / len(twins)
    found = list(places)
    for m in members:
        linears = {
            name: replace(x, matrix=matrices[name], bias=x.bias if own_biases else biases[name])
            for name, x in places[m].linears.items()
        }
        found[m] = replace(places[m], linears=linears)
    return found


@dataclass
class Sharing:
    """What was decided."""

    groups: list[list[int]] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    trials: list[list[float]] = field(default_factory=list)


def share(stock: Stock, kept: list[int], teacher: Stock, held_out: Tensor, s: Settings) -> tuple[list[Place], Sharing]:
    """Survivors with shared weights, as all L places."""
    everything = without(stock.places, [i for i in range(len(stock.places)) if i not in kept])
    survivors = [everything[i] for i in kept]

    def whole(some: Sequence[Place]) -> list[Place]:
        found = list(everything)
        for i, place in zip(kept, some, strict=True):
            found[i] = place
        return found

    def parents_of(run: list[int]) -> list[int | None]:
        return {"divergence": list(run), "first": [run[0]], "mean": [None]}[s.parent]  # type: ignore[return-value]

    def harms(run: list[int]) -> list[float]:
        tried = [whole(shared(survivors, run, parent, s.own_biases)) for parent in parents_of(run)]
        return [divergence(stock, places, teacher, held_out) for places in tried]

    result = Sharing()
    trials: dict[int, list[float]] = {}
    if s.boundaries == "fixed":
        result.groups = fixed_groups(survivors, s)
    else:
        possible = runs_of(survivors, s)
        trials = {run[0]: harms(run) for run in possible}
        result.groups = least_harmful(possible, {start: min(each) for start, each in trials.items()}, s.groups)
    generator = torch.Generator().manual_seed(s.seed)
    folded = survivors  # trials are of one group alone
    for members in result.groups:
        options = parents_of(members)
        if s.parent == "divergence" or s.boundaries == "greedy":
            result.trials.append(trials.get(members[0]) or harms(members))
            least = min(range(len(options)), key=lambda k: (result.trials[-1][k], k))
        else:
            least = 0
        result.parents.append(options[least])
        folded = shared(folded, members, options[least], s.own_biases)
        for m in members if s.adapter_rank else []:
            if m != (members[0] if options[least] is None else options[least]):
                for linear in folded[m].linears.values():
                    out, inputs = linear.matrix.W.shape
                    right = drawn(s.adapter_rank, inputs, generator)
                    linear.adapter = (torch.zeros(out, s.adapter_rank, dtype=torch.float64), right)
    return whole(folded), result


# --- stage 3: healing ------------------------------------------------------------------------------------------------


def heal(stock: Stock, places: list[Place], teacher: Stock, rows: Tensor, s: Settings) -> tuple[list[float], int]:
    """Change the places' weights; returns the mean loss of each epoch and how many tensors learn."""
    kept = [i for i, place in enumerate(places) if not place.gone]
    generator = torch.Generator().manual_seed(s.seed)
    rates: dict[int, tuple[Tensor, float]] = {}
    for i in kept:
        for linear in places[i].linears.values():
            matrix = linear.matrix
            if matrix.left is None:
                out, inputs = matrix.W.shape
                matrix.left = torch.zeros(out, s.lora_rank, dtype=torch.float64)
                matrix.right = drawn(s.lora_rank, inputs, generator)
                rates |= {id(x): (x, s.lora_lr) for x in (matrix.left, matrix.right)}
            if linear.adapter is not None:
                rates |= {id(x): (x, s.lora_lr) for x in linear.adapter}
            if linear.bias is not None:
                rates[id(linear.bias)] = (linear.bias, s.norm_lr)
        rates |= {id(x): (x, s.norm_lr) for x in places[i].others.values()}
    for x, _ in rates.values():
        x.requires_grad_(True)
    adam = Adam(list(rates.values()))

    per_epoch = len(rows) // s.batch
    total = s.epochs * per_epoch
    order = batches(len(rows), s.batch, generator)
    losses: list[float] = []
    for step in range(total):
        tokens = rows[next(order)]
        with torch.no_grad():
            wanted, _, t_left = teacher.run(teacher.places, tokens)
        logits, _, s_left = stock.run(places, tokens)
        loss = s.next_token * cross_entropy(logits, tokens)
        loss = loss + s.distil * s.temperature**2 * kl(wanted, logits, s.temperature)
        for k in range(max(0, len(kept) - s.tail), len(kept)):
            h_s, h_t = s_left[kept[k]], t_left[kept[k + 1] - 1 if k + 1 < len(kept) else -1]
            loss = loss + s.tail_weight * ((h_s - h_t) ** 2).mean() / (h_t**2).mean()
        losses.append(loss.item())
        warm = min(1.0, (step + 1) / (s.warmup * total + 1))
        adam.step(loss, warm * (1 + math.cos(math.pi * step / total)) / 2, s.clip)
    for x, _ in rates.values():
        x.requires_grad_(False)
    means = [sum(losses[e * per_epoch : (e + 1) * per_epoch]) / per_epoch for e in range(s.epochs)]
    return means, len(rates)


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class FoldGPT:
    """All that is decided and measured on the way, and the model at its end."""

    stock: Stock
    removed: list[int] = field(default_factory=list)
    gates: list[float] | None = None
    gate_losses: list[float] = field(default_factory=list)
    unpolarised: float | None = None
    scores: list[float] | None = None
    removal_divergence: dict[str, float] | None = None
    removal_kept: str | None = None
    sharing: Sharing = field(default_factory=Sharing)
    divergence: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    learning: int = 0
    places: list[Place] = field(default_factory=list)

    @property
    def survivors(self) -> list[Place]:
        return [place for place in self.places if not place.gone]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.stock.run(self.places, tokens)[0]


def foldgpt(model: Any, rows: Tensor, s: Settings, teacher: Any = None) -> FoldGPT:
    """Remove, share, heal, with calibration tokens (N, T)."""
    learnt, held_out = rows[: len(rows) - s.held_out], rows[len(rows) - s.held_out :]
    stock = Stock(model)
    original = Stock(model if teacher is None else teacher)
    result = FoldGPT(stock)
    L = len(stock.places)
    N = removals(s.sparsity, L)
    if s.blocks is not None:
        result.removed = sorted(s.blocks)
    elif N:
        protected = {p % L for p in s.protect}
        choose(result, learnt, held_out, N, protected, s, original)
    result.places = without(stock.places, result.removed)
    if N:
        result.divergence["removed"] = divergence(stock, result.places, original, held_out)
    if s.group > 1:
        kept = [i for i in range(L) if i not in result.removed]
        result.places, result.sharing = share(stock, kept, original, held_out, s)
        result.divergence["shared"] = divergence(stock, result.places, original, held_out)
    if s.epochs:
        result.losses, result.learning = heal(stock, result.places, original, learnt, s)
        result.divergence["healed"] = divergence(stock, result.places, original, held_out)
    return result


def choose(
    result: FoldGPT, learnt: Tensor, held_out: Tensor, N: int, protected: set[int], s: Settings, original: Stock
) -> None:
    """Which blocks go."""
    stock = result.stock
    if s.ranking != "gates":
        result.scores = SCORES[s.ranking](stock, held_out)
        result.removed = lowest(result.scores, N, protected)
        return
    result.gates, result.gate_losses = learn_gates(stock, learnt, s)
    result.unpolarised = sum(0.05 <= g <= 0.95 for g in result.gates) / len(result.gates)
    influence = block_influence(stock, held_out)
    result.removed = lowest(list(zip(result.gates, influence, strict=True)), N, protected)
    if not s.check:
        return
    sets = {"gates": result.removed, "block_influence": lowest(influence, N, protected)}
    result.removal_divergence = {
        name: divergence(stock, without(stock.places, gone), original, held_out) for name, gone in sets.items()
    }
    kls = result.removal_divergence
    result.removal_kept = "block_influence" if kls["block_influence"] < kls["gates"] else "gates"
    result.removed = sets[result.removal_kept]
