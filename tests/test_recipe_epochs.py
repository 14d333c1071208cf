"""A run in epochs: how many steps that is, who says so, and more of them later."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import beringia, final_hash, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.errors import RecipeError
from beringia.records.recipe import Recipe, parse_recipe
from beringia.records.recipe_identity import describe_epochs, in_steps

TEXT = {"text": "texts", "tokenizer": "bytes", "sequence_length": 32}


def in_epochs(epochs: float, data: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    document = small_recipe(train={"epochs": epochs, "checkpoint_every": 4} | train) | {"data": data or TEXT}
    del document["train"]["steps"]
    return document


def parsed(*arguments: Any, **train: Any) -> Recipe:
    return parse_recipe(in_epochs(*arguments, **train), "test")


@given(
    epochs=st.integers(1, 400).map(lambda hundredths: hundredths / 100),
    rows=st.lists(st.integers(1, 10**6), min_size=1, max_size=3),
    batch=st.integers(1, 512),
)
def test_steps_are_as_many_as_it_takes_to_go_through_the_rows(epochs: float, rows: list[int], batch: int) -> None:
    steps = in_steps(parsed(epochs, batch=batch), rows).train.last_step
    hundredths = round(epochs * 100) * sum(rows)  # in whole numbers: what is to be seen, in hundredths of a row
    assert 100 * (steps - 1) * batch < hundredths <= 100 * steps * batch


def test_what_is_said_of_a_mix_names_how_often_each_data_set_is_gone_through() -> None:
    mix = {"mix": [{"text": "a", "weight": 0.75}, {"text": "b", "weight": 0.25}], "tokenizer": "bytes"}
    told = describe_epochs(parsed(2.0, mix, batch=4), (100, 100))
    assert (told.asked, told.used) == ("train.epochs = 2", "100 steps")
    assert (
        told.reason
        == "an epoch is 200 rows, and a step takes 4; by their weights that goes through a 3 times, b 1 times"
    )


def test_steps_and_epochs_exclude_each_other_and_a_task_has_no_epochs() -> None:
    both = in_epochs(1.0)
    both["train"]["steps"] = 5
    neither = in_epochs(1.0)
    del neither["train"]["epochs"]
    for document in (both, neither):
        with pytest.raises(RecipeError, match="'train': give exactly one of steps and epochs"):
            parse_recipe(document, "test")
    for data in ({"task": "digit-sum"}, {"mix": [{"text": "a"}, {"task": "digit-sum"}], "tokenizer": "bytes"}):
        with pytest.raises(RecipeError, match=r"digit-sum goes on without end: give train\.steps"):
            parse_recipe(in_epochs(1.0, data), "test")
    for epochs in (0.0, -1.0, float("inf")):
        with pytest.raises(RecipeError, match=r"train\.epochs|NaN|Infinity|finite"):
            parse_recipe(in_epochs(epochs), "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts and a run of one epoch of them."""
    directory = tmp_path_factory.mktemp("epochs")
    (directory / "texts").mkdir()
    for number in range(12):
        (directory / "texts" / f"{number}.txt").write_text(f"Text number {number}. " * 12)
    write_recipe(directory, in_epochs(1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        done = beringia("train", "small.toml", "--out", "run")
    assert done.returncode == 0, done.stderr
    return directory


def rows_of(directory: Path) -> int:
    (told,) = (event for event in of_kind(directory / "run", "fallback") if event.what == "length")
    return int(told.reason.split()[3])


@pytest.mark.slow
def test_the_start_says_how_many_steps_that_is_and_so_many_are_taken(trained: Path) -> None:
    (told,) = (event for event in of_kind(trained / "run", "fallback") if event.what == "length")
    steps = -(-rows_of(trained) // 4)
    assert (told.asked, told.used) == ("train.epochs = 1", f"{steps} steps") and steps > 10
    assert [event.step for event in of_kind(trained / "run", "step")] == list(range(1, steps + 1))
    assert of_kind(trained / "run", "run")[0].steps == steps
    recorded = json.loads((trained / "run" / "recipe.json").read_text())
    assert recorded["recipe"]["train"]["schedule_steps"] == steps and recorded["rows"] == [rows_of(trained)]


@pytest.mark.slow
def test_it_is_the_run_that_the_same_number_of_steps_would_be(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    steps = -(-rows_of(trained) // 4)
    words = ("--set", "train.epochs=", "--set", f"train.steps={steps}")
    assert beringia("train", "small.toml", "--out", "in-steps", *words).returncode == 0
    assert final_hash(trained / "in-steps") == final_hash(trained / "run")
    identities = [json.loads((trained / run / "recipe.json").read_text())["identity"] for run in ("run", "in-steps")]
    assert identities[0] == identities[1]


@pytest.mark.slow
def test_a_run_that_is_done_goes_on_to_more_epochs_and_never_to_fewer(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    rows = rows_of(trained)
    assert beringia("train", "small.toml", "--out", "longer").returncode == 0
    done = beringia("train", "small.toml", "--out", "longer", "--set", "train.epochs=1.5")
    assert done.returncode == 0, done.stderr
    steps = -(-3 * rows // 8)
    assert [event.step for event in of_kind(trained / "longer", "step")] == list(range(1, steps + 1))
    (changed,) = of_kind(trained / "longer", "recipe")
    assert changed.changes == {"train.steps": (-(-rows // 4), steps)} and changed.bitwise
    assert "as planned and then stays" in changed.message
    refused = beringia("train", "small.toml", "--out", "longer")
    assert refused.returncode == 2 and "train.steps" in refused.stderr and "it may only grow" in refused.stderr
    more = ("--set", "train.epochs=", "--set", f"train.steps={steps + 2}")
    assert beringia("train", "small.toml", "--out", "longer", *more).returncode == 0
    assert of_kind(trained / "longer", "finish")[-1].step == steps + 2


@pytest.mark.slow
def test_a_run_that_was_begun_in_steps_does_not_go_on_in_epochs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    words = ("--set", "train.epochs=", "--set", "train.steps=2")
    assert beringia("train", "small.toml", "--out", "begun-in-steps", *words).returncode == 0
    refused = beringia("train", "small.toml", "--out", "begun-in-steps")
    assert refused.returncode == 2 and "was begun with train.steps = 2" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inputs.json", "data", "recipe.json", "events.jsonl"])
def test_a_start_that_is_killed_while_it_counts_is_made_up_for(
    trained: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of the files that a start leaves, in their order."""
    monkeypatch.chdir(trained)
    run = trained / f"killed-{place}"
    with start("train", "small.toml", "--out", run.name) as process:
        until(lambda: (run / place).exists(), place)
        os.kill(process.pid, signal.SIGKILL)
    done = beringia("train", "small.toml", "--out", run.name)
    assert done.returncode == 0, done.stderr
    assert final_hash(run) == final_hash(trained / "run")
    assert len([event for event in of_kind(run, "fallback") if event.what == "length"]) == 1


@pytest.mark.slow
def test_data_that_cannot_be_used_is_one_sentence_before_anything_trains(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("{broken\n")
    recipe = write_recipe(tmp_path, in_epochs(1.0, TEXT | {"text": str(tmp_path / "texts")}))
    refused = beringia("train", str(recipe), "--out", str(tmp_path / "run"))
    assert refused.returncode == 2 and "a.jsonl, line 1: is not JSON" in refused.stderr.strip().splitlines()[-1]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(9)))
    assert beringia("train", str(recipe), "--out", str(tmp_path / "run")).returncode == 0
