"""Imports run one way: compress, exporters, serving, benchmarks, deploy. No file imports to its right."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("compress", "exporters", "serving", "benchmarks", "deploy")


def imported_packages(source: str) -> Iterator[str]:
    """The top-level names that a module imports, also inside functions and `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    to_the_right = set(ORDER[ORDER.index(package) + 1 :]) | {"tests"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported_packages(path.read_text())
        if name in to_the_right
    ]
    assert not wrong


def test_an_import_inside_a_function_is_seen() -> None:
    assert list(imported_packages("def f():\n    from deploy.cli import main\n    import serving.api")) == [
        "deploy",
        "serving",
    ]


def test_the_slow_references_share_nothing_with_the_library() -> None:
    references = sorted((ROOT / "tests" / "reference").glob("*.py"))
    wrong = [path.name for path in references if set(imported_packages(path.read_text())) & set(ORDER)]
    assert not wrong


def test_the_remote_code_module_stands_alone() -> None:
    """It is copied into artifacts and must run where foldaway is not installed."""
    names = set(imported_packages((ROOT / "compress" / "remote_code.py").read_text()))
    assert not names & set(ORDER)
