"""Write-then-rename: whatever moment a process is killed at, a path holds the old thing or the new thing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ConfigError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` whole, or not at all.

    Yields:
        A temporary sibling to write into. It is renamed to ``path`` when the block ends well, and removed when it does
        not. What an earlier process left behind when it was killed is removed first.

    Raises:
        ConfigError: ``path`` exists and is not an empty folder.
    """
    check_free(path)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.partial-"
    for stale in path.parent.glob(f"{prefix}*"):
        if not _alive(stale.name.removeprefix(prefix).split("-")[0]):
            shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(path: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: ``path`` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty; name a folder that does not exist yet, or remove it")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {nearest} is not a folder that may be written to")


def check_new_file(path: Path) -> None:
    """Refuse early to write a file over anything, or where none can be written.

    Raises:
        ConfigError: ``path`` exists, or its folder cannot be written to.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already: name another file, or remove it")
    check_free(path)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file that takes its place whole, or leaves what was there.

    Yields:
        A temporary sibling to write into. It is renamed to ``path`` when the block ends well, and removed when it does
        not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        _flush(partial)
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file whole, or leave what was there."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _alive(pid: str) -> bool:
    """Whether the process that owns a partial folder still runs."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True
