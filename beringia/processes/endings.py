"""Ending a process and everything it started, in stages, and finding what is left by our own mark.

A process group is not enough: torchrun's ranks make sessions of their own, and a rank that is stopped hears nothing.
So every process that is started inherits `MARK_VARIABLE`, and the process table tells who has it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

from beringia.processes.patience import EXEC_SECONDS, KILLED_SECONDS, STOP_SECONDS
from beringia.processes.protocol import MARK_VARIABLE

_LOOK_SECONDS = 0.02
_TABLE = Path("/proc")


def new_mark() -> str:
    """For one more process that is started here: below this process's own, so that who ends this one ends that, too."""
    own, new = os.environ.get(MARK_VARIABLE), uuid.uuid4().hex[:12]
    return f"{own}/{new}" if own else new


def end_in_stages(process: subprocess.Popen[bytes], mark: str, *, grace_seconds: float, ask: bool = False) -> int:
    """Wait for a process whose input is closed, perhaps ask it to end (SIGTERM), then kill what is left of it and of
    what it started. Returns its exit status; when this returns, all of them are gone."""
    if not _ended_within(process, grace_seconds) and ask:
        signal_group(process, signal.SIGTERM)
        _ended_within(process, STOP_SECONDS)
    signal_group(process, signal.SIGKILL)
    kill_marked(mark)
    return process.wait()


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To a process that leads a session of its own, and to all that stayed in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def kill_marked(mark: str) -> None:
    """SIGKILL to every process started under a mark, until none is left (what a dying one just started, too)."""
    deadline = time.monotonic() + KILLED_SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        for number in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)


def marked(mark: str) -> list[int]:
    """Processes on this machine that were started under a mark, this one left out. Those that have ended and wait for
    their parent have no environment any more."""
    wanted = f"{MARK_VARIABLE}={mark}".encode()
    found: list[int] = []
    unclear = [number for number in _numbers() if number != os.getpid()]
    deadline = time.monotonic() + EXEC_SECONDS
    while unclear:
        variables = {number: _environment(number) for number in unclear}
        found += [number for number, own in variables.items() if own is not None and _has(own, wanted)]
        unclear = [number for number, own in variables.items() if own is None]
        if unclear and time.monotonic() > deadline:
            break  # they have none, and want none
        time.sleep(_LOOK_SECONDS if unclear else 0.0)
    return sorted(found)


def _has(variables: list[bytes], wanted: bytes) -> bool:
    return any(one == wanted or one.startswith(wanted + b"/") for one in variables)


def _environment(number: int) -> list[bytes] | None:
    """A process's variables; None while it has none yet: Linux closes the files of a process that executes a program
    before it shows the new environment, so that its starter may believe it ready. Empty for one that has ended, for the
    kernel's own and for other users'."""
    process = _TABLE / str(number)
    try:
        content = (process / "environ").read_bytes()
        if not content and (process / "exe").readlink():
            return None
    except OSError:
        return []
    return content.split(b"\0")


def _numbers() -> list[int]:
    return [int(entry.name) for entry in _TABLE.iterdir() if entry.name.isdigit()] if _TABLE.is_dir() else []


def _ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
