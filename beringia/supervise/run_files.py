"""What the supervisor does to the files of a run directory before a worker starts.

A new directory gets the recipe, a run that goes on may get another one as far as it stays the same run
(`records/recipe_identity.py` says how far): told by an event, with the old recipe kept. What is refused touches
nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.errors import RunError
from beringia.history.log import EventLog, read_events
from beringia.records.events import AnyEvent, ChipOpened, Fallback, RecipeChanged
from beringia.records.files import write_bytes
from beringia.records.inputs import NO_INPUTS, Inputs, look_at_inputs, placed
from beringia.records.recipe import Recipe
from beringia.records.recipe_identity import (
    Rule,
    changes_between,
    describe_change,
    refusals,
    rule_of,
    run_identity,
    settle,
)
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory
from beringia.supervise.lock import RunLock
from beringia.supervise.run_checkpoints import newest_epoch, owner_of

_BEFORE_A_RUN = {"run-id", "certificates", "logs", "ranks", "followed.json", "lock", "epoch", "epoch.lock"}
"""What a new run's directory may hold: certificates that were put there, what a start that failed has left, and what
other ranks of the same job write."""


@dataclass(frozen=True)
class Examined:
    """A recipe that a run directory can begin or go on with."""

    recipe: Recipe
    """With the schedule's horizon stated."""
    inputs: Inputs
    """What its paths hold now."""
    change: RecipeChanged | None = None
    """What differs from the recipe there, where it is not the same."""


@dataclass(frozen=True)
class TakenRun:
    """A run directory whose only writer is this process."""

    recipe: Recipe
    """Its paths whole."""
    recipe_hash: str
    """Of the recipe as the user wrote it."""
    owner: Owner
    """What its checkpoints are known by."""
    lock: RunLock
    log: EventLog


def examine_run(recipe: Recipe, run: RunDirectory) -> Examined:
    """What the recipe means for this run directory. Touches nothing. Raises RunError where it is another run's, or
    holds what no run of ours put there."""
    begun = run.events.exists()  # looked at first: another rank's supervisor may be writing both, this one last
    if not run.resolved_recipe.exists():
        if begun:
            raise RunError(
                f"{run.root} has events but no recipe: it is not a run directory of ours. Choose another with --out."
            )
        _refuse_others(run)
        return Examined(settle(recipe, recipe.train.steps), NO_INPUTS)
    found = _recorded(run)
    before, now = (settle(one, found.train.horizon) for one in (found, recipe))
    known = _recorded_inputs(run)
    inputs = look_at_inputs(now, known)
    changes = changes_between(before, now)
    opened = _opened(run) if any(rule_of(key) is Rule.OPENED for key in changes) else frozenset()
    reasons = refusals(changes, known, inputs, opened)
    if reasons:
        raise RunError(
            f"{run.root} holds a run of another recipe: {'; '.join(reasons)}. "
            "Give the recipe another name, choose another directory with --out, or remove the old run."
        )
    examined = Examined(now, inputs, describe_change(changes, now, frozenset(before.chips)))
    CheckpointDirectory(run.checkpoints).refuse_foreign(_owner(examined, run))
    return examined


@contextmanager
def taking_run(
    recipe: Recipe, recipe_text: str, run: RunDirectory, on_event: Callable[[AnyEvent], None] | None = None
) -> Iterator[TakenRun]:
    """Hold the run directory's lock and log while the context lasts, with its recipe written down. Raises RunError."""
    examine_run(recipe, run)  # what is refused leaves even lock and epoch as they were
    with RunLock(run, above=newest_epoch(run.checkpoints)) as lock:
        examined = examine_run(recipe, run)
        if not run.resolved_recipe.exists():
            examined = replace(examined, inputs=look_at_inputs(recipe))
            _write_down(examined, recipe_text, run)
        log = EventLog(run, on_event)
        if log.fold.epoch >= lock.epoch:
            lock.advance(above=log.fold.epoch)
        try:
            if log.fold.length == 0 and CheckpointDirectory(run.checkpoints).steps():
                log.append(_LOST_EVENTS, epoch=lock.epoch)
            # First in the log: killed in between, the change is told twice, and never lost.
            if examined.change is not None:
                log.append(examined.change, epoch=lock.epoch)
            _write_down(examined, recipe_text, run)
            whole = placed(examined.recipe, examined.inputs)
            yield TakenRun(whole, examined.recipe.hash, _owner(examined, run), lock, log)
        finally:
            log.close()


def _owner(examined: Examined, run: RunDirectory) -> Owner:
    return owner_of(run, run_identity(examined.recipe, examined.inputs).hash)


_LOST_EVENTS = Fallback(
    what="history",
    asked="events.jsonl",
    used="the checkpoints",
    reason="the run's events are gone: which chips it tried, and what went wrong on them, is not known any more",
)


def _refuse_others(run: RunDirectory) -> None:
    """A new run's directory holds nothing of anybody else's."""
    if run.root.exists() and not run.root.is_dir():
        raise RunError(f"{run.root} is a file: choose a directory with --out.")
    others = [path.name for path in sorted(run.root.glob("*")) if not _may_be_there(path, run)]
    if others:
        told = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise RunError(f"{run.root} holds {told}, and no run of ours: choose a new directory with --out.")


def _may_be_there(path: Path, run: RunDirectory) -> bool:
    if path.name in _BEFORE_A_RUN or path.name.startswith(".") or (path.is_dir() and not any(path.iterdir())):
        return True
    return path == run.inputs and _are_inputs(run)  # left by a start that was killed at once


def _are_inputs(run: RunDirectory) -> bool:
    try:
        return bool(_recorded_inputs(run))
    except (RunError, OSError):
        return False


def _write_down(examined: Examined, recipe_text: str, run: RunDirectory) -> None:
    """The recipe and its inputs, as far as they are not there; what a recipe replaces is kept under a number."""
    if examined.change is not None and run.recipe.exists() and run.recipe.read_text() != recipe_text:
        number = 1 + len(run.earlier_recipes)
        write_bytes(run.root / f"recipe-{number}.toml", run.recipe.read_bytes())
    if examined.change is not None:
        _write(run.recipe, recipe_text.encode())
    if not run.identifier.exists():
        _write(run.identifier, f"{uuid.uuid4().hex}\n".encode())
    _write(run.inputs, canonical_json(examined.inputs))
    recipe, identity = examined.recipe, run_identity(examined.recipe, examined.inputs)
    document = {
        "hash": recipe.hash,
        "recipe": recipe.model_dump(mode="json"),
        "identity": {**identity.model_dump(mode="json"), "hash": identity.hash},
    }
    _write(run.resolved_recipe, canonical_json(document))
    # Last in a new directory: what has a recipe.toml and no recipe.json is somebody else's.
    if not run.recipe.exists():
        _write(run.recipe, recipe_text.encode())


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


def _recorded(run: RunDirectory) -> Recipe:
    try:
        document = json.loads(run.resolved_recipe.read_text())["recipe"]
        return Recipe.model_validate_json(json.dumps(document))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.resolved_recipe} is not a recipe that this version of Beringia knows "
            f"({str(error).splitlines()[0]}): go on with the version that wrote it, or choose another directory."
        ) from None


def recorded_recipe(run: RunDirectory) -> Recipe:
    """The recipe of a run directory, its paths whole. Raises RunError."""
    if not run.resolved_recipe.exists():
        raise RunError(f"{run.root} is not a run directory: it has no {run.resolved_recipe.name}.")
    recipe = _recorded(run)
    return placed(recipe, look_at_inputs(recipe, _recorded_inputs(run)))


def _recorded_inputs(run: RunDirectory) -> Inputs:
    if not run.inputs.exists():  # a run that was begun before there was such a file
        return NO_INPUTS
    try:
        return Inputs.model_validate_json(run.inputs.read_bytes())
    except ValueError as error:
        raise RunError(
            f"{run.inputs} is damaged ({str(error).splitlines()[0]}): remove it, and the run goes on with its model "
            "and data as they are now."
        ) from None


def _opened(run: RunDirectory) -> frozenset[str]:
    """Labels of the chips that have worked for this run."""
    return frozenset(event.chip for event in read_events(run.events) if isinstance(event, ChipOpened) and event.chip)
