"""One side of a comparison: an ONNX export, an artifact or a model, ready to be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from compress import budget
from compress.calibration import context_length_of
from compress.evaluate import Logits, logits_of
from compress.sources import Origin, load
from exporters.base import is_export, read_export
from exporters.onnx_session import OnnxSession, load_tokenizer


@dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to be asked.

    Attributes:
        path: an export, an artifact or a model, as it would be given to ``foldaway serve``.
        origin: of the model behind it.
        logits: whole forward passes.
        parameters: distinct parameters.
        size_bytes: graph and weights on disk, or in memory where the source is not a folder of its own.
        session: the ONNX session, for an export.
        form: for example "int4 ONNX".
        tokenizer: of the model.
        context_length: the most tokens of a window.
    """

    path: str
    origin: Origin
    logits: Logits
    parameters: int
    size_bytes: int
    session: OnnxSession | None
    form: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int


def open_side(path: str) -> Side:
    """Open an ONNX export, an artifact or a model."""
    if is_export(path):
        record = read_export(path)
        session = OnnxSession(path)
        source = record.source
        origin = Origin(source.name, source.kind, source.licence, source.quantised_from, record.artifact_id)
        form = f"{record.options.dtype} ONNX"
        tokenizer = load_tokenizer(path)
        return Side(
            path,
            origin,
            session.logits,
            record.parameters,
            record.bytes,
            session,
            form,
            tokenizer,
            session.context_length,
        )
    loaded = load(path)
    tensors = {id(p): p.numel() * p.element_size() for p in loaded.model.parameters()}
    weights = list(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    size = sum(file.stat().st_size for file in weights) or sum(tensors.values())
    form = f"{str(loaded.model.dtype).removeprefix('torch.').replace('float', 'fp')} PyTorch"
    parameters = budget.count(loaded.model).total
    return Side(
        path,
        loaded.origin,
        logits_of(loaded.model),
        parameters,
        size,
        None,
        form,
        loaded.tokenizer,
        context_length_of(loaded.model),
    )
