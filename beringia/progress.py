"""Progress of a run on standard error: a bar with rate and time left, and a line for each fact that matters.

Drawn only on a terminal; elsewhere the lines alone, so that a log stays readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from beringia.records.events import (
    LEARNER,
    Alarm,
    Answered,
    AnyEvent,
    Canary,
    CheckpointRejected,
    ChipOpened,
    Crossing,
    Decision,
    Evaluated,
    Exported,
    Fallback,
    Fault,
    Qualified,
    RecipeChanged,
    RunFinished,
    StepDone,
    Unqualified,
)
from beringia.records.recipe import Recipe


class PatientConsole(Console):
    """One whose reader may go away: rich would end the process then, and a run with it."""

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True


@contextmanager
def showing_progress(recipe: Recipe) -> Iterator[Callable[[AnyEvent], None]]:
    """A function to call with every event while the context lasts."""
    console = PatientConsole(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(recipe.name, total=recipe.train.steps, rate="")

        def show(event: AnyEvent) -> None:
            if isinstance(event, StepDone) and event.role == LEARNER:
                loss = "-" if event.loss is None else f"{event.loss:.3f}"
                progress.update(
                    task,
                    completed=event.step,
                    description=f"{event.chip} loss {loss}",
                    rate=f"{1 / max(event.seconds, 1e-9):.1f} steps/s",
                )
            line = describe(event)
            if line is not None:
                line = line if event.role == LEARNER else f"{event.role}: {line}"
                progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield show


def describe(event: AnyEvent) -> str | None:
    """One line for an event that a person should see, None for the others."""
    match event:
        case RecipeChanged():
            return f"the recipe has changed: {event.message}"
        case ChipOpened():
            who = f"{event.used}, {event.identity.truth}, {event.compute_dtype} ({event.identity_hash[:12]})"
            return f"{event.chip}: {who}"
        case Decision() if event.only_goes_on:
            lost = f"; {event.lost_steps:,} steps after it were lost" if event.lost_steps else ""
            return f"{event.reason}{lost}"
        case Decision():
            where = "" if event.to_step is None else f" from step {event.to_step}"
            return f"{event.action}{where}: {_first_line(event.reason)}"
        case Alarm():
            return f"alarm at step {event.step}: {event.message}"
        case Fault():
            return f"fault ({event.category}): {event.code}: {_first_line(event.message)}"
        case Canary():
            return f"canary over steps {event.from_step} to {event.to_step}: {event.message}"
        case Crossing():
            same = "equal" if event.state_hash_before == event.state_hash_after else "DIFFERENT"
            return f"crossed from {event.from_chip} to {event.to_chip} at step {event.step}: state hashes {same}"
        case Evaluated():
            accuracy = "" if event.accuracy is None else f", accuracy {event.accuracy:.3f}"
            loss = "-" if event.loss is None else f"{event.loss:.4f}"
            return f"step {event.step}: held-out loss {loss}{accuracy}"
        case Fallback():
            return f"{event.what}: {event.used} instead of {event.asked}: {event.reason}"
        case Qualified():
            wrong = f"; first wrong: {event.first_wrong}" if event.first_wrong else ""
            return f"{event.chip} qualified in {event.seconds:.0f} s: {event.verdict}{wrong}"
        case Unqualified():
            return f"{event.chip} may not train: {event.reason}"
        case CheckpointRejected():
            return f"checkpoint {event.step} cannot be used: {event.message}"
        case Exported():
            return f"exported step {event.step} to {event.directory}"
        case Answered():
            return (
                f"{event.chip} answers {event.questions} held-out questions: accuracy {event.accuracy:.3f}, "
                f"log-probabilities {event.mean_logprob_difference:.2g} from {event.trained_on}'s"
            )
        case RunFinished():
            return f"{event.status} at step {event.step}: {event.message}"
        case _:
            return None


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
