"""What is measured from outside a matrix unit is what its profile says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.chips.arithmetic import matmul
from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.profile import Format, MatrixUnit, read_profile
from beringia.qualify.arithmetic.matrix_unit import UnknownStructure, measure_unit, structure_from

UNITS = [
    (part, name)
    for part in ("v100", "a100", "l40s", "h100", "b200", "mi250x", "mi300x")
    for name in read_profile(part).units
    if name in FORMATS
]


def visible(unit: MatrixUnit, format_: Format) -> dict[str, object]:
    """What products of the format can show: short exponents do not reach float32's subnormals and largest numbers."""
    hidden = {"mark", "source"}
    if FORMATS[format_].smallest > -126:
        hidden |= {"subnormals_out", "large_products", "zero_exponent"}
    if unit.subnormals_out == "flushed":
        hidden |= {"zero_exponent"}
    return unit.model_dump(exclude=hidden)


@pytest.mark.parametrize(("part", "format_"), UNITS)
def test_every_published_unit_is_recovered_from_its_products(part: str, format_: Format) -> None:
    measured = measure_unit(lambda a, b: matmul(a, b, unit=part, format=format_), format_, source="a test")
    assert visible(measured, format_) == visible(read_profile(part).units[format_], format_)
    assert measured.mark == "measured"


DIRECTIONS = st.sampled_from(["truncate", "floor", "nearest-even", "half-away"])


@st.composite
def units(draw: Any) -> MatrixUnit:
    """Units that nobody has published. Those that round to nearest in the end may align the accumulator apart."""
    fraction_bits = draw(st.integers(23, 30))
    fields: dict[str, Any] = {
        # Below -136 the products' own alignment may keep no more than a zero leaves.
        "zero_exponent": draw(st.none() | st.integers(-136, -126)),
        "scheme": "block",
        "block": draw(st.sampled_from([4, 8, 16, 32])),
        "fraction_bits": fraction_bits,
        "alignment": draw(DIRECTIONS),
        "result_bits": draw(st.integers(13, 23)),
        "final": draw(st.sampled_from(["truncate", "nearest-even", "half-away"])),
        "subnormals_in": draw(st.sampled_from(["kept", "flushed"])),
        "subnormals_out": draw(st.sampled_from(["kept", "flushed"])),
    }
    if fields["final"] == "nearest-even" and draw(st.booleans()):
        fields["sum_bits"] = draw(st.integers(fraction_bits + 3, 34))
        fields["sum_rounding"] = draw(DIRECTIONS)
        # An accumulator aligned with as many bits is told apart by one sum in 2**15 only.
        fields["accumulator_bits"] = draw(st.integers(23, 30).filter(lambda bits: bits != fraction_bits))
        fields["accumulator_rounding"] = draw(DIRECTIONS)
    return MatrixUnit(**fields, mark="measured", source="drawn")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(unit=units(), format_=st.sampled_from(["bfloat16", "float16"]))
def test_units_that_nobody_has_published_are_recovered(unit: MatrixUnit, format_: Format) -> None:
    multiply = ExactUnit(unit, format_)
    smallest = 2.0 ** FORMATS[format_].smallest
    flushes = unit.subnormals_in == "flushed"

    def on_the_chip(a: Any, b: Any) -> Any:
        a, b = (x.float() * (x.float().abs() >= smallest) if flushes else x.float() for x in (a, b))
        return multiply(a, b)

    measured = measure_unit(on_the_chip, format_, source="a test")
    assert visible(measured, format_) == visible(unit, format_)


def test_sums_that_no_exponent_of_zero_gives_are_told() -> None:
    exact = ExactUnit(read_profile("h100").units["bfloat16"], "bfloat16")

    def on_the_chip(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        results = exact(a.float(), b.float())
        return torch.where(results.abs() == 2.0**-149, 2 * results, results)

    measured = measure_unit(on_the_chip, "bfloat16", source="a test")
    assert measured.zero_exponent is None and measured.source.endswith("fit no exponent of zero")


def test_an_order_that_no_scheme_says_is_inconclusive() -> None:
    with pytest.raises(UnknownStructure, match="not added in blocks, as a tree or one after another"):
        structure_from([3] * 63)
