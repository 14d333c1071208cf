"""`--set` on the command line: values changed and unset, in tables and lists, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import beringia, small_recipe, write_recipe
from test_recipe_identity import fields

from beringia.cli import _change
from beringia.errors import RecipeError
from beringia.records.recipe import Recipe, parse_recipe, read_recipe

TEXT = """
name = "small"
[model]
path = "a/model"
[chips.first]
use = "cpu"
faults = "some"
[chips.second]
use = "cuda"
[data]
text = "texts"
[train]
prefer = ["first"]
steps = 60
clip = 2.0
"""
MIX = TEXT.replace('text = "texts"', '[[data.mix]]\ntext = "a"\n[[data.mix]]\ntext = "b"\nweight = 2')


def read(tmp_path: Path, *changes: str, text: str = TEXT) -> Recipe:
    (tmp_path / "recipe.toml").write_text(text)
    return read_recipe(tmp_path / "recipe.toml", dict(map(_change, changes)))


def test_from_text_to_a_task_and_from_a_directory_to_a_preset(tmp_path: Path) -> None:
    recipe = read(tmp_path, "data.text=", "data.task=digit-sum", "model.preset=r2-nano", "model.path=")
    assert (recipe.data.text, recipe.data.task) == (None, "digit-sum")
    assert (recipe.model.path, recipe.model.preset) == (None, "r2-nano")


def test_what_is_unset_has_its_default(tmp_path: Path) -> None:
    recipe = read(tmp_path, "train.clip=", "chips.first.faults=", "seed= ")
    assert (recipe.train.clip, recipe.chips["first"].faults, recipe.seed) == (1.0, None, 0)
    assert read(tmp_path, "chips.second=").chips.keys() == {"first"}, "a whole chip"
    assert read(tmp_path, "serve=", "guard.share=") == read(tmp_path), "what did not stand there"


def test_an_empty_word_that_is_quoted_is_a_value(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'name'"):
        read(tmp_path, 'name=""')
    assert read(tmp_path, 'data.tokenizer=""').data.tokenizer == ""


REQUIRED = [
    "name",
    "model",
    "chips",
    "data",
    "train",
    "train.prefer",
    "chips.first.use",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_what_a_recipe_must_have_cannot_be_unset(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=f"--set {key}=: {key} cannot be unset, for a recipe must have it"):
        read(tmp_path, f"{key}=")


@pytest.mark.parametrize("key", [key for key in fields() if "*" not in key])
def test_every_key_can_be_unset_or_is_one_that_a_recipe_must_have(tmp_path: Path, key: str) -> None:
    try:
        read(tmp_path, f"{key}=")
    except RecipeError as error:
        needed = ("cannot be unset", "give exactly one of", "'train': give")
        assert any(words in str(error) for words in needed), str(error)
        assert key in {*REQUIRED, "model.path", "data.text", "train.steps"}


def test_a_key_that_no_recipe_has_is_not_unset_in_silence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--set data.txt=: unknown key 'data.txt'. Did you mean 'text'"):
        read(tmp_path, "data.txt=")
    with pytest.raises(RecipeError, match="unknown key 'nothing.here'"):
        read(tmp_path, "nothing.here=")


def test_entries_of_a_list_are_changed_by_number_and_the_list_is_unset_as_a_whole(tmp_path: Path) -> None:
    recipe = read(tmp_path, "data.mix.0.weight=3", "data.mix.1.text=", "data.mix.1.chat=c", text=MIX)
    assert [(one.text, one.chat, one.weight) for one in recipe.data.mix] == [("a", None, 3.0), (None, "c", 2.0)]
    assert read(tmp_path, "data.mix=", "data.text=d", text=MIX).data.text == "d"
    with pytest.raises(RecipeError, match="no single entry can be unset"):
        read(tmp_path, "data.mix.1=", text=MIX)
    with pytest.raises(RecipeError, match="there are 2 of these, numbered from 0; 2 is none"):
        read(tmp_path, "data.mix.2.weight=1", text=MIX)


def test_what_is_below_a_value_can_be_neither_set_nor_unset(tmp_path: Path) -> None:
    for change in ("data.text.x=1", "train.clip.x=1"):
        with pytest.raises(RecipeError, match="is a value, not a table"):
            read(tmp_path, change)
    with pytest.raises(RecipeError):
        read(tmp_path, "data.text.x=")


def test_on_the_command_line_one_line_says_what_cannot_be_unset(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small_recipe())
    refused = beringia("train", str(recipe), "--out", str(tmp_path / "run"), "--set", "train.prefer=")
    (line,) = refused.stderr.strip().splitlines()
    assert refused.returncode == 2 and "train.prefer cannot be unset" in line and not (tmp_path / "run").exists()


def test_a_document_without_changes_is_as_it_was(tmp_path: Path) -> None:
    document: dict[str, Any] = small_recipe()
    path = write_recipe(tmp_path, document)
    assert read_recipe(path) == parse_recipe(document, "test")
