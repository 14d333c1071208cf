"""The matrix unit of the card that is found: measured into a profile, and compared bit by bit with the catalogue's.

The comparison makes `SUMS` sums a format and more: five lengths from 64 to 320 terms, three or four kinds of operands,
and the unit of the catalogue's profile computes each again in the exact fidelity. A card that is in no catalogue is
compared with the profile that was just measured on it, which says so.

Ten-bit products of float32 matrices (tf32) are off when a chip is opened; they are switched on for their own sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.card.parts import Size
from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.formats import FORMATS, OperandFormat
from beringia.chips.arithmetic.products import Operand
from beringia.chips.arithmetic.profile import Format, MatrixUnit, Profile, profile_names, read_profile
from beringia.chips.arithmetic.rounding import round_fraction_
from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import ChipUnavailable
from beringia.qualify.arithmetic.chip_profile import measure_profile, multiply_on, to_toml
from beringia.qualify.arithmetic.matrix_unit import UnknownStructure
from beringia.qualify.arithmetic.products import CASES, Multiply

LENGTHS = (64, 128, 192, 256, 320)
SUMS = 10_000
"""At least so many a format: 3 kinds of operands or more x 5 lengths x 64 x 64."""
assert 3 * len(LENGTHS) * CASES**2 >= SUMS
WIDEST = 40.0
"""Binary orders of magnitude of wide-range operands, where the format has so many: more than any unit aligns."""
FLOAT8 = ("float8_e4m3", "float8_e4m3fnuz", "float8_e5m2")

PROMOTED_EVERY = 128
"""Terms of 8-bit products after which CUTLASS adds the unit's sum to one in float32 (four instructions of 32 terms)."""

Draw = Callable[[OperandFormat, tuple[int, int], torch.Generator], torch.Tensor]


def measure(chip_name: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """Measured profile, comparison by format, and what holds: every unit of the catalogue makes the card's bits."""
    chip = open_chip(chip_name)
    began = time.perf_counter()
    measured = measure_profile(chip)
    seconds = time.perf_counter() - began
    name = in_catalogue(chip.identity.sku)
    against = measured if name is None else read_profile(name)
    formats = {kind: compared(way, against) for kind, way in ways(chip, against)}
    found = {
        "identity": chip.identity.model_dump(mode="json"),
        "identity_hash": chip.identity.hash,
        "compared_with": "the measured profile itself: this part is in no catalogue" if name is None else name,
        "probe_seconds": seconds,
        "assumed": measured.assumed(),
        "facts_that_differ": {} if name is None else facts_that_differ(measured, against),
        "formats": formats,
        "profile_toml": to_toml(measured),
    }
    judged = {kind: one for kind, one in formats.items() if "differ" in one and (name or one["mark"] == "measured")}
    return found, {kind: sum(one["differ"].values()) == 0 for kind, one in judged.items()}


def in_catalogue(sku: str) -> str | None:
    """The arithmetic profile of the part that an identity names, to the variant."""
    part = sku.partition(" (")[0]
    return next((name for name in profile_names() if read_profile(name).part.partition(" (")[0] == part), None)


@dataclass(frozen=True)
class Way:
    """One way in which a chip multiplies, and what it is compared with."""

    format: Format
    multiply: Multiply
    stretch: int | None = None
    """Terms after which the unit's sum is added to another in float32; None: never."""


def ways(chip: Chip, against: Profile) -> Iterator[tuple[str, Way]]:
    """What is compared, by name."""
    real = chip.identity.truth == "real"
    for format_ in (name for name in FORMATS if name in against.units):
        if format_ in ("tfloat32", "hfloat32"):
            if real:
                yield format_, Way(format_, ten_bits(chip))
        elif FORMATS[format_].dtype in chip.capabilities.dtypes:
            yield format_, Way(format_, multiply_on(chip, format_))
            if format_ in FLOAT8 and real:
                yield f"{format_}, fast accumulation", Way(format_, fast_float8(chip))
                name = f"{format_}, added up every {PROMOTED_EVERY} terms"
                yield name, Way(format_, multiply_on(chip, format_), PROMOTED_EVERY)


def ten_bits(chip: Chip) -> Multiply:
    """Products of float32 matrices with the switch on that lets the library cut operands to ten bits."""
    multiply = multiply_on(chip, "float32")

    def with_switch(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        with precision("high"):
            return multiply(a_MK, b_KN)

    return with_switch


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_float8(chip: Chip) -> Multiply:
    """The unit alone: by default libraries add up its sums in float32 every so often (DeepSeek-V3 section 3.5.2)."""

    def multiply(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        one = torch.ones((), device=chip.device)
        a_MK, by_columns = a_MK.to(chip.device), b_KN.to(chip.device).t().contiguous().t()
        try:
            return torch._scaled_mm(
                a_MK, by_columns, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
            ).cpu()
        except RuntimeError as error:
            if chip.classify(error) is not None:
                raise
            raise UnknownStructure(f"No fast accumulation here: {str(error).splitlines()[0][:120]}") from error

    return multiply


def compared(way: Way, against: Profile) -> dict[str, Any]:
    """How many sums have other bits than the unit gives them, by kind of operands; the first of them."""
    unit = against.units[way.format]
    try:
        exact = exactly(unit, way, against)
        differ, zeros, first = {}, 0, None
        for kind, draw in operands_of(unit, FORMATS[way.format]).items():
            differ[kind] = 0
            for length in LENGTHS:
                a_MK, b_KN = draw_pair(draw, FORMATS[way.format], length)
                found_MN, wanted_MN = way.multiply(a_MK, b_KN), exact(a_MK, b_KN)
                other_MN = other_bits(found_MN, wanted_MN)
                differ[kind] += int(other_MN.sum())
                zeros += int((other_MN & (found_MN == wanted_MN)).sum())
                if first is None and bool(other_MN.any()):
                    first = example(kind, a_MK, b_KN, found_MN, wanted_MN, other_MN)
    except (UnknownStructure, ChipUnavailable) as reason:
        return {"not_compared": str(reason)}
    return {
        "unit": unit.in_words(),
        "mark": unit.mark,
        "sums_of_each_kind": len(LENGTHS) * CASES**2,
        "differ": differ,
        "differ_in_the_sign_of_zero_only": zeros,
        "first": first,
    }


def exactly(unit: MatrixUnit, way: Way, profile: Profile) -> Multiply:
    """The unit in the exact fidelity."""
    operand, product = Operand(unit, way.format, profile.float32_products.input_rounding), ExactUnit(unit, way.format)

    def multiply(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
        stretch = way.stretch or a_MK.shape[1]
        parts = zip(operand(a_MK).split(stretch, dim=1), operand(b_KN).split(stretch, dim=0), strict=True)
        total, *others = [product(a_MX.contiguous(), b_XN.contiguous()) for a_MX, b_XN in parts]
        for part in others:
            total += part
        return total

    return multiply


def other_bits(found_MN: torch.Tensor, wanted_MN: torch.Tensor) -> torch.Tensor:
    """Where the bits differ; a NaN is a NaN."""
    same_MN = found_MN.view(torch.int32) == wanted_MN.view(torch.int32)
    return ~(same_MN | (found_MN.isnan() & wanted_MN.isnan()))


def example(
    kind: str,
    a_MK: torch.Tensor,
    b_KN: torch.Tensor,
    found_MN: torch.Tensor,
    wanted_MN: torch.Tensor,
    other_MN: torch.Tensor,
) -> dict[str, Any]:
    """The first sum that differs, with its operands, so that it can be made again by hand."""
    row, column = other_MN.nonzero()[0].tolist()
    return {
        "operands": kind,
        "terms": a_MK.shape[1],
        "found": float(found_MN[row, column]).hex(),
        "wanted": float(wanted_MN[row, column]).hex(),
        "in_float64": float(a_MK[row].double() @ b_KN[:, column].double()).hex(),
        "left": [value.hex() for value in a_MK[row].double().tolist()],
        "right": [value.hex() for value in b_KN[:, column].double().tolist()],
    }


def draw_pair(draw: Draw, form: OperandFormat, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands (M, K) and (K, N) in the format's dtype; the same on every machine."""
    generator = torch.Generator().manual_seed(length)
    a_MK = draw(form, (CASES, length), generator)
    # Both near the smallest number, all products would vanish: the right one is then an ordinary number.
    b_KN = (normal if draw is near_subnormal else draw)(form, (length, CASES), generator)
    return as_operand(a_MK, form), as_operand(b_KN, form)


def as_operand(numbers: torch.Tensor, form: OperandFormat) -> torch.Tensor:
    """Rounded to the format; formats without a dtype are float32 numbers of so many bits."""
    limit = float(torch.finfo(form.dtype).max)
    numbers = numbers.clamp(-limit, limit).to(form.dtype)
    return round_fraction_(numbers, form.fraction_bits, "nearest-even") if form.dtype == torch.float32 else numbers


def normal(form: OperandFormat, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def wide(form: OperandFormat, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    spread = min(WIDEST, float(form.largest - form.smallest))
    return torch.randn(shape, generator=generator) * 2.0 ** (spread * (torch.rand(shape, generator=generator) - 0.5))


def near_subnormal(form: OperandFormat, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Around the smallest normal number: about half of them are subnormal."""
    scale = 2.0 ** (form.smallest + 4 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).float()


def tiny(form: OperandFormat, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Products of two of them lie around float32's smallest subnormal number, where the exponent of zero shows."""
    scale = 2.0 ** (SMALLEST_RESULT / 2 + 16 * (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).float()


OPERANDS: dict[str, Draw] = {"normal": normal, "wide range": wide, "near subnormal": near_subnormal}
SMALLEST_RESULT = -149
"""Exponent of float32's smallest subnormal number."""


def operands_of(unit: MatrixUnit, form: OperandFormat) -> dict[str, Draw]:
    """Tiny products only where a unit aligns terms and the format has numbers so small."""
    aligns = unit.scheme in ("block", "halves")
    return OPERANDS | ({"tiny products": tiny} if aligns and 2 * form.smallest < SMALLEST_RESULT else {})


def facts_that_differ(measured: Profile, declared: Profile) -> dict[str, list[Any]]:
    """Facts of units as they were measured and as the catalogue has them, where these are not the same."""
    beside = {"mark", "source"}
    differ = {}
    for format_ in measured.units.keys() & declared.units.keys() - {"float64"}:
        found, wanted = (profile.units[format_].model_dump(exclude=beside) for profile in (measured, declared))
        for name in sorted(found.keys() | wanted.keys()):  # what is not said is in no dump
            if found.get(name) != wanted.get(name):
                differ[f"{format_}.{name}"] = [found.get(name), wanted.get(name)]
    for group in ("casts", "overflow", "subnormals", "reduction"):
        found, wanted = (getattr(profile, group).model_dump(exclude=beside) for profile in (measured, declared))
        if found != wanted:
            differ[group] = [found, wanted]
    return differ
