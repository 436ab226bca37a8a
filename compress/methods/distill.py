"""Knowledge distillation: a smaller model learns to predict what a larger one predicts (Hinton et al. 2015).

The second half of Minitron (Muralidharan et al. 2024, section 3; Sreenivas et al. 2024), and a cure for what any other
method has done to a model: all weights learn, from the forward KL divergence between the teacher's predictions and the
student's at every token. Options add the next token itself, hidden states where depth was cut a lot, and a teacher that
first adapts itself to the text at hand.

Where we differ: the papers train with some 10^11 tokens and the optimiser of the parent's pretraining; the defaults
here belong to minutes on one machine. Kept predictions of a teacher count all but its K most likely tokens as one
token, so that what is minimised stays a divergence.

Cost: a step takes a pass of the teacher and about three of the student for each of its rows; weights are held in fp32
while they learn, with two moments and a gradient: 16 bytes for each parameter of the student. Logits exist for some
tokens at a time only.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compress import budget
from compress.activations import block_inputs, logits_from, output_seen, through
from compress.arch import check_text_model
from compress.calibration import TokenRows, parts
from compress.decoder import Decoder
from compress.device import has_bf16
from compress.errors import ConfigError
from compress.files import new_file
from compress.gating import evaluating
from compress.losses import cosine, top_logit_kl, wide
from compress.options import check_flag, check_known, check_positive, check_seed, check_share, check_weight, check_whole
from compress.remote_code import submodule
from compress.result import CompressedModel, Report, Run
from compress.resume import identity
from compress.surgery import clone
from compress.teacher import CHUNK_TOKENS, check_teacher, divergence_from, prediction_loss
from compress.training import Group, Learnt, optimise

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns.

    Attributes:
        epochs: how often all calibration rows are taken, less those held out.
        batch: rows a step; a divisor of the rows that are learnt from.
        accumulate: parts that a step is taken in, one after the other, for less memory; a divisor of ``batch``. The
            weight of hidden states is that of each part.
        learning_rate: the highest, after warm-up; it falls along a cosine to zero.
        warmup: share of the steps over which it rises first.
        clip: the largest norm of all gradients together.
        weight_decay: of matrices, decoupled (AdamW).
        distil: weight of the divergence from the teacher's predictions.
        temperature: that both predictions are softened with.
        next_token: weight of the cross-entropy with the next token; the papers found none of it best.
        intermediate: let hidden states follow the teacher's as well, behind the embeddings and behind the last block
            but two, with a weight that balances them with the predictions; for students much shallower than it.
        correction_epochs: let a copy of the teacher first learn the rows by next token, so often; 0: it stays as it is.
        correction_lr: its learning rate, at its highest.
        top_tokens: keep so many of the teacher's most likely tokens at each place on disk, and learn from those; 0:
            all, computed at each step. It pays where rows are taken several times.
        precision: what matrices are multiplied in while they learn, "bf16", where the device is fast at it, or "fp32";
            weights are held in fp32.
        held_out: rows, the last ones, that nothing learns from: what is lost on them before and after is reported.
        seed: of the order of the rows.
    """

    epochs: int = 1
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.1
    distil: float = 1.0
    temperature: float = 1.0
    next_token: float = 0.0
    intermediate: bool = False
    correction_epochs: int = 0
    correction_lr: float = 2e-5
    top_tokens: int = 0
    precision: str = "bf16"
    held_out: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate"):
            check_whole(name, getattr(self, name), 1)
        if self.batch % self.accumulate:
            raise ConfigError(f"accumulate={self.accumulate} does not divide batch={self.batch}")
        for name in ("learning_rate", "clip", "temperature", "correction_lr"):
            check_positive(name, getattr(self, name))
        check_share("warmup", self.warmup)
        for name in ("weight_decay", "distil", "next_token"):
            check_weight(name, getattr(self, name))
        if not self.distil and not self.next_token:
            raise ConfigError("distil and next_token are both 0: there is nothing to learn from")
        for name, plain in {"top_tokens": 0, "correction_epochs": 0, "temperature": 1.0}.items():
            if not self.distil and getattr(self, name) != plain:
                raise ConfigError(f"{name} is about the teacher's predictions, which distil=0 leaves out: give one")
        check_flag("intermediate", self.intermediate)
        for name in ("correction_epochs", "top_tokens", "held_out"):
            check_whole(name, getattr(self, name), 0)
        check_known("precision", self.precision, PRECISIONS)
        check_seed(self.seed)


def compress(
    model: PreTrainedModel, calibration: TokenRows, config: DistillConfig, run: Run | None = None
) -> CompressedModel:
    """Let a model learn from ``run.teacher``; where there is none, from what it predicts itself now.

    Args:
        model: the student, of any layout; not changed unless ``run.consume``.
        calibration: rows (N, T).
        config: how it learns.
        run: how to run. With ``scratch`` a call that was stopped leaves there what the next one goes on from.

    Raises:
        ConfigError: the rows do not fill batches; the teacher predicts other tokens; or there is no teacher, and
            nothing else to learn from.
        FoldawayError: the loss is not a finite number any more.
        UnsupportedArchitecture: a vision-language model.

    Source: Muralidharan et al. 2024, equations 4 to 7 (losses), section 3 (no next-token loss; dynamic weight of the
    hidden states); Sreenivas et al. 2024, section 2.3 (teacher correction).
    """
    run = run or Run()
    check_text_model(model.config, "distillation")
    if run.teacher is not None:
        check_text_model(run.teacher.config, "distillation")
    rows = learnt_rows(len(calibration.tokens), config)
    student, counts = (model if run.consume else _copy(model)), budget.count(model)
    teacher = _copy(model) if run.teacher is None else run.teacher
    _check(Decoder(student), Decoder(teacher), config, run)
    tokens = calibration.only_tokens()
    dtype = _own_weights(student, torch.promote_types(model.dtype, torch.float32))
    with evaluating(student), evaluating(teacher):
        numbers = _Lesson(student, teacher, tokens, rows, config, run).teach()
    _own_weights(student, dtype)
    resumed_seconds = numbers.pop("resumed_seconds")
    report = {**numbers, **budget.change(counts, budget.count(student), 0.0)}
    return CompressedModel(student, Report("distill", dataclasses.asdict(config), report, resumed_seconds))


def outline(model: PreTrainedModel, rows: int, config: DistillConfig) -> float:
    """No shape changes; returns about how many forward passes of the student `compress` takes, for a like teacher."""
    check_text_model(model.config, "distillation")
    learnt = learnt_rows(rows, config)
    return config.epochs * 4.0 * learnt + config.correction_epochs * 3.0 * learnt + 4.0 * config.held_out


def memory(model: PreTrainedModel, rows: int, length: int, config: DistillConfig, spill_bytes: int) -> int:
    """About how many bytes learning holds beside the model and one pass, with a teacher twice as large."""
    decoder, counts = Decoder(model), budget.count(model)
    tokens = config.batch // config.accumulate * length
    width: int = counts.blocks // (len(decoder) * decoder.config.hidden_size)  # numbers a token makes in a block
    activations: int = 4 * tokens * len(decoder) * (8 * decoder.config.hidden_size + width)
    logits: int = 5 * 4 * CHUNK_TOKENS * decoder.config.vocab_size
    teacher = 2 * counts.total
    lesson = 16 * counts.total + teacher * model.dtype.itemsize * (2 if config.correction_epochs else 1)
    correction = 16 * teacher + teacher * model.dtype.itemsize + 4 * counts.total if config.correction_epochs else 0
    return max(lesson, correction) + activations + logits


def learnt_rows(rows: int, config: DistillConfig) -> int:
    """How many of so many rows are learnt from.

    Raises:
        ConfigError: they do not fill batches.
    """
    learnt = rows - config.held_out
    if learnt < config.batch or learnt % config.batch:
        least = max(1, learnt // config.batch) * config.batch + config.held_out
        raise ConfigError(
            f"{max(learnt, 0)} rows to learn from, {config.held_out} held out, do not fill batches of {config.batch}: "
            f"give {least} or {least + config.batch} rows, or another batch"
        )
    return learnt


def _check(student: Decoder, teacher: Decoder, config: DistillConfig, run: Run) -> None:
    """Refuse, before anything learns, a pair that cannot be."""
    if run.teacher is None and not config.next_token:
        raise ConfigError("without a teacher a model has nothing to learn from its own predictions: give a teacher")
    check_teacher(student, teacher, tail=0)
    if config.top_tokens > student.config.vocab_size:
        raise ConfigError(f"top_tokens={config.top_tokens}: there are {student.config.vocab_size} tokens")
    if config.intermediate and min(len(student), len(teacher)) < 3:
        raise ConfigError("intermediate compares what leaves the last block but two: there are too few blocks")


class _Lesson:
    """One student, one teacher, and the rows."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        tokens: Tensor,
        rows: int,
        config: DistillConfig,
        run: Run,
    ) -> None:
        self.student, self.teacher = Decoder(student), Decoder(teacher)
        self.tokens, self.rows, self.config, self.run = tokens, rows, config, run
        self.learning = _parameters(student)
        self.map = _map(self.student, self.teacher, config, run.device) if config.intermediate else None
        self.kept_predictions: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.temporary: tempfile.TemporaryDirectory[str] | None = None

    def teach(self) -> dict[str, Any]:
        """Learn, and say what came of it."""
        config = self.config
        resumed = self._correct() if config.correction_epochs else 0.0
        if config.top_tokens and config.distil:
            self.kept_predictions = self._keep_predictions()
        before = self._judge()
        mapped = [] if self.map is None else list(self.map.parameters())
        learnt = self._optimise(
            [*_groups(self.learning, config.learning_rate, config.weight_decay), Group(mapped, config.learning_rate)],
            self._loss,
            config.epochs,
            "distillation",
            lambda: self._identity(self.student, f"{config} {self._identity(self.teacher, 'teacher')}"),
        )
        after = self._judge()
        return {
            "losses": list(learnt.losses),
            "tokens_learnt": config.epochs * self.rows * self.tokens.shape[1],
            "block_forwards": self._block_forwards(),
            **({"held_out_before": before, "held_out_after": after} if config.held_out else {}),
            "resumed_seconds": resumed + learnt.resumed_seconds,
        }

    def _block_forwards(self) -> int:
        """Passes of one row through one block, those of an earlier call counted as well; learning counts as three."""
        config, ours, theirs = self.config, len(self.student), len(self.teacher)
        asked = bool(config.distil and not config.top_tokens) or config.intermediate
        return (
            config.epochs * self.rows * (3 * ours + theirs * asked)
            + self.rows * theirs * bool(config.distil and config.top_tokens)
            + config.correction_epochs * self.rows * 3 * theirs
            + 2 * config.held_out * (ours + theirs)
        )

    def _optimise(
        self,
        groups: Sequence[Group],
        loss: Callable[[Tensor, int], Tensor],
        epochs: int,
        what: str,
        name: Callable[[], str],
    ) -> Learnt:
        """Run the loop; its state is kept under the name of what is done and of all that it depends on."""
        config, kept = self.config, None
        learning = [parameter for group in groups for parameter in group.parameters]
        for parameter in learning:
            parameter.requires_grad_()
        if self.run.scratch is not None:
            kept = self.run.scratch / f"{what.replace(' ', '-')}-{name()}.safetensors"
        try:
            return optimise(
                groups,
                loss,
                rows=self.rows,
                batch=config.batch,
                epochs=epochs,
                generator=torch.Generator().manual_seed(config.seed),
                progress=self.run.progress,
                what=what,
                warmup=config.warmup,
                clip=config.clip,
                accumulate=config.accumulate,
                kept=kept,
            )
        finally:
            for parameter in learning:
                parameter.requires_grad_(False)

    # --- What the student learns from

    def _loss(self, rows: Tensor, step: int) -> Tensor:
        """distil KL + next_token CE + alpha L_is, with alpha = (KL or CE) / L_is as numbers.

        Source: Muralidharan et al. 2024, equations 4 to 7.
        """
        with self._autocast():
            ours, last = self._pass(self.student, rows)
            theirs, divergence = self._teacher(rows)
            value = prediction_loss(
                self.student,
                last,
                self.tokens[rows],
                divergence,
                next_token_weight=self.config.next_token,
                distil=self.config.distil,
                learning=_of_predictions(self.student),
            )
            if self.map is None:
                return value
            pairs = zip(ours, theirs, strict=True)
            here = self.run.device
            apart = [cosine(self.map(wide(o).to(here)), t.to(here)).to(value.device) for o, t in pairs]
            intermediate = torch.stack(apart).sum()
            alpha = value.detach() / intermediate.detach().clamp_min(torch.finfo(value.dtype).eps)
            # Balanced with the rest it says nothing of its own: it gives a gradient, and no part of the loss's value.
            return value + alpha * (intermediate - intermediate.detach())

    def _pass(self, decoder: Decoder, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """The normed states that are compared, and what leaves the last block."""
        inputs = {"input_ids": self.tokens[rows].to(self.run.device)}
        with ExitStack() as stack:
            seen = [stack.enter_context(output_seen(norm)) for norm in self._norms(decoder)]
            last = through(decoder, inputs, None, 0, len(decoder))
        return [states[0] for states in seen], last

    def _norms(self, decoder: Decoder) -> list[nn.Module]:
        """Norms behind the embeddings, and behind the last block but two."""
        if self.map is None:
            return []
        norms = []
        for block in (decoder.blocks[0], decoder.blocks[-2]):
            # Where an attention was removed, what enters the block goes to its FFN's norm.
            first = block.arch.ffn_norms if block.attention is None else block.arch.attention_norms
            norms.append(submodule(block.module, first[0]))
        return norms

    @torch.no_grad()
    def _teacher(self, rows: Tensor) -> tuple[list[Tensor], Callable[[Tensor, int], Tensor]]:
        """The teacher's normed states, and how far logits of some tokens are from its own."""
        temperature = self.config.temperature
        if not self.config.distil and self.map is None:
            return [], lambda logits, start: logits.new_zeros(())
        if self.kept_predictions is not None:
            indices, log_p = self.kept_predictions(rows)

            def from_kept(logits: Tensor, start: int) -> Tensor:
                here = slice(start, start + logits.shape[1])
                told = indices[:, here].to(logits.device), log_p[:, here].to(logits.device)
                return top_logit_kl(logits, *told, temperature)

            return ([] if self.map is None else self._pass(self.teacher, rows)[0]), from_kept
        states, last = self._pass(self.teacher, rows)
        return states, divergence_from(self.teacher, last, temperature, last.device)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32" or not has_bf16(self.run.device):
            return nullcontext()
        return torch.autocast(torch.device(self.run.device).type, torch.bfloat16)

    # --- The teacher, before

    def _correct(self) -> float:
        """Let a copy of the teacher learn the rows by next token, and take its place.

        Source: Sreenivas et al. 2024, section 2.3.
        """
        teacher = _copy(self.teacher.model)
        dtype = _own_weights(teacher, torch.promote_types(teacher.dtype, torch.float32))
        self.teacher = Decoder(teacher)
        learning = _parameters(teacher)

        def loss(rows: Tensor, step: int) -> Tensor:
            with self._autocast():
                _, last = self._pass(self.teacher, rows)
                return prediction_loss(
                    self.teacher,
                    last,
                    self.tokens[rows],
                    lambda logits, start: logits.new_zeros(()),
                    next_token_weight=1.0,
                    distil=0.0,
                    learning=_of_predictions(self.teacher),
                )

        groups = _groups(learning, self.config.correction_lr, self.config.weight_decay)
        # Whatever the student: every one of them may take this teacher over.
        matters = ("batch", "accumulate", "warmup", "clip", "weight_decay", "precision", "seed")
        options = {name: getattr(self.config, name) for name in ("correction_epochs", "correction_lr", *matters)}
        learnt = self._optimise(
            groups,
            loss,
            self.config.correction_epochs,
            "correction of the teacher",
            lambda: self._identity(self.teacher, f"{options} {self.rows}"),
        )
        _own_weights(teacher, dtype)
        return learnt.resumed_seconds

    def _keep_predictions(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Write the teacher's most likely tokens at every place to disk; returns how they are read, by rows."""
        scratch = self.run.scratch
        if scratch is None:
            self.temporary = tempfile.TemporaryDirectory()  # as long as the lesson
            scratch = Path(self.temporary.name)
        options = (self.config.top_tokens, self.config.temperature, self.config.precision, self.rows)
        folder = scratch / f"teacher-{self._identity(self.teacher, f'top tokens {options}')}"
        slices = list(parts(self.rows, self.tokens.shape[1]))
        files = {part.start: folder / f"{part.start:08}.safetensors" for part in slices}
        for part in slices:
            if not files[part.start].exists():
                self._write_predictions(torch.arange(part.start, part.stop), files[part.start])
            self.run.progress("what the teacher predicts", part.stop, self.rows)
        size = slices[0].stop

        def read(rows: Tensor) -> tuple[Tensor, Tensor]:
            found: list[tuple[Tensor, Tensor]] = []
            for row in rows.tolist():
                with safe_open(files[row // size * size], "pt") as file:
                    found.append(tuple(file.get_slice(name)[row % size] for name in ("indices", "log_p")))
            indices, log_p = zip(*found, strict=True)
            return torch.stack(indices).long(), torch.stack(log_p)

        return read

    @torch.no_grad()
    def _write_predictions(self, rows: Tensor, file: Path) -> None:
        with self._autocast():
            _, last = self._pass(self.teacher, rows)
            indices, log_p = [], []
            for states in torch.split(last, max(1, CHUNK_TOKENS // len(rows)), dim=1):
                logits = wide(logits_from(self.teacher, states)) / self.config.temperature
                best = functional.log_softmax(logits, dim=-1).topk(self.config.top_tokens, dim=-1)
                indices.append(best.indices.int().cpu())
                log_p.append(best.values.cpu())
        with new_file(file) as partial:
            save_file({"indices": torch.cat(indices, 1), "log_p": torch.cat(log_p, 1)}, partial)

    # --- How it stands

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Divergence and cross-entropy on the rows held out, in nats a token."""
        found = {"divergence": 0.0, "next_token": 0.0}
        for row in range(self.rows, len(self.tokens)):
            with self._autocast():
                index = torch.tensor([row])
                _, last = self._pass(self.student, index)
                _, theirs = self._pass(self.teacher, index)
                for name in found:
                    found[name] += float(
                        prediction_loss(
                            self.student,
                            last,
                            self.tokens[index],
                            divergence_from(self.teacher, theirs, 1.0, theirs.device),
                            next_token_weight=float(name == "next_token"),
                            distil=float(name == "divergence"),
                        )
                    )
        return {name: total / max(1, self.config.held_out) for name, total in found.items()}

    def _identity(self, decoder: Decoder, what: str) -> str:
        """Of work on a model that can be taken over: what for, and on which rows."""
        with torch.no_grad():
            seen = block_inputs(decoder, self.tokens[:1].to(self.run.device))[-1]
        return identity(decoder, what, [self.tokens, seen])


def _parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Every distinct parameter of a model."""
    return list({id(parameter): parameter for parameter in model.parameters()}.values())


def _of_predictions(decoder: Decoder) -> list[nn.Parameter]:
    """The parameters that make predictions of what leaves the last block: those of the final norm and of the head."""
    head: Any = decoder.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [*submodule(decoder.model, decoder.arch.final_norm).parameters(), *head.parameters()]


def _groups(parameters: Sequence[nn.Parameter], rate: float, weight_decay: float) -> list[Group]:
    """Matrices with weight decay, norms and biases without."""
    return [
        Group([p for p in parameters if p.dim() > 1], rate, weight_decay),
        Group([p for p in parameters if p.dim() <= 1], rate),
    ]


def _map(student: Decoder, teacher: Decoder, config: DistillConfig, device: str) -> nn.Module:
    """One map from the student's hidden channels to the teacher's, for all states; none where they are as many.

    Source: Muralidharan et al. 2024, section 3 (one shared linear transformation).
    """
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if ours == theirs:
        return nn.Identity()
    mapped = nn.Linear(ours, theirs, bias=False, device=device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(config.seed)
        mapped.weight.copy_(torch.randn(theirs, ours, generator=generator) * ours**-0.5)
    return mapped.requires_grad_(False)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same tensors in Parameters of its own, which may be given other values."""
    twin = clone(model)
    _own_weights(twin, None)
    return twin


def _own_weights(model: PreTrainedModel, dtype: torch.dtype | None) -> torch.dtype:
    """Give a model Parameters that no other model has, of another dtype, ties kept; returns the dtype before.

    With None the values are shared and only the Parameters are its own.
    """
    before, twins = model.dtype, {}
    for parameter in model.parameters():
        value = parameter.detach() if dtype is None else parameter.detach().to(dtype, copy=True)
        twins[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                module._parameters[name] = twins[id(own)]
    return before
