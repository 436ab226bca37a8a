"""From tokens to text, as they come: whole characters only, and never a part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""

PROMPT_TAIL = 5
"""Tokens of the prompt that are decoded along, for decoders that treat the start of a text differently."""

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8, so the most tokens that one can be spread over."""

GIVE_UP = 16
"""Tokens without certain text after which the wait ends: bytes that are no character, or special tokens in a row."""


def plain_decode(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Decoding without special tokens and without beautifying."""

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


class Detokenizer:
    """Text of one sequence, token by token.

    Decoders look at neighbours (a space before the first word goes, bytes join into characters), so a token cannot be
    decoded by itself. A short window is decoded instead, once with and once without the new tokens; the difference is
    new text, and it is held back while it ends in the middle of a character. Tokens without text (special ones) wait
    for the next that has some, so that the window always begins with text.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        """Start after the tokens `prompt`."""
        self._decode = decode
        self._window = list(prompt[-PROMPT_TAIL:])
        self._given = len(self._window)  # tokens of the window whose text was returned
        self._given_text = decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now, often one word, sometimes nothing."""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) > len(self._given_text) and not text.endswith(INCOMPLETE):
            return self._give(len(self._window), text)
        if len(self._window) - self._given >= GIVE_UP:
            upto = len(self._window) - LONGEST_CHARACTER + 1
            return self._give(upto, self._decode(self._window[:upto]))
        return ""

    def flush(self) -> str:
        """The rest, at the end, without a character that was cut."""
        return self._give(len(self._window), self._decode(self._window)).rstrip(INCOMPLETE)

    def _give(self, upto: int, text: str) -> str:
        """Return what `text`, of the window's first `upto` tokens, has that was not returned, and move the window."""
        new = text[len(self._given_text) :]
        self._window = self._window[self._given :]
        self._given = upto - self._given
        self._given_text = self._decode(self._window[: self._given])
        return new


class StopFinder:
    """Text up to the first stop text; what could still become one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        """Watch for any of `stop`, none of which is empty."""
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what may be shown now, and whether a stop text was found (then nothing may follow)."""
        if not self._stop:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when the answer ends otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, all of `stop` excepted."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[len(text) - n :])), 0)
