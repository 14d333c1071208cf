"""How a run stands, in a line: `beringia status RUN`.

Made from a History and from whether a supervisor holds the run's lock. Disturbs nobody: a supervisor that starts while
the lock is asked for waits a moment (`supervise/lock.py`).
"""

from __future__ import annotations

import fcntl
import time
from typing import Literal

from beringia.records.events import LEARNER, StepDone
from beringia.records.record import Record
from beringia.records.run_directory import RunDirectory
from beringia.report.answer import chip_name
from beringia.report.history import History, read_history
from beringia.report.words import count, duration, significant

_PACE_STEPS = 32

Standing = Literal["running", "done", "given-up", "stopped", "ended"]


class RunStatus(Record):
    """What `beringia status --json` prints."""

    name: str
    standing: Standing
    """`ended`: no supervisor works on it, and none said that it was done; the same command goes on."""
    message: str
    """Why it was given up or stopped; empty otherwise."""
    step: int
    planned_steps: int | None
    chip: str | None
    """Label of the chip in use."""
    chip_name: str
    """What it is, and whether it is real or emulated."""
    loss: float | None
    """Of the last step; null where it is no finite number, too."""
    tokens_per_second: float | None
    """Over the last steps, by the clock."""
    seconds_left: float | None
    newest_checkpoint: int | None
    trusted_checkpoint: int | None
    seconds_since_event: float | None
    """While a supervisor works on it."""

    def line(self) -> str:
        """For a person."""
        parts = [f"{self.name}: {self._where()}"]
        if self.standing == "running":
            parts += self._pace()
        if self.newest_checkpoint is not None and self.standing != "done":
            trusted = "none trusted" if self.trusted_checkpoint is None else f"trusted {self.trusted_checkpoint:,}"
            parts.append(f"newest checkpoint {self.newest_checkpoint:,} ({trusted})")
        if self.message and self.standing != "done":
            parts.append(self.message)
        return "; ".join(parts)

    def _where(self) -> str:
        place = f"step {self.step:,} of {self.planned_steps or 0:,}"
        match self.standing:
            case "running":
                return f"running on {self.chip_name}, {place}" if self.step else f"starting on {self.chip_name}"
            case "done":
                return f"done, all {count(self.step, 'step')}, on {self.chip_name}"
            case "ended":
                return f"no process works on it any more, {place}; the same command goes on"
            case _:
                return f"{self.standing.replace('-', ' ')} at {place}"

    def _pace(self) -> list[str]:
        parts = []
        if self.step:
            parts.append("no finite loss" if self.loss is None else f"loss {significant(self.loss)}")
        if self.tokens_per_second is not None and self.seconds_left is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s, {duration(self.seconds_left)} left")
        if self.seconds_since_event is not None:
            parts.append(f"last heard of {duration(max(0.0, self.seconds_since_event))} ago")
        return parts


def status_of(run: RunDirectory) -> RunStatus:
    """How a run stands now. Raises RunError where there is no run."""
    running = _held(run)
    history = read_history(run.root)
    recent = list(history.situation.recent)[-_PACE_STEPS:]
    seconds = _seconds_a_step(recent)
    last = recent[-1] if recent else None
    left = None if seconds is None else max(0, (history.planned_steps or 0) - history.step) * seconds
    return RunStatus(
        name=history.name,
        standing=_standing(history, running),
        message=history.message,
        step=history.step,
        planned_steps=history.planned_steps,
        chip=history.situation.chip,
        chip_name=chip_name(history, history.situation.chip),
        loss=last.loss if last is not None else None,
        tokens_per_second=last.tokens / seconds if last is not None and seconds else None,
        seconds_left=left,
        newest_checkpoint=history.situation.newest,
        trusted_checkpoint=history.situation.newest_trusted,
        seconds_since_event=time.time() - run.events.stat().st_mtime if running and run.events.exists() else None,
    )


def _standing(history: History, running: bool) -> Standing:
    if running:
        return "running"
    ends: dict[str, Standing] = {"done": "done", "given-up": "given-up", "stopped": "stopped"}
    return ends.get(history.status, "ended")


def _seconds_a_step(steps: list[StepDone]) -> float | None:
    """By the clock over the steps of the worker that is at work."""
    mine = [step for step in steps if step.epoch == steps[-1].epoch and step.role == LEARNER]
    if not mine:
        return None
    if len(mine) == 1 or mine[-1].time <= mine[0].time:
        return mine[-1].seconds
    return (mine[-1].time - mine[0].time) / (mine[-1].step - mine[0].step)


def _held(run: RunDirectory) -> bool:
    """Whether a supervisor holds the lock."""
    if not run.lock.is_file():
        return False
    with open(run.lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
