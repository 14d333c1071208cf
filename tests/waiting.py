"""Waiting for what another process or thread does. The deadline is where a test gives up; it measures nothing, and is
long enough for a machine that is busy with other work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")

GIVE_UP_SECONDS = 600.0
"""Below pytest's own time-out, which would not say what was waited for."""


def until(holds: Callable[[], Found], what: str, seconds: float = GIVE_UP_SECONDS) -> Found:
    """What `holds` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > end:
            raise AssertionError(f"gave up after {seconds:g} s: {what}")
        time.sleep(0.02)
    return found


def waiters(lock: Path) -> int:
    """How many wait for a `flock` of this file."""
    file = f":{lock.stat().st_ino} "
    return sum("-> FLOCK" in line and file in line for line in Path("/proc/locks").read_text().splitlines())


class Clock:
    """A clock that moves only when somebody sleeps by it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
