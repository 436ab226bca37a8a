"""A user of optimum: continue a prompt greedily with ``ORTModelForCausalLM`` and the tokenizer of transformers 4.

``python run_optimum.py FOLDER GRAPH PROMPT NEW_TOKENS``; the last line of stdout is JSON. It stands alone: what it
knows of a folder is what its files say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main(folder: str, graph: str, prompt: str, new_tokens: int) -> None:
    """Load the folder as its documentation says, and let transformers generate."""
    path = Path(graph)
    where = {"subfolder": str(path.parent)} if path.parent.name else {}
    model = ORTModelForCausalLM.from_pretrained(folder, file_name=path.name, **where)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    sys.stdout.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
