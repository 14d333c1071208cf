"""`beringia qualify CHIP` through the command line: the verdict, its reasons, how long it took, how much memory."""

from __future__ import annotations

from typing import Any

from qualify_time import measure as qualify

from benchmarks.card.parts import Size

MODELS = {"full": "r2-micro", "small": "r2-nano"}
LIMIT_SECONDS = 90.0
"""As for the emulated chip in the exact fidelity, which a card is faster than."""


def measure(chip: str, size: Size) -> tuple[dict[str, Any], dict[str, bool]]:
    """One qualification; a card that is sold for training must be found fit to train."""
    found = qualify(MODELS[size], chip, LIMIT_SECONDS)
    return found, {"verdict": found["verdict"] == "train"} | found["holds"]
