"""Does a chip compute with integers as they are defined: casts, overflow, division, shifts, large numbers, order.

What is expected comes from Python's own integers and torch's documentation, not from another chip. Where nothing is
defined (a NaN cast to an integer, a shift past the width, the order of equal numbers) the chip's answer is told beside
the CPU's, because a program that meets it gets other numbers on another chip. Defined cases that differ rule the chip
out: token numbers, routing tables and offsets are integers.

Does not divide by zero, nor the smallest number by -1: both end the process on some processors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from beringia.chips.chip import Chip
from beringia.qualify.arithmetic.transfers import BITS, FLOATS, INTEGERS, dtype_word
from beringia.qualify.attempts import RefusedAttempt, attempt, exact_result
from beringia.qualify.exact_measures import none_allowed
from beringia.records.certificate import ProbeResult

Number = int | float
Operation = Callable[..., torch.Tensor]

_SHOWN = 3
"""Wrong cases that a sentence names."""


@dataclass(frozen=True)
class Case:
    """An operation on tensors of numbers, and what each element of the result has to be."""

    text: str
    """`int32 of float32`."""
    operation: Operation
    operands: tuple[torch.Tensor, ...]
    """On the CPU."""
    expected: tuple[Number, ...] | None = None
    """None: not defined, only told."""
    written: tuple[torch.Tensor, ...] = ()
    """The operands as a sentence gives them, where they are the bits of other numbers."""


@dataclass(frozen=True)
class Answer:
    """What came out of a case."""

    case: Case
    found: list[Number] | RefusedAttempt

    @property
    def wrong(self) -> list[int]:
        """Elements that are not what is defined."""
        if self.case.expected is None or isinstance(self.found, RefusedAttempt):
            return []
        pairs = zip(self.found, self.case.expected, strict=True)
        return [place for place, (found, wanted) in enumerate(pairs) if found != wanted]


def probe_integers(chip: Chip) -> list[ProbeResult]:
    """One finding for each group of defined cases, and one for each group of undefined ones."""
    dtypes = chip.capabilities.dtypes
    groups = {
        "casts to integers": _casts(dtypes),
        "casts from integers": _casts_back(dtypes),
        "overflow": _overflow(dtypes, exact_int64=chip.capabilities.exact_int64),
        "division": _division(dtypes),
        "shifts": _shifts(dtypes),
        "numbers beyond 2^53": _large(exact_int64=chip.capabilities.exact_int64),
        "order and sums": _order(),
    }
    undefined = {
        "casts that are not defined": _undefined_casts(dtypes),
        "shifts past the width": _undefined_shifts(dtypes),
        "order of equal numbers": _undefined_order(),
    }
    return [
        *(_judged(chip, subject, cases) for subject, cases in groups.items()),
        *(_told(chip, subject, cases) for subject, cases in undefined.items()),
    ]


# ---- cases


def _casts(dtypes: frozenset[torch.dtype]) -> list[Case]:
    """Toward zero, for numbers whose integer part fits (C11 6.3.1.4, which torch's casts are)."""
    return [
        _cast(source, target, [number for number in _numbers_for(source) if _fits(number, target)])
        for source in FLOATS
        for target in INTEGERS
        if {source, target} <= dtypes
    ]


def _numbers_for(source: torch.dtype) -> list[float]:
    """Negative fractions, halves, and the last numbers of the format inside each integer type."""
    simple = [0.0, -0.0, 0.5, -0.5, 0.75, -0.75, 1.5, -1.5, 2.5, -2.5, -2.75, 3.5, 100.75, -100.75, 127.5, -127.5]
    edges = [sign * (2.0**power - step) for power in (15, 24, 31, 53, 63) for step in (0, 1) for sign in (1, -1)]
    edges += [-(2.0**power) for power in (7, 15, 31, 63)] + [_below(2.0**power, source) for power in (31, 63)]
    largest = torch.finfo(source).max
    exact = torch.tensor([edge for edge in edges if abs(edge) <= largest], dtype=torch.float64).to(source)
    return [*simple, *(float(number) for number in exact if math.isfinite(float(number)))]


def _below(number: float, source: torch.dtype) -> float:
    """The format's largest number below a power of two."""
    return number * (1.0 - torch.finfo(source).eps / 2.0)


def _fits(number: float, target: torch.dtype) -> bool:
    limits = torch.iinfo(target)
    # C leaves negative numbers undefined for unsigned types, but for those that truncate to 0.
    return limits.min <= int(number) <= limits.max


def _cast(source: torch.dtype, target: torch.dtype, numbers: Sequence[float]) -> Case:
    """The floats travel as bits: a copy that loses some of them is no wrong cast (`transfers.py`)."""
    floats = torch.tensor(numbers, dtype=torch.float64).to(source)
    bits = floats.view(BITS[floats.element_size()])
    expected = tuple(int(float(number)) for number in floats)
    text = f"{dtype_word(target)} of {dtype_word(source)}"
    return Case(text, lambda x: x.view(source).to(target), (bits,), expected, written=(floats,))


def _undefined_casts(dtypes: frozenset[torch.dtype]) -> list[Case]:
    """What does not fit: NaN, the infinities, and the first numbers beyond the type."""
    numbers = (math.nan, math.inf, -math.inf, 2.0**31, -(2.0**31) - 256, 2.0**63, -(2.0**63) * 1.5, -1.0)
    cases = []
    for target in (torch.int32, torch.int64, torch.uint8):
        if target in dtypes:
            beyond = [number for number in numbers if not (math.isfinite(number) and _fits(number, target))]
            text = f"{dtype_word(target)} of float32 {' '.join(f'{number:.7g}' for number in beyond)}"
            operand = torch.tensor(beyond, dtype=torch.float32)
            cases.append(Case(text, lambda x, target=target: x.to(target), (operand,)))
    return cases


def _casts_back(dtypes: frozenset[torch.dtype]) -> list[Case]:
    """Integers that the format has are kept; others go to the nearest, ties to even (IEEE 754-2019, 5.4.1)."""
    wide = (2**24, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, -(2**31), 255, -256, 0)
    cases = []
    for target in (torch.float64, torch.float32):
        for source in (torch.int64, torch.int32):
            if {source, target} <= dtypes:
                numbers = [*wide, 2**53 + 1, 2**53 + 3, -(2**53) - 1] if source == torch.int64 else list(wide)
                bits = 53 if target == torch.float64 else 24
                expected = tuple(_nearest_even(number, bits) for number in numbers)
                operand = torch.tensor(numbers, dtype=source)
                text = f"{dtype_word(target)} of {dtype_word(source)}"
                # Back as float64, which holds every float32.
                cases.append(Case(text, lambda x, target=target: x.to(target), (operand,), expected))
    return cases


def _nearest_even(number: int, bits: int) -> int:
    """The nearest integer with so many significant bits, in integers alone."""
    excess = max(0, abs(number).bit_length() - bits)
    kept, rest = divmod(abs(number), 1 << excess)
    half = (1 << excess) / 2
    kept += rest > half or (rest == half and kept % 2 == 1)
    return -(kept << excess) if number < 0 else kept << excess


def _overflow(dtypes: frozenset[torch.dtype], *, exact_int64: bool) -> list[Case]:
    """Results are taken modulo 2 to the width; hashes and generators of random numbers rest on it."""
    cases = []
    for dtype in (dtype for dtype in INTEGERS if dtype in dtypes):
        limits = torch.iinfo(dtype)
        left = (limits.max, limits.min, limits.max, limits.max)
        right = (1, 1, limits.max, 2)
        named: list[tuple[str, Operation, Callable[[int, int], int]]] = [
            ("plus", torch.add, lambda a, b: a + b),
            ("minus", torch.sub, lambda a, b: a - b),
        ]
        # A chip whose 64-bit products are declared not to be exact is not held to them.
        if dtype != torch.int64 or exact_int64:
            named.append(("times", torch.mul, lambda a, b: a * b))
        for word, operation, exact in named:
            expected = tuple(_wrapped(exact(a, b), dtype) for a, b in zip(left, right, strict=True))
            cases.append(Case(f"{dtype_word(dtype)} {word}", operation, _pair(left, right, dtype), expected))
    return cases


def _wrapped(number: int, dtype: torch.dtype) -> int:
    limits = torch.iinfo(dtype)
    return (number - limits.min) % (1 << limits.bits) + limits.min


def _division(dtypes: frozenset[torch.dtype]) -> list[Case]:
    """Python's own rules for floor and remainder, C's for truncation and fmod (torch.div, remainder, fmod)."""
    pairs = [(a, b) for a in (7, -7, 8, -8, 1, -1, 0, 100) for b in (2, -2, 3, -3, 8, -8)]
    left, right = zip(*pairs, strict=True)
    rules: list[tuple[str, Operation, Callable[[int, int], int]]] = [
        ("floor_divide", torch.floor_divide, lambda a, b: a // b),
        ("div, floor", lambda a, b: torch.div(a, b, rounding_mode="floor"), lambda a, b: a // b),
        ("div, trunc", lambda a, b: torch.div(a, b, rounding_mode="trunc"), _truncated),
        ("remainder", torch.remainder, lambda a, b: a % b),
        ("fmod", torch.fmod, lambda a, b: a - b * _truncated(a, b)),
    ]
    return [
        Case(
            f"{dtype_word(dtype)} {word}",
            operation,
            _pair(left, right, dtype),
            tuple(exact(a, b) for a, b in pairs),
        )
        for dtype in (torch.int64, torch.int32)
        if dtype in dtypes
        for word, operation, exact in rules
    ]


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shifts(dtypes: frozenset[torch.dtype]) -> list[Case]:
    """By less than the width: to the left modulo the width, to the right with the sign."""
    cases = []
    for dtype in (dtype for dtype in (torch.int64, torch.int32) if dtype in dtypes):
        bits = torch.iinfo(dtype).bits
        pairs = [(a, s) for a in (1, 5, -1, -8, -7, 2 ** (bits - 2)) for s in (0, 1, 3, bits - 2, bits - 1)]
        left, right = zip(*pairs, strict=True)
        operands = _pair(left, right, dtype)
        up = tuple(_wrapped(a << s, dtype) for a, s in pairs)
        down = tuple(a >> s for a, s in pairs)
        cases += [
            Case(f"{dtype_word(dtype)} left shift", torch.bitwise_left_shift, operands, up),
            Case(f"{dtype_word(dtype)} right shift", torch.bitwise_right_shift, operands, down),
        ]
    return cases


def _undefined_shifts(dtypes: frozenset[torch.dtype]) -> list[Case]:
    return [
        Case(f"int32 {number} {word} {by}", operation, _pair((number,), (by,), torch.int32))
        for word, operation in (("<<", torch.bitwise_left_shift), (">>", torch.bitwise_right_shift))
        for number, by in ((1, 32), (-8, 33), (1, -1))
        if torch.int32 in dtypes
    ]


def _large(*, exact_int64: bool) -> list[Case]:
    """What a detour over float64 or 32-bit halves would lose."""
    odd, large = 2**53 + 1, 2**62 + 1
    named: list[tuple[str, Operation, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
        ("plus", torch.add, (odd, large), (1, -(2**62)), (odd + 1, 1)),
        ("minus", torch.sub, (large, odd), (2**62, 2**53), (1, 1)),
        ("equal", torch.eq, (odd, odd, large), (2**53, odd, large - 1), (0, 1, 0)),
        ("less", torch.lt, (2**53, odd, -odd), (odd, 2**53, -(2**53)), (1, 0, 1)),
        ("maximum", torch.maximum, (2**53, -odd), (odd, -(2**53)), (odd, -(2**53))),
        ("floor_divide", torch.floor_divide, (large, -large), (3, 3), (large // 3, -large // 3)),
        ("remainder", torch.remainder, (large, -large), (1000, 1000), (large % 1000, -large % 1000)),
    ]
    if exact_int64:
        factors = (3_037_000_499, -3_037_000_499, 94_906_267)
        named.append(("times", torch.mul, factors, (3_037_000_499, 3_037_000_499, 94_906_267), (
            3_037_000_499**2, -(3_037_000_499**2), 94_906_267**2,
        )))  # fmt: skip
    cases = [
        Case(f"int64 {word}", operation, _pair(left, right, torch.int64), expected)
        for word, operation, left, right, expected in named
    ]
    column = torch.tensor([odd, 1, -(2**52), 3], dtype=torch.int64)
    return [
        *cases,
        Case("int64 sum", lambda x: x.sum().reshape(1), (column,), (int(odd + 1 - 2**52 + 3),)),
        Case("int64 max", lambda x: x.max().reshape(1), (column,), (odd,)),
    ]


def _order() -> list[Case]:
    """What is defined of numbers that are equal: values, a stable sort's order, the first maximum, running sums."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(8, (1000,), generator=generator)
    numbers = x.tolist()
    stable = tuple(sorted(range(len(numbers)), key=lambda place: numbers[place]))
    running = torch.randint(2**40, 2**50, (64,), generator=generator)
    sums = running.tolist()
    return [
        Case("stable argsort", lambda x: torch.argsort(x, stable=True), (x,), stable),
        Case("sorted values", lambda x: torch.sort(x).values, (x,), tuple(sorted(numbers))),
        # Each place once, and each the place of its value, whatever the order among equal ones.
        Case("argsort, places once", lambda x: _distinct(torch.argsort(x)), (x,), (1000,)),
        Case("argsort, values", lambda x: x[torch.argsort(x)], (x,), tuple(sorted(numbers))),
        Case("topk values", lambda x: torch.topk(x, 300).values, (x,), tuple(sorted(numbers, reverse=True)[:300])),
        Case("topk, its places", lambda x: x[torch.topk(x, 300).indices], (x,), tuple(sorted(numbers)[: -301 : -1])),
        Case("topk, places once", lambda x: _distinct(torch.topk(x, 300).indices), (x,), (300,)),
        Case("argmax of equal integers", lambda x: torch.argmax(x).reshape(1), (x,), (numbers.index(7),)),
        Case("argmax of equal floats", lambda x: torch.argmax(x).reshape(1), (x.float(),), (numbers.index(7),)),
        Case("int64 cumsum", lambda x: x.cumsum(0), (running,), tuple(sum(sums[: n + 1]) for n in range(64))),
        Case("int32 sum", lambda x: x.sum().reshape(1), (torch.full((3,), 2**30, dtype=torch.int32),), (3 * 2**30,)),
        Case("bincount", lambda x: torch.bincount(x, minlength=8), (x,), tuple(numbers.count(n) for n in range(8))),
    ]  # fmt: skip


def _undefined_order() -> list[Case]:
    x = torch.tensor([3, 1, 3, 1, 3, 0, 1, 3])
    return [
        Case("argsort of 3 1 3 1 3 0 1 3", torch.argsort, (x,)),
        Case("topk(3) of 3 1 3 1 3 0 1 3", lambda x: torch.topk(x, 3).indices, (x,)),
    ]


def _distinct(places: torch.Tensor) -> torch.Tensor:
    """How many different numbers there are."""
    ordered = places.sort().values
    return (ordered[1:] != ordered[:-1]).sum().reshape(1) + 1


def _pair(left: Sequence[int], right: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)


# ---- findings


def answer(chip: Chip, case: Case) -> Answer:
    """The chip's answer to one case."""

    def compute() -> list[Number]:
        result = case.operation(*(operand.to(chip.device) for operand in case.operands)).cpu()
        # Booleans become 0 and 1; bfloat16 and float16 lists are read as float64.
        numbers: list[Number] = (result.double() if result.is_floating_point() else result.to(torch.int64)).tolist()
        return numbers

    return Answer(case, attempt(chip, compute))


def _judged(chip: Chip, subject: str, cases: list[Case]) -> ProbeResult:
    began = time.perf_counter()
    answers = [answer(chip, case) for case in cases]
    refused = [
        f"{found.case.text} ({found.found.reason})" for found in answers if isinstance(found.found, RefusedAttempt)
    ]
    wrong = sum(len(found.wrong) for found in answers)
    made = len(answers) - len(refused)
    elements = sum(len(found.found) for found in answers if not isinstance(found.found, RefusedAttempt))
    beside = f" Refused, so not measured: {'; '.join(refused[:_SHOWN])}." if refused else ""
    text = _of_wrong(answers, wrong) if wrong else f"{elements} numbers of {made} operations are as defined."
    measure = none_allowed("numbers not as defined", wrong, "integer arithmetic is exact")
    seconds = time.perf_counter() - began
    return exact_result(f"integers: {subject}", wrong, made, f"{text}{beside}", measure, seconds)


def _of_wrong(answers: list[Answer], wrong: int) -> str:
    shown = []
    for found in (found for found in answers if found.wrong):
        assert not isinstance(found.found, RefusedAttempt) and found.case.expected is not None
        place = found.wrong[0]
        given = ", ".join(
            str(operand.reshape(-1)[place].item())
            for operand in found.case.written or found.case.operands
            if _has(operand, place)
        )
        shown.append(f"{found.case.text} ({given}) is {found.found[place]}, defined as {found.case.expected[place]}")
    return f"{wrong} numbers are not as defined: {'; '.join(shown[:_SHOWN])}."


def _has(operand: torch.Tensor, place: int) -> bool:
    return place < operand.numel()


def _told(chip: Chip, subject: str, cases: list[Case]) -> ProbeResult:
    """The chip's answers beside the CPU's."""
    began, parts = time.perf_counter(), []
    for case in cases:
        found = answer(chip, case).found
        on_cpu = case.operation(*case.operands).to(torch.int64).tolist()
        if isinstance(found, RefusedAttempt):
            parts.append(f"{case.text}: refused")
        else:
            same = "as the CPU" if found == on_cpu else f"CPU {_few(on_cpu)}"
            parts.append(f"{case.text}: {_few(found)} ({same})")
    emulated = " An emulator's integers are its host's." if chip.identity.truth == "emulated" else ""
    told = f"Not defined, so only told: {'; '.join(parts)}.{emulated}"
    return ProbeResult(
        probe="arithmetic",
        subject=f"integers: {subject}",
        outcome="told",
        summary=told if parts else "The chip has no such numbers.",
        seconds=time.perf_counter() - began,
    )


def _few(numbers: list[Number]) -> str:
    return " ".join(str(number) for number in numbers)
