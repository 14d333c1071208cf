"""What torch and its plugins raise for a call that they do not have, and how that is put into a sentence."""

from __future__ import annotations

REFUSALS = (RuntimeError, IndexError, TypeError, ValueError)
"""A missing kernel is a RuntimeError; the others are of arguments that one takes and another does not."""

_LONGEST_REASON = 160


def first_line(error: BaseException) -> str:
    """An error for a sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:_LONGEST_REASON]}"
