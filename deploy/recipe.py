"""recipe.yaml: what to compress, how, and what it must still be able to do. Unknown keys are refused.

    name: demo
    model: demo:smollm2
    steps:
      - {method: 2ssp, set: {sparsity: [0.125, 0.25, 0.375]}}
    gate:
      limits: [{metric: perplexity, max_ratio: 2.0}]

Steps chain. One option of one step may be a list: its values are tried in the order given, from mild to strong, each
with all steps behind it, until one misses a perplexity limit of the gate; the last that met it goes on. An option whose
value is a list itself, such as the blocks to protect, is taken as it is. A step ``distill`` learns from the model that
the recipe began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from benchmarks.gate import GateFile
from compress.methods import method_config, takes_list
from compress.schema import Strict, read_yaml
from exporters.base import ExportOptions
from exporters.to_onnx import complete

PROMPTS = (
    "Explain to a ten-year-old why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What are the advantages and disadvantages of electric cars?",
    "Describe, step by step, how to bake a simple loaf of bread.",
    "Give me five tips for learning a new language, and explain each of them.",
    "Summarise how the water cycle works.",
    "What should I think about before adopting a dog?",
    "Write a polite letter that asks a neighbour to turn the music down.",
)
"""Sent to both servers, unless a recipe has its own."""


DISTILL = "distill"
"""The method that learns, behind other steps, from the model that the first of them was applied to."""


class CalibrationSpec(Strict):
    """The rows that methods look at."""

    source: str = "builtin"
    rows: int = Field(default=24, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0)


class StepSpec(Strict):
    """One method and its options, and calibration rows of its own where it is to have others than the recipe's."""

    method: str
    set: dict[str, JsonValue] = Field(default_factory=dict)
    calibration: CalibrationSpec | None = None

    def variants(self) -> list[dict[str, Any]]:
        """The options to try: one set of them, or one for each value of the option that is a list."""
        lists = self.ladders()
        if not lists:
            return [dict(self.set)]
        values = self.set[lists[0]]
        assert isinstance(values, list)
        return [{**self.set, lists[0]: value} for value in values]

    def ladders(self) -> list[str]:
        """Names of the options of which several values are given."""
        whole = takes_list(self.method)
        return [name for name, value in self.set.items() if isinstance(value, list) and name not in whole]


class EvaluationSpec(Strict):
    """The windows that perplexity is measured on.

    ``windows: null`` takes all of the text. With a ``stride`` windows overlap, and only its last so many tokens of each
    are predicted.
    """

    source: str = "builtin"
    window: int = Field(default=2048, ge=2)
    windows: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)


class ExportSpec(Strict):
    """What is served: both sides are exported alike."""

    to: Literal["onnx"] = "onnx"
    dtype: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    block_size: int | None = None
    algorithm: str | None = None
    int8: tuple[str, ...] = ()
    embeddings: str | None = None
    accuracy_level: int | None = None
    smooth: float | None = None
    max_kl: float | None = None

    def options(self) -> ExportOptions:
        """As the exporters take them."""
        return complete(ExportOptions(**self.model_dump(exclude={"to"})))

    @model_validator(mode="after")
    def _values_exist(self) -> ExportSpec:
        self.options()
        return self


class BenchmarkSpec(Strict):
    """How both sides are timed, taking turns."""

    prompt_tokens: int = Field(default=128, ge=1)
    decode_tokens: int = Field(default=64, ge=1)
    repeats: int = Field(default=9, ge=5)
    prompts: tuple[str, ...] = Field(default=PROMPTS, min_length=5)
    max_tokens: int = Field(default=64, ge=2)


class Recipe(Strict):
    """A whole run, from a model to a verdict."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    calibration: CalibrationSpec = CalibrationSpec()
    steps: tuple[StepSpec, ...] = Field(min_length=1)
    evaluation: EvaluationSpec = EvaluationSpec()
    export: ExportSpec = ExportSpec()
    benchmark: BenchmarkSpec = BenchmarkSpec()
    gate: GateFile

    @model_validator(mode="after")
    def _steps_can_be_run(self) -> Recipe:
        first = self.steps[0]
        if first.method == DISTILL and not first.set.get("next_token"):
            raise ValueError("step 1: distill learns from the model that the recipe begins with: put a step before it")
        for place, step in enumerate(self.steps, start=1):
            lists = step.ladders()
            others = [name for other in self.steps[: place - 1] for name in other.ladders()]
            if len(lists) > 1 or (lists and others):
                raise ValueError(
                    f"step {place}: only one option of one step may be a list ({', '.join(others + lists)})"
                )
            if lists and not step.set[lists[0]]:
                raise ValueError(f"step {place}: {lists[0]} is an empty list")
            shares = []
            for options in step.variants():
                shares.append(getattr(method_config(step.method, options), "sparsity", 0.0))
            if shares != sorted(shares):
                raise ValueError(
                    f"step {place}: list sparsities from mild to strong: the first that misses the gate ends"
                )
        return self

    @property
    def is_ladder(self) -> bool:
        """Whether a step has several values to try."""
        return len(self.chains()) > 1

    @property
    def rung(self) -> int:
        """The place of the step of which several values are tried; where there is none, of the last that cuts."""
        ladders = [place for place, step in enumerate(self.steps) if step.ladders()]
        cuts = [place for place, step in enumerate(self.steps) if step.method != DISTILL]
        return (ladders or cuts[-1:] or [0])[0]

    def chains(self) -> list[list[StepSpec]]:
        """All steps with one value each, once for every value that is to be tried."""
        step = self.steps[self.rung]
        chosen = [step.model_copy(update={"set": options}) for options in step.variants()]
        return [[*self.steps[: self.rung], one, *self.steps[self.rung + 1 :]] for one in chosen]


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, method or option, or a value that cannot be meant.
    """
    return read_yaml(path, Recipe, "recipe")
