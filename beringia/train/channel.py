"""The worker's end of the two streams: sends messages to the supervisor, hears its orders, dies with it.

Standard output belongs to messages alone, so everything else that a library prints there is sent to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable

from beringia.records.events import Event
from beringia.records.messages import EventLine, Go, Heartbeat, Order, Stop, to_worker
from beringia.records.record import Record

_HEARTBEAT_SECONDS = 1.0
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
        self._go = threading.Event()
        self.stop_requested = threading.Event()

    def read_order(self) -> Order:
        """The first line of standard input; then keep listening in the background."""
        order = Order.model_validate_json(sys.stdin.readline(), strict=False)
        self.listen()
        return order

    def listen(self, on_close: Callable[[], None] | None = None) -> None:
        """Hear orders from now on. When the supervisor is gone the process exits at once: nothing may be published
        that nobody watches, and what was not published is as if it had not been."""
        threading.Thread(target=self._listen, args=(on_close or _exit_orphaned,), daemon=True).start()

    def wait_for_go(self) -> None:
        """Until the supervisor has accepted the handshake and the state is in place."""
        self._go.wait()

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

    def _listen(self, on_close: Callable[[], None]) -> None:
        for line in sys.stdin:
            match to_worker.validate_json(line, strict=False):
                case Go():
                    self._go.set()
                case Stop():
                    self.stop_requested.set()
        on_close()


def _exit_orphaned() -> None:
    os._exit(_ORPHANED_STATUS)
