"""Files that people or other programs may have written: strict schemas, and complaints that fit on one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import ConfigError, CorruptArtifact, ManifestVersionError
from compress.files import sha256_of


class Strict(BaseModel):
    """A schema that refuses unknown keys. NaN and infinity travel as strings, for JSON has no words for them."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class FileEntry(Strict):
    """One file of a folder: its hash and its size."""

    sha256: str
    bytes: int


Schema = TypeVar("Schema", bound=BaseModel)
Configuration = TypeVar("Configuration")


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong, on one line: where, what, and how many more."""
    errors = error.errors(include_url=False)
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"])
    unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    what = "this key is not known" if unknown else first["msg"].removeprefix("Value error, ")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def configured(config: type[Configuration], options: Mapping[str, Any], what: str) -> Configuration:
    """Build a configuration, a dataclass, from named options.

    Args:
        config: the dataclass.
        options: by name.
        what: whose options they are, for a complaint.

    Raises:
        ConfigError: an option is not known, is missing, or has a value that cannot be meant.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ConfigError(f"{what} has no option {unknown[0]!r}; it has {', '.join(fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in options]
    if missing:
        raise ConfigError(f"{what} needs {missing[0]}; add it as {missing[0]}=VALUE")
    try:
        return config(**options)
    except TypeError as error:
        raise ConfigError(f"{what}: an option has a value of the wrong type ({error})") from error


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below a folder, by its path from there."""
    return {
        file.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read_versioned(file: Path, schema: type[Schema], version: int) -> Schema:
    """Read a JSON file that foldaway wrote.

    Raises:
        ManifestVersionError: a newer foldaway wrote it.
        CorruptArtifact: it cannot be read, or does not follow the schema.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptArtifact(f"{file} cannot be read as JSON: {error}") from error
    found = raw.get("version") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > version:
        raise ManifestVersionError(f"{file} has version {found}, this foldaway reads up to {version}; upgrade foldaway")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise CorruptArtifact(f"{file} does not follow its schema: {complaint(error)}") from error


def read_yaml(file: Path, schema: type[Schema], what: str) -> Schema:
    """Read a YAML file that a person wrote.

    Args:
        file: where it lies.
        schema: what it must follow.
        what: what to call it in a complaint, for example "recipe".

    Raises:
        ConfigError: no such file, no YAML, or it does not follow the schema.
    """
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {what} {file}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the {what} {file} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{what} {file}: {complaint(error)}") from error
