"""What is packaged and what is committed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("compress", "exporters", "serving", "benchmarks", "deploy")
REGISTERED = "optimum/commands/register/register_foldaway.py"
"""The one file that is installed outside our packages: where optimum looks for subcommands."""


def committed_files() -> list[Path]:
    """Files that git tracks or would track; where there is no repository, all that is not hidden or generated."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    skipped = {"runs", "exports", "build", "dist", "__pycache__"}
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [p for p in found if not any(s in skipped or s.startswith(".") for s in p.relative_to(ROOT).parts)]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built, without network, from a copy of the committed files."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in committed_files():
        copy = folder / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "source")], check=True)
    (wheel,) = folder.glob("foldaway-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_the_five_packages_and_one_file_for_optimum(wheel_files: set[str]) -> None:
    folders = {name.partition("/")[0] for name in wheel_files}
    assert {name for name in folders if not name.endswith(".dist-info")} == {*PACKAGES, "optimum"}
    assert [name for name in wheel_files if name.startswith("optimum/")] == [REGISTERED]
    assert not any(name.startswith("benchmarks/results") for name in wheel_files)


@pytest.mark.xdist_group("wheel")
def test_the_wheel_holds_every_module_every_recipe_and_every_suite(wheel_files: set[str]) -> None:
    """A folder of modules without an __init__.py would be missing from the wheel without a word."""
    expected = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    expected += [*(ROOT / "deploy" / "recipes").glob("*.yaml"), *(ROOT / "benchmarks" / "suites").glob("*.yaml")]
    expected += (ROOT / "benchmarks" / "consumers").glob("*.yaml")
    assert {path.relative_to(ROOT).as_posix() for path in expected} <= wheel_files


@pytest.mark.xdist_group("wheel")
def test_the_wheel_carries_the_licence(wheel_files: set[str]) -> None:
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_files)


def test_the_installed_version_is_that_of_the_project_file() -> None:
    try:
        installed = importlib.metadata.version("foldaway")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("foldaway is not installed in this environment")
    assert installed == PROJECT["project"]["version"]


def test_the_version_is_written_in_one_place() -> None:
    version = re.escape(PROJECT["project"]["version"])
    assignment = re.compile(rf"^__version__\s*=|[\"']{version}[\"']", re.MULTILINE)
    sources = [path for path in committed_files() if path.suffix == ".py"]
    assert not [path.relative_to(ROOT) for path in sources if assignment.search(path.read_text())]


def test_every_dependency_has_a_pin_that_is_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {canonical(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    tested = [
        *PROJECT["project"]["dependencies"],
        *(line for name in extras if name != "vllm" for line in extras[name]),
    ]
    for requirement in map(Requirement, tested):
        if requirement.name != "foldaway":
            assert pins[canonical(requirement.name)] in requirement.specifier, requirement


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_committed_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    machine_path = re.compile(r"(?<![\w.$}~/-])/(?:home|root|work|Users)/\w+")
    named = []
    for path in committed_files():
        if path.suffix in {".png", ".svg", ".bin", ".gz"} or path == Path(__file__).resolve():
            continue
        named += [
            f"{path.relative_to(ROOT)}: {match}"
            for match in machine_path.findall(path.read_text("utf-8", errors="ignore"))
        ]
    assert not named


def test_no_weights_are_committed() -> None:
    weights = {".safetensors", ".gguf", ".onnx", ".data", ".pt", ".pth", ".bin"}
    assert not [path.relative_to(ROOT) for path in committed_files() if path.suffix in weights]


@pytest.mark.parametrize("command", ["make test", "make test-vllm"])
def test_continuous_integration_runs_the_test_commands_of_the_readme(command: str) -> None:
    assert f"\n{command} || status=1\n" in (ROOT / ".ci" / "run").read_text()
    assert f"\n    {command}\n" in (ROOT / "README.md").read_text()


@pytest.mark.xdist_group("grouped")
def test_the_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    """As the end of their names tells pytest-xdist; what a group sets up takes too long to be done in every process."""
    assert request.node.nodeid.endswith("@grouped") == request.config.getoption("loadgroup", False)


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_is_named_after_its_file(path: Path) -> None:
    assert read_recipe(path).name == path.stem
