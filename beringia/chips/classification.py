"""What an error's text means: tables of patterns, of which the gravest that occurs decides.

Each vendor has its own table; here is only how one is read. A row names the vendor's code, a pattern, the category that
the supervisor acts on, and the reason for that category. A bare number is never enough: a tensor size or a byte count
may be 507014, so a numeric code counts only where a word such as `error code` says that it is one (`numbered`).

Only errors that a device or its libraries can raise are read (`RuntimeError` with torch's subclasses, `MemoryError`,
`AssertionError`): a `ValueError` that mentions a code is a bug of ours, a `BrokenPipeError` is our own channel's. Does
not decide what to do about a fault; reads and writes nothing.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from beringia.chips.chip import ChipFault

Category = Literal["transient", "device-lost", "persistent"]

_GRAVITY: dict[Category, int] = {"transient": 0, "persistent": 1, "device-lost": 2}
"""A log often holds several codes, the cause among its consequences: a lost device also makes collectives time out."""

_MESSAGE_CHARACTERS = 2000
"""Longest message kept in a fault: vendors append whole stack dumps, and an event is one line."""

_SPEAKS_FOR_A_DEVICE = (RuntimeError, MemoryError, AssertionError)
"""torch's AcceleratorError, OutOfMemoryError and Dist*Error are RuntimeErrors, and so is what gloo raises; torch_npu
asserts. Of OSErrors only the one that says there is no memory counts: Python's own sockets and files raise the rest."""


@dataclass(frozen=True)
class Rule:
    """One row of a vendor's table."""

    code: str
    """The vendor's name or number for it, as it appears in events."""
    pattern: str
    """Regular expression, searched in the text as it stands (`(?i:...)` where the case varies)."""
    category: Category
    reason: str
    """Why this category: what the vendor documents, or what is left of the device."""
    number: int | None = None
    """Value of `torch.AcceleratorError.error_code` that means the same."""


def numbered(code: int) -> str:
    """Pattern for a numeric code, only where the text says that the number is an error code.

    Matches `error code is 507014`, `retCode=507014`, `runtime result = 507014`, `ACL_ERROR_RT_X(507014)`.
    """
    says_so = r"(?i:error[ _]?code|err_?code|ret_?code|return code|\bret\b|runtime result|\bACL_ERROR_\w+)"
    return rf"{says_so}\s*(?:is|=|\(|\[)?\s*:?\s*{code}(?![\w]|[.,]\d)"


def word(text: str) -> str:
    """Pattern for a code such as `EI0002`, not inside a path, a file name or a longer word."""
    return rf"(?<![\w./-]){re.escape(text)}(?!\w|[./-]\w)"


def gravest_match(text: str, rules: Sequence[Rule]) -> ChipFault | None:
    """The fault of the gravest rule whose pattern occurs in the text (the first of equals), or None."""
    matching = [rule for rule in rules if re.search(rule.pattern, text)]
    if not matching:
        return None
    return fault(max(matching, key=lambda rule: _GRAVITY[rule.category]), text)


def fault(rule: Rule, text: str) -> ChipFault:
    """What the rule says, with the text as its message."""
    return ChipFault(rule.code, rule.category, shortened(text))


def shortened(text: str) -> str:
    """The text without surrounding space, cut to what an event holds."""
    text = text.strip()
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 1] + "…"


def device_errors(error: BaseException) -> list[BaseException]:
    """The error and those it was raised from, newest first, as far as a device can have raised them.

    Frameworks wrap the vendor's error ("training step failed") and chain the original: the code is in the chain.
    """
    return [link for link in _chain(error) if isinstance(link, _SPEAKS_FOR_A_DEVICE) or _says_no_memory(link)]


def device_text(error: BaseException | str) -> str:
    """What `device_errors` say, each with its type's name; a string is taken as a device's own log."""
    if isinstance(error, str):
        return error
    return "\n".join(f"{type(link).__name__}: {link}" for link in device_errors(error))


def _says_no_memory(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
