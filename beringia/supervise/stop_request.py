"""Whether the user asked to stop, and by which signal; inside torchrun also by its end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from beringia.processes.patience import POLL_SECONDS, TOGETHER_SECONDS


class StopRequest:
    """SIGTERM, SIGINT or SIGHUP, once it came."""

    signal: int | None = None
    why: str = ""
    """What asked for it, in words."""
    since: float = 0.0
    """When it came, on the monotonic clock."""

    def came(self, number: int, why: str | None = None) -> None:
        """Note it; the first one counts."""
        if self.signal is None:
            self.since = time.monotonic()
            self.why = why or f"stopped by signal {number}"
            self.signal = number

    @contextmanager
    def ending(self, action: Callable[[], None], seconds: float) -> Iterator[None]:
        """While the context lasts, `action` is taken so long after the wish has come: it ends what this thread waits
        for, and is called in another."""

        def act() -> bool:
            due = self.signal is not None and time.monotonic() - self.since >= seconds
            if due:
                action()
            return due

        with _watching(act):
            yield

    def comes(self) -> bool:
        """Whether it has come or comes now: a child was asked to end, and this process may be about to be."""
        end = time.monotonic() + TOGETHER_SECONDS
        while self.signal is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return self.signal is not None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGINT and a terminal that goes (SIGHUP, unless it is to be ignored: nohup) into a request while
    the context lasts."""
    request = StopRequest()
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)

    def note(number: int, frame: FrameType | None) -> None:
        request.came(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, *hangup)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_with_torchrun(request: StopRequest) -> Iterator[None]:
    """Take the end of the torchrun that started this process for a SIGTERM while the context lasts. Where it was
    killed it could hand on none, and its ranks would wait for each other in a store that it has taken along, or go on
    where nobody sees them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    launcher = os.getppid()

    def look() -> bool:
        gone = os.getppid() != launcher
        if gone:
            request.came(signal.SIGTERM, "stopped with torchrun, which has ended")
        return gone

    with _watching(look):
        yield


@contextmanager
def _watching(look: Callable[[], bool]) -> Iterator[None]:
    """While the context lasts, look again and again in another thread, until there is nothing more to look for."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS) and not look():
            pass

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()
