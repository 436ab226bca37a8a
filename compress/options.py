"""Checks of the options of a method, each with a message that says what can be given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import ConfigError


def check_share(name: str, value: Any) -> None:
    """Raise ConfigError unless it is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is not a share; give one from 0 up to, not including, 1")


def check_whole(name: str, value: Any, low: int) -> None:
    """Raise ConfigError unless it is a whole number from ``low`` up."""
    if type(value) is not int or value < low:
        raise ConfigError(f"{name}={value!r} is not a whole number from {low} up")


def check_seed(value: Any) -> None:
    """Raise ConfigError unless PyTorch and NumPy both take it."""
    check_whole("seed", value, 0)
    if value >= 2**32:
        raise ConfigError(f"seed={value} is too large: give one below {2**32}")


def check_positive(name: str, value: Any) -> None:
    """Raise ConfigError unless it is a positive, finite number."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r} is not a positive number")


def check_weight(name: str, value: Any) -> None:
    """Raise ConfigError unless it is zero or a positive, finite number."""
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name}={value!r} is not a number from 0 up")


def check_flag(name: str, value: Any) -> None:
    """Raise ConfigError unless it is true or false."""
    if type(value) is not bool:
        raise ConfigError(f"{name}={value!r} is neither true nor false")


def check_known(name: str, value: Any, known: Mapping[str, Any] | Sequence[str]) -> None:
    """Raise ConfigError unless it is one of some names."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name}={value!r} is not known; give {', '.join(known)}")


def places(name: str, value: Any) -> tuple[int, ...]:
    """A list of blocks as a tuple; raises ConfigError where it is none, or names one twice."""
    if not isinstance(value, (list, tuple)) or any(type(place) is not int for place in value):
        raise ConfigError(f"{name}={value!r} is not a list of blocks; give for example [0, 12]")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name}={list(value)} names a block twice")
    return tuple(value)
