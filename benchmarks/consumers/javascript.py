"""transformers.js, on Node and in headless Chromium: the sources beside this file, in ``transformersjs/``."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.consumers.base import ENVIRONMENTS, last_line
from compress.errors import BackendError

SOURCES = Path(__file__).resolve().parent / "transformersjs"
HOME = ENVIRONMENTS / "transformersjs"
"""Where the sources are copied to, since Node looks for packages beside the file that imports them."""

RUN_SECONDS, INSTALL_SECONDS = 900.0, 1800.0
STAMP = Path("node_modules") / "installed-lock.json"
PACKAGES = ("@huggingface/transformers", "onnxruntime-node", "onnxruntime-web")


@dataclass(frozen=True)
class Generated:
    """What transformers.js makes of an export.

    Attributes:
        text: the continuation, without special tokens.
        tokens: the same as ids.
        load_seconds: from the start of loading until the model can be asked.
        decode_tokens_per_second: after the first token; None where there are fewer than two.
        shown: what the page shows of the text; empty on Node.
        requests: the addresses that the browser asked for; none on Node.
    """

    text: str
    tokens: tuple[int, ...]
    load_seconds: float
    decode_tokens_per_second: float | None
    shown: str = ""
    requests: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformersJs:
    """transformers.js on Node, with onnxruntime-node.

    Attributes:
        name: what tables call it.
        script: the program that runs it.
    """

    name: str = "transformers.js"
    script: str = "generate.mjs"

    def prepare(self) -> None:
        """Copy the sources to `HOME`, and install there what their lock file names.

        Raises:
            BackendError: Node.js is missing, or the install fails.
        """
        _program("node", "nodejs, version 20 or newer")
        npm = _program("npm", "nodejs with npm")
        shutil.copytree(SOURCES, HOME, dirs_exist_ok=True)
        lock = (SOURCES / "package-lock.json").read_text("utf-8")
        if (HOME / STAMP).is_file() and (HOME / STAMP).read_text("utf-8") == lock:
            return
        # The packages' scripts would download CUDA; the CPU's binaries come inside.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it failed"]
            raise BackendError(f"npm ci for transformers.js: {said[0]}")
        (HOME / STAMP).write_text(lock, "utf-8")

    def versions(self) -> dict[str, str]:
        """Versions of its packages and of Node.

        Raises:
            BackendError: they are not installed yet.
        """
        node = _version([_program("node", "nodejs, version 20 or newer"), "--version"])
        return {"node": node.removeprefix("v"), **{name.rpartition("/")[2]: _installed(name) for name in PACKAGES}}

    def run(self, export: Path, prompt: str, new_tokens: int) -> str:
        """The text that it generates."""
        return self.generate(export, prompt, new_tokens).text

    def generate(self, export: Path, prompt: str, new_tokens: int, *, threads: int = 1) -> Generated:
        """Continue a prompt greedily, without a chat template.

        Raises:
            BackendError: it does not open the export, or fails; the message is one line.
        """
        return self._ask(
            {"folder": str(export.resolve()), "prompt": prompt, "new_tokens": new_tokens, "threads": threads}
        )

    def _ask(self, request: dict[str, Any]) -> Generated:
        _installed(PACKAGES[0])
        answer = last_line(["node", str(HOME / self.script), json.dumps(request)], RUN_SECONDS)
        return Generated(
            text=str(answer["text"]),
            tokens=tuple(answer["tokens"]),
            load_seconds=float(answer["load_seconds"]),
            decode_tokens_per_second=answer["decode_tokens_per_second"],
            shown=str(answer.get("shown", "")),
            requests=tuple(answer.get("requests", ())),
        )


@dataclass(frozen=True)
class Chromium(TransformersJs):
    """transformers.js on a page in headless Chromium, with onnxruntime's WebAssembly."""

    name: str = "transformers.js, Chromium"
    script: str = "chromium.mjs"

    def prepare(self) -> None:
        """As on Node; Chromium itself must be there.

        Raises:
            BackendError: it is not; or as on Node.
        """
        _chromium()
        super().prepare()

    def versions(self) -> dict[str, str]:
        """Versions of its packages, of Node, which serves the page, and of Chromium."""
        said = _version([_chromium(), "--version"])
        return {"chromium": said.removeprefix("Chromium ").split()[0], **super().versions()}

    def generate(
        self, export: Path, prompt: str, new_tokens: int, *, threads: int = 1, screenshot: Path | None = None
    ) -> Generated:
        """Continue a prompt greedily on the page, and write a PNG of it to `screenshot` afterwards.

        Raises:
            BackendError: it does not open the export, or fails; the message is one line.
        """
        picture = None if screenshot is None else str(screenshot.resolve())
        request = {"folder": str(export.resolve()), "prompt": prompt, "new_tokens": new_tokens, "threads": threads}
        return self._ask(request | {"chromium": _chromium(), "screenshot": picture})


def _program(name: str, what: str) -> str:
    """Where a program is."""
    found = shutil.which(name)
    if found is None:
        raise BackendError(f"transformers.js needs {name}: install {what}")
    return found


def _chromium() -> str:
    """Where Chromium is."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        raise BackendError("the browser consumer needs Chromium: `apt-get install chromium` (Debian's package)")
    return found


def _installed(package: str) -> str:
    """The version of a package in `HOME`."""
    file = HOME / "node_modules" / package / "package.json"
    if not (HOME / STAMP).is_file() or not file.is_file():
        raise BackendError("transformers.js is not installed yet: `make test-consumers` or `make test-browser` does it")
    return str(json.loads(file.read_text("utf-8"))["version"])


def _version(command: list[str]) -> str:
    """What a program says of its version."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines()[-1]


NODE = TransformersJs()
CHROMIUM = Chromium()
