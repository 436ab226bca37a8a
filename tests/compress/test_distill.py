"""Distillation: its losses against torch's own, what it touches, and how it goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from compress.decoder import Decoder
from compress.errors import ConfigError, FoldawayError, UnsupportedArchitecture
from compress.evaluate import logits_of
from compress.losses import by_chunks, logit_kl, top_logit_kl
from compress.methods import METHODS, distill, method_config
from compress.result import CompressedModel, Run
from compress.training import Group, optimise
from tests.conftest import Killed, killer, tiny, token_rows

ROWS = token_rows(6, 24)
PLAIN = {"batch": 2, "learning_rate": 0.001, "precision": "fp32"}


def learn(student: PreTrainedModel, teacher: PreTrainedModel | None, run: Run | None = None, **options: Any) -> Any:
    run = run or Run()
    given = Run(run.progress, run.device, run.scratch, run.consume, teacher)
    return METHODS["distill"].compress(student, ROWS, method_config("distill", {**PLAIN, **options}), given)


def smaller(model_type: str, **options: Any) -> PreTrainedModel:
    given = {"sparsity": 0.3, "cut": "ffn", **options}
    return METHODS["minitron"].compress(tiny(model_type), ROWS, method_config("minitron", given)).model


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def divergence(teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    return float(logit_kl(logits_of(student)(ROWS.tokens), logits_of(teacher)(ROWS.tokens)))


# The losses


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_divergence_and_its_gradient_are_torchs(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 17, dtype=torch.float64), torch.randn(2, 5, 17, dtype=torch.float64)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = logit_kl(ours, teacher, temperature)
    q, p = (functional.log_softmax(x.flatten(0, 1) / temperature, -1) for x in (theirs, teacher))
    wanted = temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert torch.allclose(value, wanted)
    (3 * value).backward()
    (3 * wanted).backward()
    assert torch.allclose(ours.grad, theirs.grad)
    assert torch.autograd.gradcheck(lambda x: logit_kl(x, teacher, temperature), student.clone().requires_grad_())


def test_equal_predictions_have_no_divergence_and_no_gradient() -> None:
    logits = torch.randn(2, 5, 17).requires_grad_()
    value = logit_kl(logits, logits.detach())
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_the_divergence_of_the_most_likely_is_the_whole(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 17, dtype=torch.float64), torch.randn(2, 5, 17, dtype=torch.float64)
    log_p = functional.log_softmax(teacher / temperature, -1)
    found = []
    for count in (1, 4, 16, 17):
        best = log_p.topk(count, -1)
        found.append(float(top_logit_kl(student, best.indices, best.values, temperature)))
    whole = float(logit_kl(student, teacher, temperature))
    assert found[:-1] == sorted(found[:-1])  # the last two are one number, but for the order of its terms
    assert found[-1] == pytest.approx(whole)
    assert found[-2] == pytest.approx(whole)  # the last one is known from the others
    assert 0 <= found[0] < 0.9 * whole


def test_a_loss_by_chunks_has_the_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    states, head = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    inputs = [[x.clone().requires_grad_() for x in (states, head)] for _ in range(2)]
    whole = (inputs[0][0] @ inputs[0][1].T).square().sum()
    parts = by_chunks(inputs[1][0], lambda part, start: (part @ inputs[1][1].T).square().sum(), 3, [inputs[1][1]])
    assert torch.allclose(whole, parts)
    (2 * whole).backward()
    (2 * parts).backward()
    for one, other in zip(*inputs, strict=True):
        assert torch.allclose(one.grad, other.grad)


def test_one_step_is_that_of_an_optimiser_on_whole_logits() -> None:
    """Against autograd through the stock model, with logits of all tokens at once."""
    student, teacher = smaller("llama").double(), tiny("llama").double()
    plain = copy.deepcopy(student).requires_grad_()
    q, p = (model(input_ids=ROWS.tokens[:2], use_cache=False).logits for model in (plain, teacher))
    logit_kl(q, p).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    matrices = [x for x in plain.parameters() if x.dim() > 1]
    others = [x for x in plain.parameters() if x.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.001, betas=(0.9, 0.95)).step()
    rows = token_rows(6, 24).rows(slice(0, 2))
    options = method_config("distill", {**PLAIN, "warmup": 0})
    result = METHODS["distill"].compress(student, rows, options, Run(teacher=teacher))
    for (name, one), (_, other) in zip(plain.named_parameters(), result.model.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9), name


def test_hidden_states_give_a_gradient_and_no_part_of_the_loss_that_is_told() -> None:
    student, teacher = smaller("llama", sparsity=0, num_hidden_layers=4), tiny("llama")
    plain, compared = (learn(student, teacher, intermediate=on, warmup=0.9) for on in (False, True))
    assert compared.report.numbers["losses"][0] == pytest.approx(plain.report.numbers["losses"][0], rel=0.2)
    assert not same(state(plain.model), state(compared.model))


def test_where_an_attention_was_removed_the_state_behind_the_next_norm_is_compared() -> None:
    student = (
        METHODS["2ssp"].compress(tiny("llama"), ROWS, method_config("2ssp", {"sparsity": 0.5, "alpha": 1.0})).model
    )
    gone = [block.index for block in Decoder(student) if block.attention is None]
    assert gone
    lesson = distill._Lesson(
        student, tiny("llama"), ROWS.tokens, 6, distill.DistillConfig(intermediate=True), Run(teacher=tiny("llama"))
    )
    assert not any(isinstance(norm, torch.nn.Identity) for norm in lesson._norms(lesson.student))
    assert divergence(tiny("llama"), learn(student, tiny("llama"), intermediate=True, epochs=4).model) < divergence(
        tiny("llama"), student
    )


def test_several_parts_of_the_logits_make_the_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(smaller("gemma3_text").double(), tiny("gemma3_text").double(), next_token=0.5)
    monkeypatch.setattr("compress.teacher.CHUNK_TOKENS", 10)
    parts = learn(smaller("gemma3_text").double(), tiny("gemma3_text").double(), next_token=0.5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_cpu_that_is_slow_at_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    def learnt(capability: str, precision: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return state(learn(smaller("llama"), tiny("llama"), precision=precision).model)

    exact = learnt("AVX512", "fp32")
    assert same(learnt("AVX2", "bf16"), exact)
    assert not same(learnt("AVX512", "bf16"), exact)


def test_memory_counts_the_correction_of_a_teacher() -> None:
    plain, corrected = (
        distill.memory(tiny("llama"), 6, 24, distill.DistillConfig(correction_epochs=n), 0) for n in (0, 1)
    )
    parameters = sum(p.numel() for p in tiny("llama").parameters())
    assert corrected - plain > 16 * parameters


def test_steps_in_parts_are_the_same_steps() -> None:
    whole, parts = (learn(smaller("llama").double(), tiny("llama").double(), accumulate=n) for n in (1, 2))
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    with pytest.raises(ValueError, match="in 3 parts"):
        optimise([], None, rows=4, batch=4, accumulate=3, epochs=1, generator=None, progress=None, what="x")  # type: ignore


# What it does to the models


def test_a_student_comes_nearer_to_its_teacher(architecture: str) -> None:
    student, teacher = smaller(architecture), tiny(architecture)
    before, kept = state(student), state(teacher)
    result = learn(student, teacher, epochs=12)
    assert divergence(teacher, result.model) < 0.7 * divergence(teacher, student)
    assert same(state(student), before)
    assert same(state(teacher), kept)
    assert not any(p.requires_grad for p in result.model.parameters())


def test_every_weight_learns(architecture: str) -> None:
    student = smaller(architecture)
    result = learn(student, tiny(architecture), next_token=1.0)
    still = [name for name, tensor in state(student).items() if torch.equal(tensor, result.model.state_dict()[name])]
    buffers = {name for name, _ in student.named_buffers()}
    # A bias of keys shifts all scores of a query alike, and the padding row of OPT's positions is never read.
    assert not [name for name in still if name not in buffers and not name.endswith("k_proj.bias")]


def test_a_teacher_that_shares_tensors_with_its_student_stays_as_it_is() -> None:
    teacher = tiny("llama")
    student = METHODS["2ssp"].compress(teacher, ROWS, method_config("2ssp", {"sparsity": 0.3})).model
    assert {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    before = state(teacher)
    result = learn(student, teacher, Run(consume=True))
    assert same(state(teacher), before)
    assert result.model is student
    assert Decoder(result.model).model.get_output_embeddings().weight is result.model.get_input_embeddings().weight


def test_a_teacher_of_another_shape_teaches_and_another_vocabulary_does_not() -> None:
    student = smaller("llama", sparsity=0, num_hidden_layers=3, hidden_size=32)
    learnt = learn(student, tiny("llama"), intermediate=True, epochs=12, learning_rate=0.003).model
    assert divergence(tiny("llama"), learnt) < 0.7 * divergence(tiny("llama"), student)
    other = tiny("qwen2")
    other.resize_token_embeddings(300)
    with pytest.raises(ConfigError, match="300 tokens"):
        learn(student, other)


def test_hidden_states_come_nearer_where_they_are_to() -> None:
    """What leaves the last block but two, behind the next norm, as the teacher has it."""
    student, teacher = smaller("llama", sparsity=0, num_hidden_layers=4), tiny("llama")

    def apart(model: PreTrainedModel) -> float:
        seen = []
        for each in (model, teacher):
            decoder = Decoder(each)
            norm = decoder.blocks[-2].module.input_layernorm
            hook = norm.register_forward_hook(lambda module, args, out: seen.append(out))
            logits_of(each)(ROWS.tokens)
            hook.remove()
        return float(1 - functional.cosine_similarity(seen[-2], seen[-1], dim=-1).mean())

    with_states, without = (learn(student, teacher, epochs=12, intermediate=on).model for on in (True, False))
    assert apart(with_states) < min(apart(without), apart(student))


def test_a_corrected_teacher_knows_the_rows_better_and_the_one_given_is_not_changed() -> None:
    student, teacher = smaller("llama"), tiny("llama")
    before = state(teacher)
    plain, corrected = (learn(student, teacher, correction_epochs=n, correction_lr=0.003).model for n in (0, 12))
    assert same(state(teacher), before)
    tokens = ROWS.tokens

    def loss(model: PreTrainedModel) -> float:
        return float(functional.cross_entropy(logits_of(model)(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))

    assert loss(corrected) < loss(plain)


def test_kept_predictions_of_all_tokens_teach_as_those_computed_at_each_step(tmp_path: Path) -> None:
    student, teacher = smaller("llama").double(), tiny("llama").double()
    plain = learn(student, teacher, epochs=2)
    kept = learn(student, teacher, Run(scratch=tmp_path), epochs=2, top_tokens=259)
    for one, other in zip(plain.model.parameters(), kept.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7)
    assert list(tmp_path.glob("teacher-*/*.safetensors"))


def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.training.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("compress.training.KEEP_SHARE", float("inf"))
    student, teacher = smaller("gemma3_text"), tiny("gemma3_text")
    options: dict[str, Any] = {"epochs": 2, "correction_epochs": 1, "top_tokens": 40}
    whole = learn(student, teacher, Run(scratch=tmp_path / "whole"), **options)
    for after in (1, 3, 4):
        with pytest.raises(Killed):
            learn(student, teacher, Run(progress=killer(after), scratch=tmp_path / "a"), **options)
    resumed = learn(student, teacher, Run(scratch=tmp_path / "a"), **options)
    assert same(state(whole.model), state(resumed.model))
    assert resumed.report.resumed_seconds > 0


@pytest.mark.parametrize("options", [{}, {"top_tokens": 40}, {"correction_epochs": 1}], ids=str)
def test_a_state_of_another_student_or_teacher_is_not_taken_over(tmp_path: Path, options: dict[str, Any]) -> None:
    """They differ where the first block's input and all shapes agree: in the last block and the head."""
    teacher, other = tiny("llama"), tiny("llama")
    student, twin = smaller("llama"), smaller("llama")
    for model in (other, twin):
        Decoder(model).blocks[-1].ffn_out.module.weight = torch.nn.Parameter(
            -Decoder(model).blocks[-1].ffn_out.module.weight, requires_grad=False
        )
    learn(student, teacher, Run(scratch=tmp_path), **options)
    for one, theirs in ((student, other), (twin, teacher)):
        there, fresh = (learn(one, theirs, Run(scratch=place), **options) for place in (tmp_path, None))
        assert same(state(there.model), state(fresh.model))


def test_a_corrected_teacher_is_taken_over_by_another_student(tmp_path: Path) -> None:
    learn(smaller("llama"), tiny("llama"), Run(scratch=tmp_path), correction_epochs=2)
    second = learn(smaller("llama", sparsity=0.2), tiny("llama"), Run(scratch=tmp_path), correction_epochs=2)
    assert second.report.resumed_seconds > 0
    assert len(list(tmp_path.glob("correction*"))) == 1
    assert len(list(tmp_path.glob("distillation*"))) == 2


def test_shared_and_ragged_students_learn_and_keep_their_shape() -> None:
    for method, options in (
        ("2ssp", {"sparsity": 0.5, "alpha": 1.0}),
        ("foldgpt", {"sparsity": 0, "epochs": 0, "batch": 1, "held_out": 1, "keep_ends": 0}),
    ):
        made = METHODS[method].compress(tiny("llama"), ROWS, method_config(method, options))
        result: CompressedModel = learn(made.model, tiny("llama"))
        assert result.report.numbers["parameters_after"] == made.report.numbers["parameters_after"]
        assert divergence(tiny("llama"), result.model) < divergence(tiny("llama"), made.model)


# What is refused


def test_what_cannot_be_learnt_is_refused() -> None:
    student, teacher = smaller("llama"), tiny("llama")
    for options, words in (
        ({"batch": 4}, "give 4 or 8 rows"),
        ({"held_out": 6}, "0 rows to learn from"),
        ({"distil": 0}, "nothing to learn from"),
        ({"distil": 0, "next_token": 1, "top_tokens": 4}, "distil=0 leaves out"),
        ({"distil": 0, "next_token": 1, "correction_epochs": 1}, "distil=0 leaves out"),
    ):
        with pytest.raises(FoldawayError, match=words):
            learn(student, teacher, **options)
    with pytest.raises(ConfigError, match="give a teacher"):
        learn(student, None)
    with pytest.raises(ConfigError, match="too few blocks"):
        learn(smaller("llama", sparsity=0, num_hidden_layers=2), teacher, intermediate=True)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    with pytest.raises(FoldawayError, match="lower the learning rates"):
        learn(smaller("llama"), tiny("llama"), learning_rate=1e30, clip=1e30, epochs=3)


def test_vision_language_models_are_refused() -> None:
    class Composite:
        config = type("Config", (), {"model_type": "llava"})()

    with pytest.raises(UnsupportedArchitecture, match="distillation"):
        distill.compress(Composite(), ROWS, distill.DistillConfig())  # type: ignore[arg-type]


def test_groups_decay_apart() -> None:
    with_decay, without = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    groups = [Group([with_decay], 0.1, 0.5), Group([without], 0.1)]
    optimise(
        groups,
        lambda rows, step: 0 * (with_decay.sum() + without.sum()),
        rows=1,
        batch=1,
        epochs=1,
        generator=torch.Generator(),
        progress=lambda what, done, total: None,
        what="nothing",
    )
    assert torch.allclose(with_decay.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(without.detach(), torch.ones(2, 2))
