"""A run that crosses from an emulated chip to this one, and one to the CPU: the same state, the canary in its band."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from crossing import cross, difference_over_noise

from benchmarks.card.parts import Size

FROM = "h800"


def measure(chip: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """One run to each chip."""
    found, holds = {}, {}
    for to in dict.fromkeys((chip, "cpu")):
        with tempfile.TemporaryDirectory() as directory:
            crossing, canary = cross(FROM, 0, Path(directory), to)
        found[to] = {
            "from": f"emulated:{FROM}",
            "at_step": crossing.step,
            "state_hash_before": crossing.state_hash_before,
            "state_hash_after": crossing.state_hash_after,
            "canary_difference": canary.difference,
            "canary_band": canary.band,
            "canary_difference_over_noise": difference_over_noise(canary),
            "seconds": crossing.seconds,
            "imports_seconds": crossing.imports_seconds,
            "load_seconds": crossing.load_seconds,
            "canary_seconds": crossing.canary_seconds,
        }
        holds[f"same state on {to}"] = crossing.state_hash_before == crossing.state_hash_after
        holds[f"canary on {to}"] = canary.passed
    return found, holds
