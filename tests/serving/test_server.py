"""Whole servers in processes of their own: a tiny random llama in PyTorch behind a free port."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from compress.errors import BackendError, ConfigError
from serving.service import BACKENDS, open_backend, serve
from tests.conftest import byte_tokenizer, tiny

SCRIPT = """
import sys
from serving.service import serve
serve(sys.argv[1], port=int(sys.argv[2]), ready=lambda url: print(url, flush=True))
print("served", flush=True)
"""
CONTEXT = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a long context and no end token, so that an answer lasts as long as it is asked to."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = tiny("llama")
    model.config.max_position_embeddings = CONTEXT
    model.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(path)
    return path


@contextlib.contextmanager
def process(folder: Path, port: int = 0) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def client_of(running: subprocess.Popen[str]) -> openai.OpenAI:
    """Wait until the server is up."""
    assert running.stdout is not None
    url = running.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url), running.communicate()
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60, http_client=http)


def stream(client: openai.OpenAI, tokens: int) -> Any:
    """`ignore_eos`, and no sampling: the answer has exactly so many tokens."""
    messages: Any = [{"role": "user", "content": "Hello"}]
    return client.chat.completions.create(
        model="tiny-llama",
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )


def test_sigterm_while_streaming_finishes_the_stream_and_exits_with_0(folder: Path) -> None:
    with process(folder) as running:
        client = client_of(running)
        assert client.models.list().data[0].id == "tiny-llama"
        chunks = stream(client, 400)
        first = next(chunks)
        running.send_signal(signal.SIGTERM)
        *_, last = [first, *chunks]
        assert last.usage.completion_tokens == 400
        out, err = running.communicate(timeout=30)
        assert (running.returncode, out) == (0, "served\n")
        assert "Traceback" not in err
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_ctrl_c_lets_a_stream_go_on_and_a_second_one_stops_it(folder: Path) -> None:
    with process(folder) as running:
        chunks = stream(client_of(running), CONTEXT - 100)
        next(chunks)
        running.send_signal(signal.SIGINT)
        after = time.monotonic() + 0.5
        while time.monotonic() < after:
            next(chunks)
        running.send_signal(signal.SIGINT)
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(chunks)
        out, err = running.communicate(timeout=20)
        assert "served" not in out
        assert "KeyboardInterrupt" in err


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_one_clear_error_before_the_model_is_loaded(taken: int, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=f"port {taken}: Address already in use; give another --port"):
        serve(tmp_path / "no model here", port=taken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "203.0.113.7"}, "cannot listen on 203.0.113.7"),
        ({"host": "no.such.host.invalid"}, "is not known"),
        ({"port": 70_000}, "give 1 to 65535"),
        ({"backend": "abacus"}, "known are onnx, torch"),
        ({"max_model_len": CONTEXT + 1}, "can be served with 2 to 4096"),
        ({"max_batch": 0}, "give 1 or more"),
        ({"device": "abacus"}, "give cpu, cuda"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"backend": "onnx"}, "holds no model.onnx"),
        ({"backend": "onnx", "device": "cuda"}, "run on the cpu"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((BackendError, ConfigError), match=re.escape(message)):
        serve(folder, **{"port": 0, **options})


def test_a_path_that_is_no_model_is_one_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError):
            open_backend(path)


def test_the_backend_is_chosen_by_what_the_path_is(folder: Path) -> None:
    opened = open_backend(folder)
    assert opened.name == "torch"
    assert isinstance(opened, BACKENDS["torch"])
    assert (opened.model_id, opened.artifact_id, opened.context_length) == ("tiny-llama", None, CONTEXT)
