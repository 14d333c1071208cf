"""Collects what the `crossing` event says, from the decision to the first step on the new chip."""

from __future__ import annotations

import time

from beringia.history.situation import Situation
from beringia.records.events import AnyEvent, Canary, Crossing, Resumed


class CrossingInProgress:
    """One crossing under way. Feed it the new worker's events; `event()` once the first step is done."""

    def __init__(self, from_chip: str, state_hash_before: str, decided_at: float) -> None:
        self._from_chip = from_chip
        self._before = state_hash_before
        self._decided_at = decided_at
        self._resumed: Resumed | None = None
        self._canary: Canary | None = None
        self.imports_seconds = 0.0

    @classmethod
    def of(cls, situation: Situation, decided_at: float) -> CrossingInProgress | None:
        """The crossing that this situation is in the middle of, if any. `decided_at` is on the monotonic clock."""
        if situation.came_from is None:
            return None
        return cls(situation.came_from, _hash_on_old_chip(situation, situation.came_from), decided_at)

    def note(self, event: AnyEvent) -> None:
        """Keep what matters of one event of the new worker."""
        if isinstance(event, Resumed):
            self._resumed = event
        elif isinstance(event, Canary):
            self._canary = event

    def event(self, to_chip: str) -> Crossing:
        """The finished crossing; call when the first step on the new chip is done."""
        assert self._resumed is not None, "a worker reports its resume before its first step"
        canary_seconds = self._canary.seconds if self._canary else 0.0
        return Crossing(
            from_chip=self._from_chip,
            to_chip=to_chip,
            step=self._resumed.step,
            state_hash_before=self._before,
            state_hash_after=self._resumed.state_hash,
            band=self._canary.band if self._canary else None,
            difference=self._canary.difference if self._canary else None,
            seconds=time.monotonic() - self._decided_at - canary_seconds,
            imports_seconds=self.imports_seconds,
            load_seconds=self._resumed.load_seconds,
            canary_seconds=canary_seconds,
        )


def _hash_on_old_chip(situation: Situation, old_chip: str) -> str:
    if situation.resume_step is not None:
        return situation.complete[situation.resume_step]
    # Nothing was ever held on the old chip when its worker never got as far as its initial state.
    return situation.initial_hashes.get(old_chip, "")
