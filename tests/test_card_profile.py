"""What the card script compares shows what it is there to show: checked against units, without a card."""

from __future__ import annotations

import pytest

from benchmarks.card.profile import draw_pair, facts_that_differ, operands_of, other_bits, tiny
from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.profile import Format, MatrixUnit, Profile, read_profile


def with_zero(part: str, exponent: int | None) -> MatrixUnit:
    """The part's unit for bfloat16 with this exponent of zero."""
    return read_profile(part).units["bfloat16"].model_copy(update={"zero_exponent": exponent})


def differing(one: MatrixUnit, other: MatrixUnit) -> int:
    """How many sums of tiny products have other bits."""
    operands = [operand.float() for operand in draw_pair(tiny, FORMATS["bfloat16"], 64)]
    return int(other_bits(*(ExactUnit(unit, "bfloat16")(*operands) for unit in (one, other))).sum())


@pytest.mark.parametrize(("part", "published"), [("h100", -133), ("mi300x", -126)])
def test_sums_of_tiny_products_tell_rules_for_zero_apart(part: str, published: int) -> None:
    unit = with_zero(part, published)
    assert unit == read_profile(part).units["bfloat16"]
    assert differing(unit, unit) == 0 < differing(unit, with_zero(part, None))
    assert differing(unit, with_zero(part, -133 if published == -126 else -126)) > 0


@pytest.mark.parametrize(
    ("part", "format_", "shown"),
    [("h100", "bfloat16", True), ("h100", "tfloat32", True), ("h100", "float16", False), ("mi250x", "bfloat16", False)],
)
def test_they_are_made_where_a_unit_aligns_numbers_so_small(part: str, format_: Format, shown: bool) -> None:
    assert ("tiny products" in operands_of(read_profile(part).units[format_], FORMATS[format_])) is shown


def test_a_fact_that_one_side_does_not_say_differs() -> None:
    h100 = read_profile("h100")

    def of(exponent: int | None) -> Profile:
        return h100.model_copy(update={"units": {"bfloat16": with_zero("h100", exponent)}})

    assert facts_that_differ(of(None), h100) == {"bfloat16.zero_exponent": [None, -133]}
    assert facts_that_differ(of(-133), h100) == {}
