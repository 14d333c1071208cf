"""How a command is left that a signal ends: children end, scratch files go."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from beringia.processes.patience import POLL_SECONDS, TOGETHER_SECONDS

_IMPORT = "<frozen importlib._bootstrap>"


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a terminal that goes (SIGHUP) raise SystemExit with 128 + the signal, but what is to be
    ignored already (nohup). Who stops with grace sets handlers of its own meanwhile."""
    came = -math.inf

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if _importing(frame):  # a module that is left half imported fails in ways of its own: a moment later
            threading.Timer(POLL_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number)).start()
            return
        before, came = came, time.monotonic()
        # Whoever stops a job may ask twice (`timeout` asks the process, then its group): cleaning up is not cut short.
        if came - before > TOGETHER_SECONDS:
            sys.exit(128 + number)

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    replaced = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
    for number in replaced:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            return True
        frame = frame.f_back
    return False
