"""A run that begins with another run's weights: which, pinned by content, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_runs import beringia, final_hash, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.checkpoint.reader import open_checkpoint
from beringia.cli import main
from beringia.errors import RecipeError, RunError
from beringia.records.files import sha256_of_file
from beringia.records.recipe import ModelSection, parse_recipe
from beringia.supervise.beginning import source_of

SHORT = {"steps": 8, "checkpoint_every": 4}


def on(run: str, step: int | None = None, **sections: Any) -> dict[str, Any]:
    document = small_recipe(train=SHORT, **sections) | {"name": "next", "seed": 5}
    document["model"] = {"run": run} | ({} if step is None else {"step": step})
    return document


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run `first`: checkpoints of steps 4 and 8, the last of them trusted."""
    directory = tmp_path_factory.mktemp("first")
    recipe = write_recipe(directory, small_recipe(train=SHORT, guard={"share": 0.5}) | {"name": "first"})
    assert beringia("train", str(recipe), "--out", str(directory / "first")).returncode == 0
    assert CheckpointDirectory(directory / "first" / "checkpoints").trusted_steps()[-1] == 8
    return directory


@pytest.fixture(scope="module")
def following(first: Path) -> Path:
    """The same directory, in which a run has been trained from that one's weights."""
    write_recipe(first, on("first"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(first)
        done = beringia("train", "next.toml", "--out", "next")
    assert done.returncode == 0, done.stderr
    return first


def copy(directory: Path, tmp_path: Path, *names: str) -> Path:
    for name in names:
        place = directory / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tmp_path / name)
    return tmp_path


def train(name: str, *changes: str) -> Any:
    words = [word for change in changes for word in ("--set", change)]
    return beringia("train", f"{name}.toml", "--out", name, *words)


# Which checkpoint


def mark_trusted(directory: Path, *steps: int) -> None:
    for step in (4, 8):
        mark = directory / "first" / "checkpoints" / f"step-{step:06d}" / "trusted.json"
        if step in steps:
            mark.write_text("{}")
        else:
            mark.unlink(missing_ok=True)


def pinned_step(model: ModelSection) -> str:
    return source_of(model).files[0].name.partition("/")[0]


@pytest.mark.slow
def test_it_is_the_newest_trusted_checkpoint_unless_a_step_is_named(first: Path, tmp_path: Path) -> None:
    run = str(copy(first, tmp_path, "first") / "first")
    mark_trusted(tmp_path, 4, 8)
    assert pinned_step(ModelSection(run=run)) == "step-000008"
    mark_trusted(tmp_path, 4)
    assert pinned_step(ModelSection(run=run)) == "step-000004"
    assert pinned_step(ModelSection(run=run, step=8)) == "step-000008", "trusted or not"
    mark_trusted(tmp_path)
    with pytest.raises(RunError, match=r"has no trusted checkpoint: it has 4, 8\. Name a run that has one"):
        source_of(ModelSection(run=run))
    with pytest.raises(RunError, match=r"has no checkpoint of step 6: it has 4, 8"):
        source_of(ModelSection(run=run, step=6))


@pytest.mark.slow
def test_equal_weights_are_the_same_source_wherever_they_lie(first: Path, tmp_path: Path) -> None:
    copied = copy(first, tmp_path, "first") / "first"
    here, there = (source_of(ModelSection(run=str(run))) for run in (first / "first", copied))
    assert here.content == there.content and here.place != there.place


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"run": "a", "preset": "r2-nano"}, "exactly one of preset, path and run"),
        ({"path": "a", "step": 4}, "step names a checkpoint of run"),
        ({"run": "a", "step": 0}, "model.step"),
        ({}, "exactly one of preset, path and run"),
    ],
)
def test_what_names_no_one_model_is_a_sentence(model: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        parse_recipe(small_recipe() | {"model": model}, "test")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["missing", "no-run", "damaged-manifest"])
def test_a_run_that_is_not_there_or_damaged_is_refused_before_anything_is_made(
    first: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "no-run":
        (tmp_path / "first").mkdir()
    if kind == "damaged-manifest":
        copy(first, tmp_path, "first")
        manifest = tmp_path / "first" / "checkpoints" / "step-000008" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-9])
    write_recipe(tmp_path, on("first"))
    with pytest.raises(SystemExit) as refused:
        main(["train", "next.toml", "--out", "next"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert refused.value.code == 2 and "first" in line and not (tmp_path / "next").exists()


@pytest.mark.slow
def test_a_damaged_weight_is_refused_by_its_file_and_the_same_command_goes_on_when_it_is_mended(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy(first, tmp_path, "first"))
    write_recipe(tmp_path, on("first"))
    (weights, *_) = sorted((tmp_path / "first" / "checkpoints" / "step-000008").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = train("next")
    assert refused.returncode == 2 and weights.name in refused.stderr and "Traceback" not in refused.stderr
    weights.write_bytes(whole)
    done = train("next")
    assert done.returncode == 0, done.stderr


# What it begins with


@pytest.mark.slow
def test_it_begins_with_exactly_those_weights_and_with_no_moments(following: Path) -> None:
    taken = load_file(following / "next" / "model" / "model.safetensors")
    with open_checkpoint(following / "first" / "checkpoints" / "step-000008") as reader:
        same = [name for name in taken if name in reader.tensors]
        assert len(same) > 10 and all(reader.holds(name, taken[name]) for name in same)
    begun = of_kind(following / "next", "resume")[0]
    assert (begun.step, begun.cursor) == (0, 0)
    first_losses, losses = ([event.loss for event in of_kind(following / run, "step")] for run in ("first", "next"))
    assert losses[0] < first_losses[0] - 0.05, "it has learned something already"


@pytest.mark.slow
def test_it_is_the_run_that_its_copy_as_a_path_would_be(
    following: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = on("unused") | {"model": {"path": str(following / "next" / "model")}}
    write_recipe(tmp_path, document)
    assert train("next").returncode == 0
    first, other = ([(e.step, e.loss) for e in of_kind(run, "step")] for run in (following / "next", tmp_path / "next"))
    assert first == other


@pytest.mark.slow
def test_it_goes_on_when_the_other_run_is_gone_or_has_moved_on(
    following: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy(following, tmp_path, "first", "first.toml", "next", "next.toml"))
    assert train("first", "train.steps=12").returncode == 0
    assert train("next", "train.steps=10").returncode == 0
    shutil.rmtree(tmp_path / "first")
    assert train("next", "train.steps=12").returncode == 0
    assert [event.step for event in of_kind(tmp_path / "next", "step")] == list(range(1, 13))
    identities = {event.run_identity for event in of_kind(tmp_path / "next", "run")}
    assert len(identities) == 1, "the pinned checkpoint is what it began with"


@pytest.mark.slow
def test_another_checkpoint_is_another_run_and_the_same_one_elsewhere_is_not(
    following: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy(following, tmp_path, "first", "next", "next.toml"))
    assert train("next", "model.step=8", "train.steps=9").returncode == 0, "the pinned one, named"
    refused = train("next", "model.step=4", "train.steps=10")
    assert refused.returncode == 2 and "model.step was 8 and is 4" in refused.stderr
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train("next", "model.run=moved", "model.step=", "train.steps=10").returncode == 0
    refused = train("next", "model.run=nowhere")
    assert refused.returncode == 2 and 'model.run was "moved" and is "nowhere"' in refused.stderr
    weights = tmp_path / "next" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = train("next", "model.run=moved", "train.steps=11")
    assert refused.returncode == 2 and "model.safetensors" in refused.stderr, "its copy is pinned, too"
    weights.unlink()
    (tmp_path / "next" / "model" / "config.json").unlink()
    shutil.rmtree(tmp_path / "next" / "model")
    again = train("next", "model.run=moved", "train.steps=11")
    assert again.returncode == 0 and weights.read_bytes() == whole, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["inputs.json", "model", "recipe.json"])
def test_a_start_that_is_killed_while_it_takes_the_model_is_made_up_for(
    following: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(following)
    run = following / f"killed-{place}"
    with start("train", "next.toml", "--out", run.name) as process:
        until(lambda: (run / place).exists(), place)
        os.kill(process.pid, signal.SIGKILL)
    done = beringia("train", "next.toml", "--out", run.name)
    assert done.returncode == 0, done.stderr
    assert final_hash(run) == final_hash(following / "next")


@pytest.mark.slow
def test_a_run_from_a_run_is_exported_and_begun_from_in_turn(
    following: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next links of a chain need none of those before."""
    monkeypatch.chdir(copy(following, tmp_path, "next"))
    done = beringia("export", "next", "--to", "exported")
    assert done.returncode == 0, done.stderr
    last = CheckpointDirectory(tmp_path / "next" / "checkpoints").steps()[-1]
    write_recipe(tmp_path, on("next", last) | {"name": "third"})
    done = train("third")
    assert done.returncode == 0, done.stderr
    begun = load_file(tmp_path / "third" / "model" / "model.safetensors")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all((begun[name] == exported[name]).all() for name in begun)


@pytest.mark.slow
def test_a_campaign_qualifies_the_model_that_was_taken(
    following: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy(following, tmp_path, "first"))
    document = on("first", qualify={"unqualified": "refuse"}, serve={"chip": "first", "questions": 4})
    write_recipe(tmp_path, document)
    done = beringia("campaign", "next.toml", "--out", "next", "--json", XDG_CONFIG_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    certificate = json.loads((tmp_path / "next" / "certificates" / "first.json").read_text())["certificate"]
    assert certificate["model"]["configuration"] == sha256_of_file(tmp_path / "next" / "model" / "config.json")
    assert of_kind(tmp_path / "next", "export")[0].step == 8
