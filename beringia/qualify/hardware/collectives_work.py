"""The collectives' probe where the chip is, as work of a far end: its ranks meet on that machine.

Its document is a `CollectivesOrder`, its lines are probe results.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from beringia.processes.child import lines_of, start
from beringia.processes.command import Command
from beringia.processes.far_end import FarEnd
from beringia.processes.patience import Patience
from beringia.processes.protocol import Ended
from beringia.qualify.hardware.collectives import probe_collectives
from beringia.records.certificate import ProbeResult
from beringia.records.record import Record

_MODULE = "beringia.qualify.hardware.collectives_work"


class CollectivesOrder(Record):
    """What is tried."""

    chip: str
    faults: str | None
    seed: int
    ranks: int = 2
    time_out_seconds: float = 60.0
    bandwidth: bool = False


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Probe, and say each result."""
    for result in _probe(CollectivesOrder.model_validate(document, strict=False)):
        far_end.channel.line(result)
    return Ended(why="done")


def collectives_at(command: Command, order: CollectivesOrder, log: Path) -> list[ProbeResult]:
    """Results from where the command leads. Raises what is the user's to mend there."""
    if not command.elsewhere:
        return _probe(order)
    patience = Patience(silence_seconds=2 * order.time_out_seconds)
    child = start(replace(command, module=_MODULE), order, log, patience=patience)
    return [ProbeResult.model_validate(line, strict=False) for line in lines_of(child)]


def _probe(order: CollectivesOrder) -> list[ProbeResult]:
    return probe_collectives(
        order.chip,
        faults=order.faults,
        seed=order.seed,
        ranks=order.ranks,
        time_out_seconds=order.time_out_seconds,
        bandwidth=order.bandwidth,
    )
