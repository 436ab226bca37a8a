"""DAREx: drop most of what a fine-tune added to its base model, and rescale what stays by a chosen 1/q.

DARE drops each element of the delta with probability p and divides the rest by q = 1 - p, which keeps every output
unbiased; its variance grows with 1 / (1 - p) and ruins the model beyond p of 0.9 or so. DAREx-q takes a q between 1 - p
and 1: a bias towards the base model for much less variance. This file has the ways to drop and the ways to choose q;
what is stored, and how, is in `compress.delta`.

Everything here works on tensors: deltas are fp32 matrices (out, in), flat indices are row-major and ascending, and p is
always the share that is dropped.

Source: Deng et al. 2024 (DAREx, arXiv 2410.09344); Yu et al. 2023 (DARE, arXiv 2311.03099). Where we differ:

* Masks come from a portable generator, and by default keep one element of every m in a row in place of independent
  draws; every element is still kept with probability 1 - p.
* `analytic_q` and `least_squares` are ours: closed forms that need one forward pass in place of a search.
* q is searched on a geometric grid, for the useful values are small multiples of 1 - p.
* Only matrices are pruned: biases and norms cost nothing and stay exact.
* The authors calibrate their decoders on a test split; give a text of another source.

Cost: dropping takes a hash per element kept. Closed forms take two products of each matrix with its inputs, a search
some twenty forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from compress.delta.masks import SCHEMES, Scheme, random_index
from compress.errors import ConfigError

Keep = Literal["random", "magnitude", "wanda"]
Rescale = Literal["dare", "none", "fixed", "search", "paper-bound", "analytic-mse", "least-squares"]

KEEPS: tuple[Keep, ...] = ("random", "magnitude", "wanda")
RESCALES: tuple[Rescale, ...] = ("dare", "none", "fixed", "search", "paper-bound", "analytic-mse", "least-squares")
NEED_INPUTS = {"wanda", "paper-bound", "analytic-mse", "least-squares"}
"""Ways that look at what enters a matrix."""

ROUNDING = 1e-9
"""How far below 1 - p a q may be that was computed as 1 - p."""
Q_STEP, Q_TOP = 0.001, 0.998
"""Grid of the paper's bound."""
SHRINKAGE_TOKENS = 16
"""Factors of single rows are drawn to that of the whole matrix as if it had been seen on so many tokens more."""


@dataclass(frozen=True)
class DarexConfig:
    """What to drop, and how to rescale the rest.

    Attributes:
        p: share dropped, as a number or as a fraction, "19/20".
        keep: what stays: "random" elements, those of largest "magnitude", or of largest magnitude times input norm
            ("wanda"), the same number in every row.
        scheme: of random masks: "one-of-m" (where 1 - p is 1/m), "bernoulli", "columns" (whole inputs go); None takes
            one-of-m where it can.
        rescale: 1/q: "dare" (q = 1 - p), "none" (q = 1), "fixed" (``q``), "search" (one q for all), "paper-bound" (one
            per matrix), "analytic-mse" (one per matrix), "least-squares" (for the drawn mask).
        q: for "fixed".
        per_row: of "least-squares": a factor for each output instead of one for the matrix.
        eta: of "paper-bound"; None searches it as "search" does q.
        seed: of the mask.
    """

    p: float | str = 0.95
    keep: Keep = "random"
    scheme: Scheme | None = None
    rescale: Rescale = "dare"
    q: float | None = None
    per_row: bool = True
    eta: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        density = float(self.density)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed must be a whole number, not {self.seed}")
        if self.keep not in KEEPS:
            raise ConfigError(f"keep={self.keep!r} is not known: {', '.join(KEEPS)}")
        if self.rescale not in RESCALES:
            raise ConfigError(f"rescale={self.rescale!r} is not known: {', '.join(RESCALES)}")
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise ConfigError(f"scheme={self.scheme!r} is not known: {', '.join(SCHEMES)}")
        if self.scheme is not None and self.keep != "random":
            raise ConfigError(f"scheme={self.scheme} is for keep=random")
        if self.scheme == "one-of-m" and self.density.numerator != 1:
            raise ConfigError(f"one-of-m keeps one of m, and 1 - p = {self.density} is not: use scheme=bernoulli")
        if (self.q is not None) != (self.rescale == "fixed"):
            raise ConfigError("q=NUMBER and rescale=fixed belong together")
        if self.q is not None and not density - ROUNDING <= self.q <= 1:
            raise ConfigError(f"q={self.q} is outside [1 - p, 1] = [{density:g}, 1]")
        if self.rescale in ("dare", "paper-bound", "analytic-mse") and self.keep != "random":
            raise ConfigError(f"rescale={self.rescale} takes a random mask for granted: use none or least-squares")
        if self.eta is not None and not self.eta > 0:
            raise ConfigError(f"eta must be above 0, not {self.eta}")

    @property
    def density(self) -> Fraction:
        """Share kept, 1 - p, exactly as it was written.

        Raises:
            ConfigError: p is no number in [0, 1).
        """
        try:
            dropped = Fraction(str(self.p))
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"p={self.p!r} is no number and no fraction") from None
        if not 0 <= dropped < 1:
            raise ConfigError(f"p={self.p} is the share that is dropped: give one from 0 to below 1")
        return 1 - dropped

    @property
    def drawn(self) -> Scheme:
        """The scheme of random masks."""
        return self.scheme or ("one-of-m" if self.density.numerator == 1 else "bernoulli")

    @property
    def needs_search(self) -> bool:
        """Whether something is still to be searched for the model as a whole."""
        return self.rescale == "search" or (self.rescale == "paper-bound" and self.eta is None)

    @property
    def needs_inputs(self) -> bool:
        """Whether something is measured on calibration text."""
        return bool(NEED_INPUTS & {self.keep, self.rescale})


# --- What stays


def kept_index(name: str, delta: Tensor, config: DarexConfig, inputs: Tensor | None = None) -> Tensor:
    """Choose the elements of one matrix that stay.

    Args:
        name: of the tensor, which its mask depends on.
        delta: fp32 (out, in).
        config: what to keep.
        inputs: for "wanda": what enters the matrix, (T, in).

    Returns:
        int64 (n,): flat indices, ascending.
    """
    rows, cols = delta.shape
    if config.keep == "random":
        return random_index(config.drawn, config.density, config.seed, name, (rows, cols), delta.device)
    if config.keep == "magnitude":
        return largest(delta.abs().view(1, -1), config.density)
    return largest(delta.abs() * _needed(inputs).float().norm(dim=0), config.density)


def largest(scores: Tensor, density: Fraction) -> Tensor:
    """The share ``density`` of largest scores in each row of (R, C); flat indices, ascending, ties to the first.

    Source: DARE's magnitude baseline ranks a whole tensor (R = 1); Wanda (Sun et al. 2024) ranks within each row.
    """
    rows, cols = scores.shape
    count = round(density * cols)
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return (ranked + torch.arange(rows, device=scores.device)[:, None] * cols).flatten().sort().values


def scattered(index: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A matrix of zeros with values at flat indices."""
    return torch.zeros(shape.numel(), device=values.device).index_copy_(0, index, values).view(shape)


# --- How the rest is rescaled: factors 1/q


def factors(
    delta: Tensor, kept: Tensor, config: DarexConfig, inputs: Tensor | None = None, bias_delta: Tensor | None = None
) -> Tensor:
    """The factor 1/q of one matrix, or of each of its rows.

    Args:
        delta: fp32 (out, in).
        kept: fp32 (out, in): the delta as it stays, zero where dropped, before rescaling.
        config: how; what is to be searched must have been found by now.
        inputs: what enters the matrix on calibration text, (T, in), for the ways that look at it.
        bias_delta: fp32 (out,): of the bias that the bound counts in.

    Returns:
        fp32 (1,) or (out,).
    """
    density = float(config.density)
    if config.needs_search:
        raise ConfigError("q or eta is searched for a whole model: do that first")
    if config.rescale == "least-squares":
        return least_squares(delta, kept, _needed(inputs), per_row=config.per_row)
    if config.rescale == "paper-bound":
        q = bound_q(delta, _needed(inputs).float().mean(0), 1 - density, config.eta or 0.0, bias_delta=bias_delta)
    elif config.rescale == "analytic-mse":
        q = analytic_q(delta, _needed(inputs), 1 - density)
    else:
        q = {"dare": density, "none": 1.0, "fixed": config.q or 1.0}[config.rescale]
    return torch.tensor([1 / q], device=delta.device)


def influence_ratio(delta: Tensor, inputs: Tensor) -> float:
    """R: how far the influences c_ij = delta_ij x_j of an output's inputs are from pulling the same way.

    The sum over tokens and outputs of sum_j c_ij^2, over that of (sum_j c_ij)^2. About 1 / in when all pull together,
    where DARE's q = 1 - p is right; 1 when they are independent with mean zero, where rescaling only does harm.

    Source: ours, from the moments of DAREx, eq. 2 and appendix E.
    """
    x = inputs.float()
    apart = float((x.square().sum(0) * delta.square().sum(0)).double().sum())
    together = float((x @ delta.T).square().double().sum())
    if together == 0:
        return 1.0 if apart == 0 else math.inf
    return float(apart / together)


def analytic_q(delta: Tensor, inputs: Tensor, p: float) -> float:
    """The q that minimises the mean square of a matrix's output change over random masks: (1 - p) + p R, at most 1.

    The mean square of one output is (1 - (1 - p)/q)^2 S^2 + p (1 - p)/q^2 Q, with S the sum of its influences and Q the
    sum of their squares (DAREx, eq. 2 and appendix E); R is Q / S^2, summed over tokens and outputs.

    Source: ours.
    """
    return min(1.0, (1 - p) + p * influence_ratio(delta, inputs)) if p > 0 else 1.0


def least_squares(delta: Tensor, kept: Tensor, inputs: Tensor, *, per_row: bool) -> Tensor:
    """The factor, or one for each row, that brings the kept delta's outputs closest to those of the whole.

    As the mask is known by now, this is least squares: <delta X, kept X> / <kept X, kept X>. Factors of rows are drawn
    to that of the matrix by the weight of `SHRINKAGE_TOKENS`, for few tokens tell little of a single row.

    Args:
        delta: fp32 (out, in).
        kept: fp32 (out, in), as it will be stored: rounding is made good for as well.
        inputs: (T, in).
        per_row: one factor for each row.

    Returns:
        fp32 (1,) or (out,); 0 where nothing that stays has any effect.

    Source: ours.
    """
    x = inputs.float()
    wanted, given = x @ delta.T, x @ kept.T
    above, below = (wanted * given).double().sum(0), given.double().square().sum(0)
    whole = float(above.sum() / below.sum()) if float(below.sum()) > 0 else 0.0
    if not per_row:
        return torch.tensor([whole], device=delta.device)
    pull = SHRINKAGE_TOKENS / len(x) * below.mean()
    rows = (above + pull * whole) / (below + pull)
    return torch.where(below > 0, rows, whole).float()


def bound_q(
    delta: Tensor,
    mean_inputs: Tensor,
    p: float,
    eta: float,
    *,
    certainty: float = 0.95,
    stop_share: float = 0.8,
    bias_delta: Tensor | None = None,
) -> float:
    """The paper's q of one matrix: the mean over its outputs of the q at which a bound on the change is smallest.

    For each output, over q from 1 - p in steps of 0.001: |eta (1 - (1-p)/q) sum c + eta^2 phi(p) sum c^2 / (4 q^2) +
    ln(2 / (1 - certainty))|, where c_j is the delta times the mean input. The scan ends when so large a share of the
    outputs has stopped improving, which guards against outliers.

    Args:
        delta: fp32 (out, in).
        mean_inputs: fp32 (in,).
        p: share dropped.
        eta: weighs bias against variance; the paper searches it.
        certainty: of the bound.
        stop_share: of outputs.
        bias_delta: fp32 (out,): counts as a column whose input is 1.

    Source: DAREx, section 4.2 and appendix; stop rule and grid as in the authors' code.
    """
    influences = delta.double() * mean_inputs.double()
    total, squares = influences.sum(1), influences.square().sum(1)
    if bias_delta is not None:
        total, squares = total + bias_delta.double(), squares + bias_delta.double().square()
    constant = math.log(2 / (1 - certainty))
    best = torch.full_like(total, math.inf)
    chosen = torch.full_like(total, 1 - p)
    stopped = torch.zeros_like(total, dtype=torch.bool)
    for step in range(math.floor((Q_TOP - (1 - p)) / Q_STEP + 1e-6) + 1):
        q = (1 - p) + step * Q_STEP
        bound = eta * (1 - (1 - p) / q) * total + eta**2 * phi(p) * squares / (4 * q**2) + constant
        better = bound.abs() < best
        best = torch.where(better, bound.abs(), best)
        chosen = torch.where(better, q, chosen)
        stopped |= ~better
        if int(stopped.sum()) / len(stopped) >= stop_share:
            break
    return float(chosen.mean())


def phi(p: float) -> float:
    """(1 - 2 p) / ln((1 - p) / p): how concentrated a kept-or-dropped draw is (DAREx, eq. 8); 1/2 at p = 1/2."""
    if p in (0.0, 1.0):
        return 0.0
    if abs(p - 0.5) < 1e-6:
        return 0.5
    return (1 - 2 * p) / math.log((1 - p) / p)


def search(score: Callable[[float], float], low: float, high: float, *, coarse: int = 12, fine: int = 6) -> float:
    """Find the value in [low, high] with the highest score, on a geometric grid and a finer one around its best.

    With a score from labels this is DAREx's q_v, with the negative output change its q_e; over eta it tunes the bound.

    Source: DAREx, section 4.2; the authors' two-pass search, on a grid of ours.
    """
    if low >= high:
        return high
    ratio: float = (high / low) ** (1 / (coarse - 1))
    scores = {value: score(value) for value in (min(high, low * ratio**step) for step in range(coarse))}
    best = max(scores, key=lambda value: scores[value])
    around = ratio ** (2 / (fine + 1))
    for step in range(1, fine + 1):
        value = best / ratio * around**step
        if low <= value <= high and value not in scores:
            scores[value] = score(value)
    return max(scores, key=lambda value: scores[value])


def output_change(reference: Tensor, logits: Tensor, *, top: int = 5) -> float:
    """Mean square difference on the logits that the fine-tune holds highest, (.., V): what q_e keeps small.

    Source: DAREx, section 4.2 (without labels), as the authors' code scores decoders.
    """
    wanted, places = reference.float().topk(top, dim=-1)
    return (logits.float().gather(-1, places) - wanted).square().mean().item()


# --- Whole checkpoints in memory, and LoRA


def merge(
    base: Mapping[str, Tensor],
    finetuned: Mapping[str, Tensor],
    config: DarexConfig,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Prune the delta of every matrix and add it to the base.

    Args:
        base: name -> tensor.
        finetuned: likewise; what the base lacks, and what is no matrix of the same shape, is taken as it is.
        config: how.
        inputs: name -> (T, in), for the ways that look at inputs.

    Returns:
        The fine-tune that is left, in its own dtypes.
    """
    merged = {}
    for name, tensor in finetuned.items():
        if tensor.dim() != 2 or name not in base or base[name].shape != tensor.shape:
            merged[name] = tensor
            continue
        delta = tensor.float() - base[name].float()
        seen = (inputs or {}).get(name)
        index = kept_index(name, delta, config, seen)
        kept = scattered(index, delta.flatten()[index], delta.shape)
        factor = factors(delta, kept, config, seen)
        merged[name] = (base[name].float() + factor[:, None] * kept).to(tensor.dtype)
    return merged


def lora_delta(down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """The merged product of a LoRA, ``scaling * up @ down``: A is (r, in), B is (out, r); fp32 (out, in)."""
    return scaling * (up.float() @ down.float())


def prune_lora(name: str, down: Tensor, up: Tensor, p: float | str, q: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Drop the share p of each factor of a LoRA, and divide both by sqrt(q), so that the product is divided by q.

    Pruning the product instead makes it larger than its factors: a rank of 8 is 0.4 % of a matrix of 4096 x 4096.
    The variances of the two masks multiply, so p must be milder than for whole matrices. q = (1 - p)^2 is unbiased.

    Returns:
        A (r, in) and B (out, r), fp32.

    Source: DAREx, section 5 (LoRA), whose details are not published; this reading is ours.
    """
    config = DarexConfig(p=p, rescale="none", seed=seed)
    pruned = []
    for factor, label in ((down, "lora_A"), (up, "lora_B")):
        delta = factor.float()
        index = kept_index(f"{name}.{label}", delta, config)
        pruned.append(scattered(index, delta.flatten()[index], delta.shape) / math.sqrt(q))
    return pruned[0], pruned[1]


def _needed(inputs: Tensor | None) -> Tensor:
    if inputs is None:
        raise ConfigError(
            "this way of pruning looks at what enters each matrix, and nothing was given: calibrate first"
        )
    return inputs
