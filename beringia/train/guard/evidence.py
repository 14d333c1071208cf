"""Evidence that adds up: an error that no single sample betrays, but that comes again in sample after sample.

The bound of one sample (`shadow.py`) leaves room for what one draw of the roundings may do. A fault below it is no
chance when it is there every time. So each error of each sample is also held against `DRAWS` draws of the roundings of
that sample, replays in the chip's storage dtype. On a sound chip its own error, divided by `ALLOWED`, is one draw more
from the same distribution or a smaller one, so it is the largest of `DRAWS + 1` in at most one case of five. A score
goes up by one when it is the largest and down by one when it is not, and never below 0: each time 4 to the score is
multiplied by 4 or by 1/4, whose mean is 4/5 + 4/5 * 1/4 = 1, so it is a bet that cannot win on average. Started
anew whenever it has lost, such a bet reaches 4^n once in 4^n samples or more rarely (Shin, Ramdas and Rinaldo 2022,
arXiv 2203.03532, section 2: e-detectors). `BOUND` allows for one false alarm in 4^(BOUND + 1) = 4e12 samples of each
measured error: with 300 of them and 10,000 samples of each in a run, in one run of a million.
"""

from __future__ import annotations

ALLOWED = 2.0
"""How many times a draw of the CPU's roundings a sound chip's error may be in the same sample, always: it may round at
other places, and at up to four times as many (errors add up in squares). That a chip truncates what it stores is not
allowed for: every known one rounds conversions to nearest (`chips/catalogue/arithmetic`). Sound emulated H800, MI300X
and 910B used up to 0.61 of what this allows the relative error, and 0.93 of the largest element, in 415 samples."""
DRAWS = 4
BOUND = 20
"""Largest score that is believed to be chance."""

Place = tuple[str, str, str]
"""Site, tensor and measure."""


class Evidence:
    """The scores of everything that is measured, from the first visit on; a restart begins anew."""

    def __init__(self) -> None:
        self._scores: dict[Place, int] = {}

    def add(self, place: Place, *, largest: bool) -> None:
        """One more sample: whether the chip's error was larger than `ALLOWED` times every draw."""
        score = self._scores.get(place, 0)
        self._scores[place] = score + 1 if largest else max(0, score - 1)

    def score(self, place: Place) -> int:
        """Samples that speak for a fault, net."""
        return self._scores.get(place, 0)
