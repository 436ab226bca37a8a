"""Export to a Hugging Face folder: stock for a plain model, with our remote-code module for a ragged or shared one.

The folder needs transformers and nothing of ours: ``AutoModelForCausalLM.from_pretrained(path)``, with
``trust_remote_code=True`` unless it is plain, or ``AutoModelForImageTextToText`` for a vision-language model. It is
reloaded in just that way to be checked; a vision-language model on text alone. With ``expand`` blocks that share
weights get copies of their own, for runtimes that cannot share: as large as if nothing had been shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, dynamic_module_utils

from compress.arch import composite_of
from compress.artifact import write_model
from compress.device import DTYPES
from compress.evaluate import logits_of
from compress.files import new_folder
from compress.layout import Layout, layout_of
from compress.result import Progress, no_progress
from compress.sources import Loaded, auto_class
from compress.surgery import clone, expand
from exporters.base import Exported, ExportOptions, check_unused, choose_dtype, exported, in_dtype, seal
from exporters.parity import Decode, Parity, Side, check

TOLERANCE = 1e-3
MIN_AGREEMENT = 0.99
ROUNDED_MIN_AGREEMENT = 0.8
"""Where the dtype rounds the weights. Only to catch garbage: what rounding costs is for a quality gate to judge."""


def export(
    loaded: Loaded, path: Path, options: ExportOptions, check_tokens: Tensor, progress: Progress = no_progress
) -> Exported:
    """Write a Hugging Face folder and check it.

    Args:
        loaded: a model of any layout; not changed.
        path: the folder to write; it appears whole, or not at all.
        options: dtype ``"fp32"``, ``"fp16"``, ``"bf16"``, or None to keep what the source has.
        check_tokens: int64 (B, T), tokens to compare source and export on.
        progress: told of tokens checked.

    Raises:
        ConfigError: `path` is not empty, or the dtype is not one of this format.
        ParityError: what was written does not compute what its source does, or with rounded weights, what those do.
    """
    options = complete(options, loaded.model.dtype)
    dtype = str(options.dtype)
    model = in_dtype(loaded.model, DTYPES[dtype])
    if options.expand:
        model = clone(model)
        expand(model)
    with new_folder(path) as folder:
        write_model(model, loaded.tokenizer, folder, loaded.processor)
        parity = check_parity(loaded.model, model, folder, check_tokens, progress)
        layout = layout_of(model)
        code = "" if layout.kind == "plain" else ", trust_remote_code=True"
        opens = f"{auto_class(model.config.model_type).__name__}.from_pretrained(PATH{code})"
        notes = _cost_of_expanding(layout_of(loaded.model), layout)
        (folder / "README.md").write_text(card(loaded, dtype, parity, notes, ("python", opens)), encoding="utf-8")
        record = seal(folder, dataclasses.replace(loaded, model=model), "hf", options, parity)
    return exported(path, record)


def complete(options: ExportOptions, source: torch.dtype) -> ExportOptions:
    """Put the dtype of the source where none was asked for.

    Raises:
        ConfigError: an option that this format has no use for.
    """
    return with_dtype(options, source, "hf", ("dtype", "expand"))


def with_dtype(options: ExportOptions, source: torch.dtype, to: str, used: tuple[str, ...]) -> ExportOptions:
    """Options of a format that stores what transformers loads, with the dtype of the source where none was asked for.

    Raises:
        ConfigError: an option that is not one of those used.
    """
    stored = next((name for name, dtype in DTYPES.items() if dtype == source), "fp32")
    check_unused(options, to, used)
    return dataclasses.replace(options, dtype=choose_dtype(to, options, tuple(DTYPES), default=stored))


def check_parity(
    source: PreTrainedModel, stored: PreTrainedModel, folder: Path, tokens: Tensor, progress: Progress
) -> Parity:
    """Reload a folder without our loader, and compare it with its source.

    Raises:
        ParityError: as `compare`.
    """
    with _private_modules():
        reloaded = auto_class(source.config.model_type).from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=layout_of(stored).kind != "plain",  # the code that it carries then is ours
            local_files_only=True,
        )
    return compare(source, stored, reloaded, tokens, progress)


def compare(
    source: PreTrainedModel, stored: PreTrainedModel, reloaded: PreTrainedModel, tokens: Tensor, progress: Progress
) -> Parity:
    """Compare what was read back with its source, all in fp32 so that rounding of activations hides nothing.

    Where the dtype rounded the weights, two things are compared: the folder with the source, by the share of equal
    choices, and the folder's decoding with the rounded model in memory, to the same tolerance as exact weights.

    Args:
        source: the model that is exported.
        stored: the model that was written.
        reloaded: what was written, read back in fp32.
        tokens: int64 (B, T), tokens to compare on.
        progress: told of tokens checked.

    Raises:
        ParityError: it does not compute what its source does, or with rounded weights, what those do.
    """
    merged = stored is not source and any(block.adapter_rank for block in layout_of(source).blocks)
    rounded = _rounds(source, stored.dtype) or merged
    decode = _decode(reloaded)
    return check(
        logits_of(in_dtype(source, torch.float32)),
        Side(logits_of(reloaded), decode),
        tokens,
        tolerance=TOLERANCE,
        min_argmax_agreement=ROUNDED_MIN_AGREEMENT if rounded else MIN_AGREEMENT,
        full_precision=Side(logits_of(in_dtype(stored, torch.float32)), decode) if rounded else None,
        progress=progress,
    )


def _rounds(source: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a change of dtype changes any weight."""
    return any(not torch.equal(p.float(), p.to(dtype).float()) for p in source.parameters())


@contextlib.contextmanager
def _private_modules() -> Iterator[None]:
    """Let transformers copy remote code into a folder that goes away, not into the user's cache."""
    code: Any = dynamic_module_utils
    usual = code.HF_MODULES_CACHE
    with tempfile.TemporaryDirectory() as scratch:
        code.HF_MODULES_CACHE = scratch
        try:
            yield
        finally:
            code.HF_MODULES_CACHE = usual
            sys.path[:] = [entry for entry in sys.path if entry != scratch]


def _decode(model: PreTrainedModel) -> Decode:
    """Decoding with the cache that transformers makes for the model."""

    @torch.no_grad()
    def decode(tokens: Tensor) -> Iterator[Tensor]:
        past = None
        for token in tokens:
            output = model(input_ids=token.view(1, 1), past_key_values=past, use_cache=True)
            past = output.past_key_values
            yield output.logits[0, -1]

    return decode


def card(loaded: Loaded, dtype: str, parity: Parity, notes: Sequence[str], opens: tuple[str, str]) -> str:
    """README.md of an export folder.

    Args:
        loaded: the source.
        dtype: how the weights are stored.
        parity: what the check found.
        notes: what else a reader must know.
        opens: the line that loads it, after the language that it is in.
    """
    origin = loaded.origin
    name = Path(origin.name).name
    header = ["---", *([f"license: {origin.licence.lower()}"] if origin.licence else [])]
    task = "text-generation" if composite_of(loaded.model.config) is None else "image-text-to-text"
    header += ["library_name: transformers", f"pipeline_tag: {task}", "tags:", "- foldaway", "---"]
    against = "the source" if parity.decode_against == "source" else "the stored weights in memory"
    made_from = f"`{name}`" + (f" (artifact {origin.artifact_id})" if origin.artifact_id else "")
    language, line = opens
    lines = [
        "",
        f"# {name}, {dtype}",
        "",
        f"Made by foldaway from {made_from}; licence of the weights: {origin.licence or 'not stated by the source'}.",
        "",
        f"Reloaded and compared with its source on {parity.tokens} tokens, both computed in fp32: worst logit "
        f"difference {parity.max_abs_difference:.3g}, same preferred token at {parity.argmax_agreement:.1%} of them. "
        f"Decoding token by token with a cache, against {against}: {parity.decode_max_abs_difference:.3g}.",
        *(text for note in notes for text in ("", f"{note}.")),
        "",
        f"```{language}",
        line,
        "```",
    ]
    return "\n".join([*header, *lines]) + "\n"


def _cost_of_expanding(source: Layout, written: Layout) -> list[str]:
    """What the card says where sharing was given up."""
    if source.kind != "shared" or written.kind == "shared":
        return []
    blocks = len(source.blocks)
    return [
        f"In its source {source.distinct} sets of weights serve {blocks} blocks. Here every block has a copy of its "
        f"own, for runtimes that cannot share: {blocks} blocks are stored in place of {source.distinct}",
    ]
