"""What an error's text means: tables of patterns, the first that matches wins.

Each vendor's file holds its own table; here is only how one is read. A row names the vendor's code, a pattern, the
category that the supervisor acts on, and the reason for that category. Patterns are searched in the error's text
without regard to case. A bare number is never enough: a tensor size or a byte count may be 507014, so a numeric code
counts only where a word such as `error code` says that it is one.

Does not decide what to do about a fault, and reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from beringia.chips.chip import ChipFault

Category = Literal["transient", "device-lost", "persistent"]

_MESSAGE_CHARACTERS = 2000
"""Longest message kept in a fault: vendors append whole stack dumps, and an event is one line."""


@dataclass(frozen=True)
class Rule:
    """One row of a vendor's table."""

    code: str
    """The vendor's name or number for it, as it appears in events."""
    pattern: str
    """Regular expression, searched without regard to case."""
    category: Category
    reason: str
    """Why this category: what the vendor documents, or what is left of the device."""


def first_match(text: str, rules: Sequence[Rule]) -> ChipFault | None:
    """The fault of the first rule whose pattern occurs in the text, or None."""
    for rule in rules:
        if re.search(rule.pattern, text, re.IGNORECASE):
            return ChipFault(rule.code, rule.category, shortened(text))
    return None


def shortened(text: str) -> str:
    """The text without surrounding space, cut to what an event holds."""
    text = text.strip()
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 1] + "…"


def full_text(error: BaseException) -> str:
    """The messages of an error and of everything it was raised from, newest first.

    Frameworks wrap the vendor's error ("training step failed") and chain the original: the code is in the chain.
    """
    return "\n".join(f"{type(link).__name__}: {link}" for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
