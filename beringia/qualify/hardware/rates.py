"""Timing work on a chip: how many calls fill a stated time, the median of several such stretches, and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from beringia.chips.chip import Chip
from beringia.qualify.attempts import RefusedAttempt, attempt

Work = Callable[[], object]
Clock = Callable[[], float]
"""Seconds since some moment."""

STRETCH_SECONDS = 0.1
"""Long against the cost of starting a kernel and of reading the clock."""
STRETCHES = 5
SMALLEST, LARGEST = 128, 8192
"""Sizes of matrices: a tile of any matrix unit, and what fills the largest."""

FLOAT8 = frozenset(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    spread: float
    """Longest less shortest, as a share of the median."""


def time_calls(
    chip: Chip, work: Work, stretch_seconds: float = STRETCH_SECONDS, *, clock: Clock = time.perf_counter
) -> Timing:
    """The median over stretches of repeated calls, each stretch about so long."""
    calls = max(1, round(stretch_seconds / max(1e-7, seconds_of(chip, work, clock=clock))))
    stretches = [seconds_of(chip, work, calls, clock=clock) for _ in range(STRETCHES)]
    median = statistics.median(stretches)
    return Timing(median, (max(stretches) - min(stretches)) / median)


def seconds_of(chip: Chip, work: Work, calls: int = 1, *, clock: Clock = time.perf_counter) -> float:
    """Of one call, measured over several with an idle device before and after."""
    chip.synchronize()
    began = clock()
    for _ in range(calls):
        work()
    chip.synchronize()
    return (clock() - began) / calls


def square_size(chip: Chip, dtype: torch.dtype, seconds: float) -> int | RefusedAttempt:
    """The largest power of two up to `LARGEST` whose square product is expected to take at most so long."""
    size = SMALLEST
    while True:
        work = attempt(chip, lambda size=size: product(chip, dtype, size, size, size))  # type: ignore[misc]  # bound at once
        if isinstance(work, RefusedAttempt):
            return work
        refused = attempt(chip, work)  # also warms up
        if isinstance(refused, RefusedAttempt):
            return refused
        # Twice the size is eight times the work.
        if size == LARGEST or 8 * seconds_of(chip, work) > seconds:
            return size
        size *= 2


def product(chip: Chip, dtype: torch.dtype, rows: int, length: int, columns: int) -> Work:
    """A product of matrices of that dtype, ready to be called. Operands are random: constant ones toggle fewer
    transistors, and a chip at its power limit is faster with them."""
    generator = torch.Generator().manual_seed(1)
    scale = 32.0 if dtype == torch.int8 else 1.0
    a_MK, b_KN = (
        (torch.randn(shape, generator=generator) * scale).clamp(-127, 127).to(dtype).to(chip.device)
        for shape in ((rows, length), (length, columns))
    )
    if dtype in FLOAT8:
        one = torch.ones((), device=chip.device)
        # Libraries want the second operand by columns.
        by_columns = b_KN.t().contiguous().t()
        return lambda: torch._scaled_mm(a_MK, by_columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if dtype == torch.int8:
        return lambda: torch._int_mm(a_MK, b_KN)
    return lambda: torch.mm(a_MK, b_KN)
