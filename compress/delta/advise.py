"""How to store a fine-tune: measure its delta, then follow the paper's decision flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.delta.checkpoint import Tensors, model_folder, roles_of
from compress.errors import ConfigError
from compress.methods.darex import influence_ratio
from compress.result import Progress, no_progress

LARGE_DELTA = 5e-3
"""Mean magnitude from which a delta is large, like one of continued pre-training. A choice of ours: the fine-tunes that
DAREx lists lie below 0.001, and the one on which random dropping failed at 0.017."""
DROPS = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class MatrixDelta:
    """What was measured of one matrix.

    Attributes:
        name: of the tensor.
        parameters: elements.
        mean_abs: mean magnitude of the delta.
        exact_zeros: share of elements that did not change.
        influence_ratio: R; None without calibration text.
    """

    name: str
    parameters: int
    mean_abs: float
    exact_zeros: float
    influence_ratio: float | None


@dataclass(frozen=True)
class Outlook:
    """What dropping a share p would do, on average over matrices.

    Attributes:
        p: share dropped.
        dare_error: relative root mean square error of a matrix's output change with q = 1 - p; None without R.
        best_error: with the best q of each matrix; None without R.
        bytes: of a package with int8 values, positions from a seed, a scale per tensor.
    """

    p: float
    dare_error: float | None
    best_error: float | None
    bytes: int


@dataclass(frozen=True)
class Advice:
    """What was measured, and what to do.

    Attributes:
        mean_abs_delta: over all matrices.
        exact_zeros: share of their elements that did not change.
        influence_ratio: mean R; None without calibration text.
        matrices: one by one.
        changed_rows: rows of embeddings that changed, and how many there are.
        other_bytes: of tensors that will be stored as they are.
        outlook: for several p.
        options: of ``foldaway delta pack``, as ``--set`` takes them.
        reasons: one sentence each.
    """

    mean_abs_delta: float
    exact_zeros: float
    influence_ratio: float | None
    matrices: tuple[MatrixDelta, ...]
    changed_rows: tuple[int, int]
    other_bytes: int
    outlook: tuple[Outlook, ...]
    options: dict[str, float | str]
    reasons: tuple[str, ...]


def advise(
    base: Tensors,
    finetuned: Tensors,
    inputs: Callable[[str], Tensor | None] = lambda name: None,
    *,
    labels: bool = False,
    progress: Progress = no_progress,
) -> Advice:
    """Measure a delta and recommend p and a method.

    Args:
        base: the base's tensors.
        finetuned: the fine-tune's tensors.
        inputs: name of a matrix -> what enters it, (T, in); None without calibration text.
        labels: whether labelled examples are at hand.
        progress: told of each tensor.

    Raises:
        ConfigError: there is nothing to prune.

    Source: DAREx, the decision flow of its appendix; R and the errors foreseen from it are ours.
    """
    roles = roles_of(model_folder(base, finetuned))
    there, matrices = set(base.names), []
    changed, rows, other = 0, 0, 0
    for done, name in enumerate(finetuned.names, start=1):
        tensor = finetuned.get(name)
        before = base.get(name) if name in there else None
        if before is None or before.shape[1:] != tensor.shape[1:]:
            other += tensor.numel() * tensor.element_size()
        elif name in roles.embeddings:
            old = min(len(before), len(tensor))
            changed += int((tensor[:old] != before[:old]).any(1).sum()) + len(tensor) - old
            rows += len(tensor)
        elif name in roles.matrices and before.shape == tensor.shape:
            if not torch.equal(before, tensor):
                delta = tensor.float() - before.float()
                matrices.append(_measured(name, delta.T if roles.matrices[name] else delta, inputs(name)))
        elif not torch.equal(before, tensor):
            other += tensor.numel() * tensor.element_size()
        progress("measuring the delta", done, len(finetuned.names))
    if not matrices:
        raise ConfigError("no matrix differs between the two models: there is nothing to prune")
    total = sum(matrix.parameters for matrix in matrices)
    mean_abs = sum(matrix.mean_abs * matrix.parameters for matrix in matrices) / total
    ratios = [matrix.influence_ratio for matrix in matrices if matrix.influence_ratio is not None]
    ratio = sum(ratios) / len(ratios) if ratios else None
    width = finetuned.shape(next(iter(roles.embeddings & set(finetuned.names)), matrices[0].name))[-1]
    fixed = other + changed * (width + 8)
    options, reasons = _recommend(mean_abs, ratio, labels=labels)
    if changed > rows / 10:
        reasons.append(
            f"{changed:,} of {rows:,} embedding rows changed and are stored as int8, "
            f"{changed * (width + 8) / 1e6:,.1f} MB: train without them if you can"
        )
    reasons.append(
        "if you can train once more, foldaway finetune --set optimizer=adamr-l2 keeps the delta small, and far more "
        "of it can be dropped"
    )
    return Advice(
        mean_abs_delta=mean_abs,
        exact_zeros=sum(matrix.exact_zeros * matrix.parameters for matrix in matrices) / total,
        influence_ratio=ratio,
        matrices=tuple(matrices),
        changed_rows=(changed, rows),
        other_bytes=other,
        outlook=tuple(_outlook(p, ratios, total, fixed) for p in DROPS),
        options=options,
        reasons=tuple(reasons),
    )


def _measured(name: str, delta: Tensor, inputs: Tensor | None) -> MatrixDelta:
    ratio = None if inputs is None else influence_ratio(delta, inputs)
    zeros = 1 - int(delta.count_nonzero()) / delta.numel()
    return MatrixDelta(name, delta.numel(), float(delta.abs().mean()), zeros, ratio)


def _outlook(p: float, ratios: list[float], parameters: int, fixed: int) -> Outlook:
    """The mean square error relative to S^2 is p R / (1 - p) with q = 1 - p, and p R / (1 - p + p R) at its best."""
    size = round(parameters * (1 - p)) + fixed
    if not ratios:
        return Outlook(p, None, None, size)
    dare = sum((p * ratio / (1 - p)) ** 0.5 for ratio in ratios) / len(ratios)
    best = sum((p * ratio / (1 - p + p * ratio)) ** 0.5 for ratio in ratios) / len(ratios)
    return Outlook(p, dare, best, size)


def _recommend(mean_abs: float, ratio: float | None, *, labels: bool) -> tuple[dict[str, float | str], list[str]]:
    """The decision flow: large deltas by importance, small ones at random, and q by what data there is."""
    if mean_abs >= LARGE_DELTA:
        keep = "magnitude" if ratio is None else "wanda"
        rescale = "none" if ratio is None else "least-squares"
        why = f"the mean magnitude of the delta, {mean_abs:.2g}, is large (from {LARGE_DELTA:g}): random dropping fails"
        by = "there is no text, so magnitude decides" if ratio is None else "text tells which inputs matter"
        return {"p": 0.5, "keep": keep, "rescale": rescale, "values": "int8"}, [why, by]
    reasons = [f"the mean magnitude of the delta, {mean_abs:.2g}, is small: random elements stand for all of them"]
    options: dict[str, float | str] = {"p": 0.95, "keep": "random", "rescale": "dare", "values": "int8"}
    if labels:
        reasons.append("labelled examples tell the q that serves the task best")
        return {**options, "rescale": "search"}, reasons
    if ratio is not None:
        reasons.append(
            f"R is {ratio:.2g}: the table says how noisy the outputs of single matrices become. Much of that cancels "
            "in the whole model, so measure it end to end; beyond p = 0.99 try rescale=search beside dare"
        )
    return options, reasons
