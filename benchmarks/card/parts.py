"""The parts of the card script, and the record that each leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from beringia.records.record import Record

Size = Literal["full", "small"]
"""full: what an accelerator is measured with; small: the same parts on a CPU, so that they are never found broken."""


@dataclass(frozen=True)
class Part:
    """One part: the module `benchmarks.card.<name>`."""

    name: str
    seconds: float
    """After so long it is ended. Together at most `TOTAL_SECONDS`."""


TOTAL_SECONDS = 480.0
PARTS = (
    Part("profile", 60),
    Part("tests", 75),
    Part("qualify", 75),
    Part("crossing", 75),
    Part("training", 90),
    Part("engine", 60),
    Part("guard", 45),
)
"""In this order: what nobody could measure before comes first."""


class PartRecord(Record):
    """What a part left: `<part>.json`."""

    part: str
    chip: str
    size: Size
    state: Literal["done", "failed", "out of time"]
    date: str
    seconds: float
    machine: dict[str, str] = {}
    """Python, torch and what else the figures depend on; empty where the part ended before it could say."""
    found: dict[str, Any] = {}
    """What was measured."""
    holds: dict[str, bool] = {}
    """What must hold, and whether it does."""
    error: str = ""
    """Why it is not done: the error, or the end of what was printed."""
