"""Weights of data sets as whole numbers of rows in one period. Exact, without torch or numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

LONGEST_PERIOD = 100_000
"""Rows after which the order of sources repeats: a table of it is made at the start of every worker (a second)."""


def rows_in_a_period(weights: Sequence[float]) -> tuple[int, ...]:
    """How many rows each source has in the shortest stretch in which all have exactly their share: `(0.7, 0.3)` is
    `(7, 3)`. Raises ValueError for a stretch that is too long."""
    exact = [_meant(weight) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    rows = tuple(one // math.gcd(*whole) for one in whole)
    if sum(rows) > LONGEST_PERIOD:
        raise ValueError(
            f"the weights of mix need {sum(rows)} rows until all have exactly their share, and at most "
            f"{LONGEST_PERIOD} are planned ahead: write them with fewer digits, such as 0.7 and 0.3"
        )
    return rows


def _meant(weight: float) -> Fraction:
    """The fraction that somebody means by a number: the simplest, by powers of ten, that is this number in float64."""
    simple = (Fraction(weight).limit_denominator(10**digits) for digits in range(17))
    return next((fraction for fraction in simple if float(fraction) == weight), Fraction(weight))
