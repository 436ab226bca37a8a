"""Calibration of a delta: what enters each matrix of the fine-tune, and a search for one q (or the bound's eta)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.delta.checkpoint import Tensors, model_folder, roles_of
from compress.delta.pack import Storage, bias_delta, prune
from compress.evaluate import cross_entropy, logits_of
from compress.finetune import Example, tokens_of
from compress.methods.darex import DarexConfig, output_change, search
from compress.result import Progress, Run, no_progress

Score = Callable[[PreTrainedModel], float]
"""How good a model is; higher is better."""

ETAS = (0.05, 5.0)
"""Where eta of the paper's bound is searched: the authors' values are 0.27 to 1.01."""
TOP = 5
"""Logits of the fine-tune that an output change is measured on."""


@torch.no_grad()
def matrix_inputs(model: nn.Module, names: Iterable[str], rows: Tensor, run: Run) -> dict[str, Tensor]:
    """What enters some matrices on calibration rows.

    Args:
        model: takes ``input_ids``; run without gradients, one row at a time.
        names: of weights, as in the model's state.
        rows: tokens (N, T).
        run: progress and device.

    Returns:
        Name -> (N T, in), in the model's dtype; matrices that read the same tensor share one.
    """
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    pieces: dict[str, list[Tensor]] = {}
    readers: dict[str, str] = {}
    try:
        for done, row in enumerate(rows):
            model(input_ids=row[None].to(run.device))
            first: dict[int, str] = {}
            for name, tensor in seen.items():
                leader = first.setdefault(id(tensor), name)
                readers[name] = leader
                if leader == name:
                    pieces.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]).cpu())
            run.progress("inputs of matrices", done + 1, len(rows))
    finally:
        for hook in hooks:
            hook.remove()
    whole = {name: torch.cat(parts) for name, parts in pieces.items()}
    return {name: whole[leader] for name, leader in readers.items()}


def output_score(reference: PreTrainedModel, rows: Tensor) -> Score:
    """The negative output change from the fine-tune, which needs no labels: DAREx's q_e.

    Args:
        reference: the fine-tune; it is run here, and not needed afterwards.
        rows: tokens (N, T).

    Source: DAREx, section 4.2.
    """
    logits = logits_of(reference)
    kept = [logits(row[None])[0].float().topk(TOP, dim=-1) for row in rows]

    def score(model: PreTrainedModel) -> float:
        own = logits_of(model)
        changes = [
            output_change(values, own(row[None])[0].gather(-1, places), top=TOP)
            for row, (values, places) in zip(rows, kept, strict=True)
        ]
        return -sum(changes) / len(changes)

    return score


def label_score(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int = 512) -> Score:
    """The mean log-likelihood of the responses, per token in nats: DAREx's q_v, with likelihood for the metric."""
    rows = [tokens_of(example, tokenizer, max_length) for example in examples]

    def score(model: PreTrainedModel) -> float:
        logits, total, count = logits_of(model), 0.0, 0
        for prompt, response in rows:
            tokens = torch.tensor([*prompt, *response])
            learnt = min(len(response), len(tokens) - 1)
            total += cross_entropy(logits(tokens[None])[0], tokens, learnt)
            count += learnt
        return -total / count

    return score


@torch.no_grad()
def put_pruned(
    model: nn.Module,
    base: Tensors,
    finetuned: Tensors,
    config: DarexConfig,
    storage: Storage,
    inputs: Mapping[str, Tensor],
) -> None:
    """Give a live model the weights that a package would bring back; tensors that are not pruned stay as they are."""
    live = model.state_dict(keep_vars=True)
    for name, transposed in roles_of(model_folder(base, finetuned)).matrices.items():
        if name not in live or name not in finetuned.names or name not in base.names:
            continue
        before = base.get(name).to(torch.float32, copy=True)  # it may be a view of a file
        delta = finetuned.get(name).float() - before
        delta, before = (delta.T, before.T) if transposed else (delta, before)
        bias = bias_delta(name, base, finetuned, config)
        pruned = prune(name, delta.contiguous(), config, storage, inputs.get(name), bias)
        found = before.reshape(-1)
        found[pruned.index] += pruned.addend((delta.shape[0], delta.shape[1]))
        whole = found.view(delta.shape)
        live[name].copy_(whole.T if transposed else whole)


def tuned(
    model: PreTrainedModel,
    base: Tensors,
    finetuned: Tensors,
    config: DarexConfig,
    storage: Storage,
    score: Score,
    inputs: Mapping[str, Tensor],
    progress: Progress = no_progress,
) -> DarexConfig:
    """Search what a configuration leaves open: one q for all matrices, or the bound's eta.

    The mask is the one that will be stored, so the search may fit it.

    Args:
        model: the fine-tune, live; its matrices are overwritten.
        base: the base's tensors.
        finetuned: the fine-tune's tensors.
        config: rescale="search", or rescale="paper-bound" with ``eta=None``.
        storage: rounding is counted in.
        score: of a candidate.
        inputs: of matrices, for the bound.
        progress: told of each candidate.

    Returns:
        The configuration with q or eta filled in.
    """
    tried = 0

    def filled(value: float) -> DarexConfig:
        if config.rescale == "search":
            return dataclasses.replace(config, rescale="fixed", q=value)
        return dataclasses.replace(config, eta=value)

    def score_of(value: float) -> float:
        nonlocal tried
        put_pruned(model, base, finetuned, filled(value), storage, inputs)
        tried += 1
        progress("searching q", min(tried, 17), 18)
        return score(model)

    low, high = (float(config.density), 1.0) if config.rescale == "search" else ETAS
    found = filled(search(score_of, low, high))
    progress("searching q", 18, 18)
    return found
