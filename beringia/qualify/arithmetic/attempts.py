"""What a chip refuses to compute, told apart from what breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from beringia.chips.chip import Chip
from beringia.qualify.operators.watch import REFUSALS

T = TypeVar("T")
_LONGEST_REASON = 160


@dataclass(frozen=True)
class RefusedAttempt:
    """The chip's software has no such operator, or refused its arguments."""

    reason: str
    """Its first line."""


def attempt(chip: Chip, compute: Callable[[], T]) -> T | RefusedAttempt:
    """What was computed, or why it was refused. An error that is the chip's own (a fault) is raised."""
    try:
        result = compute()
        chip.synchronize()
    except REFUSALS as error:
        if chip.classify(error) is not None:
            raise
        return RefusedAttempt(first_line(error))
    return result


def first_line(error: BaseException) -> str:
    """An error for a sentence."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:_LONGEST_REASON]}"
