"""Sudden rises of the loss and of gradient norms, judged by the values that came before.

Logarithms are compared, with the median and the median absolute deviation (MAD) of a window, both of which a few
outliers cannot move. Only rises alarm: learning makes values fall fast, and that is no fault. Not seen: a rise slower
than the window, anything in the first steps, and every fault that leaves the norms alone (the layer shadow is for
those).

The threshold allows for tails that fall exponentially and no faster: with P(x > k MAD) = 2^-k / 2 (Laplace's
distribution, in which the MAD is the scale times ln 2), one false alarm in 10^9 values needs k = 29.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from beringia.train.guard.finding import Finding

Floats = npt.NDArray[np.float64]

FALSE_ALARMS_PER_VALUE = 1e-9
DEVIATIONS_ALLOWED = math.log2(0.5 / FALSE_ALARMS_PER_VALUE)
WINDOW_STEPS = 64
_FIRST_STEPS = 32
"""Values needed before anything is judged: fewer give a MAD that is often far too small."""
_REFRESH_STEPS = 8
"""Steps between recomputing median and MAD, which cost more than comparing."""
_SMALLEST_DEVIATION = 0.05
"""Least MAD of a logarithm that is believed (5 %): quiet stretches end. A rise below e^(29 x 0.05) = 4.3 never
alarms."""


class Spikes:
    """Running judgement of named positive values, one set a step.

    >>> spikes = Spikes(("loss", "gradient of layers.0"))
    >>> findings = spikes.judge((2.3, 0.7))     # empty in the first steps
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._logs_WN: Floats = np.zeros((WINDOW_STEPS, len(self.names)))
        self._count = 0
        self._median_N: Floats = np.zeros(len(self.names))
        self._limit_N: Floats = np.full(len(self.names), np.inf)

    def judge(self, values: Sequence[float]) -> list[Finding]:
        """Compare with the window, then join it. One finding for each name once the window has enough values.

        A value beyond its limit does not join: it would widen what is believed of the next.
        """
        logs_N = np.log(np.maximum(np.asarray(values, dtype=np.float64), np.finfo(np.float64).tiny))
        if self._count % _REFRESH_STEPS == 0 and self._count >= _FIRST_STEPS:
            self._refresh()
        judged = self._count >= _FIRST_STEPS
        findings = self._findings(logs_N) if judged else []
        place = self._count % WINDOW_STEPS
        joining_N = ~(logs_N > self._median_N + self._limit_N) if judged else slice(None)
        self._logs_WN[place] = self._median_N
        self._logs_WN[place, joining_N] = logs_N[joining_N]
        self._count += 1
        return findings

    def _refresh(self) -> None:
        logs_WN = self._logs_WN[: min(self._count, WINDOW_STEPS)]
        self._median_N = np.median(logs_WN, axis=0)
        deviation_N = np.median(np.abs(logs_WN - self._median_N), axis=0)
        self._limit_N = DEVIATIONS_ALLOWED * np.maximum(deviation_N, _SMALLEST_DEVIATION)

    def _findings(self, logs_N: Floats) -> list[Finding]:
        rises = (logs_N - self._median_N).tolist()
        limits = self._limit_N.tolist()
        return [
            Finding("spike", *_place(name), max(rise, 0.0), limit, "logarithm of the rise above the running median")
            for name, rise, limit in zip(self.names, rises, limits, strict=True)
        ]


def _place(name: str) -> tuple[str, str]:
    """Site and tensor: `gradient of layers.0` is about `layers.0`, `loss` about the whole model."""
    tensor, _, site = name.partition(" of ")
    return site or "model", tensor
