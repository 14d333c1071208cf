"""A far end as its starter sees it: two streams of JSON lines, a log, a death in words.

Starts it, shakes hands, sends its job, notices when it says nothing for too long, ends it with everything it started.
Knows nothing of what the work is: lines are the work's own records.
"""

from __future__ import annotations

import contextlib
import io
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beringia.errors import HandshakeError, TransferFailed
from beringia.processes.command import Command
from beringia.processes.endings import end_in_stages, new_mark, signal_group
from beringia.processes.patience import QUESTION_SECONDS, STOP_SECONDS, Patience
from beringia.processes.patient_pipe import PatientPipe
from beringia.processes.protocol import (
    JOB_VARIABLE,
    MARK_VARIABLE,
    Ended,
    FromFarEnd,
    Go,
    Heartbeat,
    Hello,
    Job,
    Line,
    Ready,
    Stop,
    check_hello,
    from_far_end,
)
from beringia.processes.words import HELLO, IMPORTS, WORK, Death, last_lines
from beringia.records.record import Record

_READ_BYTES = 1 << 16
_LAST_WORDS = 3
_QUESTION_ENDS = (":", "?", "]", ")")
_LOGGED_BYTES = 1 << 20
"""Of what a prefix prints between messages: a far end's own words go to standard error."""

_HELLO = b'{"kind":"hello"'
"""How every far end's first message begins."""

Message = Ready | Heartbeat | Line | Ended


class Child:
    """One running far end. Made by `start`; `end` it in any case."""

    def __init__(self, command: Command, job: Job, log: Path, patience: Patience, *, shared_input: bool) -> None:
        self.name = command.name
        self.log = log
        self.patience = patience
        self.hello: Hello | None = None
        self.ready: Ready | None = None
        self.ended: Ended | None = None
        """Its last word."""
        self.mark = new_mark()
        self._argv = tuple(command.argv())
        self._job = job.model_copy(update={"mark": self.mark, "environment": dict(command.environment)})
        self._open = True
        self._pending = b""
        self._logged_bytes = 0
        self._heard_at = time.monotonic()
        self._status: int | None = None
        self._ran_out = self._question = False
        self._process = self._start(command, shared_input)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = PatientPipe(self._process.stdin, patience.silence_seconds)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def _start(self, command: Command, shared_input: bool) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
        environment[MARK_VARIABLE] = self.mark
        if command.safe_path:
            environment["PYTHONSAFEPATH"] = "1"  # for the interpreters that its launcher starts
        if shared_input:
            environment[JOB_VARIABLE] = self._job.model_dump_json()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.log, "ab") as errors:
                return subprocess.Popen(
                    command.argv(),
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    env=environment,
                )
        except OSError as error:
            raise HandshakeError(
                f"{self.name}: could not start {' '.join(command.argv())}: {error.strerror}."
            ) from None

    def fileno(self) -> int:
        """To wait for several children at once."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def over(self) -> bool:
        """Whether there is nothing more to hear from it."""
        return (not self._open and b"\n" not in self._pending) or self.ended is not None

    def send(self, message: Go | Stop | Job) -> None:
        """Send one message; a far end that is gone shows by the end of its output, not here."""
        with contextlib.suppress(BrokenPipeError, TransferFailed):
            self._input.write(message.model_dump_json().encode() + b"\n")

    def poll(self, seconds: float) -> list[Message]:
        """What it says within this time; nothing where it is silent. Raises HandshakeError for another version."""
        waiting = self._messages_read()
        if waiting or not self._open or not self._selector.select(timeout=seconds):
            return waiting
        block = os.read(self.fileno(), _READ_BYTES)
        if not block:
            self._open = False
            return []
        self._pending += block
        return self._messages_read()

    def _messages_read(self) -> list[Message]:
        """Of what was read already. After `Ready` it stops: what follows may be bytes, and came in the same read."""
        messages: list[Message] = []
        while b"\n" in self._pending:
            line, _, self._pending = self._pending.partition(b"\n")
            message = self._taken(line)
            if message is not None:
                messages.append(message)
            if isinstance(message, Ready):
                break
        return messages

    def follow(self, silence_seconds: float = 1.0) -> Iterator[Message | None]:
        """Messages until it is over or patience has run out; None after each `silence_seconds` without one."""
        while not self.over and not self.impatient():
            yield from self.poll(silence_seconds) or (None,)

    def impatient(self) -> bool:
        """Whether it has been silent for too long, or its prefix waits for an answer."""
        silence = time.monotonic() - self._heard_at
        if self.hello is None and silence > QUESTION_SECONDS and self._asks():
            self._question = self._ran_out = True
        limit = self.patience.start_seconds if self.ready is None else self.patience.silence_seconds
        self._ran_out = self._ran_out or silence > limit
        return self._ran_out

    def feed(self) -> None:
        """What was received has taken a while on this side: begin to wait anew."""
        self._heard_at = time.monotonic()

    def streams(self) -> tuple[PatientPipe, BytesAfter]:
        """Its standard input and output as bytes, for work whose module `READS_BYTES`, once it is ready. Both raise
        TransferFailed where nothing moves for too long."""
        assert self._process.stdout is not None
        first, self._pending = self._pending, b""
        return self._input, BytesAfter(first, PatientPipe(self._process.stdout, self.patience.silence_seconds))

    def hear_out(self, stream: BytesAfter) -> None:
        """Its last messages, after the bytes."""
        while self.ended is None and (line := stream.readline()):
            self.take(line)
        self._open = False

    def take(self, line: bytes) -> None:
        """A message that came among the bytes."""
        self._taken(line.rstrip(b"\n"))

    def end(self, grace_seconds: float | None = None) -> int:
        """Close its input, wait, then kill what is left of it and of what it started; returns the exit status.

        Without `grace_seconds` a far end that has said its last word gets its patience; any other ends at once when its
        input does, or is killed.
        """
        if self._status is None:
            with contextlib.suppress(BrokenPipeError):
                self._input.close()
            if grace_seconds is None:
                grace_seconds = self.patience.end_seconds if self.ended is not None else STOP_SECONDS
            self._status = end_in_stages(self._process, self.mark, grace_seconds=grace_seconds)
            self._selector.close()
            assert self._process.stdout is not None
            self._process.stdout.close()
        return self._status

    def kill(self) -> None:
        """At once."""
        signal_group(self._process, signal.SIGKILL)

    @property
    def pid(self) -> int:
        """Of the process that was started: the prefix's, where there is one."""
        return self._process.pid

    def death(self) -> Death:
        """How it ended, for one that did not say why; after `end`."""
        waited_for = HELLO if self.hello is None else IMPORTS if self.ready is None else WORK
        limit = self.patience.start_seconds if self.ready is None else self.patience.silence_seconds
        status = None if self._ran_out else self._status
        words = self._last_words() if self._question else last_lines(self.log, _LAST_WORDS)
        return Death(self.name, status, waited_for, limit, words, self._question, self._argv)

    def _taken(self, line: bytes) -> Message | None:
        message = self._parsed(line)
        if message is None:
            return None
        self._heard_at = time.monotonic()
        if isinstance(message, Hello):
            self._greeted(message)
            return None
        if isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, Ended):
            self.ended = message
        return message

    def _greeted(self, hello: Hello) -> None:
        check_hello(self.name, hello)
        if self.hello is None:  # a rank that torchrun starts there greets too, and has its job from its parent
            self.send(self._job)
        self.hello = hello

    def _parsed(self, line: bytes) -> FromFarEnd | None:
        # A launch prefix may print a banner (ssh does), and need not end its line before the far end's hello: what is
        # no message goes to the log.
        begin = max(0, line.rfind(_HELLO)) if self.hello is None else 0
        message = _message(line[begin:])
        printed = line[:begin] if message is not None else line
        if printed and self._logged_bytes < _LOGGED_BYTES:
            self._logged_bytes += len(printed)
            with open(self.log, "ab") as log:
                log.write(printed + b"\n")
        return message

    def _asks(self) -> bool:
        return self._last_words().endswith(_QUESTION_ENDS)

    def _last_words(self) -> str:
        """The last line, begun or whole, on either stream; a question has no end of line."""
        asked = self._pending.decode(errors="replace").strip()
        if asked or not self.log.exists():
            return asked
        content = self.log.read_bytes()[-_READ_BYTES:].decode(errors="replace")
        return content.splitlines()[-1].strip() if content and not content.endswith("\n") else ""


def _message(line: bytes) -> FromFarEnd | None:
    try:
        return from_far_end.validate_json(line)
    except ValidationError:
        return None


class BytesAfter:
    """Bytes that were read already, then a pipe's."""

    def __init__(self, first: bytes, pipe: PatientPipe) -> None:
        self._first = first
        self._rest = io.BufferedReader(pipe)

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes; none at the end."""
        if self._first:
            taken, self._first = self._first[:size], self._first[size:]
            return taken
        return self._rest.read1(size)

    def readline(self, limit: int = -1) -> bytes:
        """A line, or what there is until the end."""
        if not self._first:
            return self._rest.readline(limit)
        line, end, self._first = self._first.partition(b"\n")
        return line + end if end else line + self._rest.readline(limit)


def start(
    command: Command,
    work: Record,
    log: Path,
    *,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    ranks: int = 1,
    stacks: str | None = None,
    shared_input: bool = False,
) -> Child:
    """Start work of ours. `work` is the module's own record of what is to be done.

    `ranks`: processes on that machine, one a device. `stacks`: file for them when it hangs, below its root.
    `shared_input`: several ranks may hang on one standard input; the job is in the environment, too. Raises
    HandshakeError for what cannot be started at all.
    """
    job = Job(
        work=work.model_dump(mode="json"),
        root=command.root,
        owner=command.owner,
        ranks=ranks,
        stacks=stacks,
        patience_seconds=patience.silence_seconds,
    )
    return Child(command, job, log, patience, shared_input=shared_input)


def lines_of(child: Child) -> list[dict[str, Any]]:
    """What a child says that is only waited for; it is ended. Raises the error that it names, or that its death is."""
    try:
        lines = [message.line for message in child.follow() if isinstance(message, Line)]
    finally:
        child.end()
    if child.ended is None:
        raise child.death().error()
    if child.ended.error is not None:
        raise child.ended.error.error()
    return lines


def wait_for_any(children: Iterable[Child], seconds: float) -> None:
    """Until one of them says something or ends."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            if not child.over:
                selector.register(child, selectors.EVENT_READ)
        if selector.get_map():
            selector.select(seconds)
        else:
            time.sleep(seconds)
