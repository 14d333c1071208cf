"""TOML files as editors write them: recipes and fault scripts alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import small_recipe, write_recipe

from beringia.chips.emulated.fault_script import FaultScript, read_script
from beringia.errors import ChipUnavailable, RecipeError
from beringia.records.recipe import Recipe, read_recipe

SCRIPT = 'summary = "hangs"\n[[faults]]\nkind = "hang"\nat_step = 5\n'


def script(path: Path, content: bytes) -> FaultScript:
    path.write_bytes(content)
    return read_script(str(path))


def recipe(path: Path, content: bytes) -> Recipe:
    path.write_bytes(content)
    return read_recipe(path)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    text = write_recipe(tmp_path, small_recipe()).read_text()
    for changed in (text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode()):
        assert recipe(tmp_path / "recipe.toml", changed) == recipe(tmp_path / "plain.toml", text.encode())
    for changed in (SCRIPT.encode("utf-8-sig"), SCRIPT.replace("\n", "\r\n").encode()):
        assert script(tmp_path / "script.toml", changed) == script(tmp_path / "plain.toml", SCRIPT.encode())


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_in_one_sentence(encoding: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.toml is not valid TOML: 'utf-8' codec"):
        recipe(tmp_path / "recipe.toml", 'name = "Überfall"'.encode(encoding))
    with pytest.raises(ChipUnavailable, match=r"script\.toml is not valid TOML: 'utf-8' codec"):
        script(tmp_path / "script.toml", 'summary = "Überfall"'.encode(encoding))


def test_a_date_where_a_script_has_a_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChipUnavailable, match=r"at_step.*2026-01-02"):
        script(tmp_path / "script.toml", SCRIPT.replace("5", "2026-01-02").encode())
