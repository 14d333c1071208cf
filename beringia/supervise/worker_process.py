"""A worker as the supervisor sees it: a child process behind a launch prefix, two streams of JSON lines and a log.

Starts it with the chip's own interpreter, shakes hands, passes messages, notices silence, ends it. Knows nothing of
what the worker does, and nothing of the vendor.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import beringia.errors as errors
from beringia.errors import BeringiaError, HandshakeError
from beringia.records.events import EVENTS_SCHEMA
from beringia.records.manifest import MANIFEST_SCHEMA
from beringia.records.messages import MESSAGES_SCHEMA, ORDER_VARIABLE, FromWorker, Hello, Order, from_worker
from beringia.records.recipe import ChipSection
from beringia.records.record import Record
from beringia.version import __version__

_READ_BYTES = 1 << 16


def chip_command(chip: ChipSection, module: str, *arguments: str) -> list[str]:
    """The command line that runs a Python module where this chip is."""
    return [*chip.launch, chip.python or sys.executable, "-m", module, *arguments]


def check_launcher(label: str, chip: ChipSection) -> None:
    """Refuse at once what cannot start: an interpreter or a launch prefix that is not there. Raises HandshakeError."""
    if chip.launch and shutil.which(chip.launch[0]) is None:
        raise HandshakeError(
            f"chips.{label}.launch begins with {chip.launch[0]!r}, which is not a command on this machine. "
            "Install it or correct the prefix."
        )
    if not chip.launch and chip.python and shutil.which(chip.python) is None:
        raise HandshakeError(
            f"chips.{label}.python is {chip.python!r}, but there is no such interpreter. "
            "Give the path of the Python of the environment that has this chip's torch."
        )


class WorkerProcess:
    """One running worker. Reads are by `messages()`, which yields None when a while passed in silence."""

    def __init__(self, label: str, chip: ChipSection, order: Order, log: Path) -> None:
        self.label = label
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.shook_hands = False
        command = chip_command(chip, "beringia.train.worker")
        try:
            with open(log, "ab") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    # For launchers that start several ranks on one standard input, and hand the environment on.
                    env=os.environ | {ORDER_VARIABLE: order.model_dump_json()},
                )
        except OSError as error:
            raise HandshakeError(f"chips.{label}: could not start {' '.join(command)}: {error.strerror}.") from None
        assert self._process.stdout is not None
        self._pending = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self.send(order)

    def send(self, message: Record) -> None:
        """Send one message; a worker that is gone shows by the end of its output, not here."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(message.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    def messages(self, silence_seconds: float = 1.0) -> Iterator[FromWorker | None]:
        """Messages until the worker closes its output; None after each `silence_seconds` without one."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while True:
            if not self._selector.select(timeout=silence_seconds):
                yield None
                continue
            block = os.read(descriptor, _READ_BYTES)
            if not block:
                return
            *lines, self._pending = (self._pending + block).split(b"\n")
            for line in lines:
                message = self._parse(line)
                if message is not None:
                    yield message

    def end(self, grace_seconds: float) -> int:
        """Close its input, wait, then kill what is left of it; returns the exit status."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        # Ranks that outlived their launcher share its process group.
        self._signal(signal.SIGKILL)
        status = self._process.wait()
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return status

    @property
    def failed(self) -> bool:
        """Whether it ended by an error."""
        return self._process.poll() not in (None, 0)

    def kill(self) -> None:
        """SIGKILL to the worker and every process it started."""
        self._signal(signal.SIGKILL)

    def last_log_lines(self, count: int = 3) -> str:
        """The end of its standard error, for a message to the user."""
        return last_lines(self.log, count)

    def did_not_start(self, status: int) -> str:
        """The sentence for a worker that ended, with this status, before it said hello."""
        words = self.last_log_lines() or "it said nothing"
        return f"the worker of chips.{self.label} did not start ({how_ended(status)}): {words}"

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _parse(self, line: bytes) -> FromWorker | None:
        # A launch prefix may print a banner (ssh does): what is not a message goes to the log.
        try:
            document: dict[str, Any] = json.loads(line)
            return from_worker.validate_python(document, strict=False)
        except (ValueError, ValidationError):
            with open(self.log, "ab") as log:
                log.write(line + b"\n")
            return None


def how_ended(status: int) -> str:
    """A process's exit status in words."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def error_called(name: str, message: str) -> BeringiaError:
    """The error that a worker named."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, BeringiaError) and kind is not errors.CheckpointDamaged:
        return kind(message)
    return BeringiaError(f"The worker failed with {name}: {message}")


def last_lines(log: Path, count: int) -> str:
    """The end of a log, in one line."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " / ".join(line.strip() for line in lines[-count:])


def check_hello(label: str, hello: Hello) -> None:
    """Compare the worker's versions with ours. Raises HandshakeError naming the first that differs."""
    ours = {
        "Beringia": (__version__, hello.beringia),
        "events schema": (EVENTS_SCHEMA, hello.events_schema),
        "manifest schema": (MANIFEST_SCHEMA, hello.manifest_schema),
        "messages schema": (MESSAGES_SCHEMA, hello.messages_schema),
    }
    for what, (here, there) in ours.items():
        if here != there:
            raise HandshakeError(
                f"chips.{label} ({hello.python}) has {what} {there}, the supervisor has {here}. "
                "Install the same Beringia in both environments."
            )
