"""Measures of what a sound chip has none of."""

from __future__ import annotations

from beringia.records.certificate import Measure

LESS_THAN_ONE = 0.5
"""Bound of a whole count that must be 0. Any number between 0 and 1 says the same; 0 itself would make the share of
the bound that is used undefined."""


def none_allowed(name: str, count: int, reason: str, unit: str = "") -> Measure:
    """A count that is 0 on a sound chip."""
    return Measure(name=name, value=float(count), bound=LESS_THAN_ONE, unit=unit, reason=f"none allowed: {reason}")


def bytes_in_words(count: float) -> str:
    """`1.5 GiB`, `64 MiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} bytes"
