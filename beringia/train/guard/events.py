"""What checks found, as the events that say so."""

from __future__ import annotations

from collections.abc import Sequence

from beringia.records.events import Alarm, CheckDone
from beringia.train.guard.finding import Finding

_REPORT_STEPS = 50
"""Checks that run in every step are reported once in so many steps, by the largest share of a bound that was used."""


class Events:
    """Collects events until somebody takes them."""

    def __init__(self) -> None:
        self._events: list[CheckDone | Alarm] = []
        self._most_used: dict[str, Finding] = {}

    def take(self) -> list[CheckDone | Alarm]:
        """What came since the last call."""
        events, self._events = self._events, []
        return events

    def note(self, findings: Sequence[Finding], step: int, seconds: float) -> None:
        """One event for the check, by the finding that used most of its bound; an alarm for the first beyond it.

        The first in the order of the computation: what comes after it may only have inherited the error.
        """
        if not findings:
            return
        self._events.append(max(findings, key=lambda finding: finding.used).check(step, seconds))
        alarming = [finding for finding in findings if finding.alarming]
        if alarming:
            self._events.append(alarming[0].alarm(step, others=[finding.tensor for finding in alarming[1:]]))

    def note_every_step(self, findings: Sequence[Finding], step: int) -> None:
        """Each finding by itself: at once where it is beyond its bound, else now and then the one that used most."""
        for finding in findings:
            key = f"{finding.detector} {finding.site} {finding.tensor}"
            before = self._most_used.get(key)
            if before is None or finding.used > before.used:
                self._most_used[key] = finding
            if finding.beyond or step % _REPORT_STEPS == 0:
                self.note([self._most_used.pop(key)], step, 0.0)
