"""What an interrupted run leaves behind, and how the next one knows that it is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from compress.artifact import versions
from compress.decoder import Decoder
from compress.layout import layout_of


def identity(decoder: Decoder, what: str, seen: Iterable[Tensor]) -> str:
    """Tells whether two runs begin alike: same purpose, data, shape and weights, and the same code.

    Args:
        decoder: the model.
        what: the purpose, with every option that matters.
        seen: the data, and what enters the last block for some of them, which stands for the weights of all blocks
            below.

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256(repr((what, layout_of(decoder.model), versions())).encode())
    below = {id(p) for block in decoder.blocks[:-1] for p in block.module.parameters()}
    above = (p.detach() for p in decoder.model.parameters() if id(p) not in below)
    for tensor in (*seen, *above):
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
