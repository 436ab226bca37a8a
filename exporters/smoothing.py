"""Before weights are rounded: move scale from channels with large activations into the weights that read them.

A block of weights shares one scale, and so does a block of activations where those are computed in int8. A few
channels of a language model are far larger than the rest, and what is rounded beside them loses its digits. Dividing a
channel by s where it is made, and multiplying the weights that read it by s, changes nothing that the model computes.
That can be done where a channel is made by a linear operation:

* the norm before the attention -> queries, keys and values;
* values -> the attention's output, a channel of a KV head for all query heads that read it;
* the norm before the FFN -> gate and up;
* up -> down, in a gated FFN.

s = a ** strength / w ** (1 - strength), with a the channel's mean magnitude and w the largest weight that reads it.
This is SmoothQuant's formula (Xiao et al. 2023, equation 4, there with the largest activation, and for the norms
alone); AWQ (Lin et al. 2024) measures a as we do, and scales values and up too. Blocks that share weights share s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.activations import mean_over_rows
from compress.calibration import TokenRows
from compress.decoder import Block, Decoder, Projection
from compress.importance import AGGREGATORS
from compress.remote_code import submodule
from compress.result import Progress, Run
from compress.surgery import clone, scale_norm

TINY = 1e-5
"""Activations and weights are taken to be no smaller."""

MOST = 64.0
"""Scales are no further than this from 1: a channel that the text hardly used must not become huge when it is used."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Joint:
    """Channels that one operation makes and linears read.

    Attributes:
        readers: the linears.
        norm: the norm that makes the channels, with its offset; None where a linear does.
        maker: the linear that does; its last outputs are the channels.
        kv_heads: of an attention whose channels, those of all query heads, are made once for each KV head; 0: of none.
    """

    readers: Sequence[Projection]
    norm: tuple[Any, float] | None = None
    maker: Projection | None = None
    kv_heads: int = 0


def smooth(model: PreTrainedModel, rows: TokenRows, strength: float, progress: Progress) -> PreTrainedModel:
    """A model that computes the same and is rounded with less loss.

    Args:
        model: of any layout, in fp32; not changed, and what stays the same is shared with the result.
        rows: text to see activations on.
        strength: between 0, where weights alone are evened out, and 1, where activations alone are.
        progress: told of each row.

    Source: SmoothQuant, section 4; AWQ, section 3.2.
    """
    smoothed = clone(model)
    decoder = Decoder(smoothed)
    groups: dict[tuple[int, ...], list[tuple[Joint, Tensor]]] = {}
    joints = [joint for block in decoder for joint in _joints(block, decoder)]
    points = [joint.readers[0].module for joint in joints]
    magnitude, tokens = AGGREGATORS["mean"], rows.only_tokens()  # AWQ's measure, which did better than the largest
    seen = mean_over_rows(decoder, points, magnitude, tokens, Run(progress), "smooth: see activations")
    for joint, activation in zip(joints, seen, strict=True):
        key = tuple(id(reader.module.weight) for reader in joint.readers)
        groups.setdefault(key, []).append((joint, activation))
    for group in groups.values():
        scaled = _Scaled()
        activation = torch.stack([each for _, each in group]).amax(0).float()
        joint = group[0][0]
        weight = torch.stack([reader.matrix.abs().amax(0) for reader in joint.readers]).amax(0).float()
        scales = activation.clamp(min=TINY) ** strength / weight.clamp(min=TINY) ** (1 - strength)
        scales = (scales / scales.log().mean().exp()).clamp(1 / MOST, MOST)
        made = _per_kv_head(scales, joint, decoder.head_dim)
        for each, _ in group:
            scaled.apply(each, made, _per_query_head(made, each, decoder.head_dim, len(scales)))
    return smoothed


def _joints(block: Block, decoder: Decoder) -> Iterator[Joint]:
    """Those of a block, in order of execution."""
    arch = block.arch
    if block.attention is not None:
        readers = block.attention_in
        yield Joint(readers, norm=(submodule(block.module, arch.attention_norms[0]), arch.norm_offset))
        yield Joint([block.attention_out], maker=readers[-1], kv_heads=decoder.kv_heads)
    if block.has_ffn:
        readers = block.ffn_in
        yield Joint(readers, norm=(submodule(block.module, arch.ffn_norms[0]), arch.norm_offset))
        if len(readers) * readers[-1].fused == 2:
            yield Joint([block.ffn_out], maker=readers[-1])


def _per_kv_head(scales: Tensor, joint: Joint, head_dim: int) -> Tensor:
    """From channels as they are read, (H * D,), to channels as they are made, (K * D,): their geometric mean."""
    if not joint.kv_heads:
        return scales
    return scales.view(joint.kv_heads, -1, head_dim).log().mean(1).exp().flatten()


def _per_query_head(made: Tensor, joint: Joint, head_dim: int, channels: int) -> Tensor:
    """The way back."""
    if not joint.kv_heads:
        return made
    queries = channels // (joint.kv_heads * head_dim)
    return made.view(joint.kv_heads, 1, head_dim).expand(-1, queries, -1).flatten()


class _Scaled:
    """Parameters that were scaled: one that several modules hold is scaled once, and they hold the new one."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def apply(self, joint: Joint, made: Tensor, read: Tensor) -> None:
        """Divide channels where they are made, by `made`, and multiply the weights that read them, by `read`."""
        if joint.norm is not None:
            norm, offset = joint.norm
            scale_norm(norm, 1 / made, offset)
        if joint.maker is not None:
            module, count = joint.maker.module, len(made)

            def divided(outputs: Tensor) -> Tensor:
                factors = torch.ones(len(outputs))
                factors[-count:] = 1 / made
                return outputs * (factors if outputs.dim() == 1 else factors[:, None])

            self._change(module, "weight", divided)
            self._change(module, "bias", divided)
            self._change(module, "lora_left", divided)
        for reader in joint.readers:
            self._change(reader.module, "weight", lambda weight: weight * read)
            self._change(reader.module, "lora_right", lambda right: right * read)

    def _change(self, module: Any, name: str, change: Change) -> None:
        old = getattr(module, name, None)
        if old is None:
            return
        if id(old) not in self._new:  # the old one is held, so that its id stays its own
            self._new[id(old)] = old, nn.Parameter(change(old.detach()), requires_grad=False)
        setattr(module, name, self._new[id(old)][1])
