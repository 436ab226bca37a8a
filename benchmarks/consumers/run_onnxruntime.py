"""A user of onnxruntime alone: continue a prompt greedily with onnxruntime, numpy and tokenizers.

``python run_onnxruntime.py FOLDER GRAPH PROMPT NEW_TOKENS``; the last line of stdout is JSON. It stands alone: what it
knows of a folder is what its files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def main(folder: Path, graph: str, prompt: str, new_tokens: int) -> None:
    """Read a prompt in one run, then decode token by token; every step gets copies of the caches."""
    session = onnxruntime.InferenceSession(str(folder / graph), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    caches: dict[str, Any] = {name: _empty(value) for name, value in inputs.items() if name.startswith("past_key")}
    ends = _ends(folder)
    tokens = tokenizer.encode(prompt).ids
    made: list[int] = []
    new = list(tokens)
    while len(made) < new_tokens and not ends & set(made):
        length = len(tokens) + len(made)
        feeds = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64), **caches}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(length - len(new), length, dtype=np.int64)[None]
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        caches = {name: found[name.replace("past_key_values", "present")].copy() for name in caches}
        new = [int(found["logits"][0, -1].argmax())]
        made += new
    sys.stdout.write(json.dumps({"text": tokenizer.decode(made, skip_special_tokens=True)}) + "\n")


def _empty(value: Any) -> Any:
    """A cache of no tokens, of the type and with the heads that the graph asks for."""
    _, heads, _, head_size = value.shape
    return np.zeros((1, heads, 0, head_size), NUMPY_TYPES[value.type])


def _ends(folder: Path) -> set[int]:
    """The tokens that end a text."""
    found = json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    return set(found) if isinstance(found, list) else {found}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
