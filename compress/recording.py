"""Calibration with images: rows of what enters the language tower of a vision-language model.

>>> inputs = (processor(images=image, text=text, return_tensors="pt") for image, text in pairs)
>>> rows = record(model, inputs, length=1024)
>>> METHODS["fusegpt"].compress(model, rows, config)

The vision tower and the projector run once, here; what calibrates on the rows runs the language tower alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.activations import stopping_before
from compress.arch import composite_of
from compress.calibration import Recorded, TokenRows, check_length, context_length_of, hashed_rows
from compress.errors import ConfigError, UnsupportedArchitecture
from compress.remote_code import submodule
from compress.surgery import clone


@torch.no_grad()
def record(
    model: PreTrainedModel,
    inputs: Iterable[Mapping[str, Any]],
    *,
    length: int | None = None,
    source: str = "images and text",
) -> TokenRows:
    """Run a vision-language model on images with text, up to where its language tower begins, and keep what enters it.

    Images take up tokens as text does. Rows must have one length: `length` cuts them to their first so many tokens.

    Args:
        model: a composite; not changed.
        inputs: what a processor gives for one or more rows at a time, as tensors: ``input_ids`` (B, T),
            ``pixel_values`` and whatever else belongs to the model.
        length: tokens a row, T; None takes rows as they are, which must then have one length.
        source: where they come from, for records.

    Returns:
        Rows whose embeddings, N x T x D numbers in the model's dtype, lie on the CPU.

    Raises:
        UnsupportedArchitecture: the model reads nothing but text.
        ConfigError: no rows, rows of different lengths, padding, or a length beyond the model's context.
    """
    composite = composite_of(model.config)
    if composite is None:
        raise UnsupportedArchitecture(f"a {model.config.model_type} model reads text only: draw rows of text instead")
    model = clone(model)  # some models keep positions of the last image for the next pass
    tower = submodule(model, composite.tower)
    entered: list[dict[str, Any]] = []
    tower.register_forward_pre_hook(lambda module, args, given: entered.append(given), with_kwargs=True)
    tokens: list[Tensor] = []
    embeds: list[Tensor] = []
    positions: list[Tensor | None] = []
    for given in inputs:
        wanted = tokens[0].shape[1] if tokens else length
        tokens.append(_tokens(given, wanted, exact=length is None))
        check_length(tokens[0].shape[1], context_length_of(model))
        here = {name: each.to(model.device) if isinstance(each, Tensor) else each for name, each in given.items()}
        with stopping_before(tower):
            model(**here, use_cache=False)
        told = entered[-1].get("position_ids")
        embeds.append(entered[-1]["inputs_embeds"][:, :length].cpu())
        positions.append(None if told is None else told.movedim(-2, 0)[..., :length].cpu())
        entered.clear()
    if not tokens:
        raise ConfigError("there is nothing to record: give at least one row of inputs")
    recorded = Recorded(torch.cat(embeds), _all_positions(positions, [len(rows) for rows in embeds]))
    return hashed_rows(torch.cat(tokens), source, seed=0, recorded=recorded)


def _tokens(given: Mapping[str, Any], length: int | None, *, exact: bool) -> Tensor:
    """The first tokens of some rows, of which all rows need as many; None takes all."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise ConfigError("there are no input_ids: call the processor with text, images and return_tensors='pt'")
    found = ids.shape[1]
    length = found if length is None else length
    if found < length or (exact and found != length):
        raise ConfigError(
            f"rows of {found} tokens cannot lie beside rows of {length}: all rows need one length, so give longer "
            "texts, or say length=T to cut every row to its first T tokens"
        )
    if mask is not None and not mask[:, :length].all():
        raise ConfigError(
            f"a row is padded within its first {length} tokens: give longer texts or ask for a shorter length, or "
            "give rows one at a time, without padding"
        )
    return ids[:, :length].cpu()


def _all_positions(positions: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    """Positions of all rows, row axis first; a tower that is told none counts from 0, on every axis alike."""
    told = next((each for each in positions if each is not None), None)
    if told is None:
        return None
    counted = torch.arange(told.shape[-1]).expand(told.shape[1:])
    pairs = zip(positions, rows, strict=True)
    return torch.cat([counted.expand(count, *counted.shape) if each is None else each for each, count in pairs])
