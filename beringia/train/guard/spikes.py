"""Sudden rises of the loss and of gradient norms, judged by the rises that came before.

Judged is the logarithm of a value over the running median. Gradient norms of sound runs rise a hundredfold now and
then, so no multiple of a typical deviation can be the bound: their tails are what matters, and they are estimated.
Beyond the quantile `TAIL_QUANTILE` rises are taken to fall off exponentially (peaks over a threshold, Pickands 1975);
the bound is where that tail leaves `FALSE_ALARMS_PER_VALUE`. The rate comes from the mean square of the excesses, which
few large ones among many small ones raise more than they raise the mean.

Only rises alarm: learning makes values fall fast, and that is no fault. Not seen: a rise slower than the window,
anything in the first steps, and every fault that leaves the norms alone (the layer shadow is for those).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from beringia.train.guard.finding import Finding

Floats = npt.NDArray[np.float64]

FALSE_ALARMS_PER_VALUE = 1e-9
TAIL_QUANTILE = 0.9
MEDIAN_STEPS = 64
"""Window of the median: it must follow a falling loss."""
TAIL_STEPS = 512
"""Window of the tail: it must have seen rare rises."""
FIRST_STEPS = 64
"""Values needed before anything is judged."""
SMALLEST_EXCESS = 0.05
"""Least mean excess that is believed of a loss (5 %): quiet stretches end."""
SMALLEST_GRADIENT_EXCESS = 0.3
"""The same of a gradient norm. In 2,000 sound steps of r2-nano norms of single layers rose up to 130-fold (e^4.9), also
after hundreds of quiet steps; this puts the bound at e^5.5 = 250-fold at least."""
_REFRESH_STEPS = 8
"""Steps between estimates, which cost more than comparing."""


class Spikes:
    """Running judgement of named positive values, one set a step.

    >>> spikes = Spikes(("loss", "gradient of layers.0"))
    >>> findings = spikes.judge((2.3, 0.7))     # empty in the first steps
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        least = [SMALLEST_GRADIENT_EXCESS if name.startswith("gradient") else SMALLEST_EXCESS for name in names]
        self._least_excess_N: Floats = np.array(least)
        self._logs_WN: Floats = np.zeros((MEDIAN_STEPS, len(self.names)))
        self._rises_WN: Floats = np.zeros((TAIL_STEPS, len(self.names)))
        self._count = 0
        self._median_N: Floats = np.zeros(len(self.names))
        self._bound_N: Floats = np.full(len(self.names), np.inf)

    def judge(self, values: Sequence[float]) -> list[Finding]:
        """Compare with what came before, then join it. One finding for each name after the first steps.

        A value beyond its bound does not join: it would widen what is believed of the next.
        """
        logs_N = np.log(np.maximum(np.asarray(values, dtype=np.float64), np.finfo(np.float64).tiny))
        if self._count % _REFRESH_STEPS == 0:
            self._estimate(logs_N)
        rises_N = logs_N - self._median_N
        findings = self._findings(rises_N) if self._count >= FIRST_STEPS else []
        beyond_N = rises_N > self._bound_N
        self._logs_WN[self._count % MEDIAN_STEPS] = np.where(beyond_N, self._median_N, logs_N)
        self._rises_WN[self._count % TAIL_STEPS] = np.where(beyond_N, 0.0, rises_N)
        self._count += 1
        return findings

    def _estimate(self, logs_N: Floats) -> None:
        self._median_N = np.median(self._logs_WN[: self._count], axis=0) if self._count else logs_N
        if self._count < FIRST_STEPS:
            return
        rises_WN = self._rises_WN[: self._count]
        quantile_N = np.quantile(rises_WN, TAIL_QUANTILE, axis=0)
        number = max(1.0, (1.0 - TAIL_QUANTILE) * len(rises_WN))
        squares_N = np.square(np.maximum(rises_WN - quantile_N, 0.0)).sum(axis=0) / number
        # The mean square of an exponential variable is twice the square of its mean; the mean of so many is uncertain
        # by one part in the root of their number, and two of these are allowed for.
        excess_N = np.maximum(np.sqrt(squares_N / 2.0) * (1.0 + 2.0 / math.sqrt(number)), self._least_excess_N)
        tail = math.log((1.0 - TAIL_QUANTILE) / FALSE_ALARMS_PER_VALUE)
        self._bound_N = np.maximum(quantile_N, 0.0) + tail * excess_N

    def _findings(self, rises_N: Floats) -> list[Finding]:
        return [
            Finding("spike", *_place(name), max(rise, 0.0), bound, "logarithm of the rise above the running median")
            for name, rise, bound in zip(self.names, rises_N.tolist(), self._bound_N.tolist(), strict=True)
        ]


def _place(name: str) -> tuple[str, str]:
    """Site and tensor: `gradient of layers.0` is about `layers.0`, `loss` about the whole model."""
    tensor, _, site = name.partition(" of ")
    return site or "model", tensor
