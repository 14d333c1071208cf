"""Tokens into text, one by one as they come: whole characters only, up to a stop string.

A token may be part of a character, and the beginning of a stop string may turn out to be plain text; such text is held
back until that is known. So pieces, joined, are the text of all the tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from beringia.data.tokenizer import Tokenizer

_PART_OF_A_CHARACTER = "�"


class Detokenizer:
    """Text of tokens, given one at a time; an unfinished character waits for its rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Text up to `_told` is out. Decoding begins some tokens earlier, at `_context`: how a token is written (with a
        # space before it or not) depends on the one before.
        self._context = self._told = 0

    def push(self, token: int) -> str:
        """The text that this token brings to an end; special tokens have none."""
        self._tokens.append(token)
        before = self._decode(self._context, self._told)
        now = self._decode(self._context, len(self._tokens))
        if now.endswith(_PART_OF_A_CHARACTER) or len(now) <= len(before):
            return ""
        self._context, self._told = self._told, len(self._tokens)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back: an unfinished character, shown as such."""
        before = self._decode(self._context, self._told)
        now = self._decode(self._context, len(self._tokens))
        self._context = self._told = len(self._tokens)
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)


class StopStrings:
    """Text up to the first stop string, which is left out itself."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that certainly belongs to the answer."""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            text, self._held = self._held[: min(places)], ""
            return text
        keep = max(longest_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def rest(self) -> str:
        """What was held back and is text after all."""
        text, self._held = self._held, ""
        return text


def longest_overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` could be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)


class StopWatch:
    """Whether the text of tokens, given one at a time, has come to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)

    def push(self, token: int) -> bool:
        """One more token."""
        self._stops.push(self._detokenizer.push(token))
        return self._stops.found
