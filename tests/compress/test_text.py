"""Text from every kind of source, and from what is not one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from compress import text
from compress.errors import ConfigError


def words_of(kind: str, whole: str) -> list[str]:
    return whole.split() if kind == "white space" else re.findall(r"\w+", whole.lower())


def overlap(ours: list[str], theirs: list[str], size: int = 12) -> float:
    """The share of runs of `size` words of `ours` that `theirs` has too."""
    runs = [tuple(ours[start : start + size]) for start in range(len(ours) - size + 1)]
    known = {tuple(theirs[start : start + size]) for start in range(len(theirs) - size + 1)}
    return sum(run in known for run in runs) / len(runs)


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["white space", "letters only"])
def test_the_parts_of_builtin_share_fewer_than_two_in_a_thousand_runs_of_twelve_words(kind: str) -> None:
    calibration = words_of(kind, "\n\n".join(text.read("builtin").documents))
    evaluation = words_of(kind, "\n\n".join(text.read("builtin", part="evaluation").documents))
    assert overlap(evaluation, calibration) < 0.002
    assert overlap(calibration, evaluation) < 0.002


def test_builtin_never_repeats_a_paragraph() -> None:
    parts = [text.read("builtin"), text.read("builtin", part="evaluation")]
    paragraphs = [" ".join(p.split()) for part in parts for whole in part.documents for p in whole.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_builtin_is_the_same_text_each_time_and_names_its_part_hash_and_licence() -> None:
    first, again = text.read("builtin", part="evaluation"), text.read("builtin", part="evaluation")
    assert first == again
    assert (first.name, first.licence) == ("builtin:evaluation", "PSF-2.0")
    assert first.sha256 == hashlib.sha256("\n\n".join(first.documents).encode()).hexdigest()
    assert first.sha256 != text.read("builtin").sha256


def test_most_of_builtin_calibrates_and_the_rest_evaluates() -> None:
    # At 4.3 characters a token: 24 x 2048 calibration tokens with a margin, and at least 12 x 2048 for evaluation.
    sizes = {part: sum(map(len, text.read("builtin", part=part).documents)) for part in ("calibration", "evaluation")}
    assert sizes["calibration"] > 24 * 2048 * 4.3
    assert sizes["evaluation"] > 12 * 2048 * 4.3


def test_a_text_file_is_kept_to_the_character_and_split_at_empty_lines(tmp_path: Path) -> None:
    content = " \n = Title = \n \nFirst line,\nsecond.\n\nAnother – paragraph.\n\n\nLast.\n"
    path = tmp_path / "some.txt"
    path.write_text(content, encoding="utf-8")
    found = text.read(str(path))
    assert len(found.documents) == 3
    assert "\n\n".join(found.documents) == content
    assert found.name == str(path)
    assert found.licence is None


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert text.read(str(path)).documents == ("one", "two")


def test_rows_of_text_messages_and_prompts_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = write(
        tmp_path / "rows.jsonl",
        {"text": "plain\u2028text"},
        {"messages": chat},
        {"prompt": "Why?", "response": "Because.", "id": 3},
    )
    expected = ("plain\u2028text", "user: Hi\nassistant: Hello", "user: Why?\nassistant: Because.")
    assert text.read(source).documents == expected


def test_the_caller_says_how_a_conversation_becomes_a_string(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": "Why?", "response": "Because."}, {"text": "untouched"})
    read = text.read(source, render=lambda messages: "|".join(message["content"] for message in messages))
    assert read.documents == ("Why?|Because.", "untouched")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Do it"},
        {},
        {"prompt": "no answer"},
        {"text": 7},
        {"messages": []},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]},
        ["a", "list"],
        "a string",
    ],
)
def test_a_row_with_nothing_to_read_is_refused_with_its_line(tmp_path: Path, row: object) -> None:
    source = write(tmp_path / "rows.jsonl", {"text": "fine"}, row)
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 2: .*messages") as caught:
        text.read(source)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n{"text": "cut of')
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 3: not valid JSON"):
        text.read(str(path))


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    def refuse(messages: object) -> str:
        raise RuntimeError("roles must\nalternate")

    source = write(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b"})
    with pytest.raises(ConfigError, match=r"line 1: the chat template refuses .*roles must alternate"):
        text.read(source, render=refuse)


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_a_file_without_text_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"empty\.txt holds no text"):
        text.read(str(path))


def test_a_jsonl_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no text"):
        text.read(str(path))


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", b"text\x00with a null"])
def test_a_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="UTF-8"):
        text.read(str(path))


def test_a_missing_file_a_folder_and_an_impossible_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no text at .*give a text"):
        text.read(str(tmp_path / "missing.txt"))
    with pytest.raises(ConfigError, match="is a folder"):
        text.read(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot read"):
        text.read("a\0b")


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibration, evaluation"):
        text.read("builtin", part="test")  # type: ignore[arg-type]


@pytest.fixture
def data_set(tmp_path: Path) -> str:
    """A data set that `datasets` loads from a folder, as it would load one from the hub."""
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", *({"text": f"training row {n}"} for n in range(5)))
    write(tmp_path / "test.jsonl", *({"text": f"test row {n}"} for n in range(3)))
    return f"hf:{tmp_path}"


def test_a_data_set_gives_its_train_split_to_calibration_and_its_test_split_to_evaluation(data_set: str) -> None:
    assert text.read(data_set).documents[0] == "training row 0"
    assert text.read(data_set, part="evaluation").documents == ("test row 0", "test row 1", "test row 2")


def test_a_data_set_is_read_from_the_split_that_is_named(data_set: str) -> None:
    assert text.read(f"{data_set}::test").documents[0] == "test row 0"
    assert text.read(f"{data_set}:default:train", part="evaluation").documents[0] == "training row 0"


def test_no_more_of_a_data_set_is_read_than_the_limit_and_the_name_says_so(
    data_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "HUB_CHARACTERS", 20)
    found = text.read(data_set)
    assert len(found.documents) == 2
    assert found.name.endswith("train (first 2 rows)")


def test_a_data_set_that_cannot_be_read_is_one_line(data_set: str) -> None:
    for source in (f"{data_set}::nowhere", f"{data_set}:nothing", "hf:", "hf:a:b:c:d"):
        with pytest.raises(ConfigError, match="hf:") as caught:
            text.read(source)
        assert "\n" not in str(caught.value)
