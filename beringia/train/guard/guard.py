"""The guard of one run: which checks are due in which step, and what they found.

The trainer calls it at fixed points of a step. It reads the run's tensors and changes none of them: with it and without
it a run is bitwise the same. Detectors live in the files beside this one; what each sees is in `docs/guard.md`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from beringia.chips.chip import Chip
from beringia.model import Decoder
from beringia.numerics.keyed_sum import open_kernel
from beringia.processes.ranks import Ranks
from beringia.records.events import Alarm, CheckDone
from beringia.records.manifest import CleanCheck
from beringia.records.messages import StepNumbers
from beringia.train.guard import embedding
from beringia.train.guard.capture import EMBEDDING, Capture, sites_of, weights_of
from beringia.train.guard.finding import Finding
from beringia.train.guard.memory import Piece, judge_replicas, judge_rest, pieces_of, words
from beringia.train.guard.repeat import Repeat
from beringia.train.guard.schedule import BLOCK_STEPS, Schedule
from beringia.train.guard.shadow import Shadow
from beringia.train.guard.spikes import MEDIAN_STEPS, Spikes
from beringia.train.guard.update import Before, look
from beringia.train.guard.update import judge as judge_update
from beringia.train.optimizer import moments
from beringia.train.sharding import Sharding, sum_of_host_values, whole

Item = TypeVar("Item")

LARGEST_FLOAT32 = 3.4028234663852886e38
_REPORT_STEPS = 50
"""Checks that run in every step are reported once in so many steps, by the largest share of a bound that was used."""
SHADOW, REPEAT, UPDATE, MEMORY = "shadow", "repeat", "update", "memory"
WEIGHTS = {SHADOW: 0.4, REPEAT: 0.4, UPDATE: 0.05, MEMORY: 0.15}
"""How the share is divided among the kinds of checks. A repeat costs
several shadows, and both must come by every layer."""


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
        self.seconds_in_step = self._charged_seconds = 0.0
        self._decoder = decoder
        self._optimizer = optimizer
        self._chip = chip
        self._ranks = ranks
        self._seed = seed
        self._schedule = Schedule(WEIGHTS, share)
        self._plan: list[int] = []
        self._due: tuple[str, ...] = ()
        self._turns = dict.fromkeys(WEIGHTS, 0)
        self._demanded: Sequence[str] = ()
        self._shadow = Shadow(decoder)
        self._repeat = Repeat(decoder, sharded=sharding == "fsdp2", alone=ranks.count == 1)
        self._captures: list[tuple[str, Capture]] = []
        self._parameters = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
        self._update: Before | None = None
        self._pieces = pieces_of((*decoder.named_parameters(), *moments(decoder.named_parameters(), optimizer)))
        self._replicated = sharding == "ddp"
        self._resting: tuple[Piece, list[int], float] | None = None
        # Apart, since after a restart only the numbers of the whole model are known.
        self._model_spikes = Spikes(("loss", "gradient", "mtp loss") if mtp else ("loss", "gradient"))
        self._layer_spikes: Spikes | None = None
        self._accepted_spikes: tuple[int, ...] = ()
        self._most_used: dict[str, Finding] = {}
        self._events: list[CheckDone | Alarm] = []
        self._step = 0
        self._started = 0.0
        # Row of each rank: the last step at which each site was clean, 0 for never.
        self._clean_RS = torch.zeros(ranks.count, len(self.sites), dtype=torch.int64)
        open_kernel()  # compiled here and not in some step

    # Called by the trainer, in this order

    def begin_step(self, step: int) -> None:
        """Before the forward pass of step `step`: decide what is checked in it."""
        self._step = step
        self._started = time.perf_counter()
        self.seconds_in_step = self._charged_seconds = 0.0
        with self._timed():
            if not self._plan:
                self._plan = self._next_block()
            self._due = self._schedule.due(self._plan.pop(0))
            self._captures = [(kind, Capture(self._decoder, site)) for kind, site in self._sites_due()]

    def gradients_ready(self) -> None:
        """Gradients are complete, and not clipped yet."""
        if not self._captures:
            return
        for _, capture in self._captures:
            capture.close()
        self._chip.synchronize()  # waiting for the backward pass is not the checks' time
        with self._timed():
            for kind, capture in self._captures:
                self._check_site(kind, capture)
        self._captures = []
        if self._demanded:
            self._demanded = ()
            self._exchange([])

    def before_update(self) -> None:
        """Gradients are clipped."""
        if self._resting is None and UPDATE not in self._due:
            return
        self._chip.synchronize()
        with self._timed():
            if self._resting is not None:
                self._wake()
            if UPDATE in self._due:
                name, parameter = self._turn(UPDATE, self._parameters)
                self._update = look(self._optimizer, name, parameter, self._draw("slice"))

    def after_update(self) -> None:
        """Weights and moments are those of this step."""
        if self._update is None and MEMORY not in self._due:
            return
        self._chip.synchronize()
        with self._timed():
            if self._update is not None:
                self._judge_update(self._update)
            if MEMORY in self._due:
                self._lay_to_rest()

    def end_step(
        self, loss: float, mtp_loss: float | None, gradient_norm: float, group_norms: Mapping[str, float]
    ) -> None:
        """The step's numbers are on the host."""
        with self._timed():
            layers = {f"gradient of {name}": norm for name, norm in group_norms.items()}
            self._judge_numbers(_numbers(loss, mtp_loss, gradient_norm), layers)
        step_seconds = time.perf_counter() - self._started - self.seconds_in_step
        self._schedule.step_took(step_seconds, self.seconds_in_step - self._charged_seconds)

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

    def expect_compiled(self) -> None:
        """Parts of the layers are compiled from now on; their hooks stay outside the compiled code."""
        self._repeat.compiled = True

    def remember(self, recent: Sequence[StepNumbers]) -> None:
        """What earlier steps were like, oldest first: spikes are judged by it from the first step on."""
        for step in recent:
            self._model_spikes.judge(_numbers(step.loss, step.mtp_loss, step.gradient_norm))

    def accept_spikes(self, steps: Sequence[int]) -> None:
        """Spikes from these steps on are known: they are reported, and are no alarm until the median has followed."""
        self._accepted_spikes = tuple(steps)

    def demand(self, sites: Sequence[str]) -> None:
        """Check these sites in the next step, and no others, whatever it costs."""
        self._demanded = sites

    # Checks

    def _check_site(self, kind: str, capture: Capture) -> None:
        if not capture.complete:
            return  # a part of the model that this step did not use
        with self._charged(kind) as findings:
            weights = weights_of(self._decoder, capture.site)
            if kind == REPEAT:
                findings += self._repeat.judge(capture, weights, self._draw("products"))
            elif capture.site == EMBEDDING:
                findings += self._judge_embedding(capture, weights)
            else:
                findings += self._shadow.judge(capture, weights, self._draw("sample"))
        if kind == SHADOW and not any(finding.alarming for finding in findings):
            self._clean_RS[self._ranks.rank, self.sites.index(capture.site)] = self._step

    def _judge_embedding(self, capture: Capture, weights: Mapping[str, torch.Tensor]) -> list[Finding]:
        calls = capture.calls[EMBEDDING]
        table_VD = weights[f"{EMBEDDING}.weight"]
        findings = [embedding.judge_rows(calls, table_VD, self._draw("sample"))]
        gradient = self._decoder.model.embed_tokens.weight.grad
        if gradient is not None and not self._decoder.config.tie_word_embeddings:
            projection = embedding.Projection(calls, table_VD.shape, self._draw("signs"))
            # Ranks average their gradients, so the sum of what they expect is shared out alike.
            expected_V = sum_of_host_values(projection.expected_V, self._chip.device) / self._ranks.count
            findings.append(projection.judge(whole(gradient), expected_V))
        return findings

    def _judge_update(self, before: Before) -> None:
        with self._charged(UPDATE) as findings:
            findings += judge_update(self._optimizer, before)
        self._update = None

    def _lay_to_rest(self) -> None:
        started = time.perf_counter()
        piece = self._turn(MEMORY, self._pieces)
        hashes = piece.hashes()
        if self._replicated:
            words_RS2 = torch.zeros(self._ranks.count, len(hashes), 2, dtype=torch.int64)
            words_RS2[self._ranks.rank] = words(hashes)
            self._note_all(judge_replicas(piece, sum_of_host_values(words_RS2, self._chip.device)), 0.0)
        self._resting = piece, hashes, time.perf_counter() - started

    def _wake(self) -> None:
        assert self._resting is not None
        started = time.perf_counter()
        piece, before, seconds = self._resting
        self._resting = None
        findings = judge_rest(piece, before, piece.hashes())
        seconds += time.perf_counter() - started
        self._note_all(findings, seconds)
        self._charge(MEMORY, seconds)

    def _judge_numbers(self, model: Mapping[str, float], layers: Mapping[str, float]) -> None:
        for name, value in (*model.items(), *layers.items()):
            if not math.isfinite(value):
                self._note_all([Finding("non-finite", "model", name, value, LARGEST_FLOAT32, "the value")], 0.0)
        if self._layer_spikes is None:
            self._layer_spikes = Spikes(tuple(layers))
        for spikes, values in ((self._model_spikes, model), (self._layer_spikes, layers)):
            for finding in spikes.judge(values):
                self._note_frequent(finding)

    # Planning

    def _sites_due(self) -> list[tuple[str, str]]:
        if self._demanded:
            return [(SHADOW, site) for site in self._demanded]
        due = []
        if SHADOW in self._due:
            due.append((SHADOW, self._turn(SHADOW, self.sites)))
        if REPEAT in self._due:
            due.append((REPEAT, self._turn(REPEAT, self.sites[1:-1])))  # the two ends have nothing to repeat
        return due

    def _turn(self, kind: str, items: Sequence[Item]) -> Item:
        """The item whose turn it is; all ranks count alike."""
        number = self._turns[kind]
        self._turns[kind] += 1
        return items[number % len(items)]

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
    def _charged(self, kind: str) -> Iterator[list[Finding]]:
        """Around one check: gives the list for its findings, then reports them and charges the kind's account."""
        started = time.perf_counter()
        findings: list[Finding] = []
        yield findings
        seconds = time.perf_counter() - started
        self._note_all(findings, seconds)
        self._charge(kind, seconds)

    def _charge(self, kind: str, seconds: float) -> None:
        self._charged_seconds += seconds
        self._schedule.check_took(kind, seconds)

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
        if finding.alarming and self._spike_accepted():
            self._events.append(self._most_used.pop(key).check(self._step, 0.0))
        elif finding.alarming or self._step % _REPORT_STEPS == 0:
            self._note_all([self._most_used.pop(key)], 0.0)

    def _spike_accepted(self) -> bool:
        return any(step <= self._step < step + MEDIAN_STEPS for step in self._accepted_spikes)


def _numbers(loss: float, mtp_loss: float | None, gradient_norm: float) -> dict[str, float]:
    """A step's numbers of the whole model, by name."""
    numbers = {"loss": loss, "gradient": gradient_norm}
    return numbers if mtp_loss is None else numbers | {"mtp loss": mtp_loss}
