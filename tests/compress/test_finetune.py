"""Fine-tuning: what is learnt, what stays as it is, and that Ctrl-C costs no more than a tenth of the steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from compress.artifact import write_model
from compress.delta.checkpoint import roles_of
from compress.errors import ConfigError, MissingExtra, UnsupportedArchitecture
from compress.finetune import IGNORED, Example, FinetuneConfig, _padded, _row, finetune, read_examples, tokens_of
from compress.layout import layout_of
from compress.result import Progress, Run
from compress.sources import load
from compress.surgery import share_blocks
from tests.conftest import byte_tokenizer, tiny

EOS, PAD = 257, 258
QUICK = FinetuneConfig(learning_rate=2e-3, steps=6, batch=4)
EXAMPLES = [Example(f"{n} and {n} are", f" {2 * n}, of course"[: 6 + n]) for n in range(8)]


def tuned(
    config: FinetuneConfig = QUICK,
    model: PreTrainedModel | None = None,
    run: Run | None = None,
    examples: list[Example] = EXAMPLES,
) -> PreTrainedModel:
    model = tiny("llama") if model is None else model
    finetune(model, byte_tokenizer(), examples, config, run)
    return model


@functools.cache
def tuned_once() -> PreTrainedModel:
    """What `tuned` gives; not to be changed."""
    return tuned()


def changed(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    """Names of tensors that differ."""
    ours, theirs = before.state_dict(), after.state_dict()
    assert set(ours) == set(theirs)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def distance(before: PreTrainedModel, after: PreTrainedModel) -> float:
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    return sum(float((theirs - ours).square().sum()) for ours, theirs in pairs) ** 0.5


def response_losses(model: PreTrainedModel, examples: list[Example] = EXAMPLES) -> list[float]:
    """The cross-entropy of every token of the responses, and of the EOS after each, with nothing but a softmax."""
    tokenizer, losses = byte_tokenizer(), []
    for example in examples:
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
        tokens = [*prompt, *tokenizer.encode(example.response, add_special_tokens=False), EOS]
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([tokens])).logits[0].double().softmax(-1)
        losses += [-float(chances[place - 1, tokens[place]].log()) for place in range(len(prompt), len(tokens))]
    return losses


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def encoded(text: str) -> list[int]:
    found: list[int] = byte_tokenizer().encode(text, add_special_tokens=False)
    return found


# --- What is learnt


def test_a_few_steps_make_the_responses_likelier_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    before = mean(response_losses(tiny("llama")))
    assert mean(response_losses(tuned())) < 0.75 * before
    assert capfd.readouterr().out == ""


def test_the_loss_is_that_of_the_responses_alone() -> None:
    still = FinetuneConfig(learning_rate=1e-12, steps=1, batch=len(EXAMPLES))
    model = tiny("llama")
    loss = finetune(model, byte_tokenizer(), EXAMPLES, still)
    assert loss == pytest.approx(mean(response_losses(model)), rel=1e-4)


def test_only_the_response_and_its_eos_have_labels() -> None:
    row = _row(Example("ab", "cde"), byte_tokenizer(), 64)
    assert row["input_ids"] == [*encoded("abcde"), EOS]
    assert row["labels"] == [IGNORED, IGNORED, *encoded("cde"), EOS]


def test_an_eos_that_is_there_is_not_put_there_again() -> None:
    assert tokens_of(Example("ab", "cde<eos>"), byte_tokenizer(), 64) == (encoded("ab"), [*encoded("cde"), EOS])


def test_an_example_is_cut_at_its_end() -> None:
    prompt, response = tokens_of(Example("abc", "defgh"), byte_tokenizer(), 6)
    assert (prompt, response) == (encoded("abc"), encoded("def"))
    assert tokens_of(Example("", "abcdef"), byte_tokenizer(), 4) == ([], encoded("abcd"))


@pytest.mark.parametrize(
    ("example", "length"), [(Example("abc", "d"), 3), (Example("abcd", "e"), 2), (Example("", ""), 64)]
)
def test_an_example_of_which_nothing_is_left_to_learn_is_refused(example: Example, length: int) -> None:
    with pytest.raises(ConfigError, match="teaches nothing"):
        tokens_of(example, byte_tokenizer(), length)
    model = tiny("llama")
    with pytest.raises(ConfigError, match="teaches nothing"):
        tuned(dataclasses.replace(QUICK, max_length=length), model, examples=[EXAMPLES[0], example])
    assert changed(tiny("llama"), model) == set()


def test_padding_is_neither_read_nor_learnt() -> None:
    rows: Any = [_row(example, byte_tokenizer(), 64) for example in (Example("a", "b"), Example("", "cdef"))]
    batch = _padded(rows, PAD)
    assert batch["input_ids"].tolist() == [[*encoded("ab"), EOS, PAD, PAD], [*encoded("cdef"), EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, *encoded("b"), EOS, IGNORED, IGNORED], [*encoded("cdef"), EOS]]


def test_no_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="no examples"):
        tuned(examples=[])


def test_without_a_number_of_steps_the_examples_are_gone_through_as_often_as_asked() -> None:
    seen: list[tuple[str, int, int]] = []
    config = FinetuneConfig(learning_rate=1e-3, batch=3, epochs=1.5)
    tuned(config, run=Run(progress=lambda *said: seen.append(said)))
    assert seen == [("fine-tuning", step, 4) for step in (1, 2, 3, 4)]


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    assert changed(tuned_once(), tuned()) == set()
    assert changed(tuned_once(), tuned(dataclasses.replace(QUICK, seed=1)))


# --- What stays as it is


@pytest.mark.parametrize("architecture", ["llama", "mistral"])  # tied embeddings, and an output layer of its own
def test_embeddings_stay_as_they_are_when_asked_to(architecture: str) -> None:
    config = dataclasses.replace(QUICK, steps=2)
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert embeddings <= changed(tiny(architecture), tuned(config, tiny(architecture)))
    others = changed(tiny(architecture), tuned(dataclasses.replace(config, train_embeddings=False), tiny(architecture)))
    assert others == set(tiny(architecture).state_dict()) - embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_type_and_end_frozen(dtype: torch.dtype) -> None:
    model = tuned(dataclasses.replace(QUICK, steps=2), tiny("llama").to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_computes_after_its_fine_tuning_what_its_folder_computes(autocast: bool, tmp_path: Path) -> None:
    write_model(tiny("llama").to(torch.bfloat16), byte_tokenizer(), tmp_path / "base")
    model = tuned(dataclasses.replace(QUICK, steps=2, autocast=autocast), load(str(tmp_path / "base")).model)
    write_model(model, byte_tokenizer(), tmp_path / "tuned")
    read = load(str(tmp_path / "tuned")).model
    tokens = torch.arange(40)[None]
    ours, theirs = model(input_ids=tokens).logits, read(input_ids=tokens).logits
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("optimizer", "strength"), [("adamr-l2", 2.0), ("adamr-l1", 2e-3)])
def test_a_strong_pull_keeps_the_weights_close_to_the_base(optimizer: Any, strength: float) -> None:
    held = tuned(dataclasses.replace(QUICK, optimizer=optimizer, strength=strength))
    assert 0 < distance(tiny("llama"), held) < 0.6 * distance(tiny("llama"), tuned_once())


def test_nothing_is_left_beside_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tuned(dataclasses.replace(QUICK, steps=2))
    assert list(tmp_path.iterdir()) == []


# --- LoRA


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lora_is_merged_into_the_matrices_and_leaves_no_trace(
    architecture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    base, rank = tiny(architecture), 2
    base.save_pretrained(tmp_path)
    config = dataclasses.replace(QUICK, learning_rate=1e-2, lora_rank=rank)
    model = tuned(config, tiny(architecture))
    matrices = set(roles_of(tmp_path).matrices) & set(base.state_dict())
    assert changed(base, model) == matrices
    assert not any("peft" in type(module).__module__ for module in model.modules())
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert mean(response_losses(model)) < mean(response_losses(base))
    for name in matrices:
        strengths = torch.linalg.svdvals(model.state_dict()[name] - base.state_dict()[name])
        assert float(strengths[rank]) < 1e-3 * float(strengths[0])
    assert capfd.readouterr().out == ""


def test_a_lora_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match="finetune"):
        tuned(dataclasses.replace(QUICK, lora_rank=2))


# --- Going on


def stop_at(step: int) -> Progress:
    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("architecture", "rank", "count", "step"),
    [
        ("gpt2", 0, 24, 4),  # within the first time through the examples; gpt2 has dropout
        ("llama", 2, 24, 4),
        ("llama", 0, 8, 5),  # after the second time; within it the order of what is left is another one
    ],
)
def test_an_interrupted_call_goes_on_and_ends_with_the_weights_of_an_uninterrupted_one(
    architecture: str, rank: int, count: int, step: int, tmp_path: Path
) -> None:
    if rank:
        pytest.importorskip("peft")
    config = dataclasses.replace(QUICK, lora_rank=rank)
    examples = [Example(f"{n} and {n} are", f" {2 * n}, of course"[: 6 + n % 5]) for n in range(count)]
    with pytest.raises(KeyboardInterrupt):
        tuned(config, tiny(architecture), Run(progress=stop_at(step), scratch=tmp_path), examples)
    seen: list[int] = []
    run = Run(progress=lambda what, done, total: seen.append(done), scratch=tmp_path)
    model = tuned(config, tiny(architecture), run, examples)
    assert seen == list(range(step, 7))
    assert changed(model, tuned(config, tiny(architecture), None, examples)) == set()


def test_a_call_that_was_done_takes_no_steps_the_second_time(tmp_path: Path) -> None:
    tuned(run=Run(scratch=tmp_path))
    second = tuned(run=Run(scratch=tmp_path, progress=stop_at(1)))
    assert changed(second, tuned_once()) == set()


def other_seed(call: dict[str, Any]) -> None:
    call["config"] = dataclasses.replace(call["config"], seed=1)


def other_examples(call: dict[str, Any]) -> None:
    call["examples"] = [*EXAMPLES[1:], Example("1", "2")]


def other_model(call: dict[str, Any]) -> None:
    for parameter in call["model"].parameters():
        parameter.mul_(1.25)


@pytest.mark.parametrize("change", [other_seed, other_examples, other_model])
def test_a_call_does_not_go_on_from_a_checkpoint_of_another(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    config = dataclasses.replace(QUICK, steps=2)
    tuned(config, run=Run(scratch=tmp_path))
    seen: list[int] = []
    run = Run(progress=lambda what, done, total: seen.append(done), scratch=tmp_path)
    call: dict[str, Any] = {"config": config, "model": tiny("llama"), "run": run}
    change(call)
    tuned(**call)
    assert seen == [1, 2]


# --- Reading examples


def examples_of(path: Path, content: str | list[dict[str, Any]], **options: Any) -> list[Example]:
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return read_examples(str(path), byte_tokenizer(), **options)


CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def test_prompts_and_responses_are_read_with_the_chat_template_around_them(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "response": "Because."}, {"messages": CHAT}]
    assert examples_of(tmp_path / "x.jsonl", rows) == [
        Example("user: Why?\nassistant: ", "Because.\n"),
        Example("user: one\nassistant: two\nuser: three\nassistant: ", "four\n"),
    ]


def test_without_the_template_prompts_and_responses_are_joined_as_they_stand(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "response": " Because."}, {"messages": CHAT}, {"messages": CHAT[1:2]}]
    plain = [Example("Why?", " Because."), Example("onetwothree", "four"), Example("", "two")]
    assert examples_of(tmp_path / "x.jsonl", rows, chat=False) == plain
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert read_examples(str(tmp_path / "x.jsonl"), tokenizer) == plain


def test_of_a_text_all_is_learnt(tmp_path: Path) -> None:
    assert examples_of(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "two"}]) == [
        Example("", "one"),
        Example("", "two"),
    ]
    assert examples_of(tmp_path / "x.txt", "one\n\ntwo") == [Example("", "one"), Example("", "two")]


def test_empty_lines_of_a_text_are_no_examples(tmp_path: Path) -> None:
    found = examples_of(tmp_path / "x.txt", "one\n\n\n\ntwo\n\n")
    assert [example.response.strip() for example in found] == ["one", "two"]


def test_a_conversation_whose_template_does_not_split_is_learnt_as_a_whole(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %}|{{ message.content }}{% endfor %}"
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    assert read_examples(str(tmp_path / "x.jsonl"), tokenizer) == [Example("", "2|a|b")]


@pytest.mark.parametrize(
    ("content", "word"),
    [("", "no text"), ("{", "line 1"), ('{"question": "a"}', "line 1"), ('{"prompt": "a"}', "line 1")],
)
def test_examples_that_cannot_be_read_are_refused(content: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        examples_of(tmp_path / "x.jsonl", content)
    with pytest.raises(ConfigError, match="no text"):
        read_examples(str(tmp_path / "gone.jsonl"), byte_tokenizer())


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"steps": -1},
        {"steps": 0},
        {"steps": 2.5},
        {"epochs": 0},
        {"batch": 0},
        {"batch": 2.5},
        {"max_length": 0},
        {"strength": -0.1},
        {"weight_decay": -0.1},
        {"warmup": 1},
        {"warmup": -0.1},
        {"lora_rank": -1},
        {"lora_rank": 1.5},
        {"optimizer": "sgd"},
        {"schedule": "sawtooth"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        FinetuneConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_weights_that_blocks_share_learn_together_and_lora_on_them_is_refused() -> None:
    model = tiny("llama")
    share_blocks(model, {1: [2]})
    learnt = tuned(model=copy.deepcopy(model))
    assert layout_of(learnt) == layout_of(model)
    assert distance(model, learnt) > 0
    with pytest.raises(UnsupportedArchitecture, match="share one set of weights"):
        tuned(dataclasses.replace(QUICK, lora_rank=2), model)
