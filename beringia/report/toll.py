"""What went wrong with a run's work, counted: what the page, the table and the sentence say of losses is made here."""

from __future__ import annotations

from dataclasses import dataclass

from beringia.report.history import History
from beringia.report.words import count


@dataclass(frozen=True)
class Toll:
    """Counts; all zero where nothing was lost."""

    steps: int
    """Steps that were done and thrown away."""
    unusable: int
    """Checkpoints that could not be used, by step."""
    from_the_start: int
    """How often all of the work was thrown away."""
    no_number: int
    """Steps that count, and whose loss is no finite number."""
    untold: int
    """Steps that count, and of which nothing is recorded: their worker outlived its supervisor until a checkpoint."""

    @property
    def keeps_state(self) -> bool:
        """Every time the run went back it went to a state that was whole."""
        return self.unusable == 0 and self.from_the_start == 0

    def words(self, done: bool) -> str:
        """A clause: `12 steps of work were done again, no state was lost`."""
        again = "done again" if done else "lost"
        told = [f"{count(self.steps, 'step')} of work {_was(self.steps)} {again}"] if self.steps else []
        if self.steps and self.keeps_state:
            told.append("no state was lost")
        if self.from_the_start:
            told.append(f"the run began again from step 0 {_times(self.from_the_start)}")
        if self.unusable:
            told.append(f"{count(self.unusable, 'checkpoint')} could not be used")
        if self.no_number:
            told.append(f"the loss was no finite number in {count(self.no_number, 'step')}")
        told = told or ["no step was lost"]
        if self.untold:
            told.append(f"nothing is recorded of {count(self.untold, 'step')}")
        return ", ".join(told)

    def short(self) -> str:
        """For a table: `93 steps of work, no state`."""
        told = [f"{self.steps:,} steps of work", "no state"] if self.keeps_state else [f"{self.steps:,} steps of work"]
        told += [f"{count(self.unusable, 'checkpoint')} that could not be used"] if self.unusable else []
        told += [f"all of them {_times(self.from_the_start)}"] if self.from_the_start else []
        told += [f"a finite loss in {count(self.no_number, 'step')}"] if self.no_number else []
        told += [f"the record of {count(self.untold, 'step')}"] if self.untold else []
        return ", ".join(told)


def toll_of(history: History) -> Toll:
    """Counted from what happened."""
    thrown = [at.event for at in history.decisions if at.event.lost_steps > 0]
    return Toll(
        steps=history.lost_steps,
        unusable=len({at.event.step for at in history.rejections}),
        from_the_start=sum(not decision.to_step for decision in thrown),
        no_number=sum(step.kept and step.event.loss is None for step in history.steps),
        untold=max(0, history.step - sum(step.kept for step in history.steps)),
    )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"
