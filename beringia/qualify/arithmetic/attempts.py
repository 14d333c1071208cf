"""What a chip refuses to compute, told apart from what breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from beringia.chips.chip import Chip
from beringia.qualify.refusals import REFUSALS, first_line

T = TypeVar("T")


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
