"""A user of onnxruntime-genai: continue a prompt greedily.

``python run_genai.py FOLDER GRAPH PROMPT NEW_TOKENS``; the last line of stdout is JSON. The graph is the one that
genai_config.json names. It stands alone: what it knows of a folder is what its files say.
"""

from __future__ import annotations

import json
import sys

import onnxruntime_genai as og


def main(folder: str, prompt: str, new_tokens: int) -> None:
    """Greedy search, as the package's own examples do it."""
    model = og.Model(folder)
    tokenizer = og.Tokenizer(model)
    tokens = tokenizer.encode(prompt)
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(tokens) + new_tokens)
    generator = og.Generator(model, params)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    text = tokenizer.decode(generator.get_sequence(0)[len(tokens) :])
    sys.stdout.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3], int(sys.argv[4]))
