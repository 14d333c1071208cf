"""Files to and from a root on another machine, as the starter sees it: a short-lived process behind the launch prefix
for each move."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from beringia.errors import InputError, StorageFull, TransferFailed
from beringia.processes.child import BytesAfter, Child, start
from beringia.processes.command import Command
from beringia.processes.files.exchange import (
    Offered,
    SomethingElse,
    files_below,
    listing,
    receive_directory,
    send,
)
from beringia.processes.files.far import FilesWork
from beringia.processes.patience import Patience
from beringia.processes.patient_pipe import PatientPipe

_MODULE = "beringia.processes.files.far"
_INPUTS = "inputs"
"""Below the root: what was sent since work reads it, and that is not the work's own."""


class FarFiles:
    """The files below the root of a command's machine.

    Every move raises TransferFailed where the other side does not do its part, InputError or StorageFull where the user
    has to change something there.
    """

    def __init__(self, command: Command, log: Path, patience: Patience) -> None:
        assert command.root is not None, "a machine that sees our files needs none sent"
        self.root = command.root
        self._command = replace(command, module=_MODULE)
        self._log = log
        self._patience = patience
        self._under_way: Child | None = None
        self._closed = threading.Event()

    def send(self, root: Path, names: Sequence[str], into: str = "") -> int:
        """Send files below `root` to where they are below that one (or `into` of it), those that it lacks; returns how
        many bytes travelled."""
        offered = listing(root, names, memory=self._log.parent / f"hashes-{into.replace('/', '-') or 'run'}.json")
        with self._exchange(FilesWork(task="receive", directory=into)) as (goes, came):
            return send(root, offered, goes, came)

    def send_directory(self, source: Path, into: str, offered: Sequence[Offered]) -> int:
        """Send a directory, offered as `offer_directory` does: it appears there complete or not at all, in the place of
        one with other files."""
        with self._exchange(FilesWork(task="receive-directory", directory=into)) as (goes, came):
            return send(source, offered, goes, came)

    def send_input(self, here: Path, kind: str) -> str:
        """Send a file or directory that work reads; returns its path there."""
        place = f"{_INPUTS}/{kind}"
        if here.is_file():
            self.send(here.parent, [here.name], into=place)
            return str(Path(self.root) / place / here.name)
        self.send(here, files_below(here), into=place)
        return str(Path(self.root) / place)

    def fetch_directory(self, name: str, into: Path) -> list[Offered]:
        """Fetch a directory, which appears here complete or not at all. Every file arrived as it was hashed there."""
        with self._exchange(FilesWork(task="send-directory", directory=name)) as (goes, came):
            return receive_directory(into, came, goes)

    def close(self) -> None:
        """End what is under way, from another thread; nothing is moved any more."""
        self._closed.set()
        if (child := self._under_way) is not None:
            child.kill()

    @contextlib.contextmanager
    def _exchange(self, work: FilesWork) -> Iterator[tuple[PatientPipe, BytesAfter]]:
        """The streams of a process on that machine, and its end."""
        if self._closed.is_set():
            raise TransferFailed("Files are not moved any more.")
        child = self._under_way = start(self._command, work, self._log, patience=self._patience)
        if self._closed.is_set():  # meanwhile: whoever closes saw no process yet
            child.kill()
        problem: TransferFailed | SomethingElse | BrokenPipeError | None = None
        try:
            _wait_until_ready(child)
            if child.ready is not None:
                goes, came = child.streams()
                try:
                    yield goes, came
                except (TransferFailed, SomethingElse, BrokenPipeError) as failure:  # the other side may know why
                    problem = failure
                    if isinstance(failure, SomethingElse):
                        child.take(failure.line)
                with contextlib.suppress(TransferFailed):
                    child.hear_out(came)
        finally:
            self._under_way = None
            child.end()
        _judge(child, problem)


def _wait_until_ready(child: Child) -> None:
    while child.ready is None and not child.over and not child.impatient():
        child.poll(1.0)


def _judge(child: Child, problem: Exception | None) -> None:
    """Raise what went wrong: the other side's own words first."""
    ended = child.ended
    if ended is not None and ended.error is not None:
        error = ended.error.error()
        if isinstance(error, InputError | StorageFull):
            raise error
        raise TransferFailed(f"Moving files to or from the machine of {child.name} failed: {error}")
    if isinstance(problem, TransferFailed) and ended is not None:
        raise problem
    if problem is not None or ended is None:
        told = f" ({str(problem).rstrip('.')})" if isinstance(problem, TransferFailed) else ""
        raise TransferFailed(f"Files were not moved{told}: {child.death().sentence}.")
