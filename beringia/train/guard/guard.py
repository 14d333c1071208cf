"""The guard of one run: which checks are due in which step, and what they found.

The trainer calls it at fixed points of a step. It reads the run's tensors and changes none of them: with it and without
it a run is bitwise the same. Detectors live in the files beside this one.
"""

from __future__ import annotations

import math
import time

import torch

from beringia.chips.chip import Chip
from beringia.model import Decoder
from beringia.records.events import Alarm, CheckDone
from beringia.records.manifest import CleanCheck
from beringia.train.guard.finding import Finding
from beringia.train.guard.spikes import Spikes
from beringia.train.ranks import Ranks
from beringia.train.sharding import Sharding

LARGEST_FLOAT32 = 3.4028234663852886e38
_REPORT_STEPS = 50
"""Checks that run in every step are reported once in so many steps, by the largest share of a bound that was used."""


class Guard:
    """Checks inside training, within `share` of the step time."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: torch.optim.Optimizer,
        chip: Chip,
        ranks: Ranks,
        *,
        share: float,
        seed: int,
        sharding: Sharding,
        mtp: bool,
    ) -> None:
        self.seconds_in_step = 0.0
        self._step = 0
        self._events: list[CheckDone | Alarm] = []
        self._spikes = Spikes(("loss", "mtp loss", "gradient") if mtp else ("loss", "gradient"))
        self._most_used: dict[str, Finding] = {}
        self.sites: tuple[str, ...] = tuple(f"layers.{index}" for index in range(len(decoder.model.layers)))

    def begin_step(self, step: int) -> None:
        """Before the forward pass of step `step`: decide what is checked in it."""
        self._step = step
        self.seconds_in_step = 0.0

    def before_update(self) -> None:
        """Gradients are complete and clipped."""

    def after_update(self) -> None:
        """Weights and moments are those of this step."""

    def end_step(self, loss: float, mtp_loss: float | None, gradient_norm: float) -> None:
        """The step's numbers are on the host."""
        started = time.perf_counter()
        values = {"loss": loss, "mtp loss": mtp_loss, "gradient": gradient_norm}
        wanted = [values[name] for name in self._spikes.names]
        known = [value for value in wanted if value is not None]
        for finding in self._non_finite(values):
            self._note(finding)
        if len(known) == len(self._spikes.names) and all(map(math.isfinite, known)):
            for finding in self._spikes.judge(known):
                self._note_frequent(finding)
        self.seconds_in_step += time.perf_counter() - started

    def take_events(self) -> list[CheckDone | Alarm]:
        """What was found since the last call."""
        events, self._events = self._events, []
        return events

    def clean_since(self, step: int) -> tuple[CleanCheck, ...] | None:
        """One clean check of every site on every replica at a step after `step`, or None if one is missing."""
        return None

    def demand_all(self) -> None:
        """Check every site in the next step."""

    def _non_finite(self, values: dict[str, float | None]) -> list[Finding]:
        return [
            Finding("non-finite", "model", name, value, LARGEST_FLOAT32, "the value")
            for name, value in values.items()
            if value is not None and not math.isfinite(value)
        ]

    def _note(self, finding: Finding, seconds: float = 0.0) -> None:
        self._events.append(finding.check(self._step, seconds))
        if finding.alarming:
            self._events.append(finding.alarm(self._step))

    def _note_frequent(self, finding: Finding) -> None:
        key = f"{finding.detector} {finding.site} {finding.tensor}"
        before = self._most_used.get(key)
        if before is None or finding.used > before.used:
            self._most_used[key] = finding
        if finding.alarming or self._step % _REPORT_STEPS == 0:
            self._note(self._most_used.pop(key))
