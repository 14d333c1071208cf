"""The same command with another recipe: what a run goes on with, what it refuses, and runs that older code began."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from small_runs import beringia, events, final_hash, of_kind

from beringia.checkpoint.directory import digest_line
from beringia.errors import RunError
from beringia.records.events import StepDone
from beringia.records.recipe import read_recipe
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory
from beringia.supervise.run_files import examine_run, taking_run

STORED = Path(__file__).parent / "data" / "runs_before_identities.tar.xz"
"""What the commit before runs had identities left behind, on a model of two layers: `stopped` by SIGTERM at step 10 of
60 on the CPU, `given-up` at step 42 of 60 on an emulated chip that raises from step 43 on; and in `went-on.json` the
hash that `stopped` came to when that commit went on with it, with the identity of the chip there."""


def unpack(directory: Path) -> None:
    with tarfile.open(STORED) as archive:
        # A filter came with Python 3.11.4, and Debian 12 has 3.11.2.
        archive.extractall(directory, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stored runs, in the directory that their recipes' paths start from."""
    unpack(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def went_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which the stopped run has gone on to its end, with the recipe as it was."""
    directory = tmp_path_factory.mktemp("stored")
    unpack(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert train("stopped").returncode == 0
    return directory


def train(name: str, *changes: str) -> subprocess.CompletedProcess[str]:
    """`beringia train` for a stored run, with changes of its recipe."""
    sets = [word for change in changes for word in ("--set", change)]
    return beringia("train", f"{name}.toml", "--out", name, *sets)


def files(run: Path) -> dict[str, str]:
    """Every file of a run directory with the hash of its content."""
    found = (path for path in sorted(run.rglob("*")) if path.is_file())
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def manifest(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"checkpoints/step-{step:06d}/manifest.json").read_text())
    return found


def steps_of(run: Path) -> list[StepDone]:
    return of_kind(run, "step")


def test_a_run_that_the_commit_before_began_goes_on_and_loses_no_step(went_on: Path) -> None:
    run, before = went_on / "stopped", RunDirectory(went_on / "stopped")
    resumed = of_kind(run, "resume")[-1]
    assert resumed.step == 10 and resumed.state_hash == manifest_in_archive("stopped", 10)["state_hash"]
    assert [event.step for event in steps_of(run)] == list(range(1, 61))
    assert sum(event.lost_steps for event in of_kind(run, "decision")) == 0 and of_kind(run, "recipe") == []
    assert json.loads(before.resolved_recipe.read_text())["recipe"]["train"]["schedule_steps"] == 60
    assert of_kind(run, "run")[-1].run_identity == json.loads(before.resolved_recipe.read_text())["identity"]["hash"]


def test_it_comes_to_the_state_that_the_commit_before_came_to(went_on: Path) -> None:
    then = json.loads((went_on / "went-on.json").read_text())
    identities = {event.identity_hash for event in of_kind(went_on / "stopped", "chip")}
    if identities != {then["chip_identity"]}:
        pytest.skip("this CPU is another chip than the one that the stored run was begun on")
    assert final_hash(went_on / "stopped") == then["state_hash"]


def manifest_in_archive(run: str, step: int) -> dict[str, Any]:
    with tarfile.open(STORED) as archive:
        file = archive.extractfile(f"./{run}/checkpoints/step-{step:06d}/manifest.json")
        assert file is not None
        found: dict[str, Any] = json.load(file)
    return found


def test_what_shapes_no_step_may_change_in_mid_run_and_the_run_stays_bitwise_the_same(
    here: Path, went_on: Path
) -> None:
    done = train(
        "stopped",
        'name="renamed"',
        "train.keep=3",
        "train.checkpoint_every=25",
        "train.evaluate_every=20",
        "guard.share=0.1",
        "supervise.hang_seconds=99.0",
        'chips.first.launch=["env"]',
    )
    assert done.returncode == 0, done.stderr
    (told,) = of_kind(here / "stopped", "recipe")
    assert told.bitwise and told.changes == {
        "name": ("stopped", "renamed"),
        "chips.first.launch": ([], ["env"]),
        "train.keep": (2, 3),
        "train.checkpoint_every": (4, 25),
        "train.evaluate_every": (1000, 20),
        "guard.share": (0.5, 0.1),
        "supervise.hang_seconds": (120.0, 99.0),
    }
    assert of_kind(here / "stopped", "resume")[-1].step == 10, "a checkpoint under the old recipe's hash is its own"
    assert final_hash(here / "stopped") == final_hash(went_on / "stopped")


@pytest.mark.slow
def test_other_ranks_go_on_from_exactly_the_same_state_and_say_that_the_rest_is_not_bitwise(here: Path) -> None:
    done = train("stopped", "chips.first.ranks=2", "train.accumulate=2")
    assert done.returncode == 0, done.stderr
    (told,) = of_kind(here / "stopped", "recipe")
    assert not told.bitwise and "bitwise another run" in told.message and "chips.first.ranks" in told.message
    resumed = of_kind(here / "stopped", "resume")[-1]
    assert resumed.state_hash == manifest_in_archive("stopped", 10)["state_hash"]
    assert [event.step for event in steps_of(here / "stopped")] == list(range(1, 61))


FORBIDDEN = {
    "train.steps": "train.steps=59",
    "seed": "seed=4",
    "train.learning_rate": "train.learning_rate=1e-3",
    "train.batch": "train.batch=8",
    "train.schedule_steps": "train.schedule_steps=80",
    "data.digits": "data.digits=5",
    "data.tokenizer": 'data.tokenizer="bytes"',
    "train.prefer": 'train.prefer=["second"]',
    "chips.first.use": 'chips.first.use="auto"',
}


@pytest.mark.parametrize("key", FORBIDDEN)
def test_what_would_make_it_another_run_is_one_sentence_and_touches_nothing(here: Path, key: str) -> None:
    before = files(here / "stopped")
    refused = train("stopped", FORBIDDEN[key])
    assert refused.returncode == 2 and files(here / "stopped") == before
    (line,) = refused.stderr.strip().splitlines()
    assert f"another recipe: {key} " in line, line


def test_of_a_model_that_has_changed_the_file_is_named_and_one_that_has_moved_is_the_same(
    here: Path, went_on: Path
) -> None:
    shutil.copytree(went_on / "stopped", here / "done")
    shutil.copy(here / "stopped.toml", here / "done.toml")
    (here / "model").rename(here / "moved")
    assert train("done", 'model.path="moved"').returncode == 0
    assert of_kind(here / "done", "recipe")[0].changes == {"model.path": ("model", "moved")}
    weights = here / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    before = files(here / "done")
    refused = train("done", 'model.path="moved"')
    assert refused.returncode == 2 and "model.path" in refused.stderr and weights.name in refused.stderr
    assert files(here / "done") == before


@pytest.mark.slow
def test_a_run_that_is_done_goes_on_to_more_steps_as_if_they_had_been_asked_for_before(
    here: Path, went_on: Path
) -> None:
    shutil.copytree(went_on / "stopped", here / "done")
    shutil.copy(here / "stopped.toml", here / "done.toml")
    assert train("done", "train.steps=66").returncode == 0
    assert train("stopped", "train.steps=66").returncode == 0
    assert final_hash(here / "done") == final_hash(here / "stopped")
    (told,) = of_kind(here / "done", "recipe")
    assert told.bitwise and "until step 60 as planned and then stays at 0.0001" in told.message
    rates = {event.step: event.learning_rate for event in steps_of(here / "stopped")}
    assert rates | {event.step: event.learning_rate for event in steps_of(went_on / "stopped")} == rates
    assert [rates[step] for step in range(60, 67)] == pytest.approx([1e-4] * 7)
    finished = of_kind(here / "done", "finish")[-1]
    assert (finished.status, finished.step) == ("done", 66)


@pytest.mark.slow
def test_a_run_that_was_given_up_goes_on_when_it_is_given_another_chip(here: Path) -> None:
    count = len(events(here / "given-up"))
    again = train("given-up", "train.keep=3")
    assert len(events(here / "given-up")) == count + 1, "told, and still given up"
    assert json.loads(beringia("train", "given-up.toml", "--out", "given-up", "--json").stdout)["status"] == "given-up"
    done = train("given-up", 'train.prefer=["first", "second"]')
    assert done.returncode == 0, done.stderr + again.stderr
    decision, crossing = of_kind(here / "given-up", "decision")[-1], of_kind(here / "given-up", "crossing")[-1]
    assert (decision.action, decision.to_chip, decision.to_step) == ("cross", "second", 20)
    trusted = manifest_in_archive("given-up", 20)["state_hash"]
    assert crossing.state_hash_before == crossing.state_hash_after == trusted
    assert of_kind(here / "given-up", "finish")[-1].status == "done"


def take(text: str, *, name: str = "stopped", **overrides: Any) -> None:
    """Take the run directory, and let it go, with this text as the recipe."""
    Path("given.toml").write_text(text)
    recipe = read_recipe(Path("given.toml"), {key.replace("__", "."): value for key, value in overrides.items()})
    with taking_run(recipe, text, RunDirectory(Path(name))):
        pass


def test_the_recipe_that_another_one_replaces_is_kept(here: Path) -> None:
    text = Path("stopped.toml").read_text()
    run = RunDirectory(here / "stopped")
    take(f"# only a comment\n{text}")
    assert run.recipe.read_text() == text and run.earlier_recipes == [] and of_kind(run.root, "recipe") == []
    second, third = text.replace("keep = 2", "keep = 3"), text.replace("keep = 2", "keep = 4")
    take(second)
    take(third)
    assert [path.read_text() for path in run.earlier_recipes] == [text, second] and run.recipe.read_text() == third
    assert [event.changes["train.keep"] for event in of_kind(run.root, "recipe")] == [(2, 3), (3, 4)]


def test_what_is_refused_leaves_even_lock_and_epoch_as_they_were(here: Path) -> None:
    before = files(here / "stopped")
    with pytest.raises(RunError, match=r"train\.batch was 16 and is 8"):
        take(Path("stopped.toml").read_text(), train__batch=8)
    assert files(here / "stopped") == before


def test_a_change_is_never_untold_if_the_supervisor_is_killed_while_it_writes_it_down(here: Path) -> None:
    run = RunDirectory(here / "stopped")
    take(Path("stopped.toml").read_text())
    before = run.resolved_recipe.read_bytes()
    take(Path("stopped.toml").read_text(), train__steps=80)
    run.resolved_recipe.write_bytes(before)  # what a kill just after the event leaves
    take(Path("stopped.toml").read_text(), train__steps=80)
    assert [event.changes["train.steps"] for event in of_kind(run.root, "recipe")] == [(60, 80)] * 2
    recorded = json.loads(run.resolved_recipe.read_text())["recipe"]["train"]
    assert (recorded["steps"], recorded["schedule_steps"]) == (80, 60)


def test_a_recipe_on_disk_that_cannot_be_read_is_said_to_be_so(here: Path) -> None:
    run = RunDirectory(here / "stopped")
    for content in ("{", '{"recipe": {"name": 3}}', "[]"):
        run.resolved_recipe.write_text(content)
        with pytest.raises(RunError, match=r"recipe\.json is not a recipe that this version of Beringia knows"):
            examine_run(read_recipe(Path("stopped.toml")), run)


@pytest.mark.slow
def test_a_relative_path_means_what_it_meant_where_the_run_was_begun(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another directory, where there is nothing at that path, the run goes on; where something else is, it is
    refused by name."""
    assert train("stopped").returncode == 0
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    again = ("train", str(here / "stopped.toml"), "--out", str(here / "stopped"))
    done = beringia(*again, "--set", "train.steps=64")
    assert done.returncode == 0, done.stderr
    shutil.copytree(here / "model", elsewhere / "model")
    config = elsewhere / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    refused = beringia(*again, "--set", "train.steps=68")
    assert refused.returncode == 2 and "model.path" in refused.stderr and "config.json" in refused.stderr


@pytest.mark.slow
def test_the_state_that_is_loaded_is_the_one_that_the_events_tell_of(here: Path) -> None:
    """Another state in a checkpoint's place, with a manifest that fits it, is rejected; the run goes back further."""
    assert train("stopped").returncode == 0
    run = here / "stopped"
    newest = max((run / "checkpoints").glob("step-*"))
    document = json.loads((newest / "manifest.json").read_text())
    document["state_hash"] = "0" * 64
    content = canonical_json(document)
    (newest / "manifest.json").write_bytes(content)
    (newest / "manifest.json.sha256").write_bytes(digest_line(content))
    assert train("stopped", "train.steps=64").returncode == 0
    (rejected,) = of_kind(run, "rejected")
    assert "the run's events say" in rejected.message and list((run / "set-aside").glob(f"{newest.name}-*"))


@pytest.mark.slow
def test_data_that_is_read_in_another_way_costs_no_checkpoint(here: Path) -> None:
    """What is due next is part of a checkpoint. Where it is not what comes, no other checkpoint would help."""
    assert train("stopped").returncode == 0
    run = here / "stopped"
    newest = max((run / "checkpoints").glob("step-*"))
    document = json.loads((newest / "manifest.json").read_text())
    document["progress"]["data"] = "read by another version"
    content = canonical_json(document)
    (newest / "manifest.json").write_bytes(content)
    (newest / "manifest.json.sha256").write_bytes(digest_line(content))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    refused = train("stopped", "train.steps=64")
    assert refused.returncode == 2 and "its data is not what it was" in refused.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    assert of_kind(run, "rejected") == []
