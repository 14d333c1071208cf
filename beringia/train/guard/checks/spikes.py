"""Sudden rises of the loss and of gradient norms, judged by the rises that came before.

Judged is the logarithm of a value over the running median: of the step itself, and the least of the last
`LASTING_STEPS` steps. Single batches are hard now and then, and norms of single layers rise a hundredfold in sound
runs; but what is wrong with the weights stays, and a sound rise that stays is small: a lasting one alarms much earlier.

Neither can be bounded by a multiple of a typical deviation: the tail is what matters. Large rises are taken to fall off
exponentially, so the largest of n is about s ln(n) for the tail's scale s, and the bound, s ln(1 / p) for the false
alarms p that are allowed, is ln(1 / p) / ln(n) times the largest rise of the last `TAIL_STEPS`: 5 times after 64 steps,
3.3 times after 512.

Only rises alarm: learning makes values fall fast, and that is no fault. Not seen: a rise slower than the window,
anything in the first steps, and every fault that leaves the norms alone (the layer shadow is for those).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from beringia.records.events import SPIKE
from beringia.train.guard.check import GRADIENT, Check, Moment, Step, Training, When
from beringia.train.guard.finding import Finding
from beringia.train.objective import Rise

Floats = npt.NDArray[np.float64]

FALSE_ALARMS_PER_VALUE = 1e-9
MEDIAN_STEPS = 64
"""Window of the median: it must follow a falling loss."""
TAIL_STEPS = 512
"""Window of the largest rise: it must have seen rare ones."""
FIRST_STEPS = 64
"""Values needed before anything is judged."""
LASTING_STEPS = 4
LEAST_GRADIENT_RISE = Rise(sudden=6.0, lasting=5.0)
"""Smallest bounds of gradient norms (those of the objective's terms are its own): quiet stretches end, and what is
normal after one was not seen in it. Up to 400 times the median, or 150 times for four steps, no rise is believed to be
a fault. In thousands of sound steps of r2-nano norms of single layers rose up to 130-fold (e^4.9), also after hundreds
of quiet steps, and stayed up to 16-fold (e^2.8) at a learning rate of 0.01; at 0.04 the embedding's stayed 73-fold
(e^4.3) in a model with grouped queries and experts."""
_REFRESH_STEPS = 8
"""Steps between estimates, which cost more than comparing."""
_WHAT = (
    "logarithm of the rise above the running median",
    f"logarithm of the least rise above the running median in the last {LASTING_STEPS} steps",
)


Numbers = Mapping[str, float]


class SpikeTest(Check[tuple[Numbers, Numbers]]):
    """Terms of the objective that have a rise, and norms of gradients."""

    name = SPIKE
    when = When(look=Moment.END, judge=(Moment.END,), order=210)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        rises = {term.name: term.rise for term in training.objective.terms if term.rise is not None}
        # Apart, since after a restart only the numbers of the whole model are known.
        self._model = Spikes({GRADIENT: LEAST_GRADIENT_RISE, **rises})
        self._layers: Spikes | None = None

    def look(self, step: Step) -> Sequence[tuple[Numbers, Numbers]]:
        return [(step.numbers, step.layer_numbers)]

    def judge(self, look: tuple[Numbers, Numbers], step: Step) -> Sequence[Finding]:
        model, layers = look
        if self._layers is None:
            self._layers = Spikes(dict.fromkeys(layers, LEAST_GRADIENT_RISE))
        accepted = any(first <= step.number < first + MEDIAN_STEPS for first in step.accepted_spikes)
        findings = self._model.judge(model) + self._layers.judge(layers)
        return [replace(finding, accepted=True) for finding in findings] if accepted else findings

    def explained(self) -> None:
        self._model.explained()
        if self._layers is not None:
            self._layers.explained()

    def remember(self, earlier: Sequence[Numbers]) -> None:
        for numbers in earlier:
            self._model.judge(numbers)


class Spikes:
    """Running judgement of named positive values, one set a step; `rises` are the smallest bounds of each.

    >>> spikes = Spikes({"loss": Rise(0.9, 0.35), "gradient of layers.0": LEAST_GRADIENT_RISE})
    >>> findings = spikes.judge({"loss": 2.3, "gradient of layers.0": 0.7})     # empty in the first steps
    """

    def __init__(self, rises: Mapping[str, Rise]) -> None:
        self.names = tuple(rises)
        self._least_2N: Floats = np.array([(rise.sudden, rise.lasting) for rise in rises.values()]).T
        self._logs_WN: Floats = np.zeros((MEDIAN_STEPS, len(self.names)))
        self._rises_W2N: Floats = np.zeros((TAIL_STEPS, 2, len(self.names)))
        self._last_LN: Floats = np.zeros((LASTING_STEPS, len(self.names)))
        self._count = 0
        self._median_N: Floats = np.zeros(len(self.names))
        self._bound_2N: Floats = np.full((2, len(self.names)), np.inf)

    def judge(self, values: Mapping[str, float]) -> list[Finding]:
        """Compare with what came before, then join it. Two findings for each name after the first steps.

        A value beyond its bound does not join: it would widen what is believed of the next. Of a set in which one is
        missing or not finite, nothing is judged.
        """
        values_N = np.array([values.get(name, math.nan) for name in self.names])
        if not np.isfinite(values_N).all():
            return []
        logs_N = np.log(np.maximum(values_N, np.finfo(np.float64).tiny))
        if self._count % _REFRESH_STEPS == 0:
            self._estimate(logs_N)
        self._last_LN[self._count % LASTING_STEPS] = logs_N - self._median_N
        rises_2N = np.stack((logs_N - self._median_N, self._last_LN.min(axis=0)))
        findings = self._findings(rises_2N) if self._count >= FIRST_STEPS else []
        beyond_2N = rises_2N > self._bound_2N
        self._logs_WN[self._count % MEDIAN_STEPS] = np.where(beyond_2N.any(axis=0), self._median_N, logs_N)
        self._rises_W2N[self._count % TAIL_STEPS] = np.where(beyond_2N, 0.0, rises_2N)
        self._count += 1
        return findings

    def explained(self) -> None:
        """The newest values are a hard batch's: a rise that lasts is one of as many other steps. What a hard batch does
        to the weights at a high learning rate may take a step or two to be learned away."""
        self._last_LN[(self._count - 1) % LASTING_STEPS] = 0.0

    def _estimate(self, logs_N: Floats) -> None:
        self._median_N = np.median(self._logs_WN[: self._count], axis=0) if self._count else logs_N
        if self._count < FIRST_STEPS:
            return
        rises_W2N = self._rises_W2N[: self._count]
        factor = math.log(1.0 / FALSE_ALARMS_PER_VALUE) / math.log(len(rises_W2N))
        self._bound_2N = np.maximum(factor * rises_W2N.max(axis=0), self._least_2N)

    def _findings(self, rises_2N: Floats) -> list[Finding]:
        return [
            Finding(SPIKE, *_place(name), max(rise, 0.0), bound, what)
            for rises_N, bounds_N, what in zip(rises_2N.tolist(), self._bound_2N.tolist(), _WHAT, strict=True)
            for name, rise, bound in zip(self.names, rises_N, bounds_N, strict=True)
        ]


def number_name(site: str, tensor: str) -> str:
    """The number's name in `Step.numbers` or `Step.layer_numbers` that a finding is about."""
    return tensor if site == "model" else f"{tensor} of {site}"


def _place(name: str) -> tuple[str, str]:
    """Site and tensor: `gradient of layers.0` is about `layers.0`, `loss` about the whole model."""
    tensor, _, site = name.partition(" of ")
    return site or "model", tensor
