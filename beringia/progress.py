"""Progress of a run on standard error: a bar with rate and time left, and a line for each fact that matters.

Drawn only on a terminal; elsewhere the lines alone, and one every half minute of how far it is, so that a log stays
readable.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from beringia.records.events import (
    DIVERGENCE,
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
    RunStarted,
    StepDone,
    Unqualified,
)
from beringia.records.recipe import Recipe

LOG_SECONDS = 30.0
"""Between two lines of how far a run is, where there is no terminal."""
PACE_STEPS = 32


class PatientConsole(Console):
    """One whose reader may go away: rich would end the process then, and a run with it."""

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True


class Pace:
    """How fast a run is: over its last steps, by the clock, so that saving and evaluating count."""

    def __init__(self) -> None:
        self._steps: deque[StepDone] = deque(maxlen=PACE_STEPS)

    def note(self, done: StepDone) -> None:
        """The next step; one that was done before begins anew."""
        if self._steps and (done.step <= self._steps[-1].step or done.epoch != self._steps[-1].epoch):
            self._steps.clear()
        self._steps.append(done)

    @property
    def seconds_a_step(self) -> float:
        """By the clock; of the first step, what it says of itself."""
        first, last = self._steps[0], self._steps[-1]
        if last.step == first.step or last.time <= first.time:
            return max(last.seconds, 1e-9)
        return (last.time - first.time) / (last.step - first.step)

    def words(self, planned: int) -> str:
        """`loss 1.234, 5,600 tokens/s, 0:02:10 left` of the last step."""
        last = self._steps[-1]
        loss = "no finite loss" if last.loss is None else f"loss {last.loss:.3f}"
        left = timedelta(seconds=round(max(0, planned - last.step) * self.seconds_a_step))
        return f"{loss}, {last.tokens / self.seconds_a_step:,.0f} tokens/s, {left} left"


@contextmanager
def showing_progress(recipe: Recipe) -> Iterator[Callable[[AnyEvent], None]]:
    """A function to call with every event while the context lasts."""
    console = PatientConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        planned = recipe.train.steps or 0  # of a recipe in epochs it is known when the run begins
        task = progress.add_task(recipe.name, total=planned, pace="")
        pace, told, due = Pace(), set[str](), time.monotonic() + LOG_SECONDS

        def show(event: AnyEvent) -> None:
            nonlocal due, planned
            if isinstance(event, RunStarted):
                planned = event.steps
                progress.update(task, total=planned)
            if isinstance(event, StepDone) and event.role == LEARNER:
                pace.note(event)
                where, words = f"{event.chip} step {event.step:,} of {planned:,}", pace.words(planned)
                progress.update(task, completed=event.step, description=where, pace=words)
                if not console.is_terminal and time.monotonic() >= due:
                    due = time.monotonic() + LOG_SECONDS
                    write(f"{where}: {words}")
            line = None if said_by_the_end(event) else describe(event)
            if line is None or (isinstance(event, ChipOpened | Fallback) and line in told):
                return  # a worker that is started again opens the same chip on the same terms
            told.add(line)
            write(line if event.role == LEARNER else f"{event.role}: {line}")

        def write(line: str) -> None:
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

        yield show


def said_by_the_end(event: AnyEvent) -> bool:
    """Whether the error that ends the command says it: what is told once is told there, with what to do."""
    match event:
        case Decision(action="stop") | Fault(category="ours"):
            return event.role == LEARNER
        case Alarm(detector=detector):
            return detector == DIVERGENCE
        case RunFinished(status=status, signal=number):
            return status == "given-up" or (status == "stopped" and number is None)
        case _:
            return False


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
        case Fallback(what="data"):
            return f"data: {event.reason}"
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
