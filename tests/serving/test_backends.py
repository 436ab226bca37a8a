"""Both backends against the model they run, without a server."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from compress.artifact import OriginEntry, save
from compress.errors import BackendError, ConfigError
from compress.sources import Loaded, load
from compress.surgery import drop_attention
from exporters import export
from serving import kv_cache
from serving.backend import Backend
from serving.detokenizer import plain_decode
from serving.onnx_backend import OnnxBackend
from serving.prompts import Prompts
from serving.protocol import Message
from serving.scheduler import Scheduler
from serving.service import open_backend
from serving.torch_backend import TorchBackend
from tests.conftest import CONTEXT, byte_tokenizer, tiny, token_rows
from tests.serving.fake import Client, request, run

ORIGIN = OriginEntry(name="tiny", kind="folder")
PROMPTS = [token_rows(1, length, seed=length).tokens[0].tolist() for length in (5, 11, 1, 17)]


def logits_of(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits after the last token, in one forward without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()


def ragged(model_type: str = "llama") -> PreTrainedModel:
    model = tiny(model_type)
    drop_attention(model, (0, 2))
    return model


def check_a_changing_batch(backend: Backend, model: PreTrainedModel, tolerance: float) -> None:
    """Rows join and leave; each step's logits are those of the whole row in one forward."""
    rng = np.random.default_rng(0)
    rows: list[list[int]] = []

    def join(prompt: list[int]) -> None:
        rows.append(list(prompt))
        np.testing.assert_allclose(backend.prefill(prompt), logits_of(model, prompt), atol=tolerance)

    def leave(row: int) -> None:
        backend.remove(row)
        last = rows.pop()
        if row < len(rows):
            rows[row] = last

    def step() -> None:
        tokens = rng.integers(0, 256, len(rows)).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        found = backend.step(tokens)
        assert found.shape == (len(rows), backend.vocab_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.stack([logits_of(model, row) for row in rows]), atol=tolerance)

    join(PROMPTS[0])
    step()
    join(PROMPTS[1])
    step()
    join(PROMPTS[2])
    step()
    leave(0)
    step()
    join(PROMPTS[3])
    step()
    leave(2)
    leave(1)
    step()
    leave(0)
    join(PROMPTS[1])
    step()


def test_torch_decodes_what_one_forward_says(architecture: str) -> None:
    model = tiny(architecture)
    check_a_changing_batch(TorchBackend(model, byte_tokenizer(), model_id="x"), model, 1e-4)


def test_torch_decodes_a_model_with_blocks_that_do_not_attend(architecture: str) -> None:
    model = ragged(architecture)
    check_a_changing_batch(TorchBackend(model, byte_tokenizer(), model_id="x"), model, 1e-4)


def test_an_artifact_is_served_under_its_id(tmp_path: Path) -> None:
    manifest = save(ragged(), byte_tokenizer(), tmp_path / "small", origin=ORIGIN, steps=[])
    opened = open_backend(tmp_path / "small")
    assert (opened.name, opened.model_id, opened.artifact_id) == ("torch", "small", manifest.id)
    assert opened.context_length == CONTEXT
    assert opened.end_tokens == {257}


@pytest.fixture(scope="module", params=["plain", "ragged"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A model and its fp32 export."""
    model = tiny("llama") if request.param == "plain" else ragged()
    path = tmp_path_factory.mktemp("exports") / "x"
    save(model, byte_tokenizer(), path.with_name("artifact"), origin=ORIGIN, steps=[])
    loaded = load(str(path.with_name("artifact")))
    export(loaded, path, to="onnx", check_tokens=token_rows().tokens)
    return loaded, path


def test_onnx_decodes_what_one_forward_says(exported: tuple[Loaded, Path]) -> None:
    loaded, path = exported
    opened = open_backend(path)
    assert opened.name == "onnx"
    assert opened.artifact_id == loaded.origin.artifact_id is not None
    assert opened.context_length == CONTEXT
    assert opened.end_tokens == {257}
    check_a_changing_batch(opened, loaded.model, 1e-3)


def test_an_onnx_backend_gives_back_its_memory(exported: tuple[Loaded, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    opened = open_backend(exported[1])
    assert isinstance(opened, OnnxBackend)

    def held() -> list[weakref.ref[np.ndarray]]:
        return [weakref.ref(buffer) for pair in opened._cache._buffer for buffer in pair]

    def check_gone(buffers: list[weakref.ref[np.ndarray]]) -> None:
        assert all(buffer() is None for buffer in buffers)

    opened.prefill(PROMPTS[0])
    first = held()
    for _ in range(4):
        opened.step([1])  # the last of these needs more room
    check_gone(first)
    grown = held()
    opened.prefill(PROMPTS[1])
    check_gone(grown)
    opened.step([1, 2])
    both = held()
    opened.remove(1)
    opened.remove(0)
    check_gone(both)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json"])
def test_an_export_folder_with_something_missing_is_one_clear_error(
    missing: str, exported: tuple[Loaded, Path], tmp_path: Path
) -> None:
    shutil.copytree(exported[1], tmp_path / "x")
    (tmp_path / "x" / missing).unlink()
    with pytest.raises(BackendError, match=missing):
        open_backend(tmp_path / "x")


def test_an_onnx_export_is_not_for_torch(exported: tuple[Loaded, Path]) -> None:
    with pytest.raises(BackendError, match="torch cannot run"):
        open_backend(exported[1], "torch")


def test_both_backends_say_the_same(exported: tuple[Loaded, Path]) -> None:
    """Greedy, through the scheduler, several rows at once, up to the end of the context."""
    loaded, path = exported
    texts = []
    for backend in (open_backend(path), TorchBackend(loaded.model, loaded.tokenizer, model_id="x")):
        scheduler = Scheduler(backend, plain_decode(backend.tokenizer), max_batch=3)
        clients = [Client() for _ in PROMPTS]
        for prompt, client in zip(PROMPTS, clients, strict=True):
            fields = {"prompt_tokens": tuple(prompt), "max_tokens": CONTEXT - len(prompt), "ignore_end": True}
            scheduler.submit(request(**fields), client)
        run(scheduler)
        texts.append([(client.text, client.finish) for client in clients])
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_torch_on_a_gpu_says_what_it_says_on_the_cpu() -> None:
    model = tiny("llama")
    expected = logits_of(model, PROMPTS[1])
    backend = TorchBackend(model, byte_tokenizer(), model_id="x", device="cuda")
    np.testing.assert_allclose(backend.prefill(PROMPTS[1]), expected, atol=1e-3)


@pytest.mark.model
def test_the_demo_model_answers_through_its_own_chat_template() -> None:
    try:
        opened = open_backend("demo:smollm2")
    except ConfigError as error:
        pytest.skip(str(error))
    messages = [Message(role="user", content="What is the capital of France?")]
    prompt = Prompts(opened.tokenizer, opened.vocab_size).of_chat(messages)
    scheduler = Scheduler(opened, plain_decode(opened.tokenizer))
    client = Client()
    scheduler.submit(request(prompt_tokens=prompt, max_tokens=20), client)
    run(scheduler)
    assert client.text == "The capital of France is Paris."
    assert client.finish.reason == "stop"
