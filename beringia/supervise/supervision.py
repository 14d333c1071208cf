"""What every role of a run works with: the recipe, the run directory, its lock and log, and the user's wish to stop."""

from __future__ import annotations

from dataclasses import dataclass

from beringia.checkpoint.directory import Owner
from beringia.history.log import EventLog
from beringia.records.events import AnyEvent, Event
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.lock import RunLock
from beringia.supervise.stop_request import StopRequest


@dataclass(frozen=True)
class Supervision:
    """One life of a supervisor over a run."""

    recipe: Recipe
    """Its paths whole."""
    recipe_hash: str
    """Of the recipe as the user wrote it."""
    owner: Owner
    """What the run's checkpoints are known by."""
    run: RunDirectory
    lock: RunLock
    log: EventLog
    stop: StopRequest
    launched: bool = False
    """Whether torchrun or Slurm has started every rank of the run: how many there are, and on which devices, is theirs
    to say."""

    def append(self, event: Event, *, role: str, chip: str | None = None) -> AnyEvent:
        """Record an event of a role."""
        return self.log.append(event, epoch=self.lock.epoch, chip=chip, role=role)
