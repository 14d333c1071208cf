"""A run that has done no step: what it was refused for is mended, and the same command begins it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from histories import any_history, finished, started
from hypothesis import given
from small_runs import beringia, of_kind, small_recipe, write_recipe
from test_recipe_identity import BEGUN, base, changed, named

from beringia.data.tokenizer import write_tokenizer
from beringia.errors import RunError
from beringia.history.fold import Fold
from beringia.records.events import AnyEvent, RecipeChanged
from beringia.records.inputs import NO_INPUTS
from beringia.records.recipe import parse_recipe
from beringia.records.recipe_identity import RULES, Rule, changes_between, describe_beginning, refusals
from beringia.records.run_directory import RunDirectory
from beringia.report.history import read_history
from beringia.supervise.run_files import recorded_inputs, recorded_recipe, taking_run

SHAPING = [*RULES[Rule.IDENTITY], "train.steps"]
ANEW = RecipeChanged(changes={}, bitwise=False, anew=True, message="")


@pytest.mark.parametrize("key", SHAPING)
def test_whatever_shapes_its_steps_may_change_and_is_told(key: str) -> None:
    changes = changes_between(base(key), changed(key))
    assert refusals(changes, NO_INPUTS, NO_INPUTS, frozenset(), stepped=False) == []
    told = describe_beginning(changes, NO_INPUTS, NO_INPUTS)
    assert told is not None and told.anew and told.changes == changes
    assert f"{named(key)} was " in told.message and told.message.endswith("and the run begins anew")


@pytest.mark.parametrize("key", [*RULES[Rule.FREE], *RULES[Rule.ROUNDING]])
def test_what_shapes_no_step_begins_nothing_anew(key: str) -> None:
    assert describe_beginning(changes_between(BEGUN, changed(key)), NO_INPUTS, NO_INPUTS) is None


def test_what_its_history_tells_of_its_chips_stays_true() -> None:
    fewer = parse_recipe(small_recipe(chips={"other": {"use": "cpu"}}, train={"prefer": ["other"]}), "test")
    changes = changes_between(BEGUN, fewer)
    (clause,) = refusals(changes, NO_INPUTS, NO_INPUTS, frozenset(), stepped=False)
    assert clause.startswith("train.prefer no longer names first")
    other = changes_between(BEGUN, changed("chips.*.use"))
    assert "label of its own" in refusals(other, NO_INPUTS, NO_INPUTS, frozenset({"first"}), stepped=False)[0]


@given(any_history())
def test_nothing_that_went_wrong_before_decides_what_comes_after(history: list[AnyEvent]) -> None:
    fold = Fold([*history, ANEW, started()])
    assert fold.status == "unfinished" and not fold.finished and fold.message == ""
    assert fold.situation() == Fold([started()]).situation()


def test_what_else_has_changed_is_told_with_it_and_its_name_is_the_new_one(tmp_path: Path) -> None:
    other = parse_recipe(small_recipe(name="other", train={"batch": 8, "keep": 5}), "test")
    told = describe_beginning(changes_between(parse_recipe(small_recipe(), "test"), other), NO_INPUTS, NO_INPUTS)
    assert told is not None and 'name "small" -> "other"; train.keep 3 -> 5; no step had been' in told.message
    history = [started(), ANEW, started().model_copy(update={"name": "other"})]
    (tmp_path / "events.jsonl").write_text("".join(event.model_dump_json() + "\n" for event in history))
    assert read_history(tmp_path).name == "other"


def test_a_run_that_was_given_up_before_its_first_step_is_taken_up() -> None:
    given_up = [started(), finished("given-up")]
    assert Fold(given_up).finished and not Fold([*given_up, ANEW]).finished


def take(directory: Path, document: dict[str, Any]) -> None:
    text = write_recipe(directory, document).read_text()
    with taking_run(parse_recipe(document, "small.toml"), text, RunDirectory(directory / "run")):
        pass


def test_its_steps_and_its_schedule_are_those_of_the_recipe_that_it_begins_with(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for steps, batch in ((60, 4), (80, 8), (40, 8)):
        take(tmp_path, small_recipe(train={"steps": steps, "batch": batch}))
        train = recorded_recipe(run).train
        assert (train.last_step, train.horizon, train.batch) == (steps, steps, batch)
    assert ["steps = 60" in path.read_text() for path in run.earlier_recipes] == [True, False]
    assert [event.anew for event in of_kind(run.root, "recipe")] == [True, True]


def test_in_epochs_its_rows_are_counted_again_when_its_data_have_changed(tmp_path: Path) -> None:
    run, texts = RunDirectory(tmp_path / "run"), tmp_path / "texts"
    texts.mkdir()
    document: dict[str, Any] = small_recipe(train={"epochs": 1.0}) | {
        "data": {"text": str(texts), "tokenizer": "bytes"}
    }
    del document["train"]["steps"]
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    take(tmp_path, document)
    before = recorded_recipe(run).train
    (texts / "more.txt").write_text("Another text, and a long one. " * 200)
    for killed_before_it_was_written_down in (True, False):
        kept = run.resolved_recipe.read_bytes(), run.inputs.read_bytes()
        take(tmp_path, document)
        assert recorded_recipe(run).train.last_step > before.last_step
        assert recorded_recipe(run).train.horizon == recorded_recipe(run).train.last_step
        if killed_before_it_was_written_down:
            run.resolved_recipe.write_bytes(kept[0])
            run.inputs.write_bytes(kept[1])
    told = of_kind(run.root, "recipe")
    assert len(told) == 2 and all("more.txt" in event.message for event in told)
    assert [event.used for event in of_kind(run.root, "fallback")][
        -1
    ] == f"{recorded_recipe(run).train.last_step} steps"
    take(tmp_path, document)
    assert len(of_kind(run.root, "recipe")) == 2, "the same again is no change"


def test_without_its_events_nobody_knows_that_no_step_was_done(tmp_path: Path) -> None:
    take(tmp_path, small_recipe())
    (tmp_path / "run" / "events.jsonl").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"train\.batch was 4 and is 8"):
        take(tmp_path, small_recipe(train={"batch": 8}))


@pytest.mark.slow
def test_a_tokenizer_that_is_mended_as_told_begins_the_run_that_was_refused_for_it(tmp_path: Path) -> None:
    write_tokenizer("bytes", tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "without")
    configuration = json.loads((tmp_path / "without" / "tokenizer_config.json").read_text())
    del configuration["eos_token"]
    (tmp_path / "without" / "tokenizer_config.json").write_text(json.dumps(configuration))
    (tmp_path / "without" / "special_tokens_map.json").unlink()
    (tmp_path / "chats.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": f"{n}"}]})
            + "\n"
            for n in range(40)
        )
    )
    data = {"chat": str(tmp_path / "chats.jsonl"), "tokenizer": str(tmp_path / "without"), "sequence_length": 64}
    recipe = write_recipe(tmp_path, small_recipe(train={"steps": 4}) | {"data": data})
    again = ("train", str(recipe), "--out", str(tmp_path / "run"))
    refused = beringia(*again)
    assert refused.returncode == 2 and "set eos_token" in refused.stderr
    shutil.rmtree(tmp_path / "without")
    (tmp_path / "tokenizer").rename(tmp_path / "without")
    done = beringia(*again)
    assert done.returncode == 0, done.stderr
    (told,) = of_kind(tmp_path / "run", "recipe")
    assert told.anew and "tokenizer_config.json" in told.message and "begins anew" in done.stderr
    assert [event.step for event in of_kind(tmp_path / "run", "step")] == [1, 2, 3, 4]
    assert "data.tokenizer" in recorded_inputs(RunDirectory(tmp_path / "run")).inputs
    other = beringia(*again, "--set", "train.batch=8")
    assert other.returncode == 2 and "train.batch was 4 and is 8" in other.stderr, "now it has steps"


@pytest.mark.slow
def test_a_chip_that_was_qualified_for_another_recipe_is_qualified_again(tmp_path: Path) -> None:
    """Its first starts are refused after that: of one text none can be held out."""
    texts, run = tmp_path / "texts", tmp_path / "run"
    texts.mkdir()
    (texts / "one.txt").write_text("Only one text. " * 20)
    data = {"text": str(texts), "tokenizer": "bytes", "sequence_length": 24}
    document = small_recipe(train={"steps": 4}, qualify={"unqualified": "refuse"}) | {"data": data}
    again = ("campaign", str(write_recipe(tmp_path, document)), "--out", str(run), "--json")
    for number in range(2):
        (texts / "one.txt").write_text(f"The text of start {number}. " * 20)
        refused = beringia(*again, XDG_CONFIG_HOME=str(tmp_path))
        assert refused.returncode == 2 and "none can be held out" in refused.stderr
        assert len(of_kind(run, "qualified")) == 1, "its texts are nothing to what it was qualified for"
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    done = beringia(*again, "--set", "data.sequence_length=32", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(of_kind(run, "qualified")) == 2 and len(list((run / "qualify").glob("*.bundle"))) == 2
    assert [event.step for event in of_kind(run, "step")] == [1, 2, 3, 4]
