"""Before anything starts, the ranks that torchrun or Slurm has started show themselves to each other in the run
directory, which all of them see.

Each leaves a file with a word of its own. The first reads them all and leaves a file that says which words it has read;
another rank goes on when its own is among them, and takes its file away, so that the first knows that it may go. What
an attempt that was killed has left has other words, so nobody takes it for the ranks of this one, though a launcher
with a fixed port or number gives every attempt the same name.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from beringia.errors import InputError
from beringia.processes.patience import PEERS_SECONDS, POLL_SECONDS
from beringia.processes.ranks import Ranks, ranks_from_environment
from beringia.records.files import write_bytes
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory

_STORE_SECONDS = 5.0
"""torchrun's agent keeps its store before it starts a rank: whoever has to wait so long for a connection has none."""


def job_name() -> str | None:
    """What the ranks of one job have in common; None outside of one."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or os.environ.get("MASTER_PORT")


@contextmanager
def meeting_other_ranks(run: RunDirectory) -> Iterator[None]:
    """While the context lasts all ranks of the job are here. Nothing where there is one.

    Raises InputError where they do not come: variables that a launcher left in a shell look like a launcher's.
    """
    ranks = ranks_from_environment()
    if ranks is None or ranks.count == 1:
        yield
        return
    _check_launcher(ranks)
    mine, word = _shown(run, ranks.rank), uuid.uuid4().hex
    try:
        if ranks.first:
            _gather(run, ranks)
            try:
                yield
            finally:
                _wait_until_read(run, ranks)
        else:
            _join(run, ranks, mine, word)
            mine.unlink(missing_ok=True)
            yield
    finally:
        mine.unlink(missing_ok=True)


def orders_file(run: RunDirectory) -> Path:
    """Where the first rank's supervisor leaves its orders. Those of an earlier attempt go before anybody looks."""
    return run.root / "followed.json"


def _gather(run: RunDirectory, ranks: Ranks) -> None:
    for path in (orders_file(run), *(_shown(run, rank) for rank in range(ranks.count))):
        path.unlink(missing_ok=True)
    words: dict[str, str] = {}
    deadline = time.monotonic() + PEERS_SECONDS
    while len(words) < ranks.count - 1:
        for rank in range(1, ranks.count):
            with suppress(FileNotFoundError):
                words[str(rank)] = _shown(run, rank).read_text()
        if time.monotonic() > deadline:
            missing = next(rank for rank in range(1, ranks.count) if str(rank) not in words)
            raise _alone(run, ranks, missing)
        time.sleep(POLL_SECONDS)
    write_bytes(_shown(run, 0), canonical_json(words))


def _join(run: RunDirectory, ranks: Ranks, mine: Path, word: str) -> None:
    deadline = time.monotonic() + PEERS_SECONDS
    while word not in _read_by_first(run).values():
        if not mine.exists():  # the first rank has just swept what an earlier attempt left
            write_bytes(mine, word.encode())
        if _held(run.lock):  # the first rank is there, and looks at what the recipe names
            deadline = time.monotonic() + PEERS_SECONDS
        if time.monotonic() > deadline:
            raise _alone(run, ranks, 0)
        time.sleep(POLL_SECONDS)


def _wait_until_read(run: RunDirectory, ranks: Ranks) -> None:
    """Until the others have seen what the first leaves: of a run that is done it is there for an instant alone."""
    deadline = time.monotonic() + PEERS_SECONDS
    while any(_shown(run, rank).exists() for rank in range(1, ranks.count)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _read_by_first(run: RunDirectory) -> dict[str, str]:
    try:
        words: dict[str, str] = json.loads(_shown(run, 0).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return words


def _shown(run: RunDirectory, rank: int) -> Path:
    return run.rank_report(0, rank).with_name(f"here-{job_name()}-{rank}")


def _held(lock: Path) -> bool:
    """Whether a supervisor has the run."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _check_launcher(ranks: Ranks) -> None:
    """torchrun keeps a store while its ranks live: without one its variables are left over."""
    if not ranks.agent_hosts_store:
        return
    try:
        socket.create_connection((ranks.address, ranks.port), _STORE_SECONDS).close()
    except OSError:
        raise InputError(
            f"{ranks.source} says that torchrun started this as rank {ranks.rank} of {ranks.count}, but there is no "
            f"torchrun at {ranks.address}:{ranks.port}. {_left_over(ranks)}"
        ) from None


def _alone(run: RunDirectory, ranks: Ranks, missing: int) -> InputError:
    return InputError(
        f"{ranks.source} says that this is rank {ranks.rank} of {ranks.count}, but rank {missing} has not come to "
        f"{run.root} within {PEERS_SECONDS:g} s. Start all ranks, with a run directory that all of them see. "
        f"{_left_over(ranks)}"
    )


def _left_over(ranks: Ranks) -> str:
    unset = " ".join(f"-u {name}" for name in ranks.variables)
    return f"If a launcher left its variables in this shell, give the command without them: env {unset} beringia ..."
