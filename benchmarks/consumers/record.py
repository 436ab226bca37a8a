"""What the consumers made of some exports: one JSON record, and the table that documents show of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from benchmarks.consumers.base import NEW_TOKENS, PROMPT, Consumer, Outcome, greedy_text, judge
from benchmarks.machine import Machine, machine
from benchmarks.record import read_as
from compress.schema import Strict
from exporters.base import ExportRecord, read_export
from exporters.onnx_session import MODEL_FILE, graph_of

FORMAT: Final = "foldaway-consumers"


@dataclass(frozen=True)
class Opened:
    """An export and what came of it.

    Attributes:
        source: the model that was exported.
        artifact_id: None for a model that is no artifact.
        layout: "plain", "ragged" or "shared".
        dtype: of the weights.
        graph: its path in the folder.
        bytes: of graph and weights.
        reference: what it generates in our own session.
        outcomes: of the consumers that were asked.
    """

    source: str
    artifact_id: str | None
    layout: str
    dtype: str
    graph: str
    bytes: int
    reference: str
    outcomes: tuple[Outcome, ...]


class ConsumersRecord(Strict):
    """What the consumers made of some exports.

    Attributes:
        id: hash of the rest of the record.
        created: ISO 8601, UTC.
        prompt: what all of them continued.
        new_tokens: at most so many.
        exports: in the order in which they were given.
        command: that repeats this.
        machine: where.
    """

    format: Literal["foldaway-consumers"] = FORMAT
    version: Literal[1] = 1
    id: str = ""
    created: str
    prompt: str
    new_tokens: int
    exports: tuple[Opened, ...]
    command: str
    machine: Machine


def read(path: Path) -> ConsumersRecord:
    """Read and check a record; raises ConfigError as `benchmarks.record.read_as` does."""
    return read_as(ConsumersRecord, FORMAT, path)


def ask(
    exports: Sequence[Path],
    consumers: Mapping[str, Consumer],
    command: str,
    save: Callable[[ConsumersRecord], object] = lambda record: None,
) -> ConsumersRecord:
    """Open each export with each consumer, one after the other.

    Args:
        exports: folders.
        consumers: by name.
        command: that repeats this.
        save: given what is known after each export, for all of them take long.

    Raises:
        BackendError: our own session cannot open one.
        ArtifactError: one is no export.
    """
    record = ConsumersRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        prompt=PROMPT,
        new_tokens=NEW_TOKENS,
        exports=(),
        command=command,
        machine=machine(),
    )
    for path in exports:
        record = record.model_copy(update={"exports": (*record.exports, opened(path, consumers))})
        save(record)
    return record


def opened(path: Path, consumers: Mapping[str, Consumer]) -> Opened:
    """Open one export with each consumer."""
    record, reference = read_export(path), greedy_text(path)
    dtype = str(record.options.dtype)
    outcomes = tuple(judge(name, consumer, path, reference, dtype) for name, consumer in consumers.items())
    return Opened(
        source=record.source.name,
        artifact_id=record.artifact_id,
        layout=layout_kind(record),
        dtype=dtype,
        graph=graph_of(path) or MODEL_FILE,
        bytes=record.bytes,
        reference=reference,
        outcomes=outcomes,
    )


def layout_kind(record: ExportRecord) -> str:
    """The kind of layout that an export's blocks make, in the words of `compress.layout.Layout.kind`."""
    if any(block["shares_with"] is not None for block in record.blocks):
        return "shared"
    first = record.blocks[0]
    whole = not first["attention"]["no_op"] and not first["ffn"]["no_op"]
    return "plain" if whole and all(block == first for block in record.blocks) else "ragged"


# --- What a person reads


def table(record: ConsumersRecord) -> str:
    """Exports by consumers, as Markdown: "yes", or "no" with the reasons below the table."""
    names = list(dict.fromkeys(outcome.consumer for export in record.exports for outcome in export.outcomes))
    reasons: list[str] = []
    lines = [("export", *names), tuple("---" for _ in range(len(names) + 1))]
    for export in record.exports:
        by_name = {outcome.consumer: outcome for outcome in export.outcomes}
        cells = (_cell(by_name[name], reasons) if name in by_name else "–" for name in names)
        lines.append((_label(export), *cells))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _label(export: Opened) -> str:
    folder = Path(export.graph).parent.name
    return f"{export.layout}, {export.dtype}" + (f", in `{folder}/`" if folder else "")


def _cell(outcome: Outcome, reasons: list[str]) -> str:
    """One cell; a reason is written once, below the table."""
    if outcome.ok:
        return "yes"
    reason = (outcome.reason or "").replace("|", "&#124;")
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"
