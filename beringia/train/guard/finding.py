"""What one check found, and the events that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from beringia.records.events import Alarm, CheckDone

LARGEST_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True)
class Finding:
    """A measured value beside the bound that it must not exceed."""

    detector: str
    site: str
    """Module path (`layers.0`), or what else was looked at."""
    tensor: str
    value: float
    bound: float
    what: str
    """What `value` is, to be read before the numbers: `relative error against the float64 replay`."""
    accepted: bool = False
    """Whether it is known, and reported without an alarm however large it is."""

    @property
    def beyond(self) -> bool:
        """Whether the value is beyond the bound; where either is not a number it is."""
        return not self.value <= self.bound

    @property
    def alarming(self) -> bool:
        """Whether it is beyond the bound and not known yet."""
        return self.beyond and not self.accepted

    @property
    def used(self) -> float:
        """How much of the bound was used; 1 is the bound itself."""
        if not math.isfinite(self.value) or math.isnan(self.bound):
            return math.inf
        return self.value / self.bound if self.bound > 0 else (math.inf if self.value > 0 else 0.0)

    def check(self, step: int, seconds: float) -> CheckDone:
        """The event of the check, whatever it found."""
        return CheckDone(
            step=step,
            detector=self.detector,
            site=self.site,
            tensor=self.tensor,
            value=self._told_value,
            bound=self._told_bound,
            seconds=seconds,
        )

    def alarm(self, step: int, others: Sequence[str] = ()) -> Alarm:
        """The event of a value beyond its bound; `others` are tensors that exceeded theirs in the same check."""
        also = f" Beyond their bounds too: {', '.join(dict.fromkeys(others))}." if others else ""
        return Alarm(
            step=step,
            detector=self.detector,
            site=self.site,
            tensor=self.tensor,
            value=self._told_value,
            bound=self._told_bound,
            message=f"{self.tensor} of {self.site} at step {step}: {self.what} is {self._figures()}{also}",
        )

    @property
    def _told_value(self) -> float | None:
        return self.value if math.isfinite(self.value) and not math.isnan(self.bound) else None

    @property
    def _told_bound(self) -> float:
        """Events hold numbers alone."""
        return 0.0 if math.isnan(self.bound) else min(self.bound, LARGEST_FLOAT32)

    def _figures(self) -> str:
        if math.isnan(self.bound):
            return f"{self.value:.3g}, and what bounds it is no number."
        if not math.isfinite(self.value):
            return f"{self.value}; it must be finite and at most {self.bound:.3g}."
        if self.bound == 0:
            return f"{self.value:.3g}, it must be 0."
        return f"{self.value:.3g}, {self.used:.3g} times its bound of {self.bound:.3g}."
