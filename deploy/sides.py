"""One side of a comparison: an ONNX export, an artifact or a model, ready to be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.scoring import Scorer, logits_scorer, torch_scorer
from compress import budget
from compress.calibration import context_length_of
from compress.errors import ConfigError
from compress.evaluate import Logits, logits_of
from compress.sources import Origin, load
from exporters.base import ExportRecord, is_export, read_export
from exporters.onnx_session import OnnxSession, load_tokenizer


@dataclass(frozen=True)
class Side:
    """One side of a comparison, ready to be asked.

    Attributes:
        path: an export, an artifact or a model, as it would be given to ``foldaway serve``.
        origin: of the model behind it.
        logits: whole forward passes.
        scorer: continuations of a prefix, for zero-shot tasks.
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
    scorer: Scorer
    parameters: int
    size_bytes: int
    session: OnnxSession | None
    form: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int


def open_side(path: str, device: str = "cpu") -> Side:
    """Open an export, an artifact or a model; PyTorch computes on `device`, an ONNX export on the CPU."""
    record = read_export(path) if is_export(path) else None
    if record is not None and record.to == "onnx":
        session = OnnxSession(path)
        form = f"{record.options.dtype} ONNX"
        tokenizer, context = load_tokenizer(path), session.context_length
        origin, size = _origin(record), record.bytes
        scorer = logits_scorer(session.logits)
        return Side(path, origin, session.logits, scorer, record.parameters, size, session, form, tokenizer, context)
    loaded = load(path)
    loaded.model.to(device)  # type: ignore[arg-type]
    tensors = {id(p): p.numel() * p.element_size() for p in loaded.model.parameters()}
    weights = list(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    size = sum(file.stat().st_size for file in weights) or sum(tensors.values())
    form = form_of(loaded.model)
    origin = _origin(record) if record is not None else loaded.origin
    parameters, context = budget.count(loaded.model).total, context_length_of(loaded.model)
    logits, scorer = logits_of(loaded.model), torch_scorer(loaded.model)
    return Side(path, origin, logits, scorer, parameters, size, None, form, loaded.tokenizer, context)


def form_of(model: PreTrainedModel) -> str:
    """For example "fp32 PyTorch", or "bf16 PyTorch"."""
    dtype = str(model.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    return f"{dtype} PyTorch"


def _origin(record: ExportRecord) -> Origin:
    source = record.source
    return Origin(source.name, source.kind, source.licence, source.quantised_from, record.artifact_id)


def check_comparable(baseline: Side, candidate: Side) -> None:
    """Refuse sides whose tokens mean different things.

    Raises:
        ConfigError: their vocabularies differ.
    """
    if baseline.tokenizer.get_vocab() != candidate.tokenizer.get_vocab():
        raise ConfigError(
            f"{candidate.path} and {baseline.path} have different tokenizers, so their perplexities cannot be "
            "compared; give two models of one family"
        )
