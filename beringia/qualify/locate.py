"""Which operator is wrong first, what that is consistent with, and what helps.

Calls are judged by their own inputs (`operators/`), so a later call is not wrong because an earlier one was: the first
one beyond its bound, in the order of execution, is the first that is wrong. The traces that known faults leave are
compared with what it shows; several may fit, and a fault that nobody knows fits none.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from beringia.records.certificate import Located, OperatorCheck

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention")
_FEW = 0.02
"""Share of the elements that single struck numbers, or a race, stay below."""


def first_wrong(checks: Iterable[OperatorCheck]) -> OperatorCheck | None:
    """The first call beyond its bound, of calls in the order of execution."""
    return next((check for check in checks if check.used > 1.0), None)


def locate(check: OperatorCheck, *, repeatable: bool = True) -> Located:
    """What a wrong call is consistent with, and what helps against that."""
    fitting = [trace for trace in _TRACES if trace.fits(check)]
    if not repeatable:
        fitting.insert(0, _UNREPEATABLE)
    return Located(
        check=check,
        consistent_with=tuple(trace.fault for trace in fitting),
        mitigations=tuple(dict.fromkeys(trace.mitigation for trace in fitting if trace.mitigation)),
    )


@dataclass(frozen=True)
class _Trace:
    """What a known fault leaves behind."""

    fault: str
    fits: Callable[[OperatorCheck], bool]
    mitigation: str = ""


def _used(check: OperatorCheck) -> Mapping[str, float]:
    return {measure.name: measure.used for measure in check.measures}


def _beyond(check: OperatorCheck, name: str) -> bool:
    return _used(check).get(name, 0.0) > 1.0


def _is(check: OperatorCheck, *names: str) -> bool:
    return any(name in check.operator for name in names)


def _past_a_length(check: OperatorCheck) -> bool:
    """Wrong from a position on, right before it: rows of attention (the last dimension but one)."""
    return (
        _is(check, "attention", "softmax", "masked_fill")
        and len(check.wrong_from) >= 2
        and check.wrong_from[-2] > 0
        and check.wrong_share > 0.0
    )


def _flipped(check: OperatorCheck) -> bool:
    """Few elements, one of which differs from the right number by single bits, or by a power of two."""
    found, expected = check.found, check.expected
    if check.wrong_share > _FEW or not check.wrong_share:
        return False
    if found is None or expected is None or not found or not expected:
        return found is None
    ratio = math.log2(abs(found / expected))
    return abs(ratio) >= 1.0 and abs(ratio - round(ratio)) < 0.05 or _one_bit(found, expected, check.dtype)


def _one_bit(found: float, expected: float, dtype: str) -> bool:
    if dtype not in ("bfloat16", "float32"):
        return False
    try:
        here, there = (int.from_bytes(struct.pack(">f", value), "big") for value in (found, expected))
    except OverflowError:
        return False
    # The float64 result is not rounded as the chip's would be: the lowest bits kept do not count.
    return 0 < ((here ^ there) >> (18 if dtype == "bfloat16" else 3)).bit_count() <= 2


def _stuck(check: OperatorCheck) -> bool:
    """Several elements, within one rectangle with edges at multiples of 16."""
    if len(check.wrong_from) < 2 or check.wrong_share > 0.5 or not _is(check, *_PRODUCTS):
        return False
    rows, columns = (check.wrong_to[dim] // 16 - check.wrong_from[dim] // 16 for dim in (-2, -1))
    return rows == 0 and columns == 0 and check.wrong_from != check.wrong_to


def _scaled(check: OperatorCheck) -> bool:
    factor, error = check.factor, check.error
    if factor is None or error is None or abs(factor - 1.0) < 1e-6:
        return False
    return abs(abs(factor - 1.0) - error) < 0.1 * error


def _added_up_short(check: OperatorCheck) -> bool:
    """Sums cut again and again: few elements beyond their bounds, or all smaller, and that most of the error."""
    shrunk = check.factor is not None and check.error is not None and 1.0 - check.factor > 0.5 * check.error
    return (
        _is(check, *_PRODUCTS)
        and (check.wrong_share < 0.5 or shrunk)
        and (_beyond(check, "root mean square error") or _beyond(check, "signed error"))
    )


_TRACES = (
    _Trace(
        "subnormal numbers flushed to zero",
        lambda check: _beyond(check, "small numbers lost"),
        "compute in bfloat16, whose smallest number is that of float32, or scale the loss up",
    ),
    _Trace(
        "saturation: a large number where infinity is due, which hides overflow",
        lambda check: _beyond(check, "not finite on one side") and check.found is not None,
        "turn the saturating overflow mode off, or clip before the operator",
    ),
    _Trace(
        "an overflow inside: infinity or NaN where float64 has a number",
        lambda check: _beyond(check, "not finite on one side") and check.found is None,
        "compute this operator in a format with more exponent bits",
    ),
    _Trace(
        "a mask or a length that is not respected: wrong past a position, right before it",
        _past_a_length,
        "use attention made of single operators, or sequences shorter than the position",
    ),
    _Trace("a stuck tile of the matrix unit", _stuck, "replace the device"),
    _Trace("flipped bits", _flipped, "replace the device, or run it with error correction on"),
    _Trace(
        "results truncated instead of rounded",
        lambda check: (
            _beyond(check, "signed error") and not _beyond(check, "worst element") and check.wrong_share == 0.0
        ),
        "switch the rounding of casts to nearest",
    ),
    _Trace(
        "a short accumulator",
        _added_up_short,
        "have the unit accumulate in float32, or add partial products up outside it",
    ),
    _Trace("a wrong factor in every element", _scaled),
    _Trace(
        "numbers in wrong places: a wrong layout or index",
        lambda check: (
            _is(check, "index", "gather", "embedding", "clone", "cat", "copy", "scatter", "transpose")
            and check.wrong_share > 0.0
            and "moves" in check.basis
        ),
        "make the operand contiguous before the operator; check that indices lie in range",
    ),
    _Trace(
        "memory that does not keep what was written",
        lambda check: check.operator == "memory at rest",
        "replace the device, or run it with error correction on",
    ),
    _Trace("an operator that the chip does not have", lambda check: bool(check.refused)),
    _Trace(
        "an operator whose result has another shape, dtype or layout than torch's",
        lambda check: _beyond(check, "results of another form"),
        "compute this operator from others, or with another version of the chip's plugin",
    ),
)

_UNREPEATABLE = _Trace(
    "results that differ from run to run: an order of additions, or a race",
    lambda check: True,
    "switch deterministic algorithms on",
)
