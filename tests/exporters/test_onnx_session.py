"""Prefill and batched decoding of an exported graph."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compress.errors import BackendError, ConfigError
from compress.sources import Loaded, Origin
from compress.surgery import drop_attention
from exporters import export
from exporters.onnx_session import KV, OnnxSession, load_tokenizer
from tests.conftest import CONTEXT, byte_tokenizer, tiny, token_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ragged tiny llama, whose block 0 does not attend."""
    path = tmp_path_factory.mktemp("exports") / "x"
    model = tiny("llama")
    drop_attention(model, (0, 2))
    export(Loaded(model, byte_tokenizer(), Origin("tiny", "folder")), path, to="onnx", check_tokens=token_rows().tokens)
    return path


@pytest.fixture(scope="module")
def session(folder: Path) -> OnnxSession:
    return OnnxSession(folder, threads=1)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return token_rows(1, length, seed).tokens.numpy()


def greedy(session: OnnxSession, tokens: np.ndarray, count: int) -> list[int]:
    """Continue one prompt alone."""
    logits, kv = session.prefill(tokens, capacity=CONTEXT)
    found = [int(logits.argmax())]
    for position in range(tokens.shape[1], tokens.shape[1] + count - 1):
        logits, kv = session.step(np.array([[found[-1]]]), kv, np.array([position]))
        found.append(int(logits[0].argmax()))
    return found


def gather(caches: list[KV], lengths: list[int]) -> KV:
    """Copy the rows of caches of different lengths into one."""

    def rows(layer: int, which: int) -> np.ndarray:
        shape = caches[0][layer][which].shape
        batch = np.full((len(caches), shape[1], CONTEXT, shape[3]), np.nan, np.float32)
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            batch[row, :, :length] = cache[layer][which][0, :, :length]
        return batch

    return tuple((rows(layer, 0), rows(layer, 1)) for layer in range(len(caches[0])))


def test_prompts_of_different_lengths_decode_together_as_they_do_alone(session: OnnxSession) -> None:
    prompts = [prompt(5, 1), prompt(17, 2), prompt(1, 3)]
    alone = [greedy(session, tokens, 12) for tokens in prompts]
    first = [session.prefill(tokens) for tokens in prompts]
    lengths = np.array([tokens.shape[1] for tokens in prompts])
    kv = gather([cache for _, cache in first], lengths.tolist())
    together = [[int(logits.argmax())] for logits, _ in first]
    for _ in range(11):
        logits, kv = session.step(np.array([[found[-1]] for found in together]), kv, lengths)
        lengths = lengths + 1
        for found, row in zip(together, logits, strict=True):
            found.append(int(row.argmax()))
    assert together == alone


def test_a_step_appends_to_the_cache_in_place(session: OnnxSession) -> None:
    _, kv = session.prefill(prompt(6), capacity=10)
    before = [(key.copy(), value.copy()) for key, value in kv]
    _, after = session.step(np.array([[7]]), kv, np.array([6]))
    assert after is kv
    for (key, value), (old_key, old_value) in zip(kv, before, strict=True):
        assert np.array_equal(key[:, :, :6], old_key[:, :, :6])
        assert np.array_equal(value[:, :, 7:], old_value[:, :, 7:])
        assert np.abs(key[:, :, 6]).max() > 0


def test_a_long_prompt_read_in_chunks_gives_the_same_logits(
    session: OnnxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = session.prefill(prompt(40))
    runs, right = [], session._run

    def counted(tokens: Any, *rest: Any, **options: Any) -> Any:
        runs.append(tokens.shape[1])
        return right(tokens, *rest, **options)

    monkeypatch.setattr(session, "_run", counted)
    chunked, kv = session.prefill(prompt(40), chunk=7)
    assert runs == [7, 7, 7, 7, 7, 5]
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    assert kv[0][0].shape == (1, session.num_key_value_heads, 40, session.head_dim)


def test_prefill_and_whole_forward_agree(session: OnnxSession) -> None:
    tokens = prompt(20)
    logits, _ = session.prefill(tokens)
    np.testing.assert_allclose(logits, session.logits(torch.from_numpy(tokens))[0, -1], atol=1e-4)


def test_the_session_describes_its_graph(session: OnnxSession) -> None:
    assert (session.num_layers, session.num_key_value_heads, session.head_dim) == (3, 2, 16)
    assert (session.vocab_size, session.context_length) == (259, CONTEXT)
    assert session.config["num_hidden_layers"] == 3
    assert session.artifact_id is None


def test_a_full_cache_is_refused(session: OnnxSession) -> None:
    _, kv = session.prefill(prompt(4))
    with pytest.raises(ConfigError, match="more room"):
        session.step(np.array([[1]]), kv, np.array([4]))


@pytest.mark.parametrize(("length", "capacity"), [(0, None), (5, 4), (CONTEXT + 1, None), (5, CONTEXT + 1)])
def test_a_prompt_that_does_not_fit_is_refused(session: OnnxSession, length: int, capacity: int | None) -> None:
    with pytest.raises(ConfigError):
        session.prefill(prompt(length), capacity=capacity)


def test_a_folder_without_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"holds no model\.onnx"):
        OnnxSession(tmp_path)


def test_a_damaged_graph_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(BackendError, match="cannot load") as caught:
        OnnxSession(tmp_path)
    assert "\n" not in str(caught.value)


def copy_of(folder: Path, path: Path, **changes: Any) -> Path:
    """An export folder whose config.json says something else; None takes a key away."""
    shutil.copytree(folder, path)
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def test_a_folder_without_a_config_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path / "x")
    (path / "config.json").unlink()
    with pytest.raises(BackendError, match=r"holds no config\.json; make one with `foldaway export"):
        OnnxSession(path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_config_that_cannot_be_read_is_refused(content: str, folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path / "x")
    (path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(BackendError, match=r"config\.json"):
        OnnxSession(path)


def test_a_config_without_a_context_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="does not say max_position_embeddings"):
        OnnxSession(copy_of(folder, tmp_path / "x", max_position_embeddings=None))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["input_ids", "attention_mask"], "input_ids, attention_mask and 0 past_key_values"),
        (["input_ids", "attention_mask", "token_type_ids", "past"], "attention_mask, token_type_ids and 2 past_key"),
        (["input_ids", "attention_mask", "past"], r"does not return present\.0\.key"),
    ],
)
def test_a_graph_that_wants_other_inputs_is_refused_by_their_names(
    inputs: list[str], message: str, folder: Path, tmp_path: Path
) -> None:
    path = copy_of(folder, tmp_path / "x")
    values = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "t"]) for n in inputs if n != "past"]
    for kind in ("key", "value") if "past" in inputs else ():
        name = f"past_key_values.0.{kind}"
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2, "p", 16]))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t"])
    node = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", values, [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path / "model.onnx"))
    with pytest.raises(BackendError, match=rf"no graph of ours: .*{message}.*make one with") as caught:
        OnnxSession(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("tokenizer_config.json", "tokenizer.json"), ("tokenizer.json",)])
def test_a_folder_without_a_tokenizer_is_refused(names: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path / "x")
    for name in names:
        (path / name).unlink()
    with pytest.raises(BackendError, match="tokenizer"):
        load_tokenizer(path)


def test_a_session_that_is_unbound_holds_no_cache(folder: Path) -> None:
    session = OnnxSession(folder, threads=1)
    _, kv = session.prefill(prompt(5))
    buffers = [weakref.ref(buffer) for pair in kv for buffer in pair]
    del kv
    session.unbind()
    assert all(buffer() is None for buffer in buffers)
    session.prefill(prompt(5))
