"""A run's folder: every stage leaves its result under a name that holds the hash of what went into it.

A stage whose inputs are unchanged finds its result there and is skipped. Results appear whole or not at all, so a run
that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.files import write_file

logger = logging.getLogger(__name__)

MARK = "foldaway-run.json"


class Workspace:
    """The folder of one run.

    Attributes:
        root: the folder.
        skipped: names of the stages whose results were there already.
    """

    def __init__(self, root: Path) -> None:
        """Open a run's folder, or begin one.

        Raises:
            ConfigError: the folder holds something else.
        """
        self.root = root
        self.skipped: list[str] = []
        if not (root / MARK).is_file():
            # A kill before the mark was written leaves an empty folder behind, or one with the mark's temporary file.
            foreign = root.is_dir() and any(not child.name.startswith(f".{MARK}") for child in root.iterdir())
            if foreign or root.is_file():
                raise ConfigError(f"{root} is not empty and not the folder of a run; name another one")
            write_file(root / MARK, json.dumps({"format": "foldaway-run", "version": 1}) + "\n")

    def folder(self, stage: str, inputs: Mapping[str, Any], make: Callable[[Path], object]) -> Path:
        """A stage whose result is a folder; ``make(path)`` must write it whole or not at all."""
        path = self.root / f"{stage}-{digest(inputs)}"
        if path.is_dir():
            self._skip(stage)
        else:
            make(path)
        return path

    def has(self, stage: str, inputs: Mapping[str, Any]) -> bool:
        """Whether a stage whose result is JSON is done."""
        return self._file(stage, inputs).is_file()

    def _file(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        return self.root / f"{stage}-{digest(inputs)}.json"

    def result(self, stage: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A stage whose result is JSON."""
        path = self._file(stage, inputs)
        if path.is_file():
            self._skip(stage)
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        computed = compute()
        write_file(path, json.dumps(computed, indent=2) + "\n")
        return computed

    def _skip(self, stage: str) -> None:
        self.skipped.append(stage)
        logger.info("skipped %s: its inputs are unchanged", stage)


def digest(inputs: Mapping[str, Any]) -> str:
    """The first 12 hex digits of the SHA-256 of inputs, as sorted JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
