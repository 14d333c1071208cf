"""The worker's end of the two streams: sends messages to the supervisor, hears its orders, dies with it.

Standard output belongs to messages alone, so everything else that a library prints there is sent to standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from beringia.records.events import Event
from beringia.records.messages import EventLine, Go, Heartbeat, Order, Stop, to_worker
from beringia.records.record import Record

_HEARTBEAT_SECONDS = 1.0

_STACKS_SHARE = 0.8
"""Of the time after which the supervisor calls silence a hang: the stacks must be written before it kills."""
_ORPHANED_STATUS = 70
"""Exit status of a worker whose supervisor is gone (EX_SOFTWARE of sysexits: nobody is left to read it)."""


class Channel:
    """Messages over standard input and output. Make one per process, before anything else prints."""

    def __init__(self, *, rank: int = 0) -> None:
        self._rank = rank
        self._output = os.dup(1)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._beat_at = 0.0
        self.watchdog: Watchdog | None = None
        self.go = threading.Event()
        """Set when the supervisor has accepted the handshake and the state is in place."""
        self.stop_requested = threading.Event()
        """Set when a checkpoint is to be written and the worker to end."""

    def listen(self, on_close: Callable[[], None] | None = None) -> None:
        """Hear orders from now on. When the supervisor is gone the process exits at once: nothing may be published
        that nobody watches, and what was not published is as if it had not been."""
        threading.Thread(target=self._listen, args=(on_close or _exit_orphaned,), daemon=True).start()

    def send(self, message: Record) -> None:
        """Send one message, as one line."""
        line = message.model_dump_json().encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._output, line) :]

    def event(self, event: Event) -> None:
        """Send an event of this rank."""
        document = event.model_dump(mode="json") | {"rank": self._rank}
        self.send(EventLine(event=json.loads(json.dumps(document, allow_nan=False))))

    def beat(self) -> None:
        """Say that the computing thread gets on; cheap enough to call in every loop."""
        now = time.monotonic()
        if now - self._beat_at >= _HEARTBEAT_SECONDS:
            self._beat_at = now
            self.send(Heartbeat())
            if self.watchdog is not None:
                self.watchdog.feed()

    def _listen(self, on_close: Callable[[], None]) -> None:
        for line in sys.stdin:
            match to_worker.validate_json(line, strict=False):
                case Go():
                    self.go.set()
                case Stop():
                    self.stop_requested.set()
                case Order():
                    pass  # read from the environment
        on_close()


class Watchdog:
    """Writes the stacks of all threads of this process into a file when it is not fed for too long.

    A thread of the interpreter's own does it, so it works while the computing thread hangs in a driver, and without a
    signal from outside, which would not pass a launch prefix.
    """

    def __init__(self, file: Path, patience_seconds: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(file, "w")  # noqa: SIM115 - must stay open until the last moment
        self._seconds = patience_seconds * _STACKS_SHARE
        self.feed()

    def feed(self) -> None:
        """All is well; begin to wait anew."""
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def close(self) -> None:
        """Stop watching; an empty file is removed."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        path = Path(self._file.name)
        if path.stat().st_size == 0:
            path.unlink()


def _exit_orphaned() -> None:
    os._exit(_ORPHANED_STATUS)
