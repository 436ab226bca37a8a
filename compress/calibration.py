"""Token rows (N, T): what methods calibrate on, and what perplexity is measured on."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress import text
from compress.arch import text_config_of
from compress.errors import ConfigError
from compress.result import Progress, no_progress

ROWS_AT_ONCE = 8  # sampled together: the key-value cache of so many rows must fit in memory
PASS_TOKENS = 2048  # passes without gradients take about so many at once
NO_LIMIT = 1_000_000_000  # tokenizers without a limit name a number beyond this


@dataclass(frozen=True, eq=False)
class Recorded:
    """What entered the language tower of a vision-language model: tokens' and images' embeddings.

    Attributes:
        embeds: (N, T, D), as the model computed them.
        position_ids: (N, T), or (N, A, T) with A axes of position; None where the tower counts for itself.
    """

    embeds: Tensor
    position_ids: Tensor | None = None

    def batch(self, index: slice | Tensor, device: str | torch.device) -> dict[str, Tensor]:
        """The rows at some places as keyword inputs of a model's forward pass."""
        if self.position_ids is None:
            return {"inputs_embeds": self.embeds[index].to(device)}
        positions = self.position_ids[index].movedim(0, -2)  # transformers puts the axes before the rows: (A, B, T)
        return {"inputs_embeds": self.embeds[index].to(device), "position_ids": positions.to(device)}

    def rows(self, index: slice) -> Recorded:
        """Some of the rows."""
        return Recorded(self.embeds[index], None if self.position_ids is None else self.position_ids[index])


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of token ids of one length.

    Attributes:
        tokens: int64 (N, T).
        source: where they come from, for records.
        sha256: of the bytes of `tokens` (int64, little endian, row after row), and behind them of what was recorded.
        seed: what they were shuffled or sampled with.
        stride: tokens from the start of one evaluation window to the next; None where rows do not overlap.
        recorded: for a vision-language model, what enters its language tower in the place of tokens; see recording.py.
    """

    tokens: Tensor
    source: str
    sha256: str
    seed: int
    stride: int | None = None
    recorded: Recorded | None = None

    @property
    def predicted(self) -> int:
        """Tokens of each row that an evaluation predicts: those that no other row does."""
        length = self.tokens.shape[1]
        return length - 1 if self.stride is None else min(self.stride, length - 1)

    def batch(self, index: slice | Tensor, device: str | torch.device) -> dict[str, Tensor]:
        """The rows at some places as keyword inputs of a model's forward pass."""
        if self.recorded is not None:
            return self.recorded.batch(index, device)
        return {"input_ids": self.tokens[index].to(device)}

    def rows(self, index: slice) -> TokenRows:
        """Some of the rows, under the hash of all."""
        recorded = None if self.recorded is None else self.recorded.rows(index)
        return dataclasses.replace(self, tokens=self.tokens[index], recorded=recorded)

    def only_tokens(self) -> Tensor:
        """The tokens (N, T), for a method that gives the model nothing else.

        Raises:
            ConfigError: the rows hold images, which their tokens alone only have places for.
        """
        if self.recorded is not None:
            raise ConfigError(
                "this method calibrates on text only, and these rows were recorded with images: draw rows of text, or "
                "take a method that can use them (fusegpt, minitron, shortgpt, window)"
            )
        return self.tokens

    def record(self) -> dict[str, Any]:
        """What a manifest says of these rows."""
        rows, length = self.tokens.shape
        stride = {} if self.stride is None else {"stride": self.stride}
        return {
            "source": self.source,
            "sha256": self.sha256,
            "rows": rows,
            "length": length,
            "seed": self.seed,
            **stride,
        }


def parts(rows: int, length: int, first: int = 0) -> Iterator[slice]:
    """Consecutive slices of rows that hold about `PASS_TOKENS` tokens, one row at least."""
    size = max(1, PASS_TOKENS // length)
    return (slice(start, min(start + size, rows)) for start in range(first, rows, size))


def draw(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = 24,
    length: int = 2048,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    progress: Progress = no_progress,
) -> TokenRows:
    """Draw `rows` calibration rows of `length` tokens.

    Args:
        source: as for `text.read`, or ``self``: sampled from `model` itself, which needs no data.
        tokenizer: of the model.
        rows: how many, N.
        length: tokens a row, T; at most the model's context.
        seed: 0 takes the documents in their order, others shuffle them; for ``self`` it seeds the sampling.
        model: needed for ``self``; otherwise only its context length is looked at.
        progress: told of each sampled token.

    Raises:
        ConfigError: the text is missing, empty or too short, or `length` is beyond the model's context.

    Source: 2SSP, calibration data (documents joined with two newlines, no special tokens, consecutive pieces).
    """
    check_length(length, context_length_of(model) if model is not None else tokenizer.model_max_length)
    if rows < 1:
        raise ConfigError(f"cannot draw {rows} rows: ask for at least 1")
    if source == "self":
        if model is None:
            raise ConfigError("self samples from the model itself, and no model was given: give one, or a text source")
        return hashed_rows(
            sample(model, tokenizer, rows=rows, length=length, seed=seed, progress=progress), "self", seed
        )
    drawn = text.read(source, part="calibration", render=_chat(tokenizer))
    documents = list(drawn.documents)
    if seed != 0:
        if len(documents) == 1:
            raise ConfigError(f"{drawn.name} is a single document, which seed {seed} cannot shuffle: use seed 0")
        random.Random(seed).shuffle(documents)
    return hashed_rows(_cut(documents, tokenizer, drawn.name, rows, length), drawn.name, seed)


def windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 2048,
    count: int | None = None,
    stride: int | None = None,
    context_length: int | None = None,
) -> TokenRows:
    """Evaluation windows of `length` tokens: consecutive, the tail dropped.

    Args:
        source: as for `text.read`; of ``builtin`` its evaluation part.
        tokenizer: of the model.
        length: tokens a window, T; at most the model's context.
        count: the first so many windows; None takes all.
        stride: tokens from the start of one window to the next, at most `length`; None: windows do not overlap. With
            a stride only the last so many tokens of a window are predicted, and the others are their context.
        context_length: of the model; None takes what the tokenizer says.

    Raises:
        ConfigError: the text is missing, empty or too short, or `length` is beyond the model's context.
    """
    check_length(length, context_length or tokenizer.model_max_length)
    if count is not None and count < 1:
        raise ConfigError(f"cannot cut {count} windows: ask for at least 1")
    if stride is not None and not 1 <= stride <= length:
        raise ConfigError(f"a stride of {stride} does not fit windows of {length}: give one from 1 to {length}")
    if source == "self":
        raise ConfigError("self is for calibration: a model is not evaluated on its own text; give a text source")
    drawn = text.read(source, part="evaluation", render=_chat(tokenizer))
    if stride is not None and stride < length:
        tokens = _encode(drawn.documents, tokenizer)
        return hashed_rows(_slide(tokens, drawn.name, count, length, stride), drawn.name, seed=0, stride=stride)
    return hashed_rows(_cut(drawn.documents, tokenizer, drawn.name, count, length), drawn.name, seed=0)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    seed: int,
    progress: Progress = no_progress,
) -> Tensor:
    """Sample token rows from the model at temperature 1; the same seed gives the same tokens.

    A row starts with the tokenizer's bos, or with a random token where there is none, and goes on past any end token:
    what a model writes after one is a new document.

    Returns:
        int64 (N, T), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for first in range(0, rows, ROWS_AT_ONCE):
        step = _first_tokens(tokenizer, min(ROWS_AT_ONCE, rows - first), generator)
        steps, cache = [step], None
        while len(steps) < length:
            output = model(input_ids=step.to(model.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].float(), dim=-1).cpu()
            step = torch.multinomial(chances, num_samples=1, generator=generator)
            steps.append(step)
            progress("sampling calibration rows", first * length + len(step) * len(steps), rows * length)
        batches.append(torch.cat(steps, dim=1))
    return torch.cat(batches)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, rows: int, generator: torch.Generator) -> Tensor:
    if tokenizer.bos_token_id is not None:
        return torch.full((rows, 1), int(tokenizer.bos_token_id))
    return torch.randint(len(tokenizer), (rows, 1), generator=generator)


def hashed_rows(
    tokens: Tensor, source: str, seed: int, stride: int | None = None, recorded: Recorded | None = None
) -> TokenRows:
    """Rows with their hash."""
    digest = hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes())
    if recorded is not None:
        for tensor in (recorded.embeds, recorded.position_ids):
            if tensor is not None:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return TokenRows(tokens, source, digest.hexdigest(), seed, stride, recorded)


def _encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The joined documents as tokens (X,)."""
    encoded = tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.int64)


def _slide(tokens: Tensor, name: str, count: int | None, length: int, stride: int) -> Tensor:
    """Overlapping windows (N, T) over tokens (X,)."""
    possible = 1 + (len(tokens) - length) // stride if len(tokens) >= length else 0
    if possible < (count or 1):
        raise ConfigError(
            f"{name} has {len(tokens)} tokens, which gives {possible} windows of {length} at a stride of {stride}: "
            f"ask for fewer or shorter ones than {count or 1} x {length}, or give a longer text"
        )
    return tokens.unfold(0, length, stride)[:count].contiguous()


def _cut(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: str, rows: int | None, length: int
) -> Tensor:
    """The first `rows` consecutive pieces (None: all of them) of the joined documents, (N, T)."""
    tokens = _encode(documents, tokenizer)
    possible = len(tokens) // length
    if possible < (rows or 1):
        wanted = (rows or 1) * length
        advice = (
            f"ask for at most {possible} rows of {length}" if possible else f"ask for rows of at most {len(tokens)}"
        )
        raise ConfigError(
            f"{name} has {len(tokens)} tokens, but {rows or 1} x {length} = {wanted} are needed: {advice}, "
            "or give a longer text"
        )
    rows = possible if rows is None else rows
    return tokens[: rows * length].view(rows, length)


def context_length_of(model: PreTrainedModel) -> int:
    """The most tokens that a model has positions for."""
    return int(getattr(text_config_of(model.config), "max_position_embeddings", NO_LIMIT))


def check_length(length: int, context_length: int) -> None:
    """Refuse rows that predict nothing, or that the model has no positions for."""
    if length < 2:
        raise ConfigError(f"rows of {length} tokens predict nothing: ask for at least 2")
    if length > context_length:
        raise ConfigError(
            f"rows of {length} tokens are longer than the model's context: ask for at most {context_length}"
        )


def _chat(tokenizer: PreTrainedTokenizerBase) -> text.Render:
    """The tokenizer's chat template as a `Render`, or plain lines where it has none."""
    if not tokenizer.chat_template:
        return text.plain_chat
    return lambda messages: str(tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False))
