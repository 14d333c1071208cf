"""One operator call held against float64: how much of its bound the chip's result uses.

Five measures, each blind to what the others see:

- the worst element, against a bound that holds for every element: gross and local errors
- the root mean square error, against what storing and adding up cost and a quarter more: errors everywhere, each within
  its bound
- the signed error: rounding to nearest cancels in it, truncation and wrong factors add up
- small numbers that became zero
- infinities and NaN where float64 has none, or the other way round

Before them stands the form of the results: their number, shapes, dtypes and layouts (`form.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import zip_longest
from typing import Any

import numpy
import torch

from beringia.numerics.metrics import accumulation_floor, few, independent_rows, rounding_floor, unlike_rows
from beringia.qualify.operators.bounds import (
    ARITHMETIC_ROUNDINGS,
    ELEMENTARY_ULPS,
    Bound,
    bound_of,
    may_overflow,
    one_sided,
)
from beringia.qualify.operators.float64 import NotKnown, in_float64, to_wide
from beringia.qualify.operators.form import dtypes_due, wrong_form
from beringia.qualify.operators.named_places import are_indices, lying_there, named_again, outside, result_of_places
from beringia.qualify.operators.parts import in_parts
from beringia.qualify.operators.watch import Call, RefusedCall, tensors_in
from beringia.records.certificate import Measure, OperatorCheck

RMS_ALLOWED = 1.25
"""Root mean square error over that of a sound chip, which with the same inputs is the rounding of the result and little
else: on emulated chips of four makers it is 1.00 to 1.02. (PyTorch's accuracy check and msprobe allow 2, for errors of
results whose inputs differ.)"""
SIGNED_DEVIATIONS = 6.0
"""Standard deviations that the mean of independent rounding errors may lie from zero: once in 10^9."""
SMALL_SHARE = 0.5
"""Share of the numbers below the smallest normal number of their dtype that may become zero. A chip that keeps
subnormals loses none; one that flushes, all."""
SMALL_COUNT = 8
"""Fewer small numbers than these say nothing: one beside the limit may be rounded to zero."""
RMS_ERROR = "root mean square error"
"""The measure of errors everywhere."""
WRONG_FORM = "results of another form"
"""The measure of a result whose shape, dtype or layout is not torch's."""
WRONG_INTEGERS = "other integers"
"""The measure of a result of whole numbers."""
_SMALLEST = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
"""The spacing of numbers below the smallest normal one where operators compute."""
_BASIS_SMALL = "subnormal results that became zero; a chip that keeps them loses none"
_PAIRS = "; complex numbers as pairs of reals: of an element the last index is the part"


@dataclass(frozen=True)
class _Worst:
    element: tuple[int, ...]
    found: float | None
    expected: float | None
    error: float
    allowed: float

    share: float = 0.0
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    factor: float | None = None

    @property
    def used(self) -> float:
        return self.error / self.allowed

    def moved(self, rows: int) -> _Worst:
        """As an element of a tensor in which its own begins after so many rows."""
        if not rows:
            return self

        def there(element: tuple[int, ...]) -> tuple[int, ...]:
            return (element[0] + rows, *element[1:]) if element else element

        return replace(self, element=there(self.element), first=there(self.first), last=there(self.last))


Judged = tuple[tuple[Measure, ...], _Worst | None, float | None]
"""Measures, the worst element, the relative error."""


def check(call: Call) -> OperatorCheck | None:
    """The call judged; None where it has no number to judge. Raises NotKnown."""
    if not call.results:
        return None
    judged, basis = [], ""
    for part in in_parts(call):
        found, basis = _judge(part.call)
        judged += [(measures, worst and worst.moved(part.first_row), error) for measures, worst, error in found]
    measures, worst, error = _largest(judged)
    if not measures:
        return None
    first = next((one for one in call.results if one.is_floating_point() or one.is_complex()), call.results[0])
    return OperatorCheck(
        **_place(call),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors_in((call.args, dict(call.kwargs)))),
        dtype=str(first.dtype).removeprefix("torch."),
        attributes=_attributes(call),
        basis=basis,
        error=error if error is not None and math.isfinite(error) else None,
        measures=measures,
        worst_element=worst.element if worst else (),
        found=worst.found if worst else None,
        expected=worst.expected if worst else None,
        wrong_share=worst.share if worst else 0.0,
        wrong_from=worst.first if worst else (),
        wrong_to=worst.last if worst else (),
        factor=worst.factor if worst else None,
    )


def _judge(call: Call) -> tuple[list[Judged], str]:
    """Each result of the call judged, and what their bound is made of."""
    exact = in_float64(call)
    dtypes, apart = _dtypes(call, exact)
    wrong = wrong_form(call, exact, dtypes)
    judged: list[Judged | None] = [] if wrong is None else [_of_another_form(wrong.words)]
    if wrong is not None and not wrong.has_numbers:
        return [_of_another_form(wrong.words)], f"results have torch's shapes, dtypes and layouts{apart}"
    bound = bound_of(call, exact)
    results, references, of_places = _with_places_read(call, exact)
    inside = bound.inner, bound.storing_noise, bound.noise
    judged += [of_places] + [
        judge_tensor(found, reference, allowed, bound, inner, noise, partial(may_overflow, call, exact, place))
        for place, (found, reference, allowed, inner, *noise) in enumerate(
            zip_longest(results, references, bound.allowed, *(one[: len(exact)] for one in inside))
        )
        if found is not None and reference is not None and allowed is not None and _comparable(found, reference)
    ]
    apart += _PAIRS if any(one.is_complex() for one in exact) else ""
    return [one for one in judged if one is not None], bound.basis + apart


def _with_places_read(
    call: Call, exact: tuple[torch.Tensor, ...]
) -> tuple[list[torch.Tensor | None], list[torch.Tensor], Judged | None]:
    """Results and float64's, in both the numbers that lie there in place of the indices that an operator names; None
    for what are no indices, which its form says. And what there is to say of indices that point at nothing."""
    results: list[torch.Tensor | None] = list(call.results[: len(exact)])
    references, place = list(exact), result_of_places(call, exact)
    if place is None:
        return results, references, None
    found, due = call.results[place], exact[place]
    if not are_indices(found, due.shape):
        results[place] = None
        return results, references, None
    beyond, named = outside(call, found), lying_there(call, due)
    results[place], references[place] = torch.where(beyond, named, lying_there(call, found)), to_wide(named)
    again = named_again(call, found)
    if bool(beyond.any()):
        return results, references, _wrong_places(found, due, beyond, "an index is one of an element that there is")
    if bool(again.any()):
        return results, references, _wrong_places(found, due, again, "each element is named once")
    return results, references, None


def _wrong_places(found: torch.Tensor, exact: torch.Tensor, wrong: torch.Tensor, reason: str) -> Judged:
    element = _largest_in(wrong)
    here, there = float(found[element]), float(exact[element])
    measure = Measure(name=WRONG_INTEGERS, value=float(wrong.sum()), bound=0.5, unit="elements", reason=reason)
    return (measure,), _Worst(element, here, there, abs(here - there), 0.5), None


def _dtypes(call: Call, exact: tuple[torch.Tensor, ...]) -> tuple[list[torch.dtype], str]:
    """Those that its results should have, and what is told where that is not known."""
    try:
        return dtypes_due(call, exact), ""
    except NotKnown as reason:
        return [], f"; whether its dtype is right is not known here ({reason})"


def _of_another_form(words: str) -> Judged:
    measure = Measure(name=WRONG_FORM, value=1.0, bound=0.5, unit="results", reason=words)
    return (measure,), _Worst((), None, None, math.inf, 1.0), None


def refused(call: RefusedCall) -> OperatorCheck:
    """An operator that the chip does not have is a finding."""
    place = call.place
    return OperatorCheck(
        module=place.module,
        operator=place.operator,
        direction=place.direction,
        ordinal=place.ordinal,
        position=place.position,
        shapes=call.shapes,
        dtype="",
        basis="",
        error=None,
        measures=(),
        refused=call.words,
    )


def has_wrong_integers(check: OperatorCheck) -> bool:
    """Whether whole numbers are other ones: what they name is another thing, however small the difference."""
    return any(measure.name == WRONG_INTEGERS and measure.used > 1.0 for measure in check.measures)


def is_grave(check: OperatorCheck) -> bool:
    """Whether a wrong call rules out by itself, whatever it does to a model: the operator is missing, names wrong
    integers, or its result has another shape, dtype or layout than torch's."""
    return bool(check.refused) or has_wrong_integers(check) or bool(wrong_form_words(check))


def worse_than_reference(check: OperatorCheck) -> bool:
    """Whether a call is beyond its bound, and not only because it is as far off as the reference, which is beyond it,
    too: then it does to the model what the reference's does (a kernel of the CPU that adds up in 16 bits, as `nll_loss`
    in bfloat16, is both's)."""
    own = check.reference_error
    if check.used <= 1.0 or is_grave(check) or not own or not check.error:
        return check.used > 1.0
    used = {measure.name: measure.used for measure in check.measures if measure.used > 1.0}
    rms = used.pop(RMS_ERROR, 0.0)
    # Errors that are everywhere use less of the bound on single elements; what strikes a few, or none of these, is own.
    everywhere = all(name in ("worst element", "signed error") and share <= rms for name, share in used.items())
    return not everywhere or rms * own / check.error <= 1.0 or check.error > RMS_ALLOWED * own


def wrong_form_words(check: OperatorCheck) -> str:
    """What it has in place of what; empty where its results have torch's form."""
    return next((measure.reason for measure in check.measures if measure.name == WRONG_FORM), "")


def _comparable(found: torch.Tensor, reference: torch.Tensor) -> bool:
    # Of another form may be what an operator keeps for its backward pass; all else was judged by that.
    return (found.shape, found.layout) == (reference.shape, reference.layout) and found.numel() > 0


def judge_tensor(
    found: torch.Tensor,
    exact: torch.Tensor,
    allowed: torch.Tensor,
    bound: Bound,
    stored: torch.Tensor | None,
    noise: Sequence[torch.Tensor | None] = (),
    overflows: Callable[[], torch.Tensor | None] = lambda: None,
) -> Judged | None:
    """One result held against float64: its measures, its worst element and its relative error.

    `allowed` is the absolute error allowed before the result is stored, `stored` the float64 result with the roundings
    that a sound chip makes inside (None: none), `noise` how large those are in root mean square, and what else a sound
    chip is off by inside. `overflows` says which elements may overflow inside (None: it is not known), and is asked
    only where one did.
    """
    if found.shape != exact.shape:
        return _of_another_form(f"{list(found.shape)} where float64 has {list(exact.shape)}")
    if found.is_complex() and exact.is_complex():
        return _judge_complex(found, exact, allowed, bound, stored, noise, overflows)
    if found.is_complex() or exact.is_complex():
        return _of_another_form(f"{found.dtype} where float64 has {exact.dtype}")
    if not found.is_floating_point() or not exact.is_floating_point():
        return _judge_integers(found, exact)
    narrow = exact.to(found.dtype)
    rounded = narrow.double()
    if not bound.rounds:
        exact = rounded  # a constant among the arguments (`fill_(0.1)`) has no form in the dtype but its rounding
    if torch.equal(found, narrow) and _surely_finite(rounded):
        return _as_rounded(rounded, exact, allowed, bound, found.dtype)
    wide, struck, count = found.double(), None, 0.0
    if not (_surely_finite(wide) and _surely_finite(rounded)):
        differ = one_sided(wide, rounded)
        if bool(differ.any()):
            limit = _with_storage(allowed, exact, found.dtype, bound.rounds)
            differ &= ~_excused(wide, exact, limit, torch.finfo(found.dtype).max, overflows())
        count = float(differ.sum())
        struck = _not_finite_at(differ, wide, rounded) if count else None
        finite = rounded.isfinite() & wide.isfinite()
        wide, exact, rounded = (torch.where(finite, tensor, 0.0) for tensor in (wide, exact, rounded))
        allowed = torch.where(finite, allowed, 1.0)
        stored = None if stored is None else torch.where(finite, stored, 0.0)
        noise = [None if one is None else torch.where(finite, one, 0.0) for one in noise]
        # A finite result of infinite arguments owes them no error.
        allowed = torch.where(allowed.isfinite(), allowed, 0.0)
    inner, allowed = allowed, _with_storage(allowed, exact, found.dtype, bound.rounds)
    difference = wide - exact
    worst = _worst_of(difference, wide, exact, allowed)
    measures = [_not_finite(count)]
    measures.append(Measure(name="worst element", value=worst.error, bound=worst.allowed, reason=bound.basis))
    size, error = _rms(exact), _rms(difference)
    if bound.rounds and size > 0.0:
        inside = 0.0 if stored is None else _rms(stored - exact) / size
        of_storing, *others = (0.0 if one is None else _rms(one) / size for one in (*noise, None))
        inside = math.hypot(max(inside, of_storing), *others)
        inside *= few(independent_rows(exact)) if noise and exact.dim() > 1 else 1.0
        measures += _rms_and_sign(wide, exact, rounded, error, size, bound, inside)
    small = _small(wide, exact, rounded, found.dtype, inner)
    measures += [small] if small is not None else []
    return tuple(measures), struck or worst, error / size if size else error


def _judge_complex(
    found: torch.Tensor,
    exact: torch.Tensor,
    allowed: torch.Tensor,
    bound: Bound,
    stored: torch.Tensor | None,
    noise: Sequence[torch.Tensor | None],
    overflows: Callable[[], torch.Tensor | None],
) -> Judged | None:
    """As pairs of reals, each part allowed what the number is."""

    def of_both(one: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None else one.expand(exact.shape).unsqueeze(-1).expand(*exact.shape, 2)

    of_each = allowed.expand(exact.shape).unsqueeze(-1).expand(*exact.shape, 2)
    pairs = None if stored is None else _pairs(stored)
    own = [of_both(one) for one in noise]
    return judge_tensor(_pairs(found), _pairs(exact), of_each, bound, pairs, own, lambda: of_both(overflows()))


def _pairs(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def _as_rounded(
    wide: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor, bound: Bound, dtype: torch.dtype
) -> Judged:
    """The measures where every element is float64's, rounded, as most are on a sound chip: nothing needs a search."""
    error = (wide - exact).abs_() if bound.rounds else torch.zeros((), dtype=torch.float64).broadcast_to(exact.shape)
    element = _largest_in(error) if bound.rounds else (0,) * exact.dim()
    here, there, off = (_number_at(element, tensor) for tensor in (wide, exact, error))
    own = _number_at(element, allowed.broadcast_to(exact.shape))
    limit = max(abs(there) * _storing(dtype, bound.rounds) + own, torch.finfo(dtype).tiny)
    measures = [_not_finite(0.0), Measure(name="worst element", value=off, bound=limit, reason=bound.basis)]
    if not bound.rounds:
        return tuple(measures), _Worst(element, here, there, off, limit), 0.0
    size, rounding = _rms(exact), _rms(error)
    if size > 0.0:
        relative = RMS_ALLOWED * (rounding / size + _inner_floor(bound, size))
        reason = f"{RMS_ALLOWED:g} times storing and adding up"
        measures.append(Measure(name=RMS_ERROR, value=rounding / size, bound=relative, reason=reason))
    return tuple(measures), _Worst(element, here, there, off, limit), rounding / size if size else rounding


def _largest_in(tensor: torch.Tensor) -> tuple[int, ...]:
    """The index of the largest element. Through numpy: torch's own search and index take ten times as long, and every
    call has one."""
    return tuple(int(index) for index in numpy.unravel_index(tensor.numpy().argmax(), tuple(tensor.shape)))


def _number_at(element: tuple[int, ...], tensor: torch.Tensor) -> float:
    """An element of a tensor."""
    return float(tensor.numpy()[element])


@cache
def _not_finite(count: float) -> Measure:
    return Measure(
        name="not finite on one side",
        value=count,
        bound=0.5,
        unit="elements",
        reason="as in float64 rounded to the dtype",
    )


def _surely_finite(wide: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN: a sum of which one is, is not finite either. A sum that overflows (only in
    float64) says no as well, which costs time and no more."""
    return math.isfinite(float(wide.sum()))


def _rms(tensor: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(tensor))
    if not math.isfinite(norm) and tensor.numel():  # squares overflow before their root does
        largest = float(tensor.abs().amax())
        norm = largest * float(torch.linalg.vector_norm(tensor / largest)) if math.isfinite(largest) else norm
    return norm / math.sqrt(tensor.numel())


def _with_storage(allowed: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, rounds: bool) -> torch.Tensor:
    """The absolute error allowed in each element. Numbers below the smallest normal one may be flushed: that has a
    measure of its own."""
    return exact.abs().mul_(_storing(dtype, rounds)).add_(allowed).clamp_min_(torch.finfo(dtype).tiny)


def _storing(dtype: torch.dtype, rounds: bool) -> float:
    """What storing in a dtype, also one of 8 bits, may change, relative to the number."""
    return torch.finfo(dtype).eps if rounds and dtype != torch.float64 else 0.0


def _worst_of(difference: torch.Tensor, wide: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor) -> _Worst:
    used = difference.abs().div_(allowed)
    element = _largest_in(used)
    here, there, off, limit = (_number_at(element, tensor) for tensor in (wide, exact, difference, allowed))
    if not abs(off) > limit:
        return _Worst(element, here, there, abs(off), limit)
    wrong = (used > 1.0).nonzero()
    first, last = (tuple(int(index) for index in bound) for bound in (wrong.amin(0), wrong.amax(0)))
    size = float(exact.square().sum())
    factor = float((wide * exact).sum()) / size if size else math.nan
    return _Worst(element, here, there, abs(off), limit, len(wrong) / exact.numel(), first, last, _finite(factor))


def _rms_and_sign(
    wide: torch.Tensor,
    exact: torch.Tensor,
    rounded: torch.Tensor,
    error: float,
    size: float,
    bound: Bound,
    inside: float,
) -> list[Measure]:
    storing = math.hypot(_rms(rounded - exact) / size, inside)
    relative = RMS_ALLOWED * (storing + _inner_floor(bound, size))
    excess = wide - rounded
    total = float(torch.linalg.vector_norm(exact, 1))
    # Over the same mean as the gain is, which of peaked results lies far below their root mean square.
    spread = _rms(excess) * exact.numel() / total
    gain = float(excess.mul_(exact.sign()).sum()) / total
    floor, several = _inner_floor(bound, total / exact.numel()), exact.dim() > 1
    signed = floor + SIGNED_DEVIATIONS * spread / math.sqrt(independent_rows(exact) if several else 1.0)
    if several and abs(gain) > signed:  # seldom asked, since it takes long: of requests that are alike, errors are
        signed = floor + SIGNED_DEVIATIONS * spread / math.sqrt(unlike_rows(exact))
    return [
        Measure(
            name=RMS_ERROR,
            value=error / size,
            bound=max(relative, 1e-30),
            reason=f"{RMS_ALLOWED:g} times storing and adding up",
        ),
        Measure(
            name="signed error",
            value=abs(gain),
            bound=max(signed, 1e-30),
            reason="adding up, and what is left of random errors",
        ),
    ]


def _inner_floor(bound: Bound, size: float) -> float:
    """Error before storing, relative to results of this size: the worst sound accumulator over the terms, or an
    elementary function's. What comes between, a term or a scaled sum, may be below the smallest normal number, where a
    rounding costs up to a whole spacing whatever it is of."""
    below_normal = (bound.terms + ARITHMETIC_ROUNDINGS) * _SMALLEST / size
    return accumulation_floor(bound.terms) + ELEMENTARY_ULPS * rounding_floor(torch.float32) + below_normal


def _excused(
    wide: torch.Tensor, exact: torch.Tensor, limit: torch.Tensor, largest: float, overflows: torch.Tensor | None
) -> torch.Tensor:
    """Which elements a sound chip may have on another side of the largest number: those as near to it as their error,
    and those that overflow inside."""
    to_infinity = wide.isinf() & (wide.sign() == exact.sign()) & (exact.abs() + limit >= largest)
    to_infinity |= ~wide.isfinite() & (limit >= largest + exact.abs())
    from_infinity = wide.isfinite() & ((wide - exact).abs() <= limit)
    near = exact.isfinite() & (to_infinity | from_infinity)
    return near if overflows is None else near | (overflows & ~exact.isnan() & ~wide.isfinite())


def _not_finite_at(differ: torch.Tensor, wide: torch.Tensor, rounded: torch.Tensor) -> _Worst:
    wrong = differ.nonzero()
    element, first, last = (tuple(int(index) for index in one) for one in (wrong[0], wrong.amin(0), wrong.amax(0)))
    here, there = (_finite(float(tensor[element])) for tensor in (wide, rounded))
    return _Worst(element, here, there, math.inf, 1.0, len(wrong) / differ.numel(), first, last)


def _small(
    wide: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype, allowed: torch.Tensor
) -> Measure | None:
    # What may be off by as much as itself may be zero, too.
    small = (exact.abs() < torch.finfo(dtype).tiny) & (exact.abs() > allowed)
    if int(small.count_nonzero()) < SMALL_COUNT:
        return None
    small &= rounded != 0
    if int(small.count_nonzero()) < SMALL_COUNT:
        return None
    lost = float((wide[small] == 0).double().mean())
    return Measure(name="small numbers lost", value=lost, bound=SMALL_SHARE, reason=_BASIS_SMALL)


def _judge_integers(found: torch.Tensor, exact: torch.Tensor) -> Judged:
    differ = found != exact.to(found.dtype)
    count = float(differ.sum())
    worst = None
    if count:
        element = _largest_in(differ)
        here, there = float(found[element]), float(exact[element])
        worst = _Worst(element, _finite(here), _finite(there), abs(here - there), 0.5)
    measure = Measure(name=WRONG_INTEGERS, value=count, bound=0.5, unit="elements", reason="integers are exact")
    return (measure,), worst, None


def _largest(judged: list[Judged]) -> Judged:
    """Of several results, for each measure the one that used most of its bound."""
    best: dict[str, Measure] = {}
    worst: _Worst | None = None
    error: float | None = None
    for measures, element, relative in judged:
        for measure in measures:
            if measure.name not in best or measure.used > best[measure.name].used:
                best[measure.name] = measure
        if element is not None and (worst is None or element.used > worst.used):
            worst = element
        if relative is not None and (error is None or not relative <= error):
            error = relative
    return tuple(best.values()), worst, error


def _place(call: Call) -> dict[str, Any]:
    place = call.place
    return {
        "module": place.module,
        "operator": place.operator,
        "direction": place.direction,
        "ordinal": place.ordinal,
        "position": place.position,
    }


def _attributes(call: Call) -> str:
    names = [argument.name for argument in call.func._schema.arguments]
    given = [*zip(names, call.args, strict=False), *call.kwargs.items()]
    return ", ".join(f"{name}={value}" for name, value in given if not any(True for _ in tensors_in(value)))[:200]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
