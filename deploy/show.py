"""What a path is, in words and in data: an artifact, an export, a delta, a search or a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import delta_table, evaluation, table
from benchmarks import record as records
from benchmarks.evaluation import Evaluation
from benchmarks.record import Record
from benchmarks.table import Table
from benchmarks.throughput import record as throughput
from benchmarks.words import gains_and_losses, headline
from compress import artifact
from compress.delta.checkpoint import is_delta
from compress.delta.package import Package
from compress.errors import ConfigError
from compress.methods import METHODS
from deploy import fit_record
from deploy.deltas import summary
from exporters.base import is_export, read_export


def describe(path: Path) -> tuple[str, list[str], dict[str, Any]]:
    """Describe what lies at a path.

    Returns:
        Its kind, lines for a person, and its content.

    Raises:
        ConfigError: it is nothing of ours.
    """
    if path.is_file():
        return _describe_record(path)
    if artifact.is_artifact(path):
        manifest = artifact.verify(path)
        return "artifact", _artifact_lines(manifest), json.loads(manifest.model_dump_json())
    if is_export(path):
        export = read_export(path)
        maker = f"artifact {export.artifact_id}" if export.artifact_id else "a model that is no artifact"
        words = [
            f"{export.options.dtype} {export.to} export of {export.source.name}",
            f"{export.parameters:,} parameters in {export.bytes / 1e6:.1f} MB",
            f"made from {maker}",
        ]
        return "export", words, json.loads(export.model_dump_json())
    if is_delta(path):
        description = Package(path).description
        return "delta", summary(description), json.loads(description.model_dump_json())
    if (path / fit_record.FILE).is_file():
        return _describe_record(path / fit_record.FILE)
    raise ConfigError(f"{path} is no artifact, export, delta or record of foldaway's")


def _describe_record(path: Path) -> tuple[str, list[str], dict[str, Any]]:
    """A record of a run, a benchmark or a search, an evaluation, a suite's table, or models that were served."""
    found: Record | Evaluation | Table
    kind = records.format_of(path)
    if kind == evaluation.FORMAT:
        found = evaluation.read(path)
        return "evaluation", evaluation.outcome(found), json.loads(found.model_dump_json())
    if kind == table.FORMAT:
        found = table.read(path)
        words = [f"{found.title} on {found.model.name}, profile {found.profile}: {len(found.cells)} cells"]
        return "table", words, json.loads(found.model_dump_json())
    if kind == delta_table.FORMAT:
        deltas = delta_table.read(path)
        pairs = ", ".join(f"{pair.name} ({len(pair.cells)})" for pair in deltas.pairs)
        words = [f"{deltas.title}, profile {deltas.profile}: ways to store {pairs}"]
        return "delta table", words, json.loads(deltas.model_dump_json())
    if kind == fit_record.FORMAT:
        search = fit_record.read(path)
        return "search", fit_record.outcome(search), json.loads(search.model_dump_json())
    if kind == throughput.FORMAT:
        speeds = throughput.read(path)
        words = [f"{speeds.title}, by {throughput.engine(speeds)}", *throughput.summary_lines(speeds)]
        return "throughput", words, json.loads(speeds.model_dump_json())
    found = records.read(path)
    return "record", [found.title, *outcome(found)], json.loads(found.model_dump_json())


def _artifact_lines(manifest: artifact.Manifest) -> list[str]:
    blocks = f"{len(manifest.layout.blocks)} blocks"
    if manifest.layout.kind == "shared":
        stored = sum(block["shares_with"] is None for block in manifest.layout.blocks)
        blocks += f", of which {stored} are stored"
    words = [
        f"artifact {manifest.id}: a {manifest.layout.kind} {manifest.model_type} model of {blocks}",
        f"made from {manifest.origin.name}; {manifest.parameters['total']:,} parameters",
        "every file is as the manifest says",
    ]
    for step in manifest.steps:
        gone = f"{step.numbers['sparsity_of_blocks']:.1%} of the blocks' parameters removed"
        paper = METHODS[step.method].paper if step.method in METHODS else step.method
        words.append(f"  {paper}: {step.method} {json.dumps(step.config)}: {gone}")
    return words


def outcome(record: records.Record) -> list[str]:
    """What a record found, in words: the verdict, what was gained, what was lost."""
    gained, lost, same = gains_and_losses(record)
    lines = [headline(record)]
    for heading, words in (("Gained", gained), ("Lost", lost), ("Unchanged", same)):
        if words:
            lines.append(f"{heading}: {'; '.join(words)}")
    return lines
