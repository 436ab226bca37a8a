"""What deploy/docker and deploy/k8s say can be taken by those who read it: Kubernetes, hadolint, foldaway and vLLM."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
K8S = ROOT / "deploy" / "k8s"
SCALING = (ROOT / "docs" / "scaling.md").read_text("utf-8")
DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))
KUSTOMIZATIONS = sorted(K8S.glob("*/kustomization.yaml"))
MANIFESTS = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")
LAYOUTS = sorted(path.parent.name for path in KUSTOMIZATIONS if path.parent.name != "base")
SERVE = ("foldaway", "serve")
HEADLESS = ("vllm", "serve")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def check_schema(document: dict[str, Any]) -> None:
    """Raise what the schemas of the newest Kubernetes that is known say against a manifest; unknown keys, too."""
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(document, validator.latest_version(), strict=True)


# --- Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=relative)
def test_every_manifest_fits_the_schemas_of_kubernetes(path: Path) -> None:
    found = documents(path.read_text("utf-8"))
    assert found
    for document in found:
        check_schema(document)


def test_a_manifest_with_a_misspelt_key_does_not() -> None:
    (service,) = documents((K8S / "base" / "service.yaml").read_text("utf-8"))
    service["spec"]["selectors"] = service["spec"].pop("selector")
    with pytest.raises(Exception, match="selectors"):
        check_schema(service)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=relative)
def test_a_kustomization_names_files_that_exist_and_manifests_that_it_has(path: Path) -> None:
    found = yaml.safe_load(path.read_text("utf-8"))
    for resource in found["resources"]:
        assert (path.parent / resource).exists(), resource
    for patch in found.get("patches", []):
        assert patch["target"] == {"kind": "Deployment", "name": "foldaway"}
        assert all(
            operation["op"] in {"add", "remove", "replace", "test"} for operation in yaml.safe_load(patch["patch"])
        )


def test_every_manifest_belongs_to_a_layout_or_is_the_loader() -> None:
    named = {
        (path.parent / resource).resolve()
        for path in KUSTOMIZATIONS
        for resource in yaml.safe_load(path.read_text("utf-8"))["resources"]
    }
    assert {path for path in MANIFESTS if path not in named} == {K8S / "loader.yaml"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layouts, with a key."""
    folder = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(K8S, folder)
    (folder / "base" / "api-key").write_text("a key\n")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_kustomize_has_put_together_fits_as_well(layout: str, sources: Path) -> None:
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    command = [kubectl, "kustomize"] if kubectl else [kustomize, "build"]
    if command[0] is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    run = subprocess.run([*command, str(sources / layout)], capture_output=True, text=True, check=True)
    found = documents(run.stdout)
    for document in found:
        check_schema(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "foldaway"
    (secret,) = (document["metadata"]["name"] for document in found if document["kind"] == "Secret")
    for pod in map(pod_of, found):
        if pod is None:
            continue
        mounted = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        assert mounted in ([], [secret])
        assert all(each["image"].startswith("registry.example.com/foldaway:") for each in pod["containers"])
        ports = {port["name"] for each in pod["containers"] for port in each.get("ports", [])}
        assert bool(ports) == bool(mounted), "who has the API has the key"


def pod_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """The pod that a manifest is about, None where there is none."""
    spec: dict[str, Any] = document.get("spec", {})
    found: dict[str, Any] | None = spec if document["kind"] == "Pod" else spec.get("template", {}).get("spec")
    return found


def pods() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in MANIFESTS:
        for pod in map(pod_of, documents(path.read_text("utf-8"))):
            if pod is not None:
                yield path, pod


PODS = [pytest.param(pod, id=relative(path)) for path, pod in pods()]


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_asks_for_no_privileges_and_for_bounded_memory(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        allowed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == allowed
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_runs_as_the_user_of_the_images_and_can_write_where_that_lives(pod: dict[str, Any]) -> None:
    for path in DOCKERFILES:
        text = path.read_text("utf-8")
        context = pod["securityContext"]
        assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in text
        found = re.search(r"HOME=(\S+)", text)
        assert found
        for container in pod["containers"]:
            writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert container["name"] == "loader" or writable == {found.group(1), "/tmp", "/dev/shm"}


# --- Docker


@pytest.mark.parametrize("path", DOCKERFILES, ids=relative)
def test_a_dockerfile_passes_the_linter(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    run = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_all_that_the_package_is_built_from_is_in_the_build_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    setuptools = project["tool"]["setuptools"]
    folders = [setuptools["package-dir"].get(name, name.partition(".")[0]) for name in setuptools["packages"]]
    needed = {folder.partition("/")[0] for folder in folders}
    needed |= {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], "requirements"}
    assert let_in == needed
    assert all((ROOT / name).exists() for name in needed)


def test_images_are_named_after_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    named = set()
    for path in [*DOCKERFILES, DOCKER / "compose.yaml", K8S / "loader.yaml", ROOT / "docs" / "scaling.md"]:
        named |= set(re.findall(r"foldaway:(\d[\d.]*)", path.read_text("utf-8")))
    for path in KUSTOMIZATIONS:
        for image in yaml.safe_load(path.read_text("utf-8")).get("images", []):
            named.add(image["newTag"])
    assert named == {version}


def test_the_image_has_the_version_of_vllm_that_the_documents_speak_of() -> None:
    (version,) = set(re.findall(r"vllm/vllm-openai:v(\d+\.\d+)", (DOCKER / "Dockerfile").read_text("utf-8")))
    assert f"flags here are those of vLLM {version}" in SCALING


# --- The flags


def added_arguments(kustomization: Path) -> list[str]:
    """What the patches of a layout append to the arguments of its container."""
    patches = yaml.safe_load(kustomization.read_text("utf-8")).get("patches", [])
    operations = [operation for patch in patches for operation in yaml.safe_load(patch["patch"])]
    return [each["value"] for each in operations if each["path"].endswith("/args/-")]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Where it stands, and each call of `foldaway` or `vllm` in the manifests, the Dockerfiles and docs/scaling.md."""
    for path, pod in pods():
        for container in pod["containers"]:
            start = container.get("command", list(SERVE))
            arguments = [re.sub(r"\$\(\w+\)", "1", each) for each in container.get("args", [])]
            if "args" in container:
                yield relative(path), [*start, *arguments]
    (deployment,) = documents((K8S / "one-gpu" / "deployment.yaml").read_text("utf-8"))
    pod = pod_of(deployment)
    assert pod
    for path in KUSTOMIZATIONS:
        if added := added_arguments(path):
            yield relative(path), [*SERVE, *pod["containers"][0]["args"], *added]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    yield "compose.yaml", [*SERVE, *compose["services"]["server"]["command"]]
    for path in DOCKERFILES:
        (default,) = re.findall(r"^CMD (\[.*\])$", path.read_text("utf-8"), re.MULTILINE)
        yield relative(path), [*SERVE, *yaml.safe_load(default)]
    for number, line in enumerate(re.findall(r"^ {4,6}((?:foldaway|vllm) .*)$", SCALING, re.MULTILINE), 1):
        yield f"scaling.md-{number}", shlex.split(line)


def parts(line: list[str]) -> tuple[list[str], list[str]]:
    """What is foldaway's of a call, and what is vLLM's."""
    if line[:2] == list(HEADLESS):
        return [], line[2:]
    place = line.index("--") if "--" in line else len(line)
    return line[:place], line[place + 1 :]


LINES = [pytest.param(line, id=where) for where, line in command_lines()]


@pytest.mark.parametrize("line", LINES)
def test_foldaway_takes_what_it_is_given(line: list[str]) -> None:
    ours, _ = parts(line)
    assert ours or line[:2] == list(HEADLESS)
    if ours:
        assert hasattr(build_parser().parse_args(ours[1:]), "handler")


@pytest.mark.vllm
@pytest.mark.parametrize("line", LINES)
def test_vllm_takes_what_it_is_given(line: list[str]) -> None:
    launchers = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    argparse = pytest.importorskip("vllm.utils.argparse_utils")
    _, theirs = parts(line)
    launchers.make_arg_parser(argparse.FlexibleArgumentParser()).parse_args(theirs)


@pytest.mark.vllm
def test_vllm_does_not_take_a_flag_that_it_does_not_have() -> None:
    launchers = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    argparse = pytest.importorskip("vllm.utils.argparse_utils")
    with pytest.raises(SystemExit):
        launchers.make_arg_parser(argparse.FlexibleArgumentParser()).parse_args(["--tensor-parallel-sise", "2"])


def options(arguments: list[str]) -> dict[str, str | None]:
    """Flags and their values."""
    pairs = zip(arguments, [*arguments[1:], "--"], strict=True)
    return {flag: None if value.startswith("--") else value for flag, value in pairs if flag.startswith("--")}


def test_the_machines_of_a_group_agree_on_how_the_model_is_cut_and_where_the_head_is() -> None:
    lines = dict(command_lines())
    head = options(parts(lines["deploy/k8s/two-nodes/head.yaml"])[1])
    worker = options(parts(lines["deploy/k8s/two-nodes/workers.yaml"])[1])
    assert head.pop("--node-rank") == "0"
    assert worker.pop("--node-rank") == "1"
    assert worker.pop("--headless", "") is None
    assert head == worker
    (service,) = documents((K8S / "two-nodes" / "nodes.yaml").read_text("utf-8"))
    (state,) = documents((K8S / "two-nodes" / "head.yaml").read_text("utf-8"))
    assert head["--master-addr"] == f"{state['metadata']['name']}-0.{service['metadata']['name']}"


def test_the_documents_show_every_layout() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \| ", SCALING, re.MULTILINE)) == set(LAYOUTS)
