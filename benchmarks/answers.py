"""Answers that a fine-tune was taught: how likely and how right they are, and how far from the fine-tune's own.

Two files of examples are read: sentences with a label (GLUE's SST-2, as .tsv), and questions with a worked answer
(GSM8K, as .jsonl). A model of some hundred million parameters rarely solves one of the latter, so the likelihood of
the answer is what is measured there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from benchmarks.scoring import Scorer
from compress.errors import ConfigError
from compress.finetune import Example
from compress.result import Progress, no_progress

LABELS = (" negative", " positive")
"""Answers to a sentence with label 0 and 1."""
BATCH = 8
"""Questions that are asked together."""


@dataclass(frozen=True)
class Item:
    """One question: what is read, the possible answers, and which is right."""

    prompt: str
    answers: tuple[str, ...]
    gold: int

    @property
    def example(self) -> Example:
        """With its right answer, to be learnt."""
        return Example(self.prompt, self.answers[self.gold])


def read_items(path: Path) -> list[Item]:
    """Read sentences with labels (.tsv) or questions with answers (.jsonl).

    Raises:
        ConfigError: the file cannot be read, or is in another shape.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.suffix == ".tsv":
            pairs = [line.rsplit("\t", 1) for line in lines[1:]]
            items = [Item(f"{text.strip()}\nSentiment:", LABELS, ("0", "1").index(label)) for text, label in pairs]
        else:
            rows = [json.loads(line) for line in lines]
            items = [Item(f"Question: {row['question']}\nAnswer:", (f" {row['answer']}",), 0) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no questions that can be read: {error}") from error
    if not items:
        raise ConfigError(f"{path} holds no questions")
    return items


@dataclass(frozen=True)
class AnswerScore:
    """What a model makes of the items.

    Attributes:
        accuracy: share of items whose right answer is the likeliest; None where each has one answer only.
        nll: mean over items of the right answer's cross-entropy per token, in nats.
        kl: mean over items of KL(fine-tune || model) per token of the right answer, in nats; None for the fine-tune.
        right: one character per item, 1 where it is right; empty where each has one answer only.
        item_nll: of each item.
    """

    accuracy: float | None
    nll: float
    kl: float | None
    right: str
    item_nll: tuple[float, ...]


@dataclass
class Reference:
    """What the fine-tune predicts at each token of the right answers: item -> (S, V) in bf16, in memory."""

    logits: dict[int, Tensor] = field(default_factory=dict)


def score_answers(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    reference: Reference | None = None,
    progress: Progress = no_progress,
) -> AnswerScore:
    """Ask every item.

    Args:
        scorer: of the model.
        tokenizer: of the model; texts are tokenised as they stand.
        items: what to ask.
        reference: an empty one is filled with this model's predictions; a filled one is compared with.
        progress: told of each batch.
    """
    questions = [
        (
            tokenizer.encode(item.prompt, add_special_tokens=False),
            [tokenizer.encode(answer, add_special_tokens=False) for answer in item.answers],
        )
        for item in items
    ]
    fill = reference is not None and not reference.logits
    right, nll, moved = [False] * len(items), [0.0] * len(items), [0.0] * len(items)
    order = sorted(range(len(items)), key=lambda place: len(questions[place][0]))  # so that little is padding
    for start in range(0, len(items), BATCH):
        places = order[start : start + BATCH]
        for place, found in zip(places, scorer([questions[place] for place in places]), strict=True):
            gold, endings = items[place].gold, questions[place][1]
            losses = [_loss(logits, ending) for logits, ending in zip(found, endings, strict=True)]
            right[place] = min(range(len(losses)), key=lambda answer: losses[answer]) == gold
            nll[place] = losses[gold] / len(endings[gold])
            if fill:
                assert reference is not None
                reference.logits[place] = found[gold].bfloat16()
            elif reference is not None:
                moved[place] = _divergence(reference.logits[place].float(), found[gold])
        progress("answers", min(start + BATCH, len(items)), len(items))
    many = len(items[0].answers) > 1
    return AnswerScore(
        accuracy=fmean(right) if many else None,
        nll=fmean(nll),
        kl=None if fill or reference is None else fmean(moved),
        right="".join("01"[each] for each in right) if many else "",
        item_nll=tuple(nll),
    )


def _loss(logits: Tensor, tokens: Sequence[int]) -> float:
    """Cross-entropy of an answer (S,) under logits (S, V), summed."""
    return float(functional.cross_entropy(logits.float(), torch.tensor(tokens), reduction="sum"))


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    p, q = (functional.log_softmax(each.float(), dim=-1) for each in (ours, theirs))
    return float(functional.kl_div(q, p, log_target=True, reduction="sum")) / len(p)
