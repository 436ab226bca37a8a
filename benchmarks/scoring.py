"""How lm-eval asks a model: scorers that answer with logits, and the adapter that makes log-likelihoods of them.

lm-eval builds requests and turns answers into accuracies; here is only what stands between it and a model or a graph.
Questions are asked in batches that share what they begin with.

Source: Sutawika et al., lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.errors import ConfigError, require
from compress.evaluate import Logits
from compress.result import Progress, no_progress

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether each of its tokens is the likeliest."""

Question = tuple[Sequence[int], Sequence[Sequence[int]]]
"""Tokens that all answers of a question begin with, at least one, and how each goes on, S >= 1 tokens."""

BATCH_TOKENS = 512
"""Questions are asked together up to so many tokens of their endings, and as many of their beginnings, with padding."""


class Scorer(Protocol):
    """What a model must answer: the logits that predict how questions go on."""

    def __call__(self, questions: Sequence[Question]) -> list[list[Tensor]]:
        """For each question the logits of each ending, fp32 (S, V): row i predicts ending[i].

        The last token of an ending is only predicted: it takes no place in the context.
        """


def torch_scorer(model: PreTrainedModel) -> Scorer:
    """Read the beginnings of all questions as one batch, then all endings as another, on copies of the KV cache.

    The model makes its own cache, so that one with blocks without attention or with sliding windows gets the right one.
    """
    # All logits are asked for: those of the last token alone would come from a strided product, which is slow in bf16.
    places_are_taken = "position_ids" in inspect.signature(model.forward).parameters

    def run(tokens: Tensor, mask: Tensor, **options: Any) -> Any:
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        options |= {"position_ids": places.to(model.device)} if places_are_taken else {}
        return model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=True, **options)

    @torch.no_grad()
    def score(questions: Sequence[Question]) -> list[list[Tensor]]:
        beginnings, mask = _padded([beginning for beginning, _ in questions], left=True)
        read = run(beginnings, mask)
        rows = torch.tensor([row for row, (_, endings) in enumerate(questions) for _ in endings])
        first = read.logits[:, -1:]
        endings, _ = _padded([ending[:-1] for _, endings in questions for ending in endings])
        if endings.shape[1] == 0:
            return _by_question((first[row] for row in rows), questions)
        read.past_key_values.batch_select_indices(rows.to(model.device))
        both = torch.cat((mask[rows], torch.ones_like(endings)), dim=1)
        others = run(endings, both, past_key_values=read.past_key_values).logits
        return _by_question(
            (torch.cat((first[row], other)) for row, other in zip(rows, others, strict=True)), questions
        )

    return score


def logits_scorer(logits: Logits) -> Scorer:
    """Run a beginning with all its endings as one batch: for anything that maps tokens to logits."""

    @torch.no_grad()
    def score(questions: Sequence[Question]) -> list[list[Tensor]]:
        found = []
        for question in questions:
            beginning, endings = question
            whole, _ = _padded([[*beginning, *ending[:-1]] for ending in endings])
            found += _by_question(logits(whole)[:, len(beginning) - 1 :], [question])
        return found

    return score


def _padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one int64 (B, T) with its mask; zeros where a row is too short, after it or before it."""
    length = max(len(row) for row in rows)
    gaps = [[0] * (length - len(row)) for row in rows]
    tokens = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*gap, *one] if left else [*one, *gap] for one, gap in zip(ones, gaps, strict=True)]
    return tuple(torch.tensor(each, dtype=torch.long).view(len(rows), length) for each in (tokens, mask))  # type: ignore[return-value]


def _by_question(rows: Iterable[Tensor], questions: Sequence[Question]) -> list[list[Tensor]]:
    """Deal out one (T, V) per ending, without what is padding."""
    left = iter(rows)
    return [[next(left)[: len(ending)].float() for ending in endings] for _, endings in questions]


def language_model(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase, context_length: int, progress: Progress = no_progress
) -> Any:
    """A model as lm-eval asks it: an ``lm_eval.api.model.LM``, for ``lm_eval.simple_evaluate(model=...)`` too.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    template = require("lm_eval.api.model", "eval").TemplateLM
    return type("Adapter", (_Adapter, template), {})(scorer, tokenizer, context_length, progress)


class _Adapter:
    """Answers lm-eval's requests with a `Scorer`; mixed with ``lm_eval.api.model.TemplateLM``, which makes the tokens.

    Conventions are those of HFLM, lm-eval's own class for models of transformers, so that the accuracies are the same:
    the tokenizer's default decides about special tokens, none are added to a text that begins with the first token
    (BOS), and an empty context is that token, or the last one (EOS) where there is no first. Two things differ: the
    softmax is fp32 whatever the model computes in, and an item too long for the context is refused rather than cut.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, context_length: int, progress: Progress
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.max_length = context_length
        self.progress = progress

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        first: int | None = self.tokenizer.bos_token_id
        token = self.eot_token_id if first is None else first
        if token is None:
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token, and tasks need one of them")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; None leaves special tokens to the tokenizer, unless the text brings the first one."""
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode(self.prefix_token_id))):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        tokens: list[int] = self.tokenizer.encode(string, verbose=False, **special)
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Answer requests, without lm-eval's own bar."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows that predict each token once with the most context."""
        utils = require("lm_eval.utils", "eval")
        totals = []
        for done, request in enumerate(requests, start=1):
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = (utils.make_disjoint_window(window) for window in windows)
            totals.append(sum(self._loglikelihood_tokens([("", *pair)])[0][0] for pair in pairs))
            self.progress("rolling log-likelihood", done, len(requests))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse: the adapter scores, it does not generate."""
        raise NotImplementedError("this adapter answers log-likelihoods only")

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Answer]:
        """Answer (texts, context, continuation) requests; those of one question share what they begin with."""
        for _texts, context, continuation in requests:
            check_length(len(context), len(continuation), self.max_length, "an item of the task")
        asked = [(group, _question([requests[number][1:] for number in group])) for group in _groups(requests)]
        asked.sort(key=lambda each: (_lengths(each[1])[0] // 4, _lengths(each[1])[1]))  # so that little is padding
        groups, questions = [group for group, _ in asked], [question for _, question in asked]
        answers: dict[int, Answer] = {}
        done = 0
        for batch in _batches(questions):
            for found in self.scorer(questions[batch]):
                for number, logits in zip(groups[done], found, strict=True):
                    answers[number] = _answer(logits, requests[number][2])
                done += 1
            self.progress("zero-shot tasks", done, len(questions))
        return [answers[number] for number in range(len(requests))]


def _groups(requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[list[int]]:
    """Numbers of requests that are scored together: neighbours with one context, or with one continuation.

    A question of lm-eval gives such requests. Others may meet the rule by chance, which costs time and nothing else.
    """
    groups: list[list[int]] = []
    for number, (_texts, context, continuation) in enumerate(requests):
        _, before, ending = requests[groups[-1][-1]] if groups else ("", [], [])
        alike = bool(groups) and before[0] == context[0] and (before == context or ending == continuation)
        if alike:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _question(pairs: Sequence[tuple[list[int], list[int]]]) -> Question:
    """What (context, continuation) pairs begin with, and how each goes on."""
    columns = zip(*(context for context, _ in pairs), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return pairs[0][0][:shared], [(context + continuation)[shared:] for context, continuation in pairs]


def _lengths(question: Question) -> tuple[int, int]:
    """Tokens of the longest ending, and of the beginning."""
    return max(map(len, question[1])), len(question[0])


def _batches(questions: Sequence[Question]) -> Iterator[slice]:
    """Neighbouring questions that are asked together: a single one, or as many as `BATCH_TOKENS` allows."""
    start, rows, longest = 0, 0, (0, 0)
    for place, question in enumerate(questions):
        ending, beginning = map(max, longest, _lengths(question))
        tokens = max((rows + len(question[1])) * ending, (place + 1 - start) * beginning)
        if place > start and tokens > BATCH_TOKENS:
            yield slice(start, place)
            start, rows, (ending, beginning) = place, 0, _lengths(question)
        rows, longest = rows + len(question[1]), (ending, beginning)
    if questions:
        yield slice(start, len(questions))


def check_length(context: int, continuation: int, context_length: int, where: str) -> None:
    """Refuse tokens that cannot be scored. The last token is only predicted, so one more than the context fits."""
    if continuation == 0:
        raise ConfigError(f"{where}: its continuation is no token of its own with this tokenizer")
    if context + continuation > context_length + 1:
        raise ConfigError(
            f"{where}: {context + continuation - 1} tokens, and the model reads {context_length}: leave this item out"
        )


def _answer(logits: Tensor, continuation: Sequence[int]) -> Answer:
    """Sum the log-probabilities of a continuation, which the last rows of the logits (S, V) predict."""
    tokens = torch.tensor(continuation, device=logits.device)
    probabilities = functional.log_softmax(logits[-len(continuation) :].float(), dim=-1)
    total = float(probabilities.gather(1, tokens[:, None]).sum())
    if math.isnan(total):  # lm-eval would take the first choice for the likeliest, and count chance as skill
        raise ConfigError("the model computes NaN, so none of its choices is the likeliest")
    return total, bool((probabilities.argmax(-1) == tokens).all())
