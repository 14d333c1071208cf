"""Terms of the objective and norms of gradients must be numbers, in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from beringia.train.guard.check import Check, Moment, Step, When
from beringia.train.guard.finding import LARGEST_FLOAT32, Finding


class NonFinite(Check[dict[str, float]]):
    """Tells of a number only when it is none."""

    name = "non-finite"
    when = When(look=Moment.END, judge=(Moment.END,), order=200)

    def look(self, step: Step) -> Sequence[dict[str, float]]:
        return [{**step.numbers, **step.layer_numbers}]

    def judge(self, look: dict[str, float], step: Step) -> Sequence[Finding]:
        return [
            Finding(self.name, "model", name, value, LARGEST_FLOAT32, "the value")
            for name, value in look.items()
            if not math.isfinite(value)
        ]
