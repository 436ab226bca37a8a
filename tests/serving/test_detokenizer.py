"""Text that comes token by token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from serving.detokenizer import GIVE_UP, Detokenizer, StopFinder, plain_decode
from tests.conftest import byte_tokenizer
from tests.serving.fake import ids

decode = plain_decode(byte_tokenizer())


def pieces(tokens: list[int], prompt: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "🦙🦙 and 👩‍👩‍👧", "a�b", " \n\t"])
def test_characters_of_several_bytes_come_whole(text: str) -> None:
    found = pieces(list(ids(text)), prompt=ids("before "))
    assert "".join(found) == text
    assert all("\ufffd" not in piece or "�" in text for piece in found)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(list(ids("é🦙"))) == ["", "é", "", "", "", "🦙", ""]


def test_a_character_that_is_cut_at_the_end_is_left_out() -> None:
    assert "".join(pieces(list(ids("ab🦙"))[:-1])) == "ab"


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_ever() -> None:
    invalid = [byte_tokenizer().convert_tokens_to_ids("ÿ")] * (3 * GIVE_UP)  # 0xff in the byte alphabet
    found = pieces([*invalid, *ids(" then text")])
    assert next(n for n, piece in enumerate(found) if piece) < 2 * GIVE_UP
    assert "".join(found).endswith("\ufffd then text")


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces([*ids("a"), 257, 256, *ids("b"), *([257] * 40), *ids("c")])) == "abc"


def test_a_long_text_is_decoded_in_short_windows() -> None:
    longest = 0

    def watched(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    detokenizer = Detokenizer(watched, ids("x" * 100))
    assert "".join(detokenizer.push(token) for token in ids("word " * 200)) == "word " * 200
    assert longest <= 8


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words begin with a mark that becomes a space, but not at the start of a text; characters fall back to bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hello": 256, "▁world": 257, "</s>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("prompt", [(), (256,)])
def test_spaces_and_fallback_bytes_join_as_in_the_whole_text(prompt: tuple[int, ...]) -> None:
    whole = plain_decode(sentencepiece_like())
    tokens = [256, 257, *"🦙é".encode(), 258, 257, *"🦙🦙".encode(), 256]
    detokenizer = Detokenizer(whole, prompt)
    found = [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]
    assert "".join(found) == whole([*prompt, *tokens])[len(whole(list(prompt))) :]
    assert not any("\ufffd" in piece for piece in found)


def watch(texts: list[str], stop: list[str]) -> tuple[str, bool]:
    finder = StopFinder(stop)
    shown = ""
    for text in texts:
        piece, found = finder.push(text)
        shown += piece
        assert not any(s in shown for s in stop)
        if found:
            return shown, True
    return shown + finder.flush(), False


@pytest.mark.parametrize(
    ("text", "stop", "shown", "found"),
    [
        ("hello world", ["wor"], "hello ", True),
        ("hello world", ["word", "xyz"], "hello world", False),
        ("aaab rest", ["aab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("one two", ["two", "one"], "", True),
        ("end\n\nmore", ["\n\n", "more"], "end", True),
        ("stop at the very end STO", ["STOP"], "stop at the very end STO", False),
        ("ab", ["abc", "b"], "a", True),
        ("x🦙y", ["🦙"], "x", True),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_text_is_found_however_it_is_split(
    text: str, stop: list[str], shown: str, found: bool, size: int
) -> None:
    texts = [text[start : start + size] for start in range(0, len(text), size)]
    assert watch(texts, stop) == (shown, found)


def test_without_stop_texts_nothing_is_held_back() -> None:
    finder = StopFinder(())
    assert finder.push("any") == ("any", False)
    assert finder.flush() == ""
