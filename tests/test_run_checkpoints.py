"""Checkpoints on disk and what the events say of them: nothing that was trained, and nothing of anybody else's, is
thrown away."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import play, situation_of
from small_runs import beringia, events, final_hash, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import RunError
from beringia.records.events import CheckpointTrusted, CheckpointWritten
from beringia.records.manifest import TrustMark
from beringia.records.run_directory import RunDirectory
from beringia.supervise.run_checkpoints import drop_abandoned, newest_epoch, set_aside, untold_checkpoints

OURS = Owner("ours", frozenset({"r"}))


def save(run: RunDirectory, *steps: int, epoch: int = 1, identity: str | None = "ours", value: float = 0.0) -> None:
    """Complete checkpoints, as a worker publishes them."""
    store = CheckpointStore(
        run.checkpoints,
        epoch=epoch,
        epoch_file=None,
        keep=9,
        recipe_hash="r",
        chip_identity="c",
        run_identity=identity,
    )
    for step in steps:
        store.save(step, {"w": torch.full((10,), float(step) + value)}, {"step": step}).result()
    store.close()


def mark(run: RunDirectory, step: int) -> None:
    directory = CheckpointDirectory(run.checkpoints)
    state_hash = directory.manifest(step).state_hash
    directory.mark_trusted(step, TrustMark(step=step, state_hash=state_hash, checks=()))


def told(run: RunDirectory, history: list[Any]) -> list[tuple[str, int]]:
    found = untold_checkpoints(run, situation_of(history), OURS)
    return [(event.kind, event.step) for event in found]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def written(run: RunDirectory, step: int) -> CheckpointWritten:
    state_hash = CheckpointDirectory(run.checkpoints).manifest(step).state_hash
    return CheckpointWritten(step=step, directory="", bytes=1, state_hash=state_hash, pause_seconds=0, write_seconds=0)


def at_epoch(history: list[Any], epoch: int) -> list[Any]:
    return [event.model_copy(update={"epoch": epoch}) for event in history]


# ---- what nobody told of


def test_a_published_checkpoint_that_nobody_told_of_is_told(run: RunDirectory) -> None:
    save(run, 10, 20)
    history = at_epoch(play(), 0)
    assert told(run, [*history, written(run, 10)]) == [("checkpoint", 20)]
    assert told(run, [*history, written(run, 10), written(run, 20)]) == []


def test_a_mark_of_trust_that_speaks_of_the_state_counts_and_no_other(run: RunDirectory) -> None:
    save(run, 10, 20, 30)
    mark(run, 10)
    (run.checkpoints / "step-000020" / "trusted.json").write_text('{"step": 20, "state_hash": "x", "checks": []}')
    (run.checkpoints / "step-000030" / "trusted.json").write_text("{")
    assert told(run, []) == [("checkpoint", 10), ("trusted", 10), ("checkpoint", 20), ("checkpoint", 30)]


def test_what_a_decision_abandoned_is_not_told_again_and_what_was_written_since_is(run: RunDirectory) -> None:
    save(run, 10, 20, epoch=2)
    back_to_10 = play("decide")[-1].model_copy(update={"action": "rollback", "to_step": 10, "epoch": 2})
    history = [*at_epoch(play(), 1), written(run, 10), back_to_10]
    assert told(run, history) == []
    save(run, 20, epoch=3, value=0.5)
    assert told(run, history) == [("checkpoint", 20)]


def test_another_runs_checkpoint_is_not_taken_for_ours(run: RunDirectory) -> None:
    save(run, 10, identity="another")
    save(run, 20, identity=None)  # of an older version: known by its recipe
    assert told(run, []) == [("checkpoint", 20)]


def test_epochs_go_on_from_the_manifests_where_the_file_is_lost(run: RunDirectory) -> None:
    save(run, 10, epoch=7)
    assert newest_epoch(run.checkpoints) == 7


# ---- what is set aside


def test_an_abandoned_checkpoint_is_kept_aside_until_a_later_one_is_trusted(run: RunDirectory) -> None:
    save(run, 10, 20, 30)
    situation = situation_of([*play(), written(run, 10)])
    situation.resume_step = 10
    set_aside(run, situation, OURS, epoch=5)
    assert CheckpointDirectory(run.checkpoints).steps() == [10]
    kept = run.abandoned / "step-000020-5" / "manifest.json"
    assert json.loads(kept.read_text())["step"] == 20
    drop_abandoned(run, trusted=15)
    assert kept.exists()
    drop_abandoned(run, trusted=20)
    assert sorted(path.name for path in run.abandoned.iterdir()) == ["step-000030-5"]


def test_what_has_another_name_or_another_owner_is_never_touched(run: RunDirectory) -> None:
    save(run, 10, 20)
    save(run, 30, identity="another")
    shutil.copytree(run.checkpoints / "step-000020", run.checkpoints / "step-000020-good")
    (run.checkpoints / "step-40").mkdir()
    (run.checkpoints / "step-000050").write_text("a file")
    before = {"step-000010", "step-000020-good", "step-000030", "step-40", "step-000050"}
    set_aside(run, situation_of(play()), OURS, epoch=5)
    assert {path.name for path in run.checkpoints.iterdir()} == before - {"step-000010"}
    CheckpointDirectory(run.checkpoints).prune(0, OURS)
    assert {path.name for path in run.checkpoints.iterdir()} == before - {"step-000010"}


def test_a_checkpoint_is_not_published_over_anothers(run: RunDirectory) -> None:
    save(run, 10, identity="another")
    with pytest.raises(RunError, match="step-000010 is in the way"):
        save(run, 10)
    assert CheckpointDirectory(run.checkpoints).manifest(10).run_identity == "another"


# ---- real runs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped on its way, and keeps one checkpoint; with its recipe beside it."""
    place = tmp_path_factory.mktemp("stopped")
    train = {"steps": 60, "checkpoint_every": 5, "keep": 1}
    recipe = write_recipe(place, small_recipe(train=train, guard={"share": 0}))
    process = start("train", str(recipe), "--out", str(place / "run"))
    log = place / "run" / "events.jsonl"
    until(lambda: log.exists() and any(at.step >= 20 for at in of_kind(place / "run", "checkpoint")), "step 20")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    return place


@pytest.fixture(scope="module")
def undisturbed(stopped: Path) -> str:
    out = stopped / "undisturbed"
    assert beringia("train", str(stopped / "small.toml"), "--out", str(out)).returncode == 0
    return final_hash(out)


def copied(stopped: Path, tmp_path: Path) -> tuple[Path, int]:
    """A copy of the run, and the step of its newest checkpoint."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path / "run", max(CheckpointDirectory(tmp_path / "run" / "checkpoints").steps())


@pytest.mark.parametrize("share", [0.3, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.0, 0.6, 0.9))])
def test_a_run_whose_last_events_were_lost_goes_on_from_its_newest_checkpoint(
    stopped: Path, undisturbed: str, tmp_path: Path, share: float
) -> None:
    """As after a kill between publishing and telling, at any place; `keep = 1` leaves nothing else to go on from."""
    run, newest = copied(stopped, tmp_path)
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    kept = lines[: 1 + int(share * len(lines))]
    (run / "events.jsonl").write_bytes(b"".join(kept))
    assert beringia("train", str(stopped / "small.toml"), "--out", str(run)).returncode == 0
    assert [at.step for at in of_kind(run, "resume")][-1] == newest
    assert [at.step for at in of_kind(run, "checkpoint") if at.found][-1] == newest
    assert final_hash(run) == undisturbed


def test_a_run_without_events_is_rebuilt_from_its_manifests_and_says_so(
    stopped: Path, undisturbed: str, tmp_path: Path
) -> None:
    run, newest = copied(stopped, tmp_path)
    for name in ("events.jsonl", "epoch"):
        (run / name).unlink()
    assert beringia("train", str(stopped / "small.toml"), "--out", str(run)).returncode == 0
    assert [at.step for at in of_kind(run, "resume")] == [newest]
    assert "events are gone" in of_kind(run, "fallback")[0].reason
    assert final_hash(run) == undisturbed


@pytest.mark.slow
def test_a_users_copy_of_a_checkpoint_stays_where_it_is(stopped: Path, undisturbed: str, tmp_path: Path) -> None:
    run, newest = copied(stopped, tmp_path)
    copy = run / "checkpoints" / f"step-{newest:06d}-good"
    shutil.copytree(run / "checkpoints" / f"step-{newest:06d}", copy)
    assert beringia("train", str(stopped / "small.toml"), "--out", str(run)).returncode == 0
    assert copy.exists() and final_hash(run) == undisturbed


def listing(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize(
    "name", ["checkpoints/step-000100/model.safetensors", "notes.txt", "recipe.toml", "data/tokens.bin", "export/x"]
)
def test_a_directory_with_anything_of_anothers_is_refused_and_left_as_it_is(
    stopped: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("three weeks of work")
    before = listing(out)
    refused = beringia("train", str(stopped / "small.toml"), "--out", str(out))
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert f"holds {name.split('/')[0]}, and no run of ours" in refused.stderr
    assert listing(out) == before


@pytest.mark.parametrize("what", ["no manifest", "another run's", "a file"])
def test_anothers_checkpoint_in_a_run_is_named_and_nothing_is_touched(stopped: Path, tmp_path: Path, what: str) -> None:
    run, _ = copied(stopped, tmp_path)
    place = run / "checkpoints" / "step-000100"
    if what == "a file":
        place.write_text("not a directory")
    elif what == "no manifest":
        place.mkdir()
        (place / "model.safetensors").write_text("three weeks of work")
    else:
        save(RunDirectory(run), 100, identity="another")
    before = listing(run)
    refused = beringia("train", str(stopped / "small.toml"), "--out", str(run))
    assert refused.returncode == 2 and "step-000100 is no checkpoint of this run" in refused.stderr
    assert listing(run) == before


@pytest.mark.slow
def test_anothers_checkpoint_on_the_chips_machine_is_named_and_left(stopped: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "checkpoints" / "step-000005").mkdir(parents=True)
    (root / "checkpoints" / "step-000005" / "model.safetensors").write_text("three weeks of work")
    before = listing(root / "checkpoints")
    out = tmp_path / "run"
    refused = beringia(
        "train", str(stopped / "small.toml"), "--out", str(out), "--set", f"chips.first.root={json.dumps(str(root))}"
    )
    assert refused.returncode == 2 and "step-000005 is no checkpoint of this run" in refused.stderr
    assert listing(root / "checkpoints") == before
    assert not any(isinstance(event, CheckpointTrusted) for event in events(out))
