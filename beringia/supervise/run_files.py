"""What the supervisor does to the files of a run directory before a worker starts.

A new directory gets the recipe, a run that goes on may get another one as far as it stays the same run
(`records/recipe_identity.py` says how far), and one that has done no step begins anew: told by an event, with the old
recipe kept. What is refused touches nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.errors import CheckpointDamaged, RunError
from beringia.history.log import EventLog, read_events
from beringia.records.events import AnyEvent, ChipOpened, Fallback, RecipeChanged, StepDone
from beringia.records.files import write_bytes
from beringia.records.inputs import NO_INPUTS, Input, Inputs, look_at, look_at_inputs, placed
from beringia.records.recipe import Recipe
from beringia.records.recipe_identity import (
    RUN,
    Rule,
    changes_between,
    describe_beginning,
    describe_change,
    describe_epochs,
    in_steps,
    refusals,
    rule_of,
    run_identity,
    settle,
)
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory
from beringia.supervise.beginning import count_rows, source_of, take_model, with_own_model
from beringia.supervise.lock import RunLock
from beringia.supervise.run_checkpoints import newest_epoch, owner_of

_BEFORE_A_RUN = {"run-id", "certificates", "logs", "ranks", "followed.json", "lock", "epoch", "epoch.lock"}
"""What a new run's directory may hold: certificates that were put there, what a start that failed has left, and what
other ranks of the same job write."""


OWN_MODEL = "model.run (its copy)"
"""What is noted of a run's own copy of another run's model, beside the inputs that its recipe names."""


@dataclass(frozen=True)
class Examined:
    """A recipe that a run directory can begin or go on with."""

    recipe: Recipe
    """With steps and the schedule's horizon stated, but for a new run in epochs: nobody has counted its data yet."""
    inputs: Inputs
    """What its paths hold now."""
    rows: tuple[int, ...] | None = None
    """Of each data set, where the run was begun in epochs."""
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
        if recipe.model.run is not None:
            source_of(recipe.model)
        return Examined(recipe, NO_INPUTS)
    found, rows = _recorded(run)
    stepped = _has_stepped(run)
    before, now = (settle(one, found.train.horizon) for one in (found, _in_steps(recipe, found, rows, stepped)))
    known = recorded_inputs(run)
    inputs = _look(now, run, known)
    changes = changes_between(before, now)
    opened = _opened(run) if any(rule_of(key) is Rule.OPENED for key in changes) else frozenset()
    reasons = refusals(changes, known, inputs, opened, stepped=stepped)
    if reasons:
        raise RunError(
            f"{run.root} holds a run of another recipe: {'; '.join(reasons)}. "
            "Put that back to go on with it; for a new run choose another directory with --out, or another name."
        )
    anew = None if stepped else describe_beginning(changes, known, inputs)
    examined = Examined(now, inputs, rows, anew or describe_change(changes, now, frozenset(before.chips)))
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
        new, anew = not run.resolved_recipe.exists(), examined.change is not None and examined.change.anew
        if new or anew:
            examined = replace(_begin(recipe, run), change=examined.change)
        if new:
            _write_down(examined, recipe_text, run)
        elif recipe.model.run is not None and not run.model.exists():
            _take_model(examined.inputs, run)
        log = EventLog(run, on_event)
        if log.fold.epoch >= lock.epoch:
            lock.advance(above=log.fold.epoch)
        try:
            if log.fold.length == 0 and CheckpointDirectory(run.checkpoints).steps():
                log.append(_LOST_EVENTS, epoch=lock.epoch)
            counted = anew or log.fold.length == 0
            # First in the log: killed in between, the change is told twice, and never lost.
            if examined.change is not None:
                log.append(examined.change, epoch=lock.epoch)
            if counted and recipe.train.epochs is not None and examined.rows is not None:
                log.append(describe_epochs(recipe, examined.rows), epoch=lock.epoch)
            _write_down(examined, recipe_text, run)
            whole = with_own_model(placed(examined.recipe, examined.inputs), run)
            yield TakenRun(whole, examined.recipe.hash, _owner(examined, run), lock, log)
        finally:
            log.close()


def _begin(recipe: Recipe, run: RunDirectory) -> Examined:
    """What the recipe of a run that is new, or begins anew, names: looked at and made ready."""
    before, new = recorded_inputs(run), not run.resolved_recipe.exists()
    inputs = _look(recipe, run, NO_INPUTS if new else before)
    if run.model.exists() and inputs.content(RUN) != before.content(RUN):
        raise RunError(
            f"{run.model} was left by a start with another checkpoint: remove it, or choose a new directory with --out."
        )
    if new:
        _write(run.inputs, canonical_json(inputs))  # first: it says that what else is made here is ours
    if recipe.model.run is not None:
        if not run.model.exists():  # it appears complete: a start that was killed after that need not take it again
            _take_model(inputs, run)
        inputs = _look(recipe, run, inputs)
    rows = None
    if recipe.train.epochs is not None:
        rows = count_rows(run, with_own_model(placed(recipe, inputs), run))
        recipe = in_steps(recipe, rows)
    return Examined(settle(recipe, recipe.train.last_step), inputs, rows)


def _in_steps(recipe: Recipe, found: Recipe, rows: tuple[int, ...] | None, stepped: bool) -> Recipe:
    """The recipe in steps, by the rows that were counted when the run began."""
    if recipe.train.epochs is not None and rows is None:
        if not stepped:
            return recipe
        raise RunError(
            f"The run was begun with train.steps = {found.train.last_step}, and the recipe counts epochs now: ask for "
            "more steps with train.steps."
        )
    return in_steps(recipe, rows or ())


def _look(recipe: Recipe, run: RunDirectory, known: Inputs) -> Inputs:
    """What the recipe's paths hold now, and the checkpoint of another run with our copy of its model."""
    found = look_at_inputs(recipe, known).inputs
    if recipe.model.run is not None:
        pinned = known.inputs.get(RUN)
        try:
            found[RUN] = source_of(recipe.model, pinned)
        except (RunError, CheckpointDamaged):
            if known == NO_INPUTS:
                raise
            found[RUN] = Input(path=recipe.model.run, files=())  # not what it was: which is all that matters here
        if run.model.exists() or OWN_MODEL in known.inputs:
            found[OWN_MODEL] = look_at(OWN_MODEL, str(run.model), known.inputs.get(OWN_MODEL))
    return Inputs(inputs=found)


def _take_model(inputs: Inputs, run: RunDirectory) -> None:
    source = inputs.inputs[RUN]
    take_model(run, source, recorded_recipe(RunDirectory(Path(source.place or source.path))))


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
    # Left by a start that was killed at once, or while it made ready what the recipe names.
    return path in (run.inputs, run.data, run.model) and _are_inputs(run)


def _are_inputs(run: RunDirectory) -> bool:
    try:
        return run.inputs.exists() and bool(recorded_inputs(run))
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
    recipe, identity = examined.recipe, run_identity(examined.recipe, examined.inputs)
    document = {
        "hash": recipe.hash,
        "recipe": recipe.model_dump(mode="json"),
        "rows": examined.rows,
        "identity": {**identity.model_dump(mode="json"), "hash": identity.hash},
    }
    _write(run.resolved_recipe, canonical_json(document))
    # After it: killed in between, other contents are seen as such again, and rows are counted again.
    _write(run.inputs, canonical_json(examined.inputs))
    # Last in a new directory: what has a recipe.toml and no recipe.json is somebody else's.
    if not run.recipe.exists():
        _write(run.recipe, recipe_text.encode())


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


def _recorded(run: RunDirectory) -> tuple[Recipe, tuple[int, ...] | None]:
    """The recipe, and the rows of each data set where it was begun in epochs."""
    try:
        document = json.loads(run.resolved_recipe.read_text())
        rows = document.get("rows")
        recipe = Recipe.model_validate_json(json.dumps(document["recipe"]))
        return recipe, None if rows is None else tuple(map(int, rows))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run.resolved_recipe} is not a recipe that this version of Beringia knows "
            f"({str(error).splitlines()[0]}): go on with the version that wrote it, or choose another directory."
        ) from None


def recorded_recipe(run: RunDirectory) -> Recipe:
    """The recipe of a run directory, its paths whole. Raises RunError."""
    if not run.resolved_recipe.exists():
        raise RunError(f"{run.root} is not a run directory: it has no {run.resolved_recipe.name}.")
    recipe, _ = _recorded(run)
    return with_own_model(placed(recipe, look_at_inputs(recipe, recorded_inputs(run))), run)


def recorded_inputs(run: RunDirectory) -> Inputs:
    """The files that the run was made from, as they were last looked at. Raises RunError."""
    if not run.inputs.exists():  # a run that was begun before there was such a file
        return NO_INPUTS
    try:
        return Inputs.model_validate_json(run.inputs.read_bytes())
    except ValueError as error:
        raise RunError(
            f"{run.inputs} is damaged ({str(error).splitlines()[0]}): remove it, and the run goes on with its model "
            "and data as they are now."
        ) from None


def _has_stepped(run: RunDirectory) -> bool:
    """Whether a step of this run was done, or may have been: what is lost of its events may have told of some."""
    if not run.events.exists() or CheckpointDirectory(run.checkpoints).steps() or run.set_aside.exists():
        return True
    return any(isinstance(event, StepDone) for event in read_events(run.events))


def _opened(run: RunDirectory) -> frozenset[str]:
    """Labels of the chips that have worked for this run."""
    return frozenset(event.chip for event in read_events(run.events) if isinstance(event, ChipOpened) and event.chip)
