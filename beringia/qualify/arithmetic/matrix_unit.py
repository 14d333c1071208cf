"""How a chip's matrix unit adds, measured from outside: structure, alignment, accumulator, final rounding, subnormals.

The structure is found as FPRev does (arXiv 2411.00442): of equal small terms, a large one and its opposite drown those
that are added within the smallest group that holds both, so the result counts the others. Everything else is found by
moving one small term down bit by bit until the result no longer shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.products import Operand
from beringia.chips.arithmetic.profile import Direction, Format, MatrixUnit
from beringia.errors import Inconclusive
from beringia.qualify.arithmetic.products import CASES, LENGTH, Case, Multiply, Sums, Term

Scheme = Literal["block", "halves", "pairwise", "sequential"]
_FARTHEST = 60
"""Binary orders of magnitude searched: the published units keep at most 35 bits."""


class UnknownStructure(Inconclusive):
    """The unit adds in an order that no scheme of the profile says."""


@dataclass(frozen=True)
class _Aligned:
    """What aligning to a larger term leaves of a smaller one: bits below the larger one's exponent; None: all."""

    bits: int | None
    direction: Direction


def measure_unit(multiply: Multiply, format_: Format, source: str) -> MatrixUnit:
    """The unit for operands of one format, as a profile says it; what the format's range does not show is the default.

    The measured unit must then make random products that have the chip's bits. Raises UnknownStructure, and
    ChipUnavailable where there is no C compiler to compute with it. `source`: who was measured, for the profile.
    """
    sums = Sums(multiply, FORMATS[format_])
    scheme, block = find_structure(sums)
    probe = _Unit(sums, block)
    common: dict[str, object] = {
        "block": block,
        "subnormals_in": "kept" if _keeps_subnormal_operands(sums) else "flushed",
        "subnormals_out": "kept" if _keeps_subnormal_results(sums) else "flushed",
        "mark": "measured",
        "source": source,
    }
    if scheme == "block":
        common["large_products"] = "infinite" if _makes_large_products_infinite(sums) else "kept"
    else:
        common |= {"scheme": scheme, "final": probe.float32_rounding()}
    tried = []
    for facts in probe.alignments() if scheme == "block" else [{}]:
        unit = MatrixUnit.model_validate(common | facts)
        differing = count_differences(multiply, unit, format_)
        if differing == 0:
            return _with_zero_exponent(sums, unit, format_)
        tried.append(f"{differing} of {_BATTERY} sums differ from {unit.model_dump(exclude={'mark', 'source'})}")
    raise UnknownStructure(
        f"No unit that a profile can say makes the products of {format_} that were seen: {'; '.join(tried)}."
    )


_BATTERY = 3 * CASES**2
_BATTERY_LENGTH = 5 * LENGTH
"""Random sums that a measured unit is tried on, and their terms: over 0, 12 and 40 binary orders of magnitude, and
longer than the sums that were asked about, in case something happens every so many terms only."""


def count_differences(multiply: Multiply, unit: MatrixUnit, format_: Format) -> int:
    """How many of the random sums have other bits on the chip than the unit gives them."""
    form, exact = FORMATS[format_], _exactly(unit, format_)
    generator = torch.Generator().manual_seed(7)
    limit, differing = float(torch.finfo(form.dtype).max), 0
    for spread in (0.0, 12.0, 40.0):
        a_MK, b_KN = (
            (torch.randn(shape, generator=generator) * 2.0 ** (spread * (torch.rand(shape, generator=generator) - 0.5)))
            .clamp(-limit, limit)
            .to(form.dtype)
            for shape in ((CASES, _BATTERY_LENGTH), (_BATTERY_LENGTH, CASES))
        )
        found_MN, wanted_MN = multiply(a_MK, b_KN), exact(a_MK, b_KN)
        same_MN = (found_MN == wanted_MN) | (found_MN.isnan() & wanted_MN.isnan())
        differing += int((~same_MN).sum())
    return differing


_BESIDE: Mapping[Direction, tuple[float, float]] = {
    "truncate": (-2.0, 1.0),
    "nearest-even": (1.0, 1.0),
    "half-away": (-1.0, 1.0),
    "floor": (2.0, -1.0),
}
"""By the unit's last rounding: a product, in halves of the smallest number that a result can have, and the sign of a
much smaller one that moves the result as long as alignment leaves anything of it."""


def _with_zero_exponent(sums: Sums, unit: MatrixUnit, format_: Format) -> MatrixUnit:
    """The unit with the exponent of zero that gives the chip's sums of two tiny products and zeros.

    Where the sums show none, because the format does not reach so low or subnormal results are flushed, it is None;
    where no exponent gives them, too, and the unit's source says so.
    """
    cases = _tiny_sums(sums, unit)
    if not cases or unit.scheme not in ("block", "halves"):
        return unit
    found = sums(cases)
    for exponent in (None, *range(-126, -150, -1)):
        candidate = unit.model_copy(update={"zero_exponent": exponent})
        if Sums(_exactly(candidate, format_), sums.format)(cases) == found:
            return candidate
    return unit.model_copy(
        update={"source": f"{unit.source}; sums of products near 2^-149 beside zeros fit no exponent of zero"}
    )


def _tiny_sums(sums: Sums, unit: MatrixUnit) -> list[Case]:
    half = -127 - unit.result_bits
    large, sign = _BESIDE[unit.final]
    exponents = range(half - 1, max(_reach(sums), half - 1 - CASES), -1)
    return [{0: Term(math.copysign(1.0, large), half + (abs(large) > 1)), 1: Term(sign, small)} for small in exponents]


def _exactly(unit: MatrixUnit, format_: Format) -> Multiply:
    operand, exact = Operand(unit, format_, cut="truncate"), ExactUnit(unit, format_)
    return lambda a_MK, b_KN: exact(operand(a_MK), operand(b_KN))


def find_structure(sums: Sums) -> tuple[Scheme, int]:
    """Scheme and block length ("block" also for halves). Raises UnknownStructure."""
    large, small = _largest(sums), _lowest(sums)
    cases: list[Case] = []
    for place in range(1, LENGTH):
        terms = dict.fromkeys(range(LENGTH), Term(1, small))
        cases.append(terms | {0: Term(1, large), place: Term(-1, large)})
    found = sums(cases)
    if not all(math.isfinite(result) for result in found):
        raise UnknownStructure(f"Sums of terms between 2^{small} and 2^{large} are not finite: {found}.")
    return structure_from([LENGTH - round(result / 2.0**small) for result in found])


def structure_from(drowned: Sequence[int]) -> tuple[Scheme, int]:
    """From how many terms are added in the smallest group that holds place 0 and place 1, 2, ..."""
    places = range(1, len(drowned) + 1)
    if list(drowned) == [place + 1 for place in places]:
        return "sequential", 1
    for block in (2**power for power in range(1, 6)):
        chain = [block * (place // block + 1) for place in places]
        if list(drowned) == chain:
            return "block", block
        tree = [
            2 ** place.bit_length() if place < block else groups for place, groups in zip(places, chain, strict=True)
        ]
        if list(drowned) == tree:
            return "pairwise", block
    raise UnknownStructure(
        f"A sum of {len(drowned) + 1} products is not added in blocks, as a tree or one after another. Terms in the "
        f"smallest group that holds the first and the n-th: {list(drowned)}. Say what it is in the profile by hand."
    )


def _largest(sums: Sums) -> int:
    """Exponent of a large product of powers of two."""
    return min(2 * sums.format.largest, _FARTHEST)


def _lowest(sums: Sums) -> int:
    """Exponent of a small product: of subnormal operands where the unit keeps them and the format reaches no lower."""
    return max(_reach(sums), -_FARTHEST)


def _reach(sums: Sums) -> int:
    """Exponent of the smallest product."""
    form = sums.format
    return 2 * (form.smallest - (form.fraction_bits if _keeps_subnormal_operands(sums) else 0))


def _keeps_subnormal_operands(sums: Sums) -> bool:
    """The smallest number of the format times its largest power of two."""
    smallest = sums.format.smallest - sums.format.fraction_bits
    return sums([{0: Term(1, smallest + sums.format.largest, left_exponent=smallest)}]) != [0.0]


def _keeps_subnormal_results(sums: Sums) -> bool:
    """Where the format's products reach below 2**-126; elsewhere nothing can be seen, and nothing flushed."""
    return 2 * sums.format.smallest > -130 or sums([{0: Term(1, -130)}]) != [0.0]


def _makes_large_products_infinite(sums: Sums) -> bool:
    """Where the format's products reach 2**128."""
    if 2 * sums.format.largest < 128:
        return False
    (result,) = sums([{0: Term(1, 128), 1: Term(-1, 128)}])
    return math.isnan(result)


class _Unit:
    """Questions about a unit whose block length is known."""

    def __init__(self, sums: Sums, block: int) -> None:
        self._sums = sums
        self._block = block
        self._base = _largest(sums)
        self._range = min(self._base - _lowest(sums), _FARTHEST)

    def alignments(self) -> Iterator[dict[str, object]]:
        """The fields of a block scheme, simplest first: the accumulator aligned like one more product, or apart."""
        products = self._aligned(self._products)
        accumulator = self._aligned(self._accumulator)
        result_bits, final = self.result_rounding()
        facts: dict[str, object] = {
            "scheme": "block",
            "fraction_bits": products.bits,
            "alignment": products.direction,
            "result_bits": result_bits,
            "final": final,
        }
        if accumulator == products:
            yield facts
        if products.bits is not None and final == "nearest-even":
            halves = self._odd_places_are_apart(products.bits)
            block_sum = self._sum_beside_accumulator(result_bits)
            yield facts | {
                "scheme": "halves" if halves else "block",
                "sum_bits": block_sum.bits,
                "sum_rounding": block_sum.direction,
                "accumulator_bits": accumulator.bits,
                "accumulator_rounding": accumulator.direction,
            }

    # Each of these takes small terms, relative to the base, and says in units of what the base leaves of them.

    def _products(self, terms: Sequence[Term]) -> list[float]:
        """Small products in the block of a larger one and its opposite, all in one half where a block may have two."""
        small, opposite = (2, 4) if self._block >= 8 else (1, 2)
        large = {0: Term(1, self._base), opposite: Term(-1, self._base)}
        return self._sums([large | {small: self._scaled(term)} for term in terms])

    def _accumulator(self, terms: Sequence[Term]) -> list[float]:
        """A small accumulator, and then a block with a larger product and its opposite."""
        second = self._block
        large = {second: Term(1, self._base), second + 1: Term(-1, self._base)}
        return self._sums([{0: self._scaled(term)} | large for term in terms])

    def _sum_beside_accumulator(self, bits: int) -> _Aligned:
        """What aligning to a larger accumulator leaves of a block's sum, where results of `bits` bits are rounded to
        nearest even: the sum is half a unit of the result, and a small term decides which way that goes.

        Added to an even accumulator the sum must be more than half to move it, to an odd one less than half to leave
        it; a term that is kept does both.
        """
        steps = range(bits + 2, self._range + 1)
        more = self._moves([Term(1, -step) for step in steps], bits, odd=False)
        less = self._moves([Term(-1, -step) for step in steps], bits, odd=True)
        kept = [step for step, up, tie in zip(steps, more, less, strict=True) if up and not tie]
        last = max(kept, default=bits + 1)
        below = -(last + 1)
        away = [Term(-1, below), Term(-1.5, below), Term(1.5, below)]
        return _Aligned(last, direction(self._moves(away, bits, odd=False)))

    def _moves(self, terms: Sequence[Term], bits: int, *, odd: bool) -> list[bool]:
        """Whether half a unit and a small term beside it change the accumulator; on an odd one, all but the term is
        positive, on an even one all has the term's sign."""
        cases, before = [], []
        for term in terms:
            sign = 1.0 if odd else math.copysign(1.0, term.left)
            case = {0: Term(sign, self._base), self._block: Term(sign, self._base - bits - 1)}
            case[self._block + 1] = self._scaled(term)
            if odd:
                case[1] = Term(sign, self._base - bits)
            cases.append(case)
            before.append(sign * (2.0**self._base + (2.0 ** (self._base - bits) if odd else 0.0)))
        return [result != old for result, old in zip(self._sums(cases), before, strict=True)]

    def _scaled(self, term: Term) -> Term:
        return Term(term.left, self._base + term.exponent)

    def _aligned(self, left_of: Callable[[Sequence[Term]], list[float]]) -> _Aligned:
        steps = range(1, self._range + 1)
        left = left_of([Term(1, -step) for step in steps])
        kept = [step for step, result in zip(steps, left, strict=True) if result == 2.0 ** (self._base - step)]
        bits = max(kept, default=0)
        if bits == self._range:
            return _Aligned(None, "truncate")
        below = bits + 1
        answers = left_of([Term(-1, -below), Term(-1.5, -below), Term(1.5, -below)])
        return _Aligned(bits, direction(answers))

    def _odd_places_are_apart(self, bits: int) -> bool:
        """Four terms of a quarter of the last bit that alignment keeps: visible if they are added up before they are
        aligned to what stands in the even places. Shorter blocks have no room for the question."""
        if self._block < 8:
            return False
        large = {0: Term(1, self._base), 2: Term(-1, self._base)}
        return self._sums([large | dict.fromkeys((1, 3, 5, 7), Term(1, self._base - bits - 2))]) != [0.0]

    # The last rounding

    def result_rounding(self) -> tuple[int, Direction]:
        """Fraction bits of what a block hands on, and how it is rounded to them.

        Beside a sum of 4.5 (two products of 1.5 x 1.5, whose own exponent is 0) the unit's alignment has room for two
        more bits than the result.
        """
        steps = range(2, 24)
        results = self._beside([Term(1, -step) for step in steps])
        kept = [step for step, result in zip(steps, results, strict=True) if result == 2.0**-step]
        if not kept:
            raise UnknownStructure("The result of 4.5 + 1/4 keeps no bit of the quarter: fewer than four bits.")
        bits = 2 + kept[-1]
        half = 1 - bits
        return bits, direction(self._beside([Term(-1, half), Term(-1.5, half), Term(1.5, half)]))

    def _beside(self, terms: Sequence[Term]) -> list[float]:
        """What is left of small terms beside 4.5 of their own sign."""
        shift = self._base - 2
        cases: list[Case] = []
        for term in terms:
            sign = math.copysign(1.0, term.left)
            square = Term(1.5 * sign, shift, 1.5)
            case = {0: square, 1: square, 2: Term(sign, shift + term.exponent)}
            if abs(term.left) == 1.5:  # the half as a term of its own, so that alignment sees two powers of two
                case[3] = Term(sign, shift + term.exponent - 1)
            cases.append(case)
        results = zip(terms, self._sums(cases), strict=True)
        return [result / 2.0**shift - math.copysign(4.5, term.left) for term, result in results]

    def float32_rounding(self) -> Direction:
        """How float32 additions are rounded where they are made one by one."""
        terms = [Term(-1, -24), Term(-1.5, -24), Term(1.5, -24)]
        whole = [Term(math.copysign(1.0, term.left), self._base) for term in terms]
        results = self._sums([{0: one, 1: self._scaled(term)} for one, term in zip(whole, terms, strict=True)])
        return direction([abs(result) != 2.0**self._base for result in results])


def direction(answers: Sequence[float] | Sequence[bool]) -> Direction:
    """From what becomes of -1/2, -3/4 and 3/4 of the last bit: whether each moved."""
    moved = tuple(answer != 0 for answer in answers)
    directions: dict[tuple[bool, ...], Direction] = {
        (False, False, False): "truncate",
        (True, True, False): "floor",
        (False, True, True): "nearest-even",
        (True, True, True): "half-away",
    }
    if moved not in directions:
        raise UnknownStructure(f"No rounding moves -1/2, -3/4 and 3/4 of the last bit as was seen: {list(answers)}.")
    return directions[moved]
