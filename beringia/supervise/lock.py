"""One supervisor per run: a lock held for life, and an epoch that grows with every worker it starts.

The kernel releases the lock (flock on `lock`) when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from beringia.checkpoint.epoch import advance_epoch
from beringia.errors import RunError, StaleEpoch
from beringia.records.files import reporting_storage
from beringia.records.run_directory import RunDirectory

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.02


class RunLock:
    """Held while a supervisor works on a run directory. `epoch` is the number of the worker that may publish; it begins
    above `above`, should the file be lost.

    Raises RunError when another process holds it.
    """

    def __init__(self, run: RunDirectory, above: int = 0) -> None:
        self._run = run
        with reporting_storage(run.root):
            run.root.mkdir(parents=True, exist_ok=True)
            self._file = _lock_or_refuse(run.lock)
        self.epoch = self.advance(above)

    def advance(self, above: int = 0) -> int:
        """Begin the next epoch: whatever an earlier worker still tries to publish is refused from now on."""
        try:
            self.epoch = advance_epoch(self._run.epoch, above)
        except StaleEpoch as problem:
            raise RunError(
                f"{str(problem).partition(';')[0]}: it was altered or damaged. Remove it and give the same command "
                "again: the number goes on from events and checkpoints."
            ) from None
        return self.epoch

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _lock_or_refuse(path: Path) -> IO[str]:
    file = open(path, "a+")  # noqa: SIM115 - held for the life of the lock
    if not _locked(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"The run directory {path.parent} is in use by {holder}. "
            "Wait for it or stop it: two supervisors would overwrite each other."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _locked(file: IO[str]) -> bool:
    """Whether the lock is ours now. `beringia status` holds it for an instant: asked again a few times."""
    for _ in range(_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False
