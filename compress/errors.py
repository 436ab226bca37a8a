"""The errors that foldaway raises on purpose.

    FoldawayError
    ├── ConfigError (ValueError)      an option, a recipe or an input that cannot be meant
    ├── UnsupportedArchitecture       a model whose parts we cannot find
    ├── BudgetError                   a target that cannot be reached
    ├── ArtifactError                 a folder that is not what it should be
    │   ├── CorruptArtifact           bytes differ from the manifest
    │   └── ManifestVersionError      written by a newer foldaway
    ├── ExportError                   an export that cannot be made or does not match
    │   ├── LayoutNotSupported        the format has no words for this shape
    │   └── ParityError               the export computes something else
    ├── BackendError                  a runtime or a server that does not start
    └── MissingExtra (ImportError)    an optional package is not installed

The command line shows any of them as one line and exits with 2. Everything else is a bug.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class FoldawayError(Exception):
    """Base of everything raised on purpose; the message says what was asked, what is possible, what to do."""


class ConfigError(FoldawayError, ValueError):
    """An option, a recipe or an input that cannot be meant."""


class UnsupportedArchitecture(FoldawayError):
    """A model whose parts we cannot find."""


class BudgetError(FoldawayError):
    """A target that cannot be reached."""


class ArtifactError(FoldawayError):
    """A folder that is not what it should be."""


class CorruptArtifact(ArtifactError):
    """The bytes on disk differ from the manifest, or cannot be read."""


class ManifestVersionError(ArtifactError):
    """The manifest was written by a newer foldaway."""


class ExportError(FoldawayError):
    """An export that cannot be made or does not match."""


class LayoutNotSupported(ExportError):
    """The format has no words for this shape."""


class ParityError(ExportError):
    """The export computes something else than its source."""


class BackendError(FoldawayError):
    """A runtime or a server that does not start."""


class MissingExtra(FoldawayError, ImportError):
    """An optional package is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: dotted module name, for example ``"onnxruntime"``.
        extra: the extra of the distribution that installs it, for example ``"onnx"``.

    Raises:
        MissingExtra: with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingExtra(f"{missing} is not installed: pip install 'foldaway[{extra}]'") from error


def first_line(error: BaseException) -> str:
    """What an error says first, for a message of one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
