"""Answers to questions: the files they come from, and scores against numbers computed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.answers import LABELS, Item, Reference, read_items, score_answers
from benchmarks.scoring import Question, torch_scorer
from compress.errors import ConfigError
from compress.finetune import Example
from tests.conftest import byte_tokenizer, tiny

# --- Files


def test_sentences_with_labels_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("sentence\tlabel\nit is  fine \t1\na tab\tinside\t0\n")
    assert read_items(tmp_path / "x.tsv") == [
        Item("it is  fine\nSentiment:", LABELS, 1),
        Item("a tab\tinside\nSentiment:", LABELS, 0),
    ]


def test_questions_with_answers_are_read(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, {"question": "Naïve?", "answer": "Ja.", "id": 3}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_items(tmp_path / "x.jsonl") == [
        Item("Question: 1 + 1?\nAnswer:", (" It is 2.\n#### 2",), 0),
        Item("Question: Naïve?\nAnswer:", (" Ja.",), 0),
    ]


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path) -> None:
    question = "one\u2028two\x85three"
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": question, "answer": "a"}, ensure_ascii=False) + "\n")
    assert read_items(tmp_path / "x.jsonl") == [Item(f"Question: {question}\nAnswer:", (" a",), 0)]
    (tmp_path / "x.tsv").write_text(f"sentence\tlabel\n{question}\t1\n")
    assert read_items(tmp_path / "x.tsv") == [Item(f"{question}\nSentiment:", LABELS, 1)]


def test_the_example_of_an_item_is_its_right_answer() -> None:
    assert Item("p", ("a", "b"), 1).example == Example("p", "b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", b"sentence\tlabel\nno label\n"),
        ("x.tsv", b"sentence\tlabel\nfine\tgood\n"),
        ("x.tsv", b"sentence\tlabel\nfine\t2\n"),
        ("x.tsv", b"sentence\tlabel\nfine\t-1\n"),
        ("x.tsv", b"sentence\tlabel\n\xff\t1\n"),
        ("x.tsv", b"sentence\tlabel\n"),
        ("x.tsv", b""),
        ("x.jsonl", b""),
        ("x.jsonl", b"{"),
        ("x.jsonl", b"[1, 2]\n"),
        ("x.jsonl", b'"text"\n'),
        ("x.jsonl", b'{"question": "a"}\n'),
        ("x.jsonl", b'{"answer": "a"}\n'),
    ],
)
def test_a_file_that_holds_no_questions_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name) as caught:
        read_items(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.tsv", tmp_path):
        with pytest.raises(ConfigError, match="no questions"):
            read_items(path)


# --- Scores

P = (0.1, 0.2, 0.3, 0.4)
"""Chances of the letters a, b, c, d, whatever came before."""


class Letters:
    """A tokenizer of four letters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ["abcd".index(letter) for letter in text]


def scorer(chances: Sequence[float], asked: list[int] | None = None) -> Any:
    """A model without context."""
    logits = torch.tensor(chances).log()

    def score(questions: Sequence[Question]) -> list[list[Tensor]]:
        if asked is not None:
            asked.append(len(questions))
        return [[logits.repeat(len(ending), 1) for ending in endings] for _, endings in questions]

    return score


def score(items: list[Item], chances: Sequence[float] = P, **options: Any) -> Any:
    tokenizer: Any = Letters()
    return score_answers(scorer(chances, options.pop("asked", None)), tokenizer, items, **options)


def test_scores_are_those_computed_by_hand() -> None:
    # b costs ln 5 = 1.61 nats; cd costs ln (1 / 0.12) = 2.12 nats, which is 1.06 a token: b is likelier as a whole.
    items = [Item("a", ("b", "cd"), 0), Item("ab", ("b", "cd"), 1), Item("d", ("a", "d"), 1)]
    found = score(items)
    nll = [-math.log(0.2), -(math.log(0.3) + math.log(0.4)) / 2, -math.log(0.4)]
    assert found.item_nll == pytest.approx(nll)
    assert found.nll == pytest.approx(sum(nll) / 3)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.right == "101"
    assert found.kl is None


def test_where_there_is_one_answer_nothing_is_right_or_wrong() -> None:
    found = score([Item("a", ("bcd",), 0), Item("b", ("d",), 0)])
    assert (found.accuracy, found.right) == (None, "")
    assert found.item_nll == pytest.approx((-math.log(0.2 * 0.3 * 0.4) / 3, -math.log(0.4)))


def test_divergence_is_from_the_fine_tune_at_the_tokens_of_the_right_answers() -> None:
    items = [Item("a", ("b", "cd"), 1), Item("b", ("acd", "b"), 0)]
    uniform, reference = (0.25, 0.25, 0.25, 0.25), Reference()
    filled = score(items, uniform, reference=reference)
    assert filled.kl is None
    assert {place: tuple(logits.shape) for place, logits in reference.logits.items()} == {0: (2, 4), 1: (3, 4)}
    # KL(uniform || P), the same at every token.
    expected = sum(0.25 * math.log(0.25 / chance) for chance in P)
    assert score(items, reference=reference).kl == pytest.approx(expected, rel=1e-3)
    assert score(items, uniform, reference=reference).kl == pytest.approx(0, abs=1e-9)
    assert len(reference.logits) == 2


def test_questions_are_asked_in_batches_and_told_of() -> None:
    items = [Item("a" * (n % 3 + 1), ("abcd"[n % 4], "dd"), 0) for n in range(19)]
    asked: list[int] = []
    told: list[tuple[int, int]] = []
    found = score(items, asked=asked, progress=lambda what, done, total: told.append((done, total)))
    assert asked == [8, 8, 3]
    assert told == [(8, 19), (16, 19), (19, 19)]
    assert found.item_nll == pytest.approx([-math.log(P[n % 4]) for n in range(19)])


def test_a_model_is_scored_as_a_plain_loop_scores_it() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    items = [Item("so dull\nSentiment:", LABELS, 0), Item("a warm and good one\nSentiment:", LABELS, 1)]
    found = score_answers(torch_scorer(model), tokenizer, items)
    right = ""
    for item, nll in zip(items, found.item_nll, strict=True):
        losses = []
        for answer in item.answers:
            beginning, ending = (tokenizer.encode(text, add_special_tokens=False) for text in (item.prompt, answer))
            tokens = [*beginning, *ending]
            with torch.no_grad():
                chances = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            losses.append(-sum(float(chances[t - 1, tokens[t]]) for t in range(len(beginning), len(tokens))))
        assert nll == pytest.approx(losses[item.gold] / len(item.answers[item.gold]), rel=1e-4)
        right += "1" if losses[item.gold] == min(losses) else "0"
    assert found.right == right
