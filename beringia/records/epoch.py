"""The epoch: the number of the supervisor that may publish into a run directory.

The kernel's lock keeps a second supervisor out while the first lives. The epoch keeps a *late* process out: whatever a
worker publishes, it publishes only while the file `epoch` still holds the number that it was started with, checked under
a lock so that check and rename are one.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beringia.errors import StaleEpoch


def read_epoch(path: Path) -> int:
    """The epoch in force; 0 before the first."""
    return int(path.read_text()) if path.exists() else 0


@contextmanager
def holding_epoch(path: Path) -> Iterator[None]:
    """Context in which the epoch does not change: whoever publishes or takes over holds it for a moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def publishing(path: Path, epoch: int) -> Iterator[None]:
    """Context for one publication under `epoch`. Raises StaleEpoch when another supervisor has taken over."""
    with holding_epoch(path):
        current = read_epoch(path)
        if current != epoch:
            raise StaleEpoch(f"This process belongs to epoch {epoch} of {path.parent}, which is at {current} now: not published.")
        yield
