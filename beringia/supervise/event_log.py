"""The run's `events.jsonl` as the supervisor keeps it: the history in memory, and the file that it appends to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from beringia.records.events import AnyEvent, CheckDone, Event, StepDone, parse_event
from beringia.records.jsonl import JsonLinesWriter, read_lines
from beringia.records.run_directory import RunDirectory

# Lost in a power cut without harm: later lines of the same kind say the same.
_NOT_DURABLE = (StepDone, CheckDone)


class EventLog:
    """Reads what is there, then appends. The caller holds the run's lock."""

    def __init__(self, run: RunDirectory, on_event: Callable[[AnyEvent], None] | None = None) -> None:
        self._history: list[AnyEvent] = [parse_event(line) for _, line in read_lines(run.events)]
        self._writer = JsonLinesWriter(run.events)
        self._on_event = on_event

    @property
    def history(self) -> Sequence[AnyEvent]:
        """All events so far, in order."""
        return self._history

    def append(self, event: Event, *, epoch: int, chip: str | None = None) -> AnyEvent:
        """Number, date and write an event; returns it as written."""
        stamped: dict[str, Any] = event.model_dump(mode="json")
        stamped |= {"sequence": len(self._history), "time": time.time(), "epoch": epoch}
        stamped["chip"] = stamped["chip"] or chip
        parsed = parse_event(stamped)
        self._writer.append(stamped, durable=not isinstance(parsed, _NOT_DURABLE))
        self._history.append(parsed)
        if self._on_event is not None:
            self._on_event(parsed)
        return parsed

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
