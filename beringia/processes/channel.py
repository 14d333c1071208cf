"""The far end's end of the two streams: sends messages to the starter, hears what it says, dies with it.

Standard output belongs to messages alone, so everything else that a library prints there is sent to standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from beringia.processes.patience import HEARTBEAT_SECONDS, LOCKED_STACKS_SHARE, STACKS_SHARE
from beringia.processes.protocol import Go, Heartbeat, Job, Line, Stop, to_far_end
from beringia.processes.words import ORPHANED_STATUS
from beringia.records.record import Record

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Channel:
    """Messages over standard input and output. Make one per process, before anything else prints."""

    def __init__(self, *, rank: int = 0) -> None:
        self.rank = rank
        self.input: IO[bytes] = os.fdopen(os.dup(0), "rb")
        """As bytes; what a message's line has read ahead is in here."""
        self.output = os.dup(1)
        """Descriptor of standard output as it was."""
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._beat_at = 0.0
        self.watchdog: Watchdog | None = None
        self.go = threading.Event()
        """Set when the starter has accepted the handshake and what the work needs is in place."""
        self.stop_requested = threading.Event()
        """Set when what there is to save is to be saved and the process to end."""

    def listen(self, on_close: Callable[[], None] | None = None) -> None:
        """Hear the starter from now on. When it is gone the process exits at once: nothing may be published that
        nobody watches, and what was not published is as if it had not been."""
        threading.Thread(target=self._listen, args=(on_close or self._exit_orphaned,), daemon=True).start()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT ask to stop, as the starter may."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_requested.set()

        for number in STOP_SIGNALS:
            signal.signal(number, note)

    def end_on_signals(self) -> None:
        """They end this process, as they do any; now, if one came already."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.stop_requested.is_set():
            signal.raise_signal(signal.SIGTERM)

    def send(self, message: Record) -> None:
        """Send one message, as one line."""
        line = message.model_dump_json().encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self.output, line) :]

    def line(self, record: Record) -> None:
        """Send a fact of the work. Raises ValueError for a number that JSON cannot carry."""
        document = record.model_dump(mode="json")
        self.send(Line(line=json.loads(json.dumps(document, allow_nan=False))))

    def beat(self) -> None:
        """Say that the computing thread gets on; cheap enough to call in every loop."""
        now = time.monotonic()
        if now - self._beat_at >= HEARTBEAT_SECONDS:
            self._beat_at = now
            self.send(Heartbeat())
            if self.watchdog is not None:
                self.watchdog.feed()

    def readable_within(self, seconds: float) -> bool:
        """Whether something comes, or the end, before anything was read."""
        return bool(select.select([self.input], [], [], seconds)[0])

    def readline(self) -> bytes:
        """One line; empty at the end."""
        return self.input.readline()

    def _listen(self, on_close: Callable[[], None]) -> None:
        while line := self.readline():
            match to_far_end.validate_json(line):
                case Go():
                    self.go.set()
                case Stop():
                    self.stop_requested.set()
                case Job():
                    pass  # read from the environment
        on_close()

    def _exit_orphaned(self) -> None:
        if self.watchdog is not None:
            self.watchdog.close()
        os._exit(ORPHANED_STATUS)


class Watchdog:
    """Writes the stacks of all threads of this process into a file when it is not fed for too long.

    Inside the process, without a signal from outside, which would not pass a launch prefix. A thread does it that holds
    the interpreter's lock: the others stand still meanwhile. Where the computing thread hangs in a driver and keeps the
    lock, faulthandler's own timer does it a little later: it reads the stacks without the lock, which is safe while
    they do not change, and crashed processes that were only slow (in imports, on a busy machine).
    """

    def __init__(self, file: Path, patience_seconds: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(file, "w")  # noqa: SIM115 - must stay open until the last moment
        self._patience_seconds = patience_seconds
        self._closed = threading.Event()
        self._due = math.inf
        self.feed()
        threading.Thread(target=self._watch, daemon=True).start()

    def feed(self) -> None:
        """All is well; begin to wait anew."""
        if self._closed.is_set():
            return
        self._due = time.monotonic() + self._patience_seconds * STACKS_SHARE
        faulthandler.dump_traceback_later(self._patience_seconds * LOCKED_STACKS_SHARE, file=self._file)

    def close(self) -> None:
        """Stop watching; an empty file is removed."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        path = Path(self._file.name)
        with contextlib.suppress(FileNotFoundError):  # both threads of a process that ends may come here
            if path.stat().st_size == 0:
                path.unlink()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._patience_seconds / 50)):
            if time.monotonic() >= self._due and not self._closed.is_set():
                self._due = math.inf
                faulthandler.cancel_dump_traceback_later()
                faulthandler.dump_traceback(file=self._file)
