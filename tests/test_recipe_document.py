"""docs/recipe.md says what the recipe's models say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from beringia.recipes import shipped
from beringia.records.recipe import Recipe
from beringia.records.recipe_document import document, sections
from beringia.records.record import Record

DOCUMENT = Path(__file__).parents[1] / "docs" / "recipe.md"


def test_the_document_is_up_to_date() -> None:
    advice = "run: python -m beringia.records.recipe_document > docs/recipe.md"
    assert DOCUMENT.read_text() == document(), advice


@pytest.mark.parametrize("path", shipped().values(), ids=lambda path: path.stem)
def test_every_key_of_every_recipe_that_ships_stands_in_its_section(path: Path) -> None:
    parts = dict(part.split("\n", 1) for part in document().split("\n## ")[1:])
    for section, keys in tomllib.loads(path.read_text()).items():
        if not isinstance(keys, dict):
            assert f"| `{section}` |" in parts["At the top"]
            continue
        told = parts["`[chips.<label>]`" if section == "chips" else f"`[{section}]`"]
        for key in {key for label in keys.values() for key in label} if section == "chips" else keys:
            assert f"| `{key}` |" in told, f"{section}.{key}"


def test_sections_within_sections_and_lists_of_them_are_found() -> None:
    class Source(Record):
        weight: float = 1.0

    class Data(Record):
        mix: tuple[Source, ...] = ()
        best: Source | None = None

    class Whole(Record):
        data: Data
        chips: dict[str, Source]

    found = {section.heading: section.prefix for section in sections(Whole)}
    assert found == {
        "": "",
        "data": "data.",
        "[data.mix]": "data.mix.",
        "data.best": "data.best.",
        "chips.<label>": "chips.*.",
    }
    assert {section.heading for section in sections()} >= {*Recipe.model_fields} - {"name", "seed", "chips"}
