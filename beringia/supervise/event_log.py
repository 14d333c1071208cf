"""The run's `events.jsonl` as the supervisor keeps it: the file it appends to, and in memory what decisions need."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from beringia.records.events import AnyEvent, CheckDone, Event, StepDone, parse_event
from beringia.records.jsonl import JsonLinesWriter, read_lines
from beringia.records.run_directory import RunDirectory
from beringia.supervise.decide import remember

# Lost in a power cut without harm: later lines of the same kind say the same.
_NOT_DURABLE = (StepDone, CheckDone)

_LAST_STEPS = 768
"""Kept in memory: those that the guard's spike test is given after a restart, and some that were thrown away since."""


class EventLog:
    """Reads what is there, then appends. The caller holds the run's lock."""

    def __init__(self, run: RunDirectory, on_event: Callable[[AnyEvent], None] | None = None) -> None:
        self._history: list[AnyEvent] = []
        self._last_steps: deque[StepDone] = deque(maxlen=_LAST_STEPS)
        self._length = 0
        for _, line in read_lines(run.events):
            self._keep(parse_event(line))
        self._writer = JsonLinesWriter(run.events)
        self._on_event = on_event

    @property
    def history(self) -> Sequence[AnyEvent]:
        """The events so far that `decide` looks at, in order."""
        return self._history

    def steps_before(self, resume_step: int) -> list[StepDone]:
        """The last steps that led to `resume_step`, oldest first; of a step that was taken again, the last time."""
        steps: list[StepDone] = []
        for done in reversed(self._last_steps):
            if done.step <= resume_step:
                steps.append(done)
                resume_step = done.step - 1
        return steps[::-1]

    def append(self, event: Event, *, epoch: int, chip: str | None = None) -> AnyEvent:
        """Number, date and write an event; returns it as written."""
        stamped: dict[str, Any] = event.model_dump(mode="json")
        stamped |= {"sequence": self._length, "time": time.time(), "epoch": epoch}
        stamped["chip"] = stamped["chip"] or chip
        parsed = parse_event(stamped)
        self._writer.append(stamped, durable=not isinstance(parsed, _NOT_DURABLE))
        self._keep(parsed)
        if self._on_event is not None:
            self._on_event(parsed)
        return parsed

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _keep(self, event: AnyEvent) -> None:
        if isinstance(event, StepDone):
            self._last_steps.append(event)
        remember(self._history, event)
        self._length += 1
