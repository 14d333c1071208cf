"""The catalogue of datasheets, and the generated tables of docs/chips.md and docs/fault-codes.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from chip_tables import TABLES, between, document_of, table

from beringia.chips.datasheets import CATALOGUE, all_datasheets, datasheet, read_datasheet
from beringia.errors import ChipUnavailable

EXPECTED = {
    "h800", "h20", "h100-sxm", "h100-pcie", "h200", "b200", "a100", "l40s", "v100", "mi250x", "mi300x",
    "910b1", "910b2", "910b3", "910b4", "910c", "950pr", "950dt",
}  # fmt: skip


def test_the_catalogue_has_the_parts_and_each_file_is_named_after_its_part() -> None:
    assert {sheet.name for sheet in all_datasheets()} == EXPECTED
    assert all(datasheet(name).name == name for name in EXPECTED)


def test_units_are_turned_into_base_units() -> None:
    sheet = datasheet("910b2")
    assert sheet.peak["bf16"].base == 353.9e12
    assert sheet.memory.capacity is not None and sheet.memory.capacity.base == 64 * 2**30
    assert sheet.memory.bandwidth is not None and sheet.memory.bandwidth.base == 1.6 * 2**40


@pytest.mark.parametrize("sheet", all_datasheets(), ids=lambda sheet: sheet.name)
def test_the_numbers_of_a_part_agree_with_one_another(sheet) -> None:  # type: ignore[no-untyped-def]
    peak = {dtype: quantity.base for dtype, quantity in sheet.peak.items()}
    for narrow, wide in (("fp8", "bf16"), ("int8", "bf16")):
        if narrow in peak and wide in peak:
            assert 1.9 <= peak[narrow] / peak[wide] <= 2.4, f"{narrow} is about twice {wide}"
    if "fp8" in peak:
        assert sheet.supports["fp8"].value
    if sheet.memory.bandwidth is not None and peak:
        # A matrix unit does between 30 and 1,000 operations for each byte that memory delivers.
        assert 30 < max(peak.values()) / sheet.memory.bandwidth.base < 1300
    for quantity in sheet.quantities().values():
        assert quantity.unit.endswith("/s") == (quantity is not sheet.memory.capacity)


def test_two_dies_make_a_910c() -> None:
    whole, die = datasheet("910c"), datasheet("910b2")
    assert whole.peak["bf16"].base == 2 * die.peak["bf16"].base


def test_an_unknown_part_gets_a_suggestion() -> None:
    with pytest.raises(ChipUnavailable, match="Did you mean '910b2'"):
        datasheet("910b22")


def test_a_number_without_source_or_with_an_unknown_mark_is_refused(tmp_path: Path) -> None:
    good = (CATALOGUE / "a100.toml").read_text()
    for old, new in (
        (', source = "NVIDIA A100', ', origin = "NVIDIA A100'),
        ('"documented"', '"guessed"'),
        ("312", '"312"'),
    ):
        path = tmp_path / "a100.toml"
        path.write_text(good.replace(old, new, 1))
        assert path.read_text() != good
        with pytest.raises(ChipUnavailable, match=r"a100\.toml cannot be used"):
            read_datasheet(path)


@pytest.mark.parametrize("name", TABLES)
def test_the_document_s_tables_are_what_the_code_says(name: str) -> None:
    """To renew them: python tests/chip_tables.py."""
    assert between(document_of(name).read_text(), name) == table(name)
