"""What the collectives are tried on, what they must give, and how far a sum may be off. Pure, the same on every rank.

What a rank contributes comes from the CPU and is derived from (seed, case, rank), so every rank knows what all others
gave and checks its own result against float64. Two fills: `random` numbers, and `whole` ones, so small that their sums
are exact in every dtype: whatever the order, the accumulator and the rounding, those sums have one right answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.records.record import Record, canonical_hash

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast"]
Fill = Literal["random", "whole"]

COLLECTIVES: tuple[Collective, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast")
SUMS = frozenset({"all-reduce", "reduce-scatter"})
PER_PEER = frozenset({"reduce-scatter", "all-to-all"})
"""Of these a rank contributes one piece for each rank."""
SIZES = (1, 7, 1023, 4096, 65_537, 196_608, 1_048_577)
"""Elements of a piece: alone, odd, beside a power of two, aligned as buckets of gradients are, and past where libraries
change their protocol."""
LARGE = 2_621_441
"""Elements past 2^21, of what training adds up over ranks: a bucket of gradients has 25 MiB."""
WHOLE_LIMIT = 8
"""Largest whole number. bfloat16 has 8 significant bits, so sums of up to 256 / 8 = 32 ranks are exact in it, and in
float16 and float32 all the more."""
MOST_RANKS = 32


@dataclass(frozen=True)
class Case:
    """One collective call."""

    collective: Collective
    dtype: torch.dtype
    size: int
    fill: Fill

    @property
    def subject(self) -> str:
        """What results are grouped by."""
        return f"{self.collective}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def name(self) -> str:
        """`all-reduce, bfloat16, size 7, whole numbers`."""
        return f"{self.subject}, size {self.size}, {self.fill} numbers"


class RankOrder(Record):
    """What one rank is to do."""

    chip: str
    faults: str | None
    seed: int
    rank: int
    ranks: int
    index: int
    """Of its device."""
    port: int
    """Of the starter's store."""
    time_out_seconds: float
    """After which the starter ends it."""
    bandwidth: bool = False
    """Whether collectives are timed, too."""


class CaseReport(Record):
    """What one rank says of one case."""

    rank: int
    subject: str
    name: str
    state: Literal["begun", "ran", "refused", "fault"]
    """refused: the backend has no such collective for this dtype; fault: the chip reported an error."""
    wrong: int = 0
    """Elements with wrong bits, of results that are exact."""
    error: float = 0.0
    """Largest error of a sum over the sum of its terms' magnitudes; infinite ones are counted as wrong."""
    bound: float = 1.0
    repeats: bool = True
    """Whether the second call had the same bits."""
    digest: str = ""
    """Of the result, where all ranks must have the same."""
    reason: str = ""
    seconds: float = 0.0


def cases(compute_dtype: torch.dtype) -> list[Case]:
    """All of them, in the order in which every rank makes them."""
    dtypes = dict.fromkeys((torch.float32, compute_dtype))
    return [
        Case(collective, dtype, size, fill)
        for collective in COLLECTIVES
        for dtype in dtypes
        for size in (*SIZES, *([LARGE] if collective == "all-reduce" else []))
        for fill in (("random", "whole") if collective in SUMS else ("random",))
    ]


def given(case: Case, seed: int, rank: int, ranks: int) -> torch.Tensor:
    """What a rank contributes, on the CPU."""
    generator = torch.Generator().manual_seed(int(canonical_hash([seed, case.name, rank])[:15], 16))
    count = case.size * (ranks if case.collective in PER_PEER else 1)
    if case.fill == "whole":
        return torch.randint(-WHOLE_LIMIT, WHOLE_LIMIT + 1, (count,), generator=generator).to(case.dtype)
    return torch.randn(count, generator=generator).to(case.dtype)


def terms(case: Case, seed: int, rank: int, ranks: int) -> torch.Tensor:
    """What every rank contributes to this rank's result: ranks x elements."""
    all_given = torch.stack([given(case, seed, peer, ranks) for peer in range(ranks)])
    if case.collective in PER_PEER:
        return all_given[:, rank * case.size : (rank + 1) * case.size]
    return all_given


def expected_bits(case: Case, seed: int, rank: int, ranks: int) -> torch.Tensor | None:
    """The one right result, or None where a sum rounds."""
    contributed = terms(case, seed, rank, ranks)
    if case.collective in SUMS:
        return contributed.double().sum(0).to(case.dtype) if case.fill == "whole" else None
    # The last rank is the source of a broadcast: the first is what many implementations assume.
    return contributed[-1] if case.collective == "broadcast" else contributed.flatten()


def sum_bound(dtype: torch.dtype, ranks: int) -> float:
    """Largest error of a sum over ranks, relative to the sum of its terms' magnitudes.

    Ranks - 1 additions and one rounding to storage, each off by at most 2u of a partial sum (to whichever side it
    rounds), and no partial sum is larger than the sum of magnitudes and the errors so far: (1 + 2u)^ranks - 1.
    """
    return math.expm1(ranks * math.log1p(2.0 * UNIT_ROUNDOFF[dtype]))


def check(case: Case, found: torch.Tensor, seed: int, rank: int, ranks: int) -> tuple[int, float]:
    """Elements of a result that are wrong, and the largest error of a sum that rounds."""
    wanted = expected_bits(case, seed, rank, ranks)
    if wanted is not None:
        return differing_bits(found, wanted), 0.0
    contributed = terms(case, seed, rank, ranks).double()
    error = (found.double() - contributed.sum(0)).abs() / contributed.abs().sum(0)
    finite = error.isfinite()
    wrong = ~finite | (error > sum_bound(case.dtype, ranks))
    return int(wrong.sum()), float(error[finite].max()) if bool(finite.any()) else 0.0


def differing_bits(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """Elements with other bits. Zeros of either sign are one number: a sum may have either."""
    both_zero = (found == 0) & (wanted == 0)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    return int(((found.view(integers) != wanted.view(integers)) & ~both_zero).sum())
