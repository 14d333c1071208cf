"""A campaign, start to finish: every stage hands files in the run directory to the next."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from beringia.campaign.answers import answer
from beringia.campaign.export import compare_with_transformers, export
from beringia.campaign.qualifying import qualify_chips
from beringia.errors import Refusal
from beringia.history.log import EventLog
from beringia.records.events import Answered, AnyEvent, Exported, RunFinished
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.report.history import read_history
from beringia.report.page import write_report
from beringia.report.summary import Summary, summarise
from beringia.supervise.lock import RunLock
from beringia.supervise.run_files import recorded_recipe
from beringia.supervise.supervisor import supervise

Say = Callable[[str], None]


def run_campaign(
    recipe: Recipe,
    recipe_text: str,
    run: RunDirectory,
    *,
    on_event: Callable[[AnyEvent], None] | None = None,
    say: Say = lambda text: None,
) -> Summary:
    """Qualify the chips, train with crossings as needed, export, compare, answer on the inference chip, report.

    Going on after an interruption is the same call. `say` is told of every stage as it begins.

    Raises Refusal when the run was given up or the export is not the model that was trained; the page is written first.
    """
    try:
        qualify_chips(recipe, recipe_text, run, on_event, say)
        say("training")
        finished = supervise(recipe, recipe_text, run, on_event=on_event)
        if finished.status == "done":
            _hand_on(run, finished.step, on_event, say)
            _serve(recorded_recipe(run), run, finished, on_event, say)
    finally:
        if run.events.exists():
            write_report(run.root)
    return summarise(read_history(run.root))


def _hand_on(run: RunDirectory, last_step: int, on_event: Callable[[AnyEvent], None] | None, say: Say) -> None:
    with RunLock(run) as lock, closing(EventLog(run, on_event)) as log:
        exported = log.fold.last(Exported)
        if exported is not None and exported.step == last_step:
            return
        say("exporting, and comparing with transformers")
        earlier = _set_export_aside(run, lock.epoch)
        step = export(run, run.export)
        comparison = compare_with_transformers(run, run.export)
        log.append(
            Exported(
                step=step,
                directory=str(run.export.relative_to(run.root)),
                largest_difference=comparison.largest_difference,
                bound=comparison.bound,
            ),
            epoch=lock.epoch,
        )
        _drop_what_was_replaced(earlier, run.export)
    if not comparison.same:
        raise Refusal(
            f"transformers computes other logits from {run.export} than Beringia: they differ by "
            f"{comparison.largest_difference:.3g}, where rounding explains {comparison.bound:.3g}."
        )


def _set_export_aside(run: RunDirectory, epoch: int) -> Path:
    """An export of fewer steps, or of a campaign that was interrupted before it had compared and told of it, makes
    room; returns where it is then."""
    aside = run.set_aside / f"export-{epoch}"
    if run.export.exists():
        aside.parent.mkdir(exist_ok=True)
        run.export.rename(aside)
    return aside


def _drop_what_was_replaced(earlier: Path, export: Path) -> None:
    """Unless somebody has put files of his own beside ours."""
    names = {path.name for path in earlier.glob("*")} if earlier.exists() else set()
    if names <= {path.name for path in export.iterdir()}:
        shutil.rmtree(earlier, ignore_errors=True)


def _serve(
    recipe: Recipe, run: RunDirectory, finished: RunFinished, on_event: Callable[[AnyEvent], None] | None, say: Say
) -> None:
    if recipe.serve.chip is None:
        return
    with RunLock(run) as lock, closing(EventLog(run, on_event)) as log:
        before = log.fold.last(Answered)
        if before is None or before.step != finished.step:
            say(f"{recipe.serve.chip}: answering {recipe.serve.questions} held-out questions")
            assert finished.chip is not None, "a run that is done was on a chip"
            answered = answer(recipe, run, finished.chip, finished.step)
            log.append(answered, epoch=lock.epoch, chip=recipe.serve.chip)
