"""What makes a run this run: which keys, by which content, and that a new key orphans nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from small_runs import small_recipe

from beringia.records import recipe_identity
from beringia.records.inputs import NO_INPUTS, look_at_inputs, placed
from beringia.records.recipe import DataSection, Recipe, TrainSection, parse_recipe
from beringia.records.recipe_identity import (
    HORIZON,
    RULES,
    Rule,
    changes_between,
    describe_change,
    keys_of,
    refusals,
    rule_of,
    run_identity,
    settle,
)

BEGUN = parse_recipe(small_recipe(chips={"first": {"use": "cpu"}, "a.b": {"use": "cpu"}}), "test")
MIXED = parse_recipe(
    small_recipe() | {"data": {"mix": [{"task": "digit-sum"}, {"text": "texts", "weight": 2.0}], "tokenizer": "bytes"}},
    "test",
)


def fields(model: type[BaseModel] = Recipe, above: str = "") -> Iterator[str]:
    """Every key that a recipe can have; a chip's label is `*`."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if section is None:
            yield above + name
        else:
            yield from fields(section, f"{above}{name}.{'*.' if name in ('chips', 'mix') else ''}")


OTHERS: dict[str, Any] = {
    "chips.*.launcher": "torchrun",
    "name": "other",
    "model.preset": "r2-micro",
    "data.task": "digit-sort",
    "data.mix.*.task": "digit-sort",
    "train.compute": "bfloat16",
    "train.schedule": "cosine",
    "chips.*.use": "cuda",
    "chips.*.python": "python4",
    "chips.*.launch": ["env"],
    "chips.*.root": "/there",
    "qualify.unqualified": "refuse",
    "qualify.on_refusal": "try",
    "qualify.trusted_keys": ["ab" * 32],
    "serve.chip": "first",
}
"""Another value of each key that is not a number."""


def another(key: str, value: Any, number: int) -> Any:
    """A value that this key does not have."""
    if key in OTHERS:
        return OTHERS[key]
    if key == HORIZON:
        return BEGUN.train.horizon + number
    if isinstance(value, list):
        return [another(key, one, number) for one in value]
    return not value if isinstance(value, bool) else value + number if isinstance(value, int) else value / (1 + number)


def base(key: str) -> Recipe:
    return MIXED if key.startswith("data.mix.") else BEGUN


def named(key: str) -> str:
    """The key as the recipe that is changed has it."""
    return key.replace("*", "0" if key.startswith("data.mix.") else "first")


def changed(key: str, number: int = 1) -> Recipe:
    """The recipe with another value at one key."""
    document = place = base(key).model_dump(mode="json")
    *above, last = named(key).split(".")
    for part in above:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = another(key, place[last], number)
    return parse_recipe(document, "test")


def hash_of(recipe: Recipe) -> str:
    return run_identity(recipe, NO_INPUTS).hash


def refused(before: Recipe, now: Recipe, opened: frozenset[str] = frozenset()) -> list[str]:
    return refusals(changes_between(before, now), NO_INPUTS, NO_INPUTS, opened)


def test_every_key_of_the_recipe_has_exactly_one_rule() -> None:
    ruled = [key for keys in RULES.values() for key in keys]
    assert sorted(ruled) == sorted(fields())


def test_every_key_of_a_recipe_finds_its_rule_whatever_its_chips_are_called() -> None:
    assert rule_of("chips.a.b.ranks") is Rule.ROUNDING and rule_of("chips.a.b.use") is Rule.OPENED
    assert all(isinstance(rule_of(key), Rule) for key in keys_of(BEGUN))


@pytest.mark.parametrize("key", RULES[Rule.IDENTITY])
@given(number=st.integers(1, 50))
def test_another_number_that_shapes_a_step_is_another_run(key: str, number: int) -> None:
    other = changed(key, number)
    assert hash_of(other) != hash_of(base(key))
    assert [clause.split()[0] for clause in refused(base(key), other)] == [named(key)]


@pytest.mark.parametrize("key", [*RULES[Rule.FREE], *RULES[Rule.ROUNDING]])
def test_what_shapes_no_step_may_change_and_its_event_says_whether_that_is_bitwise_the_same(key: str) -> None:
    other = changed(key)
    changes = changes_between(BEGUN, other)
    assert list(changes) == [key.replace("*", "first")]
    assert hash_of(other) == hash_of(BEGUN) and refused(BEGUN, other, frozenset({"first"})) == []
    event = describe_change(changes, other, frozenset(BEGUN.chips))
    assert event is not None and event.bitwise == (rule_of(key) is Rule.FREE)
    assert ("bitwise another run" in event.message) != event.bitwise and next(iter(changes)) in event.message


def test_a_new_key_with_a_default_changes_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    class GrownTrain(TrainSection):
        z_loss: float = 0.0

    class GrownRecipe(Recipe):
        train: GrownTrain

    monkeypatch.setitem(
        recipe_identity.RULES, Rule.IDENTITY, (*RULES[Rule.IDENTITY][:5], "train.z_loss", *RULES[Rule.IDENTITY][5:])
    )
    document = BEGUN.model_dump(mode="json")
    assert hash_of(GrownRecipe.model_validate_json(json.dumps(document))) == hash_of(BEGUN)
    document["train"]["z_loss"] = 1e-4
    assert hash_of(GrownRecipe.model_validate_json(json.dumps(document))) != hash_of(BEGUN)


def test_the_identity_of_a_known_recipe_never_changes() -> None:
    known = "8b0696cc65c16833830598a340df01a5f2f377d8b087f44216634e13eb3b48af"
    assert hash_of(BEGUN) == known, "a default or a key's place has changed: put it back, or raise IDENTITY_SCHEMA"


def test_a_default_that_is_written_out_is_no_other_run() -> None:
    written = parse_recipe(small_recipe(train={"clip": 1.0, "betas": [0.9, 0.98]}, data={"long_fraction": 0.2}), "test")
    assert hash_of(written) == hash_of(BEGUN)


@given(steps=st.integers(1, 200))
def test_a_run_may_become_longer_and_never_shorter_and_its_schedule_stays(steps: int) -> None:
    before = settle(BEGUN, BEGUN.train.horizon)
    asked = BEGUN.model_copy(update={"train": BEGUN.train.model_copy(update={"steps": steps})})
    now = settle(asked, before.train.horizon)
    assert hash_of(now) == hash_of(before) == hash_of(BEGUN)
    assert [clause.split()[0] for clause in refused(before, now)] == (["train.steps"] if steps < 60 else [])
    if steps > 60:
        event = describe_change(changes_between(before, now), now, frozenset())
        assert (
            event is not None and event.bitwise and "until step 60 as planned and then stays at 0.0001" in event.message
        )


def test_chips_may_be_added_to_those_preferred_and_none_taken_out() -> None:
    more = parse_recipe(
        small_recipe(
            chips={"first": {"use": "cpu"}, "a.b": {"use": "cpu"}, "new": {"use": "cuda", "ranks": 2}},
            train={"prefer": ["new", "first"]},
        ),
        "test",
    )
    assert refused(BEGUN, more, frozenset({"first"})) == []
    event = describe_change(changes_between(BEGUN, more), more, frozenset(BEGUN.chips))
    assert event is not None and event.bitwise, "its ranks are those of another chip"
    assert event.changes["chips.new.use"] == (None, "cuda")
    assert refused(more, BEGUN) == ["train.prefer no longer names new (chips may be added, none taken out)"]


def test_what_a_label_stands_for_may_be_mended_until_that_chip_has_worked() -> None:
    other = changed("chips.*.use")
    assert refused(BEGUN, other) == []
    assert "label of its own" in refused(BEGUN, other, frozenset({"first"}))[0]


def text_recipe(folder: Path) -> Recipe:
    data = DataSection(text=str(folder), tokenizer="bytes")
    return BEGUN.model_copy(update={"data": data})


def test_data_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "a.txt").write_text("one")
        (tmp_path / place / "b.txt").write_text("two")
    (tmp_path / "there" / ".hidden").write_text("not read")
    here, there = (text_recipe(tmp_path / place) for place in ("here", "there"))
    first = look_at_inputs(here)
    assert run_identity(here, first) == run_identity(there, look_at_inputs(there))
    assert refusals(changes_between(here, there), first, look_at_inputs(there, first), frozenset()) == []
    (tmp_path / "here" / "deep" / "a.txt").write_text("once")
    now = look_at_inputs(here, first)
    assert run_identity(here, now) != run_identity(here, first)
    (clause,) = refusals({}, first, now, frozenset())
    assert clause.startswith("what lies at data.text") and "deep/a.txt" in clause


def mixed_recipe(*sources: dict[str, Any]) -> Recipe:
    return parse_recipe(small_recipe() | {"data": {"mix": list(sources), "tokenizer": "bytes"}}, "test")


def test_each_data_set_of_a_mix_is_known_by_its_content_and_its_place_in_the_list(tmp_path: Path) -> None:
    for place in ("a", "b", "elsewhere"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text("b" if place == "elsewhere" else place)
    one, two, moved = ({"text": str(tmp_path / place)} for place in ("a", "b", "elsewhere"))
    recipe, there = mixed_recipe(one, two), mixed_recipe(one, moved)
    first = look_at_inputs(recipe)
    assert run_identity(recipe, first) == run_identity(there, look_at_inputs(there))
    assert refusals(changes_between(recipe, there), first, look_at_inputs(there, first), frozenset()) == []
    turned = mixed_recipe(two, one)
    (clause, other) = refusals(changes_between(recipe, turned), first, look_at_inputs(turned, first), frozenset())
    assert clause.startswith("data.mix.0.text was ") and other.startswith("data.mix.1.text was ")


@pytest.mark.parametrize("turned", [False, True])
def test_another_data_set_in_a_mix_is_another_run(turned: bool) -> None:
    more = MIXED.model_dump(mode="json")
    more["data"]["mix"].append({"chat": "chats.jsonl"})
    before, now = (MIXED, parse_recipe(more, "test"))[:: -1 if turned else 1]
    assert hash_of(before) != hash_of(now)
    clauses = refused(before, now)
    assert [clause.split()[0] for clause in clauses] == ["data.mix.2.chat", "data.mix.2.weight"]
    assert "not given" in clauses[0]


def test_paths_of_a_mix_are_made_whole_like_those_of_a_single_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    single = MIXED.model_copy(update={"data": DataSection(text="texts", tokenizer="bytes")})
    assert placed(single, look_at_inputs(single)).data.text == str(tmp_path / "texts")
    whole = placed(MIXED, look_at_inputs(MIXED)).data.mix
    assert [one.text for one in whole] == [None, str(tmp_path / "texts")] and [one.weight for one in whole] == [1, 2]


def test_a_tokenizer_by_another_name_is_another_run() -> None:
    one, other = (BEGUN.model_copy(update={"data": DataSection(task="digit-sum", tokenizer=t)}) for t in ("a", "b"))
    before, now = look_at_inputs(one), look_at_inputs(other)
    assert run_identity(one, before) != run_identity(other, now)
    assert refusals(changes_between(one, other), before, now, frozenset()) == ['data.tokenizer was "a" and is "b"']


def test_of_a_model_only_the_files_count_that_are_read_of_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("about")
    recipe = BEGUN.model_copy(update={"model": BEGUN.model.model_copy(update={"preset": None, "path": str(tmp_path)})})
    before = look_at_inputs(recipe)
    (tmp_path / "README.md").write_text("about it")
    assert look_at_inputs(recipe, before) == before and [file.name for file in before.inputs["model.path"].files] == [
        "config.json"
    ]


def test_a_file_is_read_again_only_where_its_size_or_time_is_another(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    recipe = text_recipe(tmp_path)
    before, when = look_at_inputs(recipe), file.stat().st_mtime_ns
    file.write_text("two")
    os.utime(file, ns=(when, when))
    assert look_at_inputs(recipe, before) == before, "of the same size and time: not read"
    os.utime(file, ns=(when, when + 1))
    assert look_at_inputs(recipe, before).content("data.text") != before.content("data.text")


def test_what_cannot_be_seen_any_more_where_it_was_counts_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    before = look_at_inputs(text_recipe(folder))
    folder.rename(tmp_path / "gone")
    assert look_at_inputs(text_recipe(folder), before) == before
