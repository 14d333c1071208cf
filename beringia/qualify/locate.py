"""Which operator is wrong first, what that is consistent with, and what helps.

Calls are judged by their own inputs (`operators/`), so a later call is not wrong because an earlier one was: the first
one beyond its bound, in the order of execution, is the first that is wrong. The traces that known faults leave are
compared with what it shows, those that few faults leave first; several may fit, and what nobody knows fits none.

Whether a pass made twice gives the same bits tells faults apart that leave the same numbers: bits flip now here, now
there, a stuck tile stays, and an order of additions changes no number beyond its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from beringia.qualify.operators.check import RMS_ERROR, worse_than_reference
from beringia.records.certificate import Located, OperatorCheck

_MATRIX_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
_PRODUCTS = (*_MATRIX_PRODUCTS, "attention")
_CASTS = ("_to_copy", "copy_")
_FEW = 0.02
"""Share of the elements that single struck numbers stay below."""
_NEIGHBOURS = 3
"""Bits side by side that flip together: what strikes one cell of a memory reaches those beside it."""
_CUT_SHORT, _CUT_OFTEN = 2.0**-4, 2.0**-2
"""Relative error up to which an accumulator may have been cut short: a cut to b fraction bits loses less than 2^-b of
the sum, and nobody builds one of fewer than four. Long sums are cut often; then most elements are beyond their bounds,
and the error may be a few times that."""
_TRUNCATED = (1.45, 1.75)
"""Root mean square error of a truncated cast over the largest allowed: it is twice that of rounding (uniform on a whole
unit in the last place instead of half of one to either side), and 1.25 times that of rounding is allowed: 1.6."""


def first_wrong(checks: Iterable[OperatorCheck]) -> OperatorCheck | None:
    """The first call beyond its bound, of calls in the order of execution; one that is no farther off than the
    reference's only where no other is."""
    wrong = [check for check in checks if check.used > 1.0]
    return next(filter(worse_than_reference, wrong), next(iter(wrong), None))


def locate(check: OperatorCheck, *, repeatable: bool = True) -> Located:
    """What a wrong call is consistent with, the likeliest first, and what helps against that.

    `repeatable`: whether a pass made twice gave the same bits.
    """
    fitting = [trace for trace in _TRACES if trace.fits(check)]
    if not repeatable:
        fitting.sort(key=lambda trace: not trace.comes_and_goes)
        if not any(trace.comes_and_goes for trace in fitting):
            fitting.append(_RACE if check.used > 1.0 else _ORDER)
    # What says little is not said where something says more.
    fitting = fitting or [trace for trace in _FAINT_TRACES if trace.fits(check)]
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
    comes_and_goes: bool = False
    """Whether it strikes now here, now there, so that a pass made twice has other bits."""


def _used(check: OperatorCheck) -> Mapping[str, float]:
    return {measure.name: measure.used for measure in check.measures}


def _beyond(check: OperatorCheck, name: str) -> bool:
    return _used(check).get(name, 0.0) > 1.0


def _is(check: OperatorCheck, *names: str) -> bool:
    return any(name in check.operator for name in names)


def _past_a_length(check: OperatorCheck) -> bool:
    """Attention (rows are the last dimension but one) that is wrong from a position on, right before it; or wrong from
    the first on and right in the last row, which sees everything, masked or not."""
    if not _is(check, "attention", "softmax", "masked_fill") or len(check.wrong_from) < 2 or not check.wrong_share:
        return False
    rows = check.shapes[0][-2] if check.shapes and len(check.shapes[0]) >= 2 else 0
    return check.wrong_from[-2] > 0 or 0 < check.wrong_to[-2] + 1 < rows


def _flipped(check: OperatorCheck) -> bool:
    """Few elements, the worst of which differs from the right number by a bit, or by a few side by side. Of several
    they are bits of sign and exponent: numbers cut off at a limit may be bits of the fraction away, too."""
    if not 0.0 < check.wrong_share <= _FEW:
        return False
    if check.found is None or check.expected is None:
        return check.found is None
    flipped = _bits_between(check.found, check.expected, check.dtype)
    alone = check.wrong_from == check.wrong_to
    return flipped > 0 and (alone or flipped % _FRACTIONS[check.dtype] == 0)


def _bits_between(found: float, expected: float, dtype: str) -> int:
    """The bits side by side that make `found` of the expected number, rounded, or of one beside it: a sound chip may
    round either way. 0 where it takes others."""
    if dtype not in _DTYPES:
        return 0
    here, there = (_as_bits(value, dtype) >> _UNSURE_BITS.get(dtype, 0) for value in (found, expected))
    between = (here ^ beside for beside in (there, there - 1, there + 1) if beside >= 0)
    return next((bits << _UNSURE_BITS.get(dtype, 0) for bits in between if _are_neighbours(bits)), 0)


_DTYPES = {"bfloat16": (torch.bfloat16, torch.int16), "float16": (torch.float16, torch.int16)}
_DTYPES |= {"float32": (torch.float32, torch.int32)}
_FRACTIONS = {"bfloat16": 2**7, "float16": 2**10, "float32": 2**23}
"""The lowest bit of the exponent."""
_UNSURE_BITS = {"float32": 3}
"""Last bits of a float32 sum that are not float64's, rounded, on a sound chip either."""


def _as_bits(value: float, dtype: str) -> int:
    number, integer = _DTYPES[dtype]
    signed = int(torch.tensor(value, dtype=torch.float64).to(number).view(integer))
    return signed & ((1 << torch.iinfo(integer).bits) - 1)


def _are_neighbours(bits: int) -> bool:
    """Whether these are one to `_NEIGHBOURS` bits side by side."""
    run = bits // (bits & -bits) if bits else 0
    return 0 < run.bit_length() <= _NEIGHBOURS and run == 2 ** run.bit_length() - 1


def _stuck(check: OperatorCheck) -> bool:
    """Most elements of a rectangle that lies within one of 16 x 16, with edges at multiples of 16; no others."""
    if len(check.wrong_from) < 2 or check.wrong_share > 0.5 or not _is(check, *_MATRIX_PRODUCTS):
        return False
    inside = all(check.wrong_to[dim] // 16 == check.wrong_from[dim] // 16 for dim in (-2, -1))
    rectangle = math.prod(last - first + 1 for first, last in zip(check.wrong_from, check.wrong_to, strict=True))
    return inside and rectangle > 1 and check.wrong_share * _elements(check) > 0.5 * rectangle


def _elements(check: OperatorCheck) -> int:
    """Of the result of a product of matrices, or of batches of them; 0 where it has no two."""
    *_, left, right = [(0, 0), (0, 0), *(shape for shape in check.shapes if len(shape) > 1)]
    return math.prod(left[:-1]) * right[-1]


def _scaled(check: OperatorCheck) -> bool:
    factor, error = check.factor, check.error
    if factor is None or error is None or abs(factor - 1.0) < 1e-6 or check.wrong_share < 0.5:
        return False
    return factor != 0.0 and abs(abs(factor - 1.0) - error) < 0.1 * error


def _truncated(check: OperatorCheck) -> bool:
    """No element beyond its bound, and all toward one side; or, of a cast, twice the error of rounding."""
    if check.wrong_share or _beyond(check, "worst element"):
        return False
    low, high = _TRUNCATED
    twice = low < _used(check).get(RMS_ERROR, 0.0) < high
    return _beyond(check, "signed error") or (_is(check, *_CASTS) and twice)


def _added_up_short(check: OperatorCheck) -> bool:
    """Sums cut again and again: no element beyond its bound, or all smaller, and that most of the error."""
    most = _CUT_OFTEN if check.wrong_share > 0.5 else _CUT_SHORT
    if not _is(check, *_PRODUCTS) or check.error is None or check.error > most:
        return False
    shrunk = check.factor is not None and 1.0 - check.factor > 0.5 * check.error
    beyond = _beyond(check, RMS_ERROR) or _beyond(check, "signed error")
    return beyond and (shrunk or check.wrong_share == 0.0)


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
    _Trace("flipped bits", _flipped, "replace the device, or run it with error correction on", comes_and_goes=True),
    _Trace(
        "an update that is not the optimizer's: a moment, its correction, the decay, or weights left as they were",
        lambda check: check.direction == "optimizer" and _is(check, "adamw") and check.used > 1.0,
        "make the update of single operators (no fused optimizer), and hold it against the fused one",
    ),
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

_FAINT_TRACES = (
    _Trace("a wrong factor in every element", _scaled),
    _Trace("results truncated instead of rounded", _truncated, "switch the rounding of casts to nearest"),
    _Trace(
        "a short accumulator",
        _added_up_short,
        "have the unit accumulate in float32, or add partial products up outside it",
    ),
)
"""Of errors that are everywhere: looked at where nothing more particular fits."""

_ORDER = _Trace(
    "results that differ from run to run: an order of additions, or a fault that comes and goes",
    lambda check: True,
    "switch deterministic algorithms on; if results still differ then, replace the device",
)
_RACE = _Trace(
    "wrong results that differ from run to run: additions lost in a race",
    lambda check: True,
    "switch deterministic algorithms on",
)
