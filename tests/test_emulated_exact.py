"""The exact fidelity computes what the published models of matrix units say, bit for bit.

The reference is the models' text in exact rational arithmetic, term by term and without a float in between.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.profile import MatrixUnit, read_profile
from beringia.chips.emulated import matmul
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable

FORMATS: dict[str, tuple[torch.dtype, int, int]] = {
    "bfloat16": (torch.bfloat16, 7, -126),
    "float16": (torch.float16, 10, -14),
    "tfloat32": (torch.float32, 10, -126),
    "float8_e4m3": (torch.float8_e4m3fn, 3, -6),
    "float8_e4m3fnuz": (torch.float8_e4m3fnuz, 3, -7),
    "float8_e5m2": (torch.float8_e5m2, 2, -14),
}
"""Torch's dtype, fraction bits and smallest normal exponent."""

UNITS = [
    (part, name)
    for part in ("v100", "a100", "l40s", "h100", "h800", "h200", "b200", "mi250x", "mi300x")
    for name in read_profile(part).units
    if name in FORMATS
]


# ---- the models in rational arithmetic


def exponent_of(number: Fraction, smallest: int) -> int | None:
    """Floor of the binary logarithm, at least `smallest`; None for zero."""
    if number == 0:
        return None
    exponent = math.floor(math.log2(abs(number.numerator)) - math.log2(number.denominator)) + 1
    while Fraction(2) ** exponent > abs(number):
        exponent -= 1
    return max(exponent, smallest)


def to_integer(number: Fraction, direction: str) -> int:
    floor = math.floor(number)
    if direction == "floor":
        return floor
    if direction == "truncate":
        return floor if number >= 0 else math.ceil(number)
    if direction == "nearest-even":
        return round(number)
    return int(math.copysign(math.floor(abs(number) + Fraction(1, 2)), number))


def cut(number: Fraction, last: int, direction: str) -> Fraction:
    """Rounded to a multiple of 2**last."""
    return to_integer(number / Fraction(2) ** last, direction) * Fraction(2) ** last


def to_float32(number: Fraction, bits: int, direction: str) -> Fraction:
    exponent = exponent_of(number, -126)
    return Fraction(0) if exponent is None else cut(number, exponent - bits, direction)


def aligned(terms: list[tuple[Fraction, int | None]], bits: int, direction: str) -> tuple[Fraction, int | None]:
    """Sum of (number, exponent) cut `bits` below the largest exponent, and that."""
    largest = max((exponent for _, exponent in terms if exponent is not None), default=None)
    if largest is None:
        return Fraction(0), None
    return sum((cut(number, largest - bits, direction) for number, _ in terms), Fraction(0)), largest


def block(unit: MatrixUnit, products: list[tuple[Fraction, int | None]], c: Fraction) -> Fraction:
    accumulator = (c, exponent_of(c, -126) if c else unit.zero_exponent)
    assert unit.fraction_bits is not None
    if unit.accumulator_bits is None:
        total, _ = aligned([*products, accumulator], unit.fraction_bits, unit.alignment)
        return to_float32(total, unit.result_bits, unit.final)
    assert unit.sum_bits is not None
    if unit.scheme == "halves":
        halves = [aligned(products[start::2], unit.fraction_bits, unit.alignment) for start in (0, 1)]
        total, largest = aligned(halves, unit.fraction_bits, unit.sum_rounding)
    else:
        total, largest = aligned(products, unit.fraction_bits, unit.alignment)
    larger = max((exponent for exponent in (largest, accumulator[1]) if exponent is not None), default=None)
    if larger is None:
        return Fraction(0)
    kept = cut(c, larger - unit.accumulator_bits, unit.accumulator_rounding)
    if unit.scheme == "halves" and accumulator[1] is not None and accumulator[1] < larger - unit.accumulator_bits - 1:
        kept = Fraction(0)
    return to_float32(cut(total, larger - unit.sum_bits, unit.sum_rounding) + kept, unit.result_bits, unit.final)


def flushed(number: Fraction) -> Fraction:
    return number if abs(number) >= Fraction(2) ** -126 else Fraction(0)


def tree(numbers: list[Fraction]) -> Fraction:
    if len(numbers) == 1:
        return flushed(to_float32(numbers[0], 23, "nearest-even"))
    half = len(numbers) // 2
    return flushed(to_float32(tree(numbers[:half]) + tree(numbers[half:]), 23, "nearest-even"))


def dot(unit: MatrixUnit, a: list[float], b: list[float], smallest: int, zero_product: int | None = None) -> float:
    """What the unit makes of finite operands, as Python's float; infinities where float32 overflows.

    `zero_product`: the exponent of a product of zero.
    """
    if unit.subnormals_in == "flushed":
        a, b = ([x if abs(x) >= 2.0**smallest else 0.0 for x in numbers] for numbers in (a, b))
    left, right = ([(Fraction(x), exponent_of(Fraction(x), smallest)) for x in numbers] for numbers in (a, b))
    total = Fraction(0)
    for start in range(0, len(a), unit.block):
        products = [
            (x * y, zero_product if ex is None or ey is None else ex + ey)
            for (x, ex), (y, ey) in zip(
                left[start : start + unit.block], right[start : start + unit.block], strict=True
            )
        ]
        if unit.scheme == "pairwise":
            numbers = [number for number, _ in products] + [Fraction(0)] * (unit.block - len(products))
            total = flushed(to_float32(total + tree(numbers), 23, "nearest-even"))
        else:
            total = block(unit, products, total)
        if abs(total) >= Fraction(2) ** 128:
            return math.copysign(math.inf, total)
    return float(total)


def check(part: str, format_: str, a: torch.Tensor, b: torch.Tensor) -> None:
    dtype, _, smallest = FORMATS[format_]
    found = matmul(a.to(dtype), b.to(dtype), unit=part, format=format_)
    unit = read_profile(part).units[format_]  # type: ignore[index]
    left, right = a.to(dtype).double(), b.to(dtype).double()
    if format_ == "tfloat32":
        left, right = (x.float().view(torch.int32).bitwise_and(-(1 << 13)).view(torch.float32).double() for x in (a, b))
    wanted = torch.tensor(
        [[dot(unit, row.tolist(), column.tolist(), smallest) for column in right.mT] for row in left]
    ).float()
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted), (found - wanted).abs().max()


def spread(shape: tuple[int, ...], format_: str, seed: int, range_: float) -> torch.Tensor:
    """Numbers of the format over `range_` binary orders of magnitude around one."""
    dtype, _, _ = FORMATS[format_]
    generator = torch.Generator().manual_seed(seed)
    exponents = (torch.rand(shape, generator=generator) - 0.5) * range_
    numbers = torch.randn(shape, generator=generator) * 2.0**exponents
    limit = torch.finfo(dtype).max
    return numbers.clamp(-limit, limit).to(dtype).float()


@pytest.mark.parametrize(("part", "format_"), UNITS)
@pytest.mark.parametrize("range_", [0.0, 12.0, 30.0])
def test_products_are_the_published_models_bit_for_bit(part: str, format_: str, range_: float) -> None:
    for seed in range(2):
        a, b = spread((5, 70), format_, seed, range_), spread((70, 6), format_, seed + 50, range_)
        check(part, format_, a, b)


@settings(max_examples=150, deadline=None)
@given(unit=st.sampled_from(UNITS), data=st.data())
def test_any_finite_operands_give_the_models_bits(unit: tuple[str, str], data: Any) -> None:
    """All bit patterns: subnormals, cancellation, the largest numbers, overflow of the sum."""
    part, format_ = unit
    dtype, _, _ = FORMATS[format_]
    width = torch.finfo(dtype).bits
    terms = data.draw(st.integers(1, 40))
    patterns = st.lists(st.integers(0, 2**width - 1), min_size=2 * terms, max_size=2 * terms)
    numbers = from_bits(data.draw(patterns), dtype)
    a, b = numbers[:terms][None], numbers[terms:][:, None]
    if part == "mi300x":  # products of 2^128 and more are tested apart
        keep = (a.double().mT * b.double()).abs() < 2.0**128
        a, b = torch.where(keep.mT, a, 0.0), torch.where(keep, b, 0.0)
    check(part, format_, a, b)


def from_bits(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers with these bits as float32; what is not finite becomes zero."""
    width = torch.finfo(dtype).bits
    integers = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[width]
    signed = [x if integers == torch.uint8 or x < 2 ** (width - 1) else x - 2**width for x in patterns]
    return torch.tensor(signed, dtype=integers).view(dtype).float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@pytest.mark.parametrize("part", ["v100", "a100", "h100", "b200", "mi300x"])
def test_infinities_and_nan_propagate_as_in_exact_arithmetic(part: str) -> None:
    inf, nan = math.inf, math.nan
    ones = torch.ones(4, 1, dtype=torch.float16)
    rows = [[inf, 1, 1, 1], [-inf, 1, 1, 1], [inf, -inf, 1, 1], [nan, 1, 1, 1], [65504, 65504, 1, 0], [1, 1, 1, 1]]
    found = matmul(torch.tensor(rows, dtype=torch.float16), ones, unit=part).flatten().tolist()
    assert found[:2] == [inf, -inf] and math.isnan(found[2]) and math.isnan(found[3])
    assert found[4:] == [2 * 65504.0 + 1, 4.0]
    zero_times_infinity = matmul(torch.tensor([[inf, 1, 1, 1]], dtype=torch.float16), 0 * ones, unit=part)
    assert zero_times_infinity.isnan().all()


def test_a_product_beyond_float32_is_infinite_at_once_on_mi300x_only() -> None:
    large = torch.tensor([[2.0**100, 2.0**100]]).bfloat16()
    opposite = torch.tensor([[2.0**28], [-(2.0**28)]]).bfloat16()
    assert matmul(large, opposite, unit="h100").item() == 0.0
    assert matmul(large, opposite, unit="mi300x").isnan().item()
    assert matmul(large[:, :1], opposite[:1], unit="mi300x").item() == math.inf
    # An accumulator that is infinite already stays so, and 2^127 is a number.
    before = torch.zeros(1, 10).bfloat16()
    before[0, 0], before[0, 8] = 2.0**64, -(2.0**64)
    assert matmul(before, before.abs().mT, unit="mi300x").item() == math.inf
    assert matmul(large[:, :1], opposite[:1] / 2, unit="mi300x").item() == 2.0**127


def small_beside_large(unit: MatrixUnit, large: float, small: float) -> float:
    """The sum of two products and a zero, of operands that bfloat16 has."""
    a, b = torch.zeros(1, 4), torch.zeros(4, 1)
    for place, product in enumerate((large, small)):
        exponent = math.frexp(product)[1] // 2
        a[0, place], b[place, 0] = product * 2.0**-exponent, 2.0**exponent
    return float(ExactUnit(unit, "bfloat16")(a, b))


@pytest.mark.parametrize(
    ("part", "zero_exponent", "last"),
    [("a100", -132, 156), ("l40s", -132, 156), *((part, -133, 158) for part in ("h100", "h200", "h800", "b200"))],
)
def test_a_zero_accumulator_decides_which_bits_of_tiny_products_are_lost(
    part: str, zero_exponent: int, last: int
) -> None:
    """2^-149 less anything that is kept is truncated to zero; the last bit kept is F below the exponent of zero."""
    unit = read_profile(part).units["bfloat16"]
    assert unit.zero_exponent == zero_exponent
    assert small_beside_large(unit, 2.0**-149, -(2.0**-last)) == 0.0
    assert small_beside_large(unit, 2.0**-149, -(2.0 ** -(last + 1))) == 2.0**-149
    without, as_first_published = (unit.model_copy(update={"zero_exponent": value}) for value in (None, -126))
    assert small_beside_large(without, 2.0**-149, -(2.0 ** -(last + 1))) == 0.0, "as if zero had no exponent"
    assert small_beside_large(as_first_published, 2.0**-149, -(2.0**-last)) == 2.0**-149


def test_mi300x_floors_the_sum_of_tiny_products_31_bits_below_2_to_minus_126() -> None:
    unit = read_profile("mi300x").units["bfloat16"]
    tie = 2.0**-150
    assert small_beside_large(unit, tie, 2.0**-157) == 2.0**-149
    assert small_beside_large(unit, tie, 2.0**-158) == 0.0, "the tie goes to even"
    assert small_beside_large(unit, tie, -(2.0**-158)) == 0.0
    without = unit.model_copy(update={"zero_exponent": None})
    assert small_beside_large(without, tie, 2.0**-158) == 2.0**-149


TINY = st.sampled_from([0.0, 1.0, -1.0, 1.5, -1.75]).flatmap(
    lambda significand: st.integers(-88, -62).map(lambda exponent: significand * 2.0**exponent)
)


@settings(max_examples=100, deadline=None)
@given(part=st.sampled_from(["a100", "h100", "b200"]), data=st.data())
def test_an_exponent_for_products_of_zero_too_changes_nothing(part: str, data: Any) -> None:
    """So MMA-Sim's rule, which gives it to every zero term, is the profile's, which gives it to the accumulator."""
    unit = read_profile(part).units["bfloat16"]
    terms = data.draw(st.integers(1, 40))
    a, b = (data.draw(st.lists(TINY, min_size=terms, max_size=terms)) for _ in range(2))
    wanted = dot(unit, a, b, -126, zero_product=unit.zero_exponent)
    assert dot(unit, a, b, -126) == wanted
    assert float(ExactUnit(unit, "bfloat16")(torch.tensor([a]), torch.tensor([b]).mT)) == wanted


def test_mi300x_drops_an_fp8_accumulator_far_below_the_products_and_floors_a_nearer_one() -> None:
    for exponent, wanted in ((-10, 0.0), (-5, -(2.0**-10))):
        a, b = torch.zeros(1, 32), torch.zeros(32, 1)
        a[0, 0], b[0, 0] = -(2.0**exponent), 2.0**exponent
        a[0, 16:18], b[16, 0], b[17, 0] = 240.0, 240.0, -240.0  # 57600 - 57600: the unnormalised exponent is 14
        found = matmul(a.to(torch.float8_e4m3fnuz), b.to(torch.float8_e4m3fnuz), unit="mi300x")
        assert found.item() == wanted
        check("mi300x", "float8_e4m3fnuz", a, b)


def test_a_sum_past_float32_is_infinite_and_stays_so() -> None:
    large = torch.full((1, 64), 2.0**64).bfloat16()
    assert matmul(large, large.mT, unit="h100").item() == math.inf


@pytest.mark.parametrize("part", ["h100", "mi300x", "mi250x"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 130), (130, 40, 2), (64, 64, 64), (2, 1000, 1)])
def test_any_shape_and_any_number_of_threads_give_the_same_bits(part: str, shape: tuple[int, int, int]) -> None:
    rows, terms, columns = shape
    a = spread((3, rows, terms), "bfloat16", 1, 8.0).bfloat16()
    b = spread((3, terms, columns), "bfloat16", 2, 8.0).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matmul(a, b, unit=part)
        torch.set_num_threads(3)
        assert torch.equal(matmul(a, b, unit=part), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.stack([matmul(x, y, unit=part) for x, y in zip(a, b, strict=True)]), alone)
    assert torch.allclose(alone.double(), a.double() @ b.double(), rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_hoppers_short_fp8_accumulator_loses_what_deepseek_measured() -> None:
    """Uniform numbers, 4096 terms: 6.6 % on Hopper's 13 bits (numerics notes, section 3.1), next to nothing on B200."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(shape, generator=generator).to(torch.float8_e4m3fn) for shape in ((8, 4096), (4096, 8)))
    exact = a.double() @ b.double()
    lost = {part: float(((matmul(a, b, unit=part) - exact) / exact).mean()) for part in ("h100", "b200")}
    assert -0.08 < lost["h100"] < -0.05
    assert -1e-5 < lost["b200"] <= 0


def test_units_that_are_wider_than_the_arithmetic_are_refused() -> None:
    unit = read_profile("h100").units["bfloat16"]
    with pytest.raises(ChipUnavailable, match="sums of up to 51 bits; the profile's unit for bfloat16 needs 59"):
        ExactUnit(unit.model_copy(update={"fraction_bits": 52}), "bfloat16")
    with pytest.raises(ChipUnavailable, match="bfloat16 has no fraction_bits, so it loses none. Use the fast fidelity"):
        open_chip("emulated:ascend-910b@exact")


def test_a_device_computes_its_products_in_the_fidelity_of_its_name() -> None:
    a, b = spread((4, 300), "bfloat16", 5, 6.0).bfloat16(), spread((300, 4), "bfloat16", 6, 6.0).bfloat16()
    chip = open_chip("emulated:h800@exact")
    try:
        assert chip.name == "emulated:h800@exact" and chip.identity.switches["fidelity"] == "exact"
        found = (a.to(chip.device) @ b.to(chip.device)).cpu()
        assert torch.equal(found, matmul(a, b, unit="h800").bfloat16())
    finally:
        chip.close()
