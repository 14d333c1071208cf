"""Takes a run's events one after another, and knows at each moment what they amount to.

One situation for each role: an event changes its own role's and no other's, but for the events that a supervisor took
the run, that its recipe changed and that the run ended, which are about all. Folding the events one by one, or all of
them anew, comes to the same; a further event costs microseconds, whatever came before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeVar, cast

from beringia.history.situation import Situation
from beringia.records.events import LEARNER, AnyEvent, Event, RecipeChanged, RunFinished, RunStarted

Status = Literal["empty", "unfinished", "done", "given-up", "stopped"]
E = TypeVar("E", bound=Event)

_ABOUT_ALL_ROLES = (RunStarted, RecipeChanged, RunFinished)


class Fold:
    """What the events that were added amount to."""

    def __init__(self, events: Iterable[AnyEvent] = ()) -> None:
        self.length = 0
        """Events so far."""
        self.epoch = 0
        """The latest of any event."""
        self.status: Status = "empty"
        self.message = ""
        """Why the run ended; empty while it goes on."""
        self.signal: int | None = None
        """Number of the signal that stopped it."""
        self._situations: dict[str, Situation] = {}
        self._last: dict[type[Event], AnyEvent] = {}
        for event in events:
            self.add(event)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that anything was told of, in the order of their first event."""
        return tuple(self._situations)

    @property
    def finished(self) -> bool:
        """The run is done or was given up, and nobody has taken it up again."""
        return self.status in ("done", "given-up")

    def situation(self, role: str = LEARNER) -> Situation:
        """The situation of a role; that of a role of which nothing was told is a beginning."""
        return self._situations.get(role) or Situation(finished=self.finished)

    def last(self, kind: type[E]) -> E | None:
        """The last event of a kind, of any role."""
        return cast("E | None", self._last.get(kind))

    def add(self, event: AnyEvent) -> None:
        """Take the next event."""
        self.length += 1
        self.epoch = max(self.epoch, event.epoch)
        self._last[type(event)] = event
        if isinstance(event, _ABOUT_ALL_ROLES):
            self._fold_for_all(event)
            return
        if self.status == "empty":
            self.status = "unfinished"
        situation = self._situations.get(event.role)
        if situation is None:
            situation = self._situations[event.role] = Situation(finished=self.finished)
        situation.fold(event)

    def _fold_for_all(self, event: RunStarted | RecipeChanged | RunFinished) -> None:
        if isinstance(event, RecipeChanged) and event.anew:  # what went wrong with another recipe decides nothing
            self._situations.clear()
            self.status, self.message, self.signal = "unfinished", "", None
            return
        for situation in self._situations.values():
            situation.fold(event)
        if isinstance(event, RunFinished):
            self.status, self.message, self.signal = event.status, event.message, event.signal
        elif isinstance(event, RunStarted) or not self.situation().finished:
            self.status, self.message, self.signal = "unfinished", "", None
