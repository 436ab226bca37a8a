"""Where a number was measured: hardware, operating system, versions and commit; no host names, users or paths."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = (
    "foldaway",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "vllm",
    "openai",
    "lm_eval",
    "datasets",
)
CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
"""The instructions that decide how fast a CPU multiplies matrices: x86-64, then arm64."""


@dataclass(frozen=True)
class Machine:
    """What a measurement depends on.

    Attributes:
        cpu: model name.
        architecture: "x86_64", "arm64" and so on.
        physical_cores: None where the system does not tell.
        logical_cores: hardware threads.
        usable_cores: those that this process may run on.
        cpu_flags: the instruction sets of CPU_FLAGS that are there; empty where the system does not tell.
        memory_bytes: all of it.
        system: name and release of the operating system.
        python: version.
        packages: name -> version of the installed ones of PACKAGES.
        commit: of foldaway's checkout, with "+" when files differ from it; None when it was installed as a package.
    """

    cpu: str
    architecture: str
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    packages: Mapping[str, str]
    commit: str | None


def machine() -> Machine:
    """Describe this machine and this environment."""
    model, flags = _cpu()
    logical = psutil.cpu_count() or 1
    return Machine(
        cpu=model,
        architecture=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        cpu_flags=tuple(flag for flag in CPU_FLAGS if flag in flags),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_versions(),
        commit=_commit(Path(__file__).resolve().parents[1]),
    )


def _cpu() -> tuple[str, frozenset[str]]:
    """Model name and instruction sets, from /proc/cpuinfo (Linux) or sysctl (macOS)."""
    try:
        fields = parse_cpuinfo(Path("/proc/cpuinfo").read_text("utf-8", "replace"))
    except OSError:
        fields = {}
    model = fields.get("model name") or _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return model or platform.machine(), frozenset((fields.get("flags") or fields.get("Features") or "").split())


def parse_cpuinfo(text: str) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit(root: Path) -> str | None:
    """The commit of the checkout at `root`; None when `root` itself is no checkout (a parent's commit is not ours)."""
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _output("git", "-C", str(root), "status", "--porcelain") else "")


def _output(*argv: str) -> str | None:
    """Standard output of a command, stripped; None when it cannot run, fails or says nothing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
