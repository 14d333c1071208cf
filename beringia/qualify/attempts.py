"""What a chip refuses to compute, told apart from what breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from beringia.chips.chip import Chip
from beringia.qualify.refusals import REFUSALS, first_line
from beringia.records.certificate import Measure, ProbeResult

T = TypeVar("T")


@dataclass(frozen=True)
class RefusedAttempt:
    """The chip's software has no such operator, or refused its arguments."""

    reason: str
    """Its first line."""


def exact_result(subject: str, wrong: int, made: int, summary: str, measure: Measure, seconds: float) -> ProbeResult:
    """Of a probe of numbers that have one right value each: of `made` attempts that were carried out, so many numbers
    are `wrong`. With none carried out it is told."""
    return ProbeResult(
        probe="arithmetic",
        subject=subject,
        outcome="failed" if wrong else "passed" if made else "told",
        rules_out="infer" if made else "neither",
        summary=summary,
        measures=(measure,) if made else (),
        seconds=seconds,
    )


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
