"""The guard of one run: which checks are due in which step, and what they found.

The trainer calls it at fixed points of a step. It reads the run's tensors and changes none of them: with it and without
it a run is bitwise the same. Detectors live in the files beside this one; what each sees is in `docs/guard.md`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence

import torch

from beringia.chips.chip import Chip
from beringia.model import Decoder
from beringia.records.events import Alarm, CheckDone
from beringia.records.manifest import CleanCheck
from beringia.train.guard.capture import EMBEDDING, Capture, sites_of, weights_of
from beringia.train.guard.finding import Finding
from beringia.train.guard.schedule import BLOCK_STEPS, Schedule
from beringia.train.guard.shadow import Shadow
from beringia.train.guard.spikes import Spikes
from beringia.train.ranks import Ranks
from beringia.train.sharding import Sharding, sum_of_host_values

LARGEST_FLOAT32 = 3.4028234663852886e38
_REPORT_STEPS = 50
"""Checks that run in every step are reported once in so many steps, by the largest share of a bound that was used."""
WEIGHTS = {"shadow": 1.0}
"""How the share is divided among the kinds of checks."""


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
        self.sites = sites_of(decoder, mtp=mtp)
        self.seconds_in_step = 0.0
        self._decoder = decoder
        self._chip = chip
        self._ranks = ranks
        self._seed = seed
        self._schedule = Schedule(WEIGHTS, share)
        self._plan: list[int] = []
        self._turns = dict.fromkeys(WEIGHTS, 0)
        self._captures: list[Capture] = []
        self._all_demanded = False
        self._shadow = Shadow(decoder)
        self._spikes = Spikes(("loss", "mtp loss", "gradient") if mtp else ("loss", "gradient"))
        self._most_used: dict[str, Finding] = {}
        self._events: list[CheckDone | Alarm] = []
        self._step = 0
        self._started = 0.0
        # Row of each rank: the last step at which each site was clean, 0 for never.
        self._clean_RS = torch.zeros(ranks.count, len(self.sites), dtype=torch.int64)

    # Called by the trainer, in this order

    def begin_step(self, step: int) -> None:
        """Before the forward pass of step `step`: decide what is checked in it."""
        self._step = step
        self._started = time.perf_counter()
        self.seconds_in_step = 0.0
        with self._timed():
            if not self._plan:
                self._plan = self._next_block()
            due = self._schedule.due(self._plan.pop(0))
            self._captures = [Capture(self._decoder, site) for site in self._sites_due("shadow" in due)]

    def gradients_ready(self) -> None:
        """Gradients are complete, and not clipped yet."""
        if not self._captures:
            return
        for capture in self._captures:
            capture.close()
        self._chip.synchronize()  # waiting for the backward pass is not the checks' time
        with self._timed():
            for capture in self._captures:
                self._check_site(capture)
        if self._all_demanded:
            self._all_demanded = False
            self._exchange([])
        self._captures = []

    def before_update(self) -> None:
        """Gradients are clipped."""

    def after_update(self) -> None:
        """Weights and moments are those of this step."""

    def end_step(self, loss: float, mtp_loss: float | None, gradient_norm: float) -> None:
        """The step's numbers are on the host."""
        with self._timed():
            self._judge_numbers({"loss": loss, "mtp loss": mtp_loss, "gradient": gradient_norm})
        self._schedule.step_took(time.perf_counter() - self._started - self.seconds_in_step)

    # Called by the session

    def take_events(self) -> list[CheckDone | Alarm]:
        """What was found since the last call."""
        events, self._events = self._events, []
        return events

    def clean_since(self, step: int) -> tuple[CleanCheck, ...] | None:
        """One clean check of every site on every replica at a step after `step`, or None if one is missing.

        With several ranks, what the others found is known once a block of steps: a None may be old, a check never is.
        """
        if int(self._clean_RS.min()) <= step:
            return None
        return tuple(
            CleanCheck(site=site, replica=rank, step=clean)
            for rank, row in enumerate(self._clean_RS.tolist())
            for site, clean in zip(self.sites, row, strict=True)
        )

    def demand_all(self) -> None:
        """Check every site in the next step, whatever it costs."""
        self._all_demanded = True

    # Checks

    def _check_site(self, capture: Capture) -> None:
        if not capture.complete:
            return  # a part of the model that this step did not use
        started = time.perf_counter()
        weights = weights_of(self._decoder, capture.site)
        if capture.site == EMBEDDING:
            findings: list[Finding] = []
        else:
            findings = self._shadow.judge(capture, weights, self._draw("sample"))
        seconds = time.perf_counter() - started
        self._note_all(findings, seconds)
        self._schedule.check_took("shadow", seconds)
        if not any(finding.alarming for finding in findings):
            self._clean_RS[self._ranks.rank, self.sites.index(capture.site)] = self._step

    def _judge_numbers(self, values: dict[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None and not math.isfinite(value):
                self._note_all([Finding("non-finite", "model", name, value, LARGEST_FLOAT32, "the value")], 0.0)
        known = [value for name in self._spikes.names if (value := values[name]) is not None]
        if len(known) == len(self._spikes.names) and all(map(math.isfinite, known)):
            for finding in self._spikes.judge(known):
                self._note_frequent(finding)

    # Planning

    def _sites_due(self, shadow: bool) -> Sequence[str]:
        if self._all_demanded:
            return self.sites
        if not shadow:
            return ()
        turn = self._turns["shadow"]
        self._turns["shadow"] += 1
        return (self.sites[turn % len(self.sites)],)

    def _next_block(self) -> list[int]:
        plan = self._schedule.plan() if self._ranks.first else [0] * BLOCK_STEPS
        return plan if self._ranks.count == 1 else self._exchange(plan)

    def _exchange(self, plan: list[int]) -> list[int]:
        """Rank 0's plan to all, and every rank's clean steps to all, in one collective."""
        if self._ranks.count == 1:
            return plan
        plan = plan or [0] * BLOCK_STEPS
        own = self._clean_RS[self._ranks.rank]
        clean_RS = torch.zeros_like(self._clean_RS)
        clean_RS[self._ranks.rank] = own
        values = torch.cat((torch.tensor(plan, dtype=torch.int64), clean_RS.flatten()))
        values = sum_of_host_values(values, self._chip.device)
        self._clean_RS = values[BLOCK_STEPS:].view_as(clean_RS).clone()
        return [int(mask) for mask in values[:BLOCK_STEPS]]

    def _draw(self, purpose: str) -> int:
        """A number that all ranks draw alike, from seed and step."""
        digest = hashlib.sha256(f"{self._seed} {self._step} {purpose}".encode()).digest()
        return int.from_bytes(digest[:6], "little")

    # Events

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_in_step += time.perf_counter() - started

    def _note_all(self, findings: Sequence[Finding], seconds: float) -> None:
        """One event for the check, by the finding that used most of its bound; an alarm for the first beyond it.

        The first in the order of the computation: what comes after it may only have inherited the error.
        """
        if not findings:
            return
        self._events.append(max(findings, key=lambda finding: finding.used).check(self._step, seconds))
        alarming = [finding for finding in findings if finding.alarming]
        if alarming:
            self._events.append(alarming[0].alarm(self._step, others=[finding.tensor for finding in alarming[1:]]))

    def _note_frequent(self, finding: Finding) -> None:
        key = f"{finding.detector} {finding.site} {finding.tensor}"
        before = self._most_used.get(key)
        if before is None or finding.used > before.used:
            self._most_used[key] = finding
        if finding.alarming or self._step % _REPORT_STEPS == 0:
            self._note_all([self._most_used.pop(key)], 0.0)
