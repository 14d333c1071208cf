"""Tokens into an answer's pieces as they come: text up to a stop string, reasoning apart.

What may yet turn out to be part of a character, of a stop string or of `</think>` is held back until that is known. So
the pieces of a stream, joined, are the text that is answered without streaming.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from beringia.data.detokenizer import Detokenizer, StopStrings, longest_overlap
from beringia.data.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


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
            return Piece(reasoning=self._take(len(self._held) - longest_overlap(self._held, CLOSE)))
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


class TextOffsets:
    """Where tokens, given one at a time, begin in their text: the character that a token has its first byte in. What
    becomes of a stop string is not known then: a token that is cut off with it begins where it would have stood."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, with_specials: bool) -> None:
        """`start`: characters before the first token; `with_specials`: the names of special tokens are text."""
        self._tokenizer = tokenizer
        self._with_specials = with_specials
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._characters = start
        self._begun = False

    def push(self, token: int) -> int:
        """Of one more token."""
        offset = self._characters
        shown = self._tokenizer.decode([token])
        if self._with_specials or not shown or self._tokenizer.decode([token], skip_special_tokens=True):
            text = self._decoder.decode(self._tokenizer.bytes_of(token))
            # SentencePiece's decoders leave out the space that a text begins with.
            stripped = not self._begun and text.startswith(" ") and not shown.startswith(" ")
            self._characters += len(text) - stripped
            self._begun = True
        return offset

    def end(self) -> int:
        """Characters of it all; a last one that is unfinished is shown as one."""
        return self._characters + len(self._decoder.decode(b"", final=True))
