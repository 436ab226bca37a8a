"""What a search under a budget tries: candidates, where they come from, and the sparsities of methods without shapes.

A method whose options are sizes (minitron) has a grid of shapes (`deploy.grid`). A method with a sparsity alone has one
candidate, the mildest sparsity that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedModel

from compress.errors import BudgetError, ConfigError
from compress.methods import METHODS, method_config, method_named
from compress.shape import NAMES, Shape
from compress.surgery import without_weights
from deploy.ruler import Size, size_of

FINEST_SPARSITY = 0.005


@dataclass(frozen=True)
class Candidate:
    """One model that may be made.

    Attributes:
        method: that makes it.
        options: of the method.
        size: counted.
        predicted: value of what the budget limits.
        shape: where the method cuts to one.
    """

    method: str
    options: Mapping[str, Any] = field(compare=False)
    size: Size
    predicted: float
    shape: Shape | None = None

    @property
    def name(self) -> str:
        """Short, the same for the same candidate, and fit for a file: minitron-26x512x1280x9, 2ssp-0.255."""
        if self.shape is None:
            return f"{self.method}-{self.options['sparsity']:g}"
        return f"{self.method}-{'x'.join(str(getattr(self.shape, name)) for name in NAMES)}"


def method_kind(name: str) -> Literal["grid", "sparsity"]:
    """How candidates of a method are found.

    Raises:
        ConfigError: the method is not known, or makes nothing smaller.
    """
    fields = {each.name for each in dataclasses.fields(method_named(name).config)}
    if set(NAMES) <= fields:
        return "grid"
    if "sparsity" in fields:
        return "sparsity"
    able = [other for other in METHODS if other != name and "sparsity" in _option_names(other)]
    raise ConfigError(f"{name} makes no model smaller: give --methods some of {', '.join(able)}")


def _option_names(method: str) -> set[str]:
    return {each.name for each in dataclasses.fields(METHODS[method].config)}


class Source:
    """Where the candidates of one method come from.

    Attributes:
        method: its name.
        options: those that the user set.
        wanted: how many candidates are to be tried.
        enumerated: how many are known of.
        smallest: the candidate of the lowest predicted value; None where there is none at all.
    """

    method: str
    options: Mapping[str, Any]
    wanted: int
    enumerated: int
    smallest: Candidate | None

    def fitting(self, limit: float) -> int:
        """How many of those known are predicted to fit."""
        raise NotImplementedError

    def next(self, limit: float, taken: Sequence[Candidate], tried: Sequence[Candidate]) -> Candidate | None:
        """The one to try next; None when there is none left.

        Args:
            limit: on predicted values.
            taken: tried, and found to fit.
            tried: all that were looked at.
        """
        raise NotImplementedError


class Mildest(Source):
    """The mildest sparsity that fits, in steps of 0.5 %, found on shapes alone.

    Args:
        method: with a sparsity among its options.
        options: the others.
        model: on the meta device.
        rows: calibration rows that there will be.
        predict: what to expect of a size.
    """

    wanted = 1

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        model: PreTrainedModel,
        rows: int,
        predict: Callable[[Size], float],
    ) -> None:
        self.method, self.options = method, options
        self._model, self._rows, self._predict = model, rows, predict
        self._known: dict[int, Candidate | None] = {}
        self._last = round(1 / FINEST_SPARSITY) - 1
        self._refuse_options()
        whole, first = size_of(model), self._at(0)
        # Sharing weights makes a model smaller that loses nothing; at sparsity 0 the others are the model itself.
        self._first = 0 if first is not None and first.size.parameters < whole.parameters else 1

    def _refuse_options(self) -> None:
        """Raise ConfigError where the options, and not the sparsity, are what cannot be meant."""
        with suppress(BudgetError):
            self._outlined(FINEST_SPARSITY)

    @property
    def enumerated(self) -> int:  # type: ignore[override]
        return self._last + 1 - self._first

    @cached_property
    def smallest(self) -> Candidate | None:  # type: ignore[override]
        """At the strongest sparsity that the method can reach, found by bisection."""
        low, high = self._first, self._last
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._at(middle) is not None else (low, middle - 1)
        known = [candidate for place, candidate in self._known.items() if candidate and place >= self._first]
        return min(known, key=lambda candidate: candidate.predicted, default=None)

    def fitting(self, limit: float) -> int:
        found = self._mildest(limit)
        return 0 if found is None else self._last + 1 - found

    def next(self, limit: float, taken: Sequence[Candidate], tried: Sequence[Candidate]) -> Candidate | None:
        """The mildest that fits and was not tried."""
        if taken:
            return None
        known = {candidate.name for candidate in tried}
        place = self._mildest(limit)
        while place is not None and place <= self._last:
            if (candidate := self._at(place)) is not None and candidate.name not in known:
                return candidate
            place += 1
        return None

    def _mildest(self, limit: float) -> int | None:
        """By bisection; then on, over sparsities that the method refuses, to the first that fits."""

        def too_large(place: int) -> bool:
            candidate = self._at(place)
            return candidate is not None and candidate.predicted > limit

        low, high = self._first, self._last + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if too_large(middle) else (low, middle)
        for place in range(low, self._last + 1):
            if self._at(place) is not None and not too_large(place):
                return place
        return None

    def _at(self, place: int) -> Candidate | None:
        """The candidate at so many steps of sparsity; None where the method cannot reach it."""
        if place not in self._known:
            try:
                self._known[place] = self._outlined(round(place * FINEST_SPARSITY, 6))
            except (BudgetError, ConfigError):
                self._known[place] = None
        return self._known[place]

    def _outlined(self, sparsity: float) -> Candidate:
        """The candidate of one sparsity, counted on a copy that is cut to its shape."""
        options = {**self.options, "sparsity": sparsity}
        trial = without_weights(self._model)
        METHODS[self.method].outline(trial, self._rows, method_config(self.method, options))
        size = size_of(trial)
        return Candidate(self.method, options, size, self._predict(size))
