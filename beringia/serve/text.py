"""Tokens into text, one by one as they come: whole characters only, up to a stop string, reasoning apart.

A token may be part of a character, and the beginning of a stop string may turn out to be plain text; such text is held
back until that is known. So the pieces of a stream, joined, are the text that is answered without streaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beringia.data.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
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
        keep = max(_longest_overlap(self._held, stop) for stop in self._stops)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def rest(self) -> str:
        """What was held back and is text after all."""
        text, self._held = self._held, ""
        return text


def _longest_overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` could be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)


@dataclass(frozen=True)
class Piece:
    """Some more of an answer."""

    content: str = ""
    reasoning: str = ""


class Reasoning:
    """Splits at `</think>`: what comes before is reasoning, where the prompt or the answer opened it."""

    def __init__(self, prompt_text: str) -> None:
        self._inside = prompt_text.rstrip().endswith(OPEN)
        self._undecided = not self._inside
        self._held = ""

    def push(self, text: str) -> Piece:
        """A piece of the answer's text."""
        self._held += text
        if self._undecided and not self._decide():
            return Piece()
        if not self._inside:
            return Piece(content=self._take(len(self._held)))
        place = self._held.find(CLOSE)
        if place < 0:
            return Piece(reasoning=self._take(len(self._held) - _longest_overlap(self._held, CLOSE)))
        reasoning = self._take(place)
        self._take(len(CLOSE))
        self._inside = False
        return Piece(content=self._take(len(self._held)), reasoning=reasoning)

    def rest(self) -> Piece:
        """What was held back."""
        self._undecided = False
        text = self._take(len(self._held))
        return Piece(reasoning=text) if self._inside else Piece(content=text)

    def _decide(self) -> bool:
        """Whether the answer begins with `<think>`; False as long as it may."""
        beginning = self._held.lstrip()
        if len(beginning) < len(OPEN) and OPEN.startswith(beginning):
            return False
        self._undecided = False
        if beginning.startswith(OPEN):
            self._inside = True
            self._held = beginning[len(OPEN) :]
        return True

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


class AnswerText:
    """All three in a row."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], prompt_text: str | None) -> None:
        """`prompt_text`: what the answer goes on from, in a chat; None: nothing is split."""
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._reasoning = None if prompt_text is None else Reasoning(prompt_text)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.found

    def push(self, token: int) -> Piece:
        """One more token."""
        return self._split(self._stops.push(self._detokenizer.push(token)))

    def rest(self) -> Piece:
        """At the end: what was held back."""
        if self._stops.found:
            text = ""
        else:
            text = self._stops.push(self._detokenizer.rest())
            text += "" if self._stops.found else self._stops.rest()
        first = self._split(text)
        if self._reasoning is None:
            return first
        last = self._reasoning.rest()
        return Piece(first.content + last.content, first.reasoning + last.reasoning)

    def _split(self, text: str) -> Piece:
        return Piece(content=text) if self._reasoning is None else self._reasoning.push(text)
