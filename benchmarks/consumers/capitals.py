"""The rows of capitals.yaml, for lm-eval. It stands alone."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

ROWS = (
    {"query": "The capital of France is", "choices": ["Paris", "Rome", "Berlin"], "gold": 0},
    {"query": "The capital of Italy is", "choices": ["Madrid", "Rome", "London"], "gold": 1},
    {"query": "Water freezes at zero degrees", "choices": ["Celsius", "Kelvin", "north"], "gold": 0},
    {"query": "The opposite of hot is", "choices": ["warm", "red", "cold"], "gold": 2},
)


def rows(**_: Any) -> dict[str, Dataset]:
    """What lm-eval takes for a data set: rows by split."""
    return {"test": Dataset.from_list([dict(row) for row in ROWS])}
