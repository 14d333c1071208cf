"""A role: work on one chip, beside the work of other roles on theirs. What happens to one leaves the others alone.

Each time it is asked a role decides where it has no process, and listens where it has one (`supervisor.py` asks them in
turn). Its events carry its name, and the fold keeps a situation for each.
"""

from __future__ import annotations

from typing import Protocol

from beringia.processes.child import Child
from beringia.records.events import RunFinished


class Role(Protocol):
    """What the supervisor asks of each."""

    name: str
    """`learner`, `candidate:<label>`, `rollout:<number>`."""

    @property
    def chip(self) -> str | None:
        """Label of the chip that it works on now."""

    @property
    def child(self) -> Child | None:
        """Its process, while it has one."""

    @property
    def over(self) -> bool:
        """Whether it has nothing more to do."""

    def advance(self) -> RunFinished | None:
        """Decide and start, or hear what there is; never waits. Returns the end of the run, where that is it."""

    def kill(self) -> None:
        """End its process at once: the run is over, or something went wrong here."""
