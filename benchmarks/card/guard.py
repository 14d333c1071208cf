"""What the guard costs a training step on this chip, at the default share of 1 %."""

from __future__ import annotations

import argparse
from typing import Any

from guard_cost import BLOCK_PAIRS, LIMIT
from guard_cost import measure as measure_cost

from benchmarks.card.parts import Size

SIZES = {
    "full": {"preset": "r2-micro", "steps": 480, "share": 0.01, "warm": 120},
    "small": {"preset": "r2-nano", "steps": BLOCK_PAIRS, "share": 0.01, "warm": 8},
}
MEASURED_WITHIN = 0.01
"""Width of the interval on either side above which steps were too noisy to judge the cost."""
LEAST_BLOCKS = 8
"""Of consecutive pairs, from which the interval is drawn: fewer say little of how much they vary."""


def measure(chip: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """Pairs of steps with and without it. The cost is told in any case, and judged where it is known well enough."""
    options = argparse.Namespace(chip=chip, **SIZES[size])
    found = measure_cost(options)
    cost = found["cost"]
    blocks = options.steps // BLOCK_PAIRS
    judged = blocks >= LEAST_BLOCKS and cost["high"] - cost["low"] <= 2 * MEASURED_WITHIN
    return SIZES[size] | found | {"judged": judged}, {"cost": cost["high"] < LIMIT} if judged else {}
