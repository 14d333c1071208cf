"""The number of the supervisor that may publish in a run directory, in the run's `epoch` file.

Each supervisor that takes over a run adds one (`advance_epoch`); a worker publishes a checkpoint only while the
number is still the one it was started with (`holding_epoch`). Both hold an exclusive lock on `epoch.lock` beside the
file meanwhile, so a takeover happens before a publication or after it, never within. The lock is flock(2): local file
systems and NFSv4.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beringia.errors import StaleEpoch
from beringia.records.files import reporting_storage, write_text


def read_epoch(epoch_file: Path) -> int:
    """The epoch in force; 0 where there is no file yet. Raises StaleEpoch if the file does not hold a number."""
    try:
        content = epoch_file.read_text()
    except FileNotFoundError:
        return 0
    if not content.strip().isdecimal():
        raise StaleEpoch(
            f"{epoch_file} does not hold the number of an epoch but {content[:20]!r}; nothing is published."
        )
    return int(content)


def advance_epoch(epoch_file: Path, above: int = 0) -> int:
    """Take over: add one to the epoch, durably, and return it. Writers of older epochs are shut out from now on.
    `above`: one that is known to have been in force, should the file be lost."""
    with _locked(epoch_file):
        epoch = max(read_epoch(epoch_file), above) + 1
        write_text(epoch_file, f"{epoch}\n")
    return epoch


@contextmanager
def holding_epoch(epoch_file: Path, epoch: int) -> Iterator[None]:
    """Run the body while the epoch is `epoch` and cannot change. Raises StaleEpoch if it is another."""
    with _locked(epoch_file):
        current = read_epoch(epoch_file)
        if current != epoch:
            raise StaleEpoch(
                f"This process belongs to epoch {epoch} of the run, but {epoch_file} says {current}: "
                "another supervisor has taken over, so nothing is published from here."
            )
        yield


@contextmanager
def _locked(epoch_file: Path) -> Iterator[None]:
    # A file of its own: the epoch file is replaced by renaming, which would leave the lock on a dead inode.
    lock = epoch_file.with_name(f"{epoch_file.name}.lock")
    with reporting_storage(lock):
        epoch_file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
