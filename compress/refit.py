"""Least-squares repair: let the neurons that an FFN keeps make up for those that go.

Not part of the 2SSP paper. FFNs are cut from the first block to the last, and after each cut the output linear is
fitted anew, so that on the calibration rows it gives what the whole FFN gave to the same inputs:

    W' = argmin || Z_K W'^T - Z W^T ||,  W'^T = (Z_K^T Z_K + damping * mean(diag(Z_K^T Z_K)) I)^-1 Z_K^T Z W^T

with Z (N T, F) the hidden neurons, K those that stay, and W (D, F) the output linear. Z comes from the model whose
earlier blocks are cut and fitted already, so that errors do not pile up unseen. A bias stays.

Cost: about two passes per calibration row, a Gram matrix (F, F) and one Cholesky factorisation per block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.activations import entering_block, input_of
from compress.decoder import Decoder
from compress.gating import starting_at
from compress.result import Run
from compress.surgery import keep_neurons

DAMPING = 0.01
"""Share of the mean of the Gram matrix's diagonal that is added to it."""


@torch.no_grad()
def keep_neurons_refitted(
    model: PreTrainedModel, kept: Mapping[int, Tensor], rows: Tensor, run: Run, what: str
) -> None:
    """Keep some neurons of each FFN, and fit its output linear to what the whole FFN gave.

    Args:
        model: changed in place.
        kept: block index -> ascending neuron indices (K,), int64.
        rows: tokens (N, T).
        run: progress and device.
        what: the name under which progress is told.
    """
    decoder = Decoder(model)
    rows = rows.to(run.device)
    entering = [entering_block(decoder, row[None], 0) for row in rows]
    for done, index in enumerate(range(len(decoder)), start=1):
        if index in kept:
            linear = decoder.blocks[index].ffn_out
            fitted = _fit(_gram(decoder, index, rows, entering, linear.module), linear.matrix, kept[index])
            keep_neurons(model, {index: kept[index]})
            linear.replace_matrix(fitted)
        if done < len(decoder):
            for place, row in enumerate(rows):
                with starting_at(decoder, index, entering[place]):
                    entering[place] = entering_block(decoder, row[None], index + 1)
        run.progress(what, done, len(decoder))


def _gram(decoder: Decoder, index: int, rows: Tensor, entering: list[Tensor], linear: nn.Module) -> Tensor:
    """Z^T Z, float64 (F, F), over all tokens of all rows; products in fp32, their sum over rows in fp64."""
    total: Tensor | None = None
    for row, states in zip(rows, entering, strict=True):
        with starting_at(decoder, index, states):
            z = input_of(decoder, row[None], linear).float()
        gram = (z.T @ z).double()
        total = gram if total is None else total.add_(gram)
    assert total is not None
    return total


def _fit(gram: Tensor, matrix: Tensor, kept: Tensor) -> Tensor:
    """W' (D, K) from Z^T Z (F, F), W (D, F) and the indices of the neurons that stay."""
    kept = kept.to(gram.device)
    right = gram[kept] @ matrix.double().T
    left = gram[kept][:, kept]
    left.diagonal().add_(DAMPING * left.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(left)
    if failed:  # only where no neuron that stays was ever active
        found: Tensor = torch.linalg.lstsq(left, right, driver=None if left.is_cuda else "gelsd").solution
        return found.T
    return torch.cholesky_solve(right, factor).T
