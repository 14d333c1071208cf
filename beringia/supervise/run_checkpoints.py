"""The checkpoints that lie in a run directory, held against what its events say.

- What no run of ours wrote is never touched: it refuses the directory before anything is written there.
- What this run's worker published and nobody told of is told now: a kill between the two loses nothing.
- What a decision abandoned is set aside, and goes when a later checkpoint is trusted; what could not be loaded is set
  aside for whoever wants to know why, and stays.

Nothing else is moved or deleted but by `keep` (`checkpoint/directory.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.errors import CheckpointDamaged, RunError
from beringia.history.situation import Situation
from beringia.records.events import CheckpointTrusted, CheckpointWritten
from beringia.records.jsonl import read_lines
from beringia.records.manifest import CheckpointManifest
from beringia.records.run_directory import RunDirectory


def owner_of(run: RunDirectory, identity: str) -> Owner:
    """The run, with every recipe that it has gone on with where it has checkpoints that do not name it."""
    recorded = json.loads(run.resolved_recipe.read_bytes())["hash"]
    owner = Owner(identity, frozenset({recorded}))
    if not CheckpointDirectory(run.checkpoints).foreign(owner) or not run.events.exists():
        return owner
    told = (line.get("recipe_hash") for _, line in read_lines(run.events) if line["kind"] == "run")
    return Owner(identity, owner.recipe_hashes | {str(one) for one in told})


def newest_epoch(checkpoints: Path) -> int:
    """The latest epoch that any checkpoint was written under; 0 without any. (The file `epoch` may be lost.)"""
    directory = CheckpointDirectory(checkpoints)
    return max((manifest.epoch for _, manifest in _readable(directory)), default=0)


def untold_checkpoints(
    run: RunDirectory, situation: Situation, owner: Owner
) -> list[CheckpointWritten | CheckpointTrusted]:
    """The events that nobody has told: of complete checkpoints that were published and not abandoned, and of their
    marks of trust."""
    directory = CheckpointDirectory(run.checkpoints)
    told: list[CheckpointWritten | CheckpointTrusted] = []
    for step, manifest in _readable(directory):
        # One with another state than was told of is not taken for it: loading it says so.
        known = step in situation.complete or step in situation.damaged
        if known or not owner.wrote(manifest) or situation.abandoned(step, manifest.epoch):
            continue
        told.append(
            CheckpointWritten(
                step=step,
                directory=str(directory.path(step).relative_to(run.root)),
                bytes=sum(entry.bytes for entry in manifest.files),
                state_hash=manifest.state_hash,
                pause_seconds=0.0,
                write_seconds=0.0,
                found=True,
            )
        )
        told += _trust(directory, step, manifest.state_hash)
    return told


def set_aside(run: RunDirectory, situation: Situation, owner: Owner, epoch: int) -> None:
    """Remove what dead writers left half done, and set aside what the run does not go on with: checkpoints after the
    step that it goes on from, and those that could not be loaded."""
    directory = CheckpointDirectory(run.checkpoints)
    directory.clean(epoch)
    kept = situation.resume_step or 0
    foreign = directory.foreign(owner)
    for step in directory.steps():
        path = directory.path(step)
        if path not in foreign and (step in situation.damaged or step > kept):
            place = run.set_aside if step in situation.damaged else run.abandoned
            _move(path, place / f"{path.name}-{epoch}")


def drop_abandoned(run: RunDirectory, trusted: int) -> None:
    """Delete the abandoned checkpoints that the run has got beyond: one of their step or later is trusted."""
    for path in run.abandoned.glob("step-*"):
        step = path.name.split("-")[1]
        if step.isdecimal() and int(step) <= trusted:
            shutil.rmtree(path)


def _readable(directory: CheckpointDirectory) -> Iterator[tuple[int, CheckpointManifest]]:
    for step in directory.steps():
        try:
            yield step, directory.manifest(step)
        except (CheckpointDamaged, RunError):
            continue  # loading it, where a decision wants to, says why


def _trust(directory: CheckpointDirectory, step: int, state_hash: str) -> list[CheckpointWritten | CheckpointTrusted]:
    try:
        mark = directory.trust_mark(step)
    except CheckpointDamaged:
        return []
    if mark is None or (mark.step, mark.state_hash) != (step, state_hash):
        return []
    return [CheckpointTrusted(step=step, state_hash=state_hash, checks=mark.checks)]


def _move(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
