"""Qualifying a chip beside a run, as work of a far end on the supervisor's machine: torch is needed, and the supervisor
loads none. Its document is a `CandidateOrder`, its one line the event that says what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beringia.campaign.qualifying import qualify_chip
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.records.orders import CandidateOrder
from beringia.records.run_directory import RunDirectory


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Qualify the chip, and write its certificate into the run directory."""
    order = CandidateOrder.model_validate(document, strict=False)
    run = RunDirectory(Path(order.directory))
    far_end.channel.line(qualify_chip(order.recipe, run, order.label, say=lambda text: far_end.channel.beat()))
    return Ended(why="done")
