"""The run's `events.jsonl`: one writer that appends, any number of readers that follow.

Each line is parsed once. A last line without its newline (its writer is in the middle of it, or was killed) is left for
later by readers and cut off by the next writer. Which run this is, and who may write, is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from beringia.errors import RunError
from beringia.history.fold import Fold
from beringia.history.situation import Situation
from beringia.records.events import LEARNER, AnyEvent, CheckDone, Event, StepDone, parse_event_line
from beringia.records.jsonl import JsonLinesWriter, whole_lines
from beringia.records.run_directory import RunDirectory

# Lost in a power cut without harm: later lines of the same kind say the same.
_NOT_DURABLE = (StepDone, CheckDone)


class Tail:
    """Follows an `events.jsonl` from a byte offset on: each call of `new` yields what was written since."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset
        """Bytes read so far: where another reader can go on."""

    def new(self) -> Iterator[AnyEvent]:
        """The events of the whole lines that were not read before. Raises RunError for a line that is not an event."""
        for end, line in whole_lines(self._path, self.offset):
            try:
                event = parse_event_line(line)
            except ValidationError as error:
                raise _unreadable(self._path, self.offset, error) from None
            self.offset = end
            yield event


def read_events(path: Path) -> Iterator[AnyEvent]:
    """Every event of an `events.jsonl`, in order. Raises RunError for a line that is not an event."""
    return Tail(path).new()


class EventLog:
    """Reads what is there, then appends, and folds all of it. The caller holds the run's lock."""

    def __init__(self, run: RunDirectory, on_event: Callable[[AnyEvent], None] | None = None) -> None:
        self.fold = Fold(read_events(run.events))
        """What the events so far amount to."""
        self._writer = JsonLinesWriter(run.events)
        self._on_event = on_event

    def situation(self, role: str = LEARNER) -> Situation:
        """What the events so far amount to for a role."""
        return self.fold.situation(role)

    def append(self, event: Event, *, epoch: int, chip: str | None = None, role: str | None = None) -> AnyEvent:
        """Number, date and write an event; returns it as written. `chip` is for one that names none; `role`, where it
        is given, is whose event this is."""
        told: dict[str, Any] = {"sequence": self.fold.length, "time": time.time(), "epoch": epoch}
        told |= {"chip": event.chip or chip, "role": role or event.role}
        stamped = cast(AnyEvent, event.model_copy(update=told))  # its fields were checked when it was made
        self._writer.append(stamped.model_dump(mode="json"), durable=not isinstance(stamped, _NOT_DURABLE))
        self.fold.add(stamped)
        if self._on_event is not None:
            self._on_event(stamped)
        return stamped

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def _unreadable(path: Path, offset: int, error: ValidationError) -> RunError:
    with open(path, "rb") as file:
        number = file.read(offset).count(b"\n") + 1
    detail = error.errors()[0]
    if detail["type"] == "json_invalid":
        return RunError(
            f"{path}, line {number}, is not JSON ({detail['ctx']['error']}): the file was altered or damaged."
        )
    where = ".".join(str(part) for part in detail["loc"])
    return RunError(
        f"{path}, line {number}, is not an event that this version knows ({where}: {detail['msg']}): "
        "read it with the version of Beringia that wrote it."
    )
