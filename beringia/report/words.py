"""Numbers as a reader wants to see them: digits that mean something, durations, sizes, counts.

Plain text only; escaping is the template's business.
"""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power_of_ten(exponent: int) -> str:
    """`10⁻³`."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def significant(value: float | None, digits: int = 3) -> str:
    """`0.00123`, `1.23`, `12,300`, `1.23 × 10⁻⁷`; what is not a finite number says so."""
    if value is None or math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    # As text: the largest float, rounded up, is none any more, and ten to the smallest one's exponent is 0.
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if exponent < -4 or exponent > 6:
        return f"{mantissa} × {power_of_ten(exponent)}".replace("-", "−")
    return f"{round(value, digits - 1 - exponent):,.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """`41.2 %`; `not finite` for None."""
    return "not finite" if share is None else f"{100 * share:.{digits}f} %"


def share_words(used: float) -> str:
    """A share of a bound: `0.81`, `2.6`, `over 1,000`, `not a number`."""
    if not math.isfinite(used):
        return "not a number"
    return "over 1,000" if used > 1000 else significant(used, 2)


def count(number: int, noun: str, nouns: str | None = None) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """`0.42 s`, `7.5 s`, `7 min 12 s`, `3 h 04 min`, `2 d 03 h`."""
    if seconds < 10:
        return f"{significant(seconds, 2)} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def clock(seconds: float) -> str:
    """`0:35`, `12:04`, `3:04:09`: time since the run began, to read in a column."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(number: int) -> str:
    """`1.23 MB`, powers of 1000."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{significant(value)} {units[0]}" if units[0] != "B" else f"{number} B"


def short_hash(value: str) -> str:
    """The first twelve characters, enough to tell two apart by eye."""
    return value[:12]
