"""What a run needs before its first step, made from what its recipe names: the model of another run, as files of its
own, and how many rows its data has, where the recipe counts epochs.

Another run's checkpoint is pinned by its manifest when this run begins: which one it was is known from then on,
whatever that run does later. Torch does the rest, in processes of its own on this machine.
"""

from __future__ import annotations

from pathlib import Path

from beringia.checkpoint.directory import CheckpointDirectory
from beringia.errors import RunError
from beringia.processes.child import lines_of, start
from beringia.processes.command import Command
from beringia.processes.patience import Patience
from beringia.records.inputs import Input, InputFile
from beringia.records.orders import PackOrder, RowCounts, TakeModelOrder
from beringia.records.recipe import ModelSection, Recipe
from beringia.records.run_directory import RunDirectory

_LOG = "beginning.log"
_PATIENCE = Patience(silence_seconds=86_400.0)
"""For copying a model: nothing of it is on a device that could hang, and disks may be slow."""


def source_of(model: ModelSection, pinned: Input | None = None) -> Input:
    """The checkpoint of another run that `model.run` and `model.step` mean, by content. One that is pinned stays, as
    far as the recipe still means it. Raises RunError, CheckpointDamaged."""
    assert model.run is not None
    if pinned is not None and pinned.path == model.run and model.step in (None, _step_of(pinned)):
        return pinned
    directory = _checkpoints(Path(model.run))
    return _pin(model.run, Path(model.run), _choose(model, directory, pinned))


def _pin(path: str, place: Path, step: int) -> Input:
    name = _checkpoints(place).path(step).name
    files = tuple(
        InputFile(name=f"{name}/{entry.name}", bytes=entry.bytes, modified_ns=0, sha256=entry.sha256)
        for entry in _checkpoints(place).manifest(step).files
    )
    return Input(path=path, place=str(place.absolute()), files=files)


def _checkpoints(run: Path) -> CheckpointDirectory:
    return CheckpointDirectory(RunDirectory(run).checkpoints)


def _step_of(pinned: Input) -> int:
    return int(pinned.files[0].name.partition("/")[0].removeprefix("step-"))


def _choose(model: ModelSection, directory: CheckpointDirectory, pinned: Input | None) -> int:
    """The step that is asked for, else the pinned one where it is there too, else the newest trusted one."""
    steps, trusted = directory.steps(), directory.trusted_steps()
    there = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
    if model.step is not None:
        if model.step not in steps:
            raise RunError(f"{model.run}, named as model.run, has no checkpoint of step {model.step}: {there}.")
        return model.step
    if pinned is not None and _step_of(pinned) in steps:
        return _step_of(pinned)
    if not trusted:
        raise RunError(
            f"{model.run}, named as model.run, has no trusted checkpoint: {there}. Name a run that has one, or one of "
            "its steps as model.step."
        )
    return trusted[-1]


def take_model(run: RunDirectory, source: Input, recipe: Recipe) -> None:
    """Write the model of a pinned checkpoint into the run's own directory; `recipe` is that of the run it is from.
    Raises RunError where the checkpoint is not the pinned one any more, CheckpointDamaged, StorageFull."""
    assert source.place is not None
    place, step = Path(source.place), _step_of(source)
    if step not in _checkpoints(place).steps() or _pin(source.path, place, step).content != source.content:
        raise RunError(
            f"{place} has no longer the checkpoint of step {step} that this run began with, and it is needed."
        )
    order = TakeModelOrder(
        recipe=recipe, checkpoint=str(_checkpoints(place).path(step)), directory=str(run.model.absolute())
    )
    lines_of(start(Command("model.run", "beringia.train.taking_work"), order, run.logs / _LOG, patience=_PATIENCE))


def with_own_model(recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe with the run's own copy of another run's model in that run's place."""
    if recipe.model.run is None:
        return recipe
    return recipe.model_copy(update={"model": ModelSection(path=str(run.model.absolute()))})


def count_rows(run: RunDirectory, recipe: Recipe) -> tuple[int, ...]:
    """Rows of each data set, which is packed for it; the recipe's paths are whole. Raises DataError."""
    order = PackOrder(recipe=recipe, directory=str(run.data.absolute()))
    (line,) = lines_of(start(Command("packing", "beringia.data.packing_work"), order, run.logs / _LOG))
    rows = RowCounts.model_validate(line, strict=False).rows
    assert None not in rows, "the recipe does not let epochs of a task through"
    return tuple(count for count in rows if count is not None)
