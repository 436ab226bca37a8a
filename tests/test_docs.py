"""What the documents show can be read by the code, and what the code can read is described."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from pydantic import BaseModel

from benchmarks import delta_table as delta_tables
from benchmarks import evaluation as evaluations
from benchmarks import table as tables
from benchmarks.consumers.record import ConsumersRecord
from benchmarks.delta_table import DeltaTable
from benchmarks.evaluation import Evaluation
from benchmarks.gate import GateFile, Limit, read_gate
from benchmarks.record import Record
from benchmarks.record import read as read_record
from benchmarks.runtimes.record import Runtimes
from benchmarks.table import Table
from benchmarks.throughput.record import Throughput
from compress.artifact import Manifest, identity, read_manifest
from compress.delta import indices, masks, values
from compress.delta.checkpoint import digest
from compress.delta.package import DESCRIPTION, VERSION, Description
from compress.schema import read_versioned, read_yaml
from deploy.cli import build_parser, parse
from deploy.delta_suite import DeltaSuite
from deploy.fit_record import FitRecord
from deploy.fit_record import read as read_fit
from deploy.recipe import Recipe, read_recipe
from deploy.suite import Suite
from exporters.base import ExportRecord, read_export

LEANS_ON = {
    "evaluation": ("record",),
    "table": ("record", "evaluation"),
    "delta-table": ("record",),
    "fit": ("record", "evaluation"),
    "runtimes": ("record",),
    "consumers": ("record",),
    "throughput": ("record",),
}
"""Sections that send the reader to others for what they share."""

ROOT = Path(__file__).resolve().parents[1]
FORMATS = (ROOT / "docs" / "formats.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
DELTAS = (ROOT / "docs" / "deltas.md").read_text("utf-8")
FIT = (ROOT / "docs" / "fit.md").read_text("utf-8")
VLLM = (ROOT / "docs" / "vllm.md").read_text("utf-8")
SCHEMAS = {
    "recipe": Recipe,
    "gate": GateFile,
    "manifest": Manifest,
    "export": ExportRecord,
    "record": Record,
    "evaluation": Evaluation,
    "suite": Suite,
    "table": Table,
    "delta": Description,
    "delta-suite": DeltaSuite,
    "delta-table": DeltaTable,
    "fit": FitRecord,
    "runtimes": Runtimes,
    "consumers": ConsumersRecord,
    "throughput": Throughput,
}


def example(name: str) -> str:
    """The block of code that follows the marker `<!-- example: NAME -->`."""
    found = re.search(rf"<!-- example: {name} -->\n+```\w+\n(.*?)```", FORMATS, re.DOTALL)
    assert found, f"docs/formats.md has no example of a {name}"
    return found.group(1)


def section(name: str) -> str:
    """The text between `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""
    return FORMATS.split(f"<!-- begin: {name} -->")[1].split(f"<!-- end: {name} -->")[0]


def keys_of(schema: object) -> set[str]:
    """The keys that a schema and everything inside it allow."""
    keys: set[str] = set()
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, field in schema.model_fields.items():
            keys |= {name} | keys_of(field.annotation)
    elif isinstance(schema, type) and dataclasses.is_dataclass(schema):
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            keys |= {field.name} | keys_of(hints[field.name])
    else:
        for argument in get_args(schema):
            keys |= keys_of(argument)
    return keys


def test_the_example_of_a_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(example("recipe"))
    assert read_recipe(tmp_path / "recipe.yaml").is_ladder


def test_the_example_of_a_gate_is_read(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(example("gate"))
    bounds = {limit.bound for limit in read_gate(tmp_path / "gate.yaml").limits}
    assert bounds == set(Limit.model_fields) - {"metric"}


def test_the_example_of_a_manifest_is_read_and_its_id_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(example("manifest"))
    manifest = read_manifest(tmp_path)
    assert manifest.id == identity({name: entry.sha256 for name, entry in manifest.files.items()})


def test_the_example_of_an_export_is_read_and_belongs_to_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(example("export"))
    assert read_export(tmp_path).artifact_id == json.loads(example("manifest"))["id"]


def test_the_example_of_a_record_is_read_and_was_not_changed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(example("record"))
    assert read_record(tmp_path / "record.json").artifacts["candidate"] == json.loads(example("manifest"))["id"]


def test_the_example_of_an_evaluation_is_read_and_was_not_changed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(example("evaluation"))
    assert evaluations.read(tmp_path / "evaluation.json").retention


def test_the_example_of_a_table_is_read_and_fills_the_example_of_a_suite(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(example("suite"))
    (tmp_path / "record.json").write_text(example("table"))
    suite, table = read_yaml(tmp_path / "suite.yaml", Suite, "suite"), tables.read(tmp_path / "record.json")
    asked = [(method.label, sparsity) for method in suite.methods for sparsity in suite.sparsities]
    assert [(cell.label, cell.sparsity) for cell in table.cells] == asked


def test_the_example_of_a_delta_is_read_and_was_not_changed_by_hand(tmp_path: Path) -> None:
    (tmp_path / DESCRIPTION).write_text(example("delta"))
    description = read_versioned(tmp_path / DESCRIPTION, Description, VERSION)
    assert description.identity() == description.id
    assert description.base_digest() == description.base.digest


def test_the_example_of_a_table_of_deltas_is_read_and_fills_the_example_of_a_suite(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(example("delta-suite"))
    (tmp_path / "record.json").write_text(example("delta-table"))
    suite, table = read_yaml(tmp_path / "suite.yaml", DeltaSuite, "suite"), delta_tables.read(tmp_path / "record.json")
    assert [pair.name for pair in table.pairs] == [pair.name for pair in suite.pairs]
    for asked, found in zip(suite.pairs, table.pairs, strict=True):
        ways = suite.grids[asked.grid]
        pruned = [(way.label, p, kind) for way in ways for p in way.p for kind in way.values]
        low_rank = [(way.label, None, "bf16") for way in ways for _ in way.ranks]
        assert sorted((cell.label, cell.p, cell.values) for cell in found.cells if cell.p) == sorted(pruned)
        assert [(cell.label, cell.p, cell.values) for cell in found.cells if cell.p is None] == low_rank


def test_the_example_of_a_search_is_read_and_was_not_changed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(example("fit"))
    found = read_fit(tmp_path / "fit.json")
    assert found.best is not None
    assert {row.method for row in found.candidates} == {each.method for each in found.searched}


@pytest.fixture(scope="module")
def vectors() -> dict[str, Any]:
    """Numbers that others may test a reader of delta packages with."""
    found: dict[str, Any] = yaml.safe_load(example("delta-vectors"))
    return found


def test_the_masks_in_the_documents_are_those_that_are_drawn(vectors: dict[str, Any]) -> None:
    stream, tensor, limit = vectors["mix"], vectors["tensor"], vectors["threshold"]
    mixed = masks.mix(stream["s"], torch.arange(len(stream["first"])))
    assert [number % (1 << 64) for number in mixed.tolist()] == stream["first"]
    assert masks.tensor_seed(tensor["seed"], tensor["name"]) == tensor["s"]
    assert int(Fraction(limit["density"]) * (1 << 32)) == limit["is"]
    assert {mask["scheme"] for mask in vectors["masks"]} == set(masks.SCHEMES)
    for mask in vectors["masks"]:
        shape = (2, mask["cols"])
        kept = masks.random_index(mask["scheme"], Fraction(mask["density"]), tensor["seed"], tensor["name"], shape)
        assert (len(kept), masks.checksum(kept)) == (mask["kept"], mask["index"])
        assert kept[: len(mask["first"])].tolist() == mask["first"]


def test_the_bits_in_the_documents_are_those_that_are_stored(vectors: dict[str, Any]) -> None:
    assert {case["kind"] for case in vectors["positions"]} == set(get_args(indices.Coding))
    for case in vectors["positions"]:
        rows, cols = case["shape"]
        _, stored = indices.encode(torch.tensor(case["kept"]), (rows, cols), case["kind"])
        assert {name: tensor.tolist() for name, tensor in stored.items()} == case["stored"]
    for case in vectors["values"]:
        assert values.store(torch.tensor(case["kept"], dtype=torch.float32), case["values"]).tolist() == case["stored"]
    assert digest(torch.tensor(vectors["digest"]["bf16"], dtype=torch.bfloat16)) == vectors["digest"]["is"]


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_key_of_a_format_is_described(name: str) -> None:
    described = "".join(section(each) for each in (name, *LEANS_ON.get(name, ())))
    written = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", described.replace("```", "")))))
    assert not sorted(keys_of(SCHEMAS[name]) - written)


@pytest.mark.parametrize("name", ["manifest", "export", "record", "evaluation", "table", "delta", "delta-table", "fit"])
def test_an_example_shows_every_key_at_the_top(name: str) -> None:
    assert set(json.loads(example(name))) == set(SCHEMAS[name].model_fields)


def command_lines(text: str) -> list[str]:
    """The calls of foldaway in blocks of code, without the words that stand two or more spaces behind them."""
    calls: list[str] = re.findall(r"^ {4}(foldaway \S+(?: {1,14}\S+)*?)(?: {2,}[a-z].*)?$", text, re.MULTILINE)
    return [call.replace("[", "").replace("]", "") for call in calls]


@pytest.mark.parametrize("line", [line for text in (README, DELTAS, FIT, VLLM) for line in command_lines(text)])
def test_a_command_line_in_the_documents_is_one_that_the_program_takes(line: str) -> None:
    assert hasattr(parse(shlex.split(line)[1:]), "handler")


def test_the_readme_shows_every_command() -> None:
    shown = {shlex.split(line)[1] for line in command_lines(README)}
    offered = re.search(r"commands:\n(.*?)\n\n", build_parser().format_help(), re.DOTALL)
    assert offered
    assert shown == set(re.findall(r"^ {4}(\w+)", offered.group(1), re.MULTILINE))


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
