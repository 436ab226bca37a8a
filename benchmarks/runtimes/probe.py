"""One run of one runtime, in a process of its own: imports nothing of foldaway unless the runtime is ours.

``PYTHON -I probe.py KIND PATH SETTINGS``: the last line that it prints is JSON with what it timed. Where its memory is
to be read it prints ``at NAME``, and waits for a line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any, Protocol

GOLDEN = 0.6180339887498949


class Side(Protocol):
    """A model in one runtime, loaded.

    Attributes:
        vocabulary: tokens that it knows.
    """

    vocabulary: int

    def start(self, prompt: Sequence[int], room: int) -> None:
        """Forget what was before, read a prompt, and choose the next token; in all there will be `room` tokens."""

    def step(self) -> None:
        """Read the token that was chosen, and choose the next one."""


Load = Callable[[str, int], Side]
"""Loads a path, to run in so many threads."""


class Onnx:
    """An export of ours."""

    def __init__(self, session: Any, np: Any) -> None:
        self.vocabulary: int = session.vocab_size
        self.session, self.np = session, np

    def start(self, prompt: Sequence[int], room: int) -> None:
        """Prefill, as the server does it."""
        logits, self.kv = self.session.prefill(self.np.array([prompt], self.np.int64), capacity=room)
        self.token, self.length = int(logits.argmax()), len(prompt)

    def step(self) -> None:
        """One token."""
        tokens, lengths = self.np.array([[self.token]]), self.np.array([self.length])
        logits, self.kv = self.session.step(tokens, self.kv, lengths)
        self.token, self.length = int(logits.argmax()), self.length + 1


def import_onnx() -> Load:
    """Our own session over onnxruntime."""
    import numpy as np
    import onnxruntime  # noqa: F401  (the session imports it when it is made, and imports are not the model's)

    from exporters.mapped import give_back_large_blocks
    from exporters.onnx_session import OnnxSession

    give_back_large_blocks()
    return lambda path, threads: Onnx(OnnxSession(path, threads=threads), np)


class GenAi:
    """A folder of onnxruntime-genai."""

    def __init__(self, og: Any, path: str, threads: int) -> None:
        config = og.Config(path)
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.og, self.model = og, og.Model(config)
        with open(f"{path}/genai_config.json", encoding="utf-8") as file:
            self.vocabulary: int = json.load(file)["model"]["vocab_size"]

    def start(self, prompt: Sequence[int], room: int) -> None:
        """A new generator: it has a cache of its own. No token ends the text before its time."""
        options = self.og.GeneratorParams(self.model)
        options.set_search_options(max_length=room, min_length=room, do_sample=False)
        self.generator = self.og.Generator(self.model, options)
        self.generator.append_tokens([list(prompt)])
        self.generator.generate_next_token()

    def step(self) -> None:
        """One token."""
        self.generator.generate_next_token()


def import_genai() -> Load:
    """onnxruntime-genai."""
    import onnxruntime_genai as og

    return lambda path, threads: GenAi(og, path, threads)


class Transformers:
    """A model with the calls of transformers: of itself, or of optimum."""

    def __init__(self, torch: Any, model: Any, **options: Any) -> None:
        self.torch, self.model, self.options = torch, model, options
        self.vocabulary: int = model.config.vocab_size

    def start(self, prompt: Sequence[int], room: int) -> None:
        """With an empty cache."""
        self.past, self.length = None, 0
        self.read(prompt)

    def step(self) -> None:
        """One token."""
        self.read([self.token])

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens behind what was read."""
        self.length += len(tokens)
        ids = self.torch.tensor([tokens])
        mask = self.torch.ones((1, self.length), dtype=ids.dtype)
        with self.torch.inference_mode():
            out = self.model(ids, attention_mask=mask, past_key_values=self.past, use_cache=True, **self.options)
        self.past, self.token = out.past_key_values, int(out.logits[0, -1].argmax())


def import_torch() -> Load:
    """transformers, which computes logits of the last position only where that is all that is asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(path: str, threads: int) -> Side:
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
        return Transformers(torch, model, logits_to_keep=1)

    return load


def import_optimum() -> Load:
    """optimum-onnx."""
    import onnxruntime
    import torch

    optimum = importlib.import_module("optimum.onnxruntime")

    def load(path: str, threads: int) -> Side:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        torch.set_num_threads(threads)
        return Transformers(torch, optimum.ORTModelForCausalLM.from_pretrained(path, session_options=options))

    return load


class LlamaCpp:
    """A GGUF file."""

    def __init__(self, llama_cpp: Any, np: Any, path: str, threads: int) -> None:
        self.llama_cpp, self.np = llama_cpp, np
        self.model = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.vocabulary: int = self.model.n_vocab()

    def start(self, prompt: Sequence[int], room: int) -> None:
        """From an empty context."""
        self.model.reset()
        self.read(prompt)

    def step(self) -> None:
        """One token."""
        self.read([self.token])

    def read(self, tokens: Sequence[int]) -> None:
        """Read tokens behind what was read; only the last one's logits are computed."""
        self.model.eval(list(tokens))
        logits = self.llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        self.token = int(self.np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def import_llama_cpp() -> Load:
    """llama-cpp-python."""
    import numpy as np

    llama_cpp = importlib.import_module("llama_cpp")

    return lambda path, threads: LlamaCpp(llama_cpp, np, path, threads)


KINDS: dict[str, tuple[Callable[[], Load], tuple[str, ...]]] = {
    "onnx": (import_onnx, ("foldaway", "onnxruntime")),
    "genai": (import_genai, ("onnxruntime-genai", "onnxruntime")),
    "optimum": (import_optimum, ("optimum-onnx", "optimum", "onnxruntime", "transformers", "torch")),
    "torch": (import_torch, ("transformers", "torch")),
    "llama.cpp": (import_llama_cpp, ("llama-cpp-python",)),
}
"""What imports a runtime, and the distributions that it is made of."""


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Tokens that are the same everywhere; as in text, half of them are among the first sqrt(vocabulary)."""
    return [int(vocabulary ** ((place + 1) * GOLDEN % 1)) for place in range(length)]


def seconds_of(call: Callable[[], object]) -> float:
    """How long something takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def steps(side: Side, count: int) -> None:
    """So many tokens more."""
    for _ in range(count):
        side.step()


def pause(name: str) -> None:
    """Let memory be read."""
    sys.stdout.write(f"at {name}\n")
    sys.stdout.flush()
    sys.stdin.readline()


def run(kind: str, path: str, settings: dict[str, int]) -> dict[str, Any]:
    """Load and use a model; seconds, tokens/second, and versions."""
    imported, packages = KINDS[kind]
    load = imported()
    pause("idle")
    start = perf_counter()
    side = load(path, settings["threads"])
    load_seconds = perf_counter() - start
    pause("loaded")
    side.start(prompt_of(settings["first_tokens"], side.vocabulary), settings["first_tokens"] + settings["first_steps"])
    steps(side, settings["first_steps"] - 1)
    pause("used")
    prefill, decode = [], []
    for _ in range(1 + settings["repeats"]):
        prompt = prompt_of(settings["prompt_tokens"], side.vocabulary)
        prefill.append(len(prompt) / seconds_of(lambda: side.start(prompt, len(prompt) + 1)))  # noqa: B023
        side.start(
            prompt_of(settings["short_tokens"], side.vocabulary), settings["short_tokens"] + settings["steps"] + 1
        )
        decode.append(settings["steps"] / seconds_of(lambda: steps(side, settings["steps"])))
    pause("done")
    return {
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": median(prefill[1:]),
        "decode_tokens_per_second": median(decode[1:]),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))) + "\n")
