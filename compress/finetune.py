"""Ordinary fine-tuning of a causal LM through transformers' Trainer, with AdamW or AdamR; LoRA through peft.

DAREx-L2 is this with ``optimizer="adamr-l2"``, and DARE after it: the same training, but the weights are held close to
where they began, so that most of the delta can be dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

from compress import text
from compress.arch import check_text_model
from compress.delta.checkpoint import digest
from compress.device import cast_weights
from compress.errors import ConfigError, require
from compress.optim import AdamR
from compress.result import Progress, Run
from compress.surgery import check_owns

IGNORED = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        learning_rate: peak, after warm-up.
        steps: optimiser steps; None goes once through the examples, or ``epochs`` times.
        epochs: times through the examples, where ``steps`` is None.
        batch: examples per step.
        optimizer: "adamw", or AdamR with a pull towards the base weights: "adamr-l2", "adamr-l1".
        strength: lambda, of AdamR's pull.
        weight_decay: of AdamW; of AdamR for parameters without a base value.
        warmup: share of the steps.
        schedule: of the learning rate after warm-up, "linear", "cosine" or "constant".
        max_length: tokens; longer examples are cut at their end.
        autocast: compute in bf16, with fp32 weights.
        train_embeddings: whether embeddings and an output layer of their own learn as well.
        lora_rank: train pairs of this rank beside the linears of the blocks instead, and merge them; 0 trains weights.
        seed: of the order of the examples, and of LoRA's start.
    """

    learning_rate: float = 2e-5
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 16
    optimizer: Literal["adamw", "adamr-l2", "adamr-l1"] = "adamw"
    strength: float = 1e-2
    weight_decay: float = 0.0
    warmup: float = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_length: int = 512
    autocast: bool = False
    train_embeddings: bool = True
    lora_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        steps = 1 if self.steps is None else self.steps
        for name, value in {"steps": steps, "batch": self.batch, "max_length": self.max_length}.items():
            _check_whole(name, value, 1)
        for name, value in {"lora_rank": self.lora_rank, "seed": self.seed}.items():
            _check_whole(name, value, 0)
        for name, size in {"learning_rate": self.learning_rate, "epochs": self.epochs}.items():
            if not 0 < size < math.inf:
                raise ConfigError(f"{name} must be above 0, not {size}")
        for name, size in {"strength": self.strength, "weight_decay": self.weight_decay}.items():
            if not 0 <= size < math.inf:
                raise ConfigError(f"{name} must not be below 0, not {size}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is a share in [0, 1), not {self.warmup}")
        if self.optimizer not in ("adamw", "adamr-l2", "adamr-l1"):
            raise ConfigError(f"optimizer {self.optimizer!r} is not known: adamw, adamr-l2 or adamr-l1")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ConfigError(f"schedule {self.schedule!r} is not known: linear, cosine or constant")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}, not {value}")


@dataclass(frozen=True)
class Example:
    """One example: what is read, and what is learnt; an empty prompt learns all of it but the first token."""

    prompt: str
    response: str


def read_examples(source: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool = True) -> list[Example]:
    """Read examples from a source of text; of a conversation the last answer is learnt, of a plain text all of it.

    Args:
        source: as for `compress.text.read`.
        tokenizer: its chat template, where it has one, is put around prompts and responses.
        chat: without it, prompt and response are joined as they stand.

    Raises:
        ConfigError: nothing is there, or it is not in the shape of examples.
    """
    render = _with_template(tokenizer) if chat and tokenizer.chat_template else _as_it_stands
    documents = [document for document in text.read(source, render=render).documents if document.strip()]
    parts = [document.partition(BOUNDARY) for document in documents]
    return [Example(before, after) if found else Example("", before) for before, found, after in parts]


BOUNDARY = "\0"
"""Between prompt and response on their way through the reader of texts, which refuses texts that hold it."""


def _as_it_stands(messages: Sequence[text.Message]) -> str:
    return BOUNDARY.join(("".join(message["content"] for message in messages[:-1]), messages[-1]["content"]))


def _with_template(tokenizer: PreTrainedTokenizerBase) -> text.Render:
    def render(messages: Sequence[text.Message]) -> str:
        chat = [dict(message) for message in messages]
        whole = str(tokenizer.apply_chat_template(chat, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True))
        return BOUNDARY.join((prompt, whole.removeprefix(prompt))) if whole.startswith(prompt) else whole

    return render


Row = dict[str, list[int] | int]
"""What a model is trained on: input_ids and labels, as the model's class takes them."""


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: FinetuneConfig,
    run: Run | None = None,
) -> float:
    """Fine-tune a causal LM in place; its weights keep their dtype, and learn in fp32.

    Args:
        model: any causal LM of transformers, or of ours.
        tokenizer: of the model; examples are tokenised as they stand and end with its EOS.
        examples: shuffled by ``config.seed``.
        config: how.
        run: progress, device, and where checkpoints go: an interrupted call goes on from the last one.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.

    Raises:
        ConfigError: no examples, or one that is empty.
        MissingExtra: LoRA without peft.
        UnsupportedArchitecture: a vision-language model; or LoRA where blocks share weights.
    """
    check_text_model(model.config, "foldaway finetune")
    if config.lora_rank and hasattr(model.config, "block_configs"):
        check_owns(model, "LoRA, merged once for each block,")
    rows = []
    for number, example in enumerate(examples, start=1):
        try:
            rows.append(_row(example, tokenizer, config.max_length))
        except ConfigError as error:
            raise ConfigError(f"example {number}: {error}; raise max_length, or leave it out") from error
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ConfigError("the tokenizer has neither a padding nor an EOS token, and batches need one of them")
    return train(model, rows, lambda batch: _padded(batch, pad), config, run or Run())


def tokens_of(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], list[int]]:
    """Prompt and response of an example as tokens, the response with the EOS at its end; cut to ``max_length``.

    Raises:
        ConfigError: nothing of the response is left.
    """
    prompt: list[int] = tokenizer.encode(example.prompt, add_special_tokens=False) if example.prompt else []
    response: list[int] = tokenizer.encode(example.response, add_special_tokens=False)
    if tokenizer.eos_token_id is not None and not example.response.endswith(str(tokenizer.eos_token)):
        response.append(int(tokenizer.eos_token_id))
    response = response[: max(0, max_length - len(prompt))]
    if not response or len(prompt) + len(response) < 2:
        raise ConfigError(f"it teaches nothing: its response is empty, or beyond {max_length} tokens")
    return prompt, response


def _row(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    """Tokens of an example, with labels on the response alone."""
    prompt, response = tokens_of(example, tokenizer, max_length)
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


def _padded(batch: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Rows as one batch (B, T), padded on the right."""
    longest = max(len(row["input_ids"]) for row in batch)

    def stack(fill: int, values: Callable[[dict[str, list[int]]], list[int]]) -> torch.Tensor:
        return torch.tensor([values(row) + [fill] * (longest - len(row["input_ids"])) for row in batch])

    return {
        "input_ids": stack(pad, lambda row: row["input_ids"]),
        "attention_mask": stack(0, lambda row: [1] * len(row["input_ids"])),
        "labels": stack(IGNORED, lambda row: row["labels"]),
    }


def train(
    model: PreTrainedModel,
    rows: Sequence[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    config: FinetuneConfig,
    run: Run,
    new: frozenset[str] = frozenset(),
) -> float:
    """Train any model of transformers in place on rows that ``collate`` makes batches of; see `finetune`.

    Batches are of rows of like length, so that little is padding. Parameters named in ``new`` have no base value that
    AdamR could pull them to. An interrupted call that goes on in a second or later pass over the rows takes them in
    another order than one that was not interrupted.
    """
    if not rows:
        raise ConfigError("there are no examples to fine-tune on")
    dtype = model.dtype
    steps = math.ceil(len(rows) / config.batch * config.epochs) if config.steps is None else config.steps
    checkpoints = None if run.scratch is None else run.scratch / f"finetune-{_digest(model, config, rows)}"
    model.to(run.device)  # type: ignore[arg-type]
    cast_weights(model, torch.float32)
    learner = _learner(model, config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if checkpoints is None else checkpoints
        arguments = _arguments(folder, steps, config, run)
        optimizer = _optimizer(learner, config, new)
        schedule = get_scheduler(
            config.schedule if config.schedule != "constant" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=round(config.warmup * steps),
            num_training_steps=steps,
        )
        trainer = Trainer(
            learner,
            arguments,
            data_collator=collate,
            train_dataset=rows,
            optimizers=(optimizer, schedule),
            callbacks=[_Tell(run.progress)],
        )
        trainer.remove_callback(PrinterCallback)
        last = get_last_checkpoint(folder) if folder.is_dir() else None  # type: ignore[no-untyped-call]
        trainer.train(resume_from_checkpoint=last)
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # computes in its own dtype again
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if config.lora_rank:
        learner.merge_and_unload()
    model.to("cpu")  # type: ignore[arg-type]
    cast_weights(model, dtype)
    model.train(False)
    model.requires_grad_(False)
    end = losses[-math.ceil(len(losses) / 10) :]
    return sum(end) / len(end)


def _learner(model: PreTrainedModel, config: FinetuneConfig) -> Any:
    """The model with what shall learn marked."""
    if config.lora_rank:
        peft = require("peft", "finetune")
        lora = peft.LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
        torch.manual_seed(config.seed)
        return peft.get_peft_model(model, lora)
    model.requires_grad_(True)
    if not config.train_embeddings:
        outputs: Any = model.get_output_embeddings  # typed by nobody
        for layer in (model.get_input_embeddings(), outputs()):
            if layer is not None:
                layer.requires_grad_(False)
    return model


def _optimizer(learner: Any, config: FinetuneConfig, new: frozenset[str]) -> torch.optim.Optimizer:
    learning = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(learning.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in learning.items() if name not in new]},
        {"params": [p for name, p in learning.items() if name in new], "anchored": False},
    ]
    return AdamR(
        [group for group in groups if group["params"]],
        config.learning_rate,
        strength=config.strength,
        norm="l2" if config.optimizer == "adamr-l2" else "l1",
        weight_decay=config.weight_decay,
    )


def _arguments(folder: Path, steps: int, config: FinetuneConfig, run: Run) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        max_grad_norm=1.0,
        bf16=config.autocast,
        use_cpu=run.device == "cpu",
        seed=config.seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no" if run.scratch is None else "steps",
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=run.device != "cpu",
    )


def _digest(model: PreTrainedModel, config: FinetuneConfig, rows: Sequence[Any]) -> str:
    """What a checkpoint belongs to."""
    found = hashlib.sha256(json.dumps([dataclasses.asdict(config), list(rows)], sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        found.update(f"{name} {digest(parameter)}\n".encode())
    return found.hexdigest()[:12]


class _Tell(TrainerCallback):
    """Pass the Trainer's steps on."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One optimiser step was taken."""
        self.progress("fine-tuning", state.global_step, state.max_steps)
