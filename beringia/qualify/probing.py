"""Runs the process that has the chip and takes in its evidence; a chip that hangs or dies is a finding, no error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from beringia.errors import HandshakeError
from beringia.processes.child import Child, start
from beringia.processes.command import Command
from beringia.processes.patience import Patience
from beringia.processes.protocol import Line
from beringia.qualify.evidence import (
    Begun,
    Checked,
    Departed,
    Fact,
    Opened,
    Probed,
    QualifyOrder,
    Unrepeatable,
    fact_adapter,
    failure,
)
from beringia.records.certificate import Departure, OperatorCheck, ProbeResult

WORKER = "beringia.qualify.worker"
PATIENCE_SECONDS = 900.0
"""Without a new fact: the watched steps of a model with 10^9 parameters take minutes."""


@dataclass
class Evidence:
    """What came out of one process."""

    opened: Opened | None = None
    probes: list[ProbeResult] = field(default_factory=list)
    checks: list[OperatorCheck] = field(default_factory=list)
    unrepeatable: Unrepeatable | None = None
    departure: Departure | None = None
    complete: bool = False

    def take(self, fact: Fact) -> None:
        """Add one fact."""
        match fact:
            case Opened():
                self.opened = fact
            case Probed():
                self.probes.append(fact.result)
            case Checked():
                self.checks.append(fact.check)
            case Unrepeatable():
                self.unrepeatable = fact
            case Departed():
                self.departure = fact.departure
            case Begun():
                pass


def gather(
    order: QualifyOrder,
    command: Command,
    log: Path,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> Evidence:
    """Carry out an order where the command leads, and return the evidence.

    Raises what the far end says is the user's to mend, HandshakeError where it did not open its chip.
    """
    patience = Patience(start_seconds=patience_seconds, silence_seconds=patience_seconds)
    child = start(replace(command, module=WORKER), order, log, patience=patience)
    evidence, begun = Evidence(), "opening"
    try:
        for message in child.follow():
            if isinstance(message, Line):
                fact = fact_adapter.validate_python(message.line, strict=False)
                evidence.take(fact)
                if isinstance(fact, Begun):
                    begun = fact.probe
                    say(begun)
    finally:
        child.end()
    _conclude(child, evidence, begun)
    return evidence


def _conclude(child: Child, evidence: Evidence, begun: str) -> None:
    """What its end says."""
    ended = child.ended
    if ended is not None and ended.error is not None:
        raise ended.error.error()
    if ended is not None:
        evidence.complete = True
    elif evidence.opened is None:
        raise HandshakeError(f"The chip was not opened: {child.death().sentence}.")
    else:
        evidence.probes.append(failure(begun, child.death().sentence))
