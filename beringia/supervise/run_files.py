"""What the supervisor does to the files of a run directory before a worker starts."""

from __future__ import annotations

import json
import shutil

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.errors import RunError
from beringia.history.situation import Situation
from beringia.records.files import write_bytes, write_text
from beringia.records.recipe import Recipe
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory


def prepare_run(recipe: Recipe, recipe_text: str, run: RunDirectory) -> None:
    """Write the recipe into a new run directory, or check that an old one is of the same recipe. Raises RunError."""
    if run.resolved_recipe.exists():
        found = json.loads(run.resolved_recipe.read_text())["hash"]
        if found != recipe.hash:
            raise RunError(
                f"{run.root} holds a run of another recipe (hash {found[:12]}, this one is {recipe.hash[:12]}). "
                "Give the recipe another name, choose another directory with --out, or remove the old run."
            )
        return
    if run.events.exists():
        raise RunError(
            f"{run.root} has events but no recipe: it is not a run directory of ours. Choose another with --out."
        )
    write_text(run.recipe, recipe_text)
    write_bytes(run.resolved_recipe, canonical_json({"hash": recipe.hash, "recipe": recipe.model_dump(mode="json")}))


def discard_abandoned(run: RunDirectory, situation: Situation, epoch: int) -> None:
    """Remove what dead writers left, and checkpoints after the step that the run goes on from: their future was given
    up.

    One that could not be loaded is set aside instead, for whoever wants to know why.
    """
    CheckpointDirectory(run.checkpoints).clean(epoch)
    kept = situation.resume_step or 0
    for directory in sorted(run.checkpoints.glob("step-*")):
        step = int(directory.name.removeprefix("step-"))
        if step in situation.damaged:
            aside = run.root / "set-aside" / f"{directory.name}-{len(list(run.root.glob('set-aside/*')))}"
            aside.parent.mkdir(exist_ok=True)
            directory.rename(aside)
        elif step > kept:
            shutil.rmtree(directory)
