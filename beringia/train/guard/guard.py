"""The guard of one run: brings the checks that are due to the moments of a step, and tells what they found.

The trainer calls it at fixed points of a step. It reads the run's tensors and changes none of them: with it and without
it a run is bitwise the same. It knows no check: they are the files in `checks/`, of the shape that `check.py` has. What
each sees is in `docs/guard.md`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from beringia.chips.chip import Chip
from beringia.data import Batch
from beringia.model import Decoder, Targets
from beringia.numerics.keyed_sum import open_kernel
from beringia.processes.ranks import Ranks
from beringia.records.events import Alarm, CheckDone
from beringia.records.manifest import CleanCheck
from beringia.records.orders import StepNumbers
from beringia.train.clipping import Clipping
from beringia.train.guard.capture import sites_of
from beringia.train.guard.check import GRADIENT, Check, Moment, Step, Training
from beringia.train.guard.checks import all_checks
from beringia.train.guard.events import Events
from beringia.train.guard.given import Given
from beringia.train.guard.schedule import BLOCK_STEPS, Schedule
from beringia.train.guard.trust import Trust
from beringia.train.objective import LOSS, MTP_LOSS, Objective
from beringia.train.sharding import Sharding


@dataclass
class Seen:
    """What a check looked at and has not judged to the end."""

    check: Check[Any]
    look: Any
    seconds: float
    moments: tuple[Moment, ...]
    """At which it is still to be judged."""


class Guard:
    """Checks inside training, within `share` of the step time."""

    def __init__(
        self,
        decoder: Decoder,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        chip: Chip,
        ranks: Ranks,
        *,
        share: float,
        seed: int,
        sharding: Sharding,
        clipping: Clipping | None = None,
        checks: Sequence[type[Check[Any]]] | None = None,
    ) -> None:
        """`clipping`: what clips the gradients, for its numbers to be checked; `checks`: other ones than all that have
        a file."""
        self.sites = sites_of(decoder, mtp=objective.looks_ahead)
        self.seconds_in_step = self._charged_seconds = 0.0
        training = Training(decoder, optimizer, objective, chip, ranks, sharding, self.sites, clipping)
        self.checks = [check(training) for check in (all_checks() if checks is None else checks)]
        self._chip = chip
        self._ranks = ranks
        self._schedule = Schedule({c.name: c.when.weight for c in self.checks if not c.when.every_step}, share)
        self._plan: list[int] = []
        self._due: list[Check[Any]] = []
        self._seen: list[Seen] = []
        self._events = Events()
        self._trust = Trust(self.sites, ranks, chip.device)
        self.seed = seed
        self._demanded: tuple[str, ...] = ()
        self._accepted_spikes: tuple[int, ...] = ()
        self._compiled = False
        self._step = Step(0, seed)
        self._started = 0.0
        open_kernel()  # compiled here and not in some step

    # Called by the trainer, in this order

    def begin_step(self, step: int) -> None:
        """Before the forward pass of step `step`: decide what is checked in it."""
        self._step = Step(step, self.seed, self._demanded, self._compiled, self._accepted_spikes)
        self._started = time.perf_counter()
        self.seconds_in_step = self._charged_seconds = 0.0
        with self._timed():
            if not self._plan:
                self._plan = self._next_block()
            self._due = self._checks_due(self._schedule.due(self._plan.pop(0)))
        self._reach(Moment.FORWARD)

    def given(self, batches: Sequence[Batch], targets: Sequence[Targets]) -> None:
        """What the host gives this rank in the step, by accumulation step."""
        self._step.given = tuple(Given(b.tokens_BT, t) for b, t in zip(batches, targets, strict=True))

    def gradients_ready(self) -> None:
        """Gradients are complete, and not clipped yet."""
        self._step.hooks.close()
        self._reach(Moment.GRADIENTS)
        if self._demanded:
            self._demanded = ()
            self._trust.exchange([])

    def before_update(self) -> None:
        """Gradients are clipped."""
        self._reach(Moment.BEFORE_UPDATE)

    def after_update(self) -> None:
        """Weights and moments are those of this step."""
        self._reach(Moment.AFTER_UPDATE)

    def end_step(self, terms: Mapping[str, float], gradient_norm: float, group_norms: Mapping[str, float]) -> None:
        """The step's numbers are on the host."""
        self._step.numbers = {LOSS: terms[LOSS], GRADIENT: gradient_norm, **terms}
        self._step.layer_numbers = {f"{GRADIENT} of {name}": norm for name, norm in group_norms.items()}
        self._reach(Moment.END)
        step_seconds = time.perf_counter() - self._started - self.seconds_in_step
        self._schedule.step_took(step_seconds, self.seconds_in_step - self._charged_seconds)

    # Called by the session

    def take_events(self) -> list[CheckDone | Alarm]:
        """What was found since the last call."""
        return self._events.take()

    def clean_since(self, step: int) -> tuple[CleanCheck, ...] | None:
        """One clean check of every site on every replica at a step after `step`, or None if one is missing.

        With several ranks, what the others found is known once a block of steps: a None may be old, a check never is.
        """
        return self._trust.since(step)

    def expect_compiled(self) -> None:
        """Parts of the layers are compiled from now on; their hooks stay outside the compiled code."""
        self._compiled = True

    def remember(self, recent: Sequence[StepNumbers]) -> None:
        """What earlier steps were like, oldest first: spikes are judged by it from the first step on."""
        earlier = [_numbers(step) for step in recent]
        for check in self.checks:
            check.remember(earlier)

    def accept_spikes(self, steps: Sequence[int]) -> None:
        """Spikes from these steps on are known: they are reported, and are no alarm until the median has followed."""
        self._accepted_spikes = tuple(steps)

    def explained(self) -> None:
        """The data explain every spike of the step that was just taken."""
        for check in self.checks:
            check.explained()

    def demand(self, sites: Sequence[str]) -> None:
        """Check these sites in the next step, and no others, whatever it costs."""
        self._demanded = tuple(sites)

    # Checks

    def _checks_due(self, planned: tuple[str, ...]) -> list[Check[Any]]:
        if self._step.demanded:
            return [check for check in self.checks if check.vouches]
        return [check for check in self.checks if check.when.every_step or check.name in planned]

    def _reach(self, moment: Moment) -> None:
        """Judge what waited for this moment, then look at what is due at it."""
        waiting = [seen for seen in self._seen if seen.moments[0] is moment]
        looking = [check for check in self._due if check.when.look is moment]
        if not waiting and not looking:
            return
        if moment.waits:
            self._chip.synchronize()
        self._step.moment = moment
        with self._timed():
            for seen in waiting:
                self._judge(seen)
            for check in looking:
                for seen in self._look(check):
                    if seen.moments[0] is moment:
                        self._judge(seen)
        self._seen = [seen for seen in self._seen if seen.moments]

    def _look(self, check: Check[Any]) -> list[Seen]:
        started = time.perf_counter()
        looks = check.look(self._step)
        seconds = (time.perf_counter() - started) / max(1, len(looks))
        seen = [Seen(check, look, seconds, check.when.judge) for look in looks]
        self._seen += seen
        return seen

    def _judge(self, seen: Seen) -> None:
        started = time.perf_counter()
        findings = seen.check.judge(seen.look, self._step)
        seen.seconds += time.perf_counter() - started
        seen.moments = seen.moments[1:]
        if seen.check.when.every_step:
            self._events.note_every_step(findings, self._step.number)
            return
        self._events.note(findings, self._step.number, 0.0 if seen.moments else seen.seconds)
        if findings and not seen.moments:
            self._charge(seen)
        if seen.check.vouches and findings and not any(finding.alarming for finding in findings):
            self._trust.clean(findings[0].site, self._step.number)

    def _charge(self, seen: Seen) -> None:
        self._charged_seconds += seen.seconds
        self._schedule.check_took(seen.check.name, seen.seconds)

    def _next_block(self) -> list[int]:
        return self._trust.exchange(self._schedule.plan() if self._ranks.first else [0] * BLOCK_STEPS)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_in_step += time.perf_counter() - started


def _numbers(step: StepNumbers) -> dict[str, float]:
    """What is told of an earlier step, by name."""
    numbers = {LOSS: step.loss, GRADIENT: step.gradient_norm}
    return numbers if step.mtp_loss is None else numbers | {MTP_LOSS: step.mtp_loss}
