"""The run directory as a chip on another machine sees it, and moving state there and back.

Where a chip shares this file system there is nothing to move. Where its section of the recipe names a `root`, files go
through the chip's own launch prefix, over the streams of a short-lived process, and are checked by hash on arrival.
Checkpoints come home in the background, one after another, and count only once they are here: what the events of a run
call complete or trusted can be loaded without the machine that wrote it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

from beringia.checkpoint.archive import read_archive, write_archive
from beringia.checkpoint.directory import CheckpointDirectory
from beringia.errors import CheckpointDamaged, RunError, TransferFailed
from beringia.records.events import (
    AnyEvent,
    CheckpointRejected,
    CheckpointTrusted,
    CheckpointWritten,
    Event,
    Fallback,
)
from beringia.records.manifest import TrustMark
from beringia.records.messages import Order
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.patient_pipe import PatientPipe
from beringia.supervise.transfer import write_files
from beringia.supervise.worker_process import chip_command, last_lines

_ATTEMPTS = 3


class SharedRoot:
    """The chip's machine sees our run directory: nothing is moved, every event can be told at once."""

    waiting = False

    def __init__(self, run: RunDirectory) -> None:
        self.root = str(run.root.resolve())

    def send_state(self, order: Order) -> CheckpointRejected | None:
        """Nothing to send."""
        return None

    def receive(self, event: AnyEvent) -> list[Event]:
        """What can be told now that the worker has told this."""
        return [event]

    def arrived(self) -> list[Event]:
        """What can be told since checkpoints have come home."""
        return []

    def close(self) -> None:
        """Nothing is under way."""


class RemoteRoot:
    """The chip's machine has a run directory of its own, at `chips.<label>.root`."""

    def __init__(self, label: str, recipe: Recipe, run: RunDirectory, epoch: int) -> None:
        self._label = label
        self._chip = recipe.chips[label]
        self._keep = recipe.train.keep
        self._patience_seconds = recipe.supervise.hang_seconds
        self._run = run
        self._epoch = epoch
        self._log = run.logs / f"{label}-{epoch}-transfer.log"
        self._transfers = ThreadPoolExecutor(1, thread_name_prefix="beringia-transfer")
        self._awaited: deque[tuple[CheckpointWritten | CheckpointTrusted, Future[None]]] = deque()
        self._under_way: subprocess.Popen[bytes] | None = None
        self._closed = False
        assert self._chip.root is not None
        self.root = self._chip.root

    @property
    def waiting(self) -> bool:
        """Whether events wait for their checkpoints."""
        return bool(self._awaited)

    def send_state(self, order: Order) -> CheckpointRejected | None:
        """Send what the order needs: recipe, epoch, data and the checkpoints it names; returns the checkpoint that
        cannot be sent because ours is damaged. Raises TransferFailed."""
        files = [self._run.resolved_recipe, self._run.epoch, *sorted(self._run.data.rglob("*"))]
        with self._sending("receive-files", self.root) as stream:
            write_files(self._run.root, (path for path in files if path.is_file()), stream)
        for step in (order.canary_from, order.resume_step):
            if step:
                try:
                    self._send_checkpoint(step)
                except (CheckpointDamaged, RunError) as problem:
                    file = getattr(problem, "path", None)
                    return CheckpointRejected(step=step, file=file, message=str(problem))
        return None

    def receive(self, event: AnyEvent) -> list[Event]:
        """What can be told now: what is about a checkpoint waits until that is here."""
        if isinstance(event, CheckpointWritten):
            self._awaited.append((event, self._transfers.submit(self._bring_home, event.step)))
        elif isinstance(event, CheckpointTrusted):
            self._awaited.append((event, self._transfers.submit(self._mark_trusted, event)))
        else:
            return [event]
        return []

    def arrived(self) -> list[Event]:
        """What can be told since checkpoints have come home, in order. One that could not be brought here is told as a
        fallback, and the run does not count on it. Raises StorageFull."""
        told: list[Event] = []
        while self._awaited and self._awaited[0][1].done():
            event, transfer = self._awaited.popleft()
            problem = transfer.exception()
            if isinstance(problem, TransferFailed):
                told.append(self._left_behind(event.step, problem))
            elif problem is not None:
                raise problem
            elif event.step in self._home.steps():
                told.append(event)
        return told

    def close(self) -> None:
        """End what is under way; what has not come home is not waited for."""
        self._closed = True
        self._transfers.shutdown(wait=False, cancel_futures=True)
        if self._under_way is not None:
            _kill(self._under_way)
        self._transfers.shutdown()

    @property
    def _home(self) -> CheckpointDirectory:
        return CheckpointDirectory(self._run.checkpoints)

    def _remote_path(self, step: int) -> str:
        return str(Path(self.root) / self._home.path(step).relative_to(self._run.root))

    def _send_checkpoint(self, step: int) -> None:
        with self._sending("receive-checkpoint", self._remote_path(step)) as stream:
            write_archive(self._home.path(step), stream)

    # In the thread of transfers

    def _bring_home(self, step: int) -> None:
        """A checkpoint from the chip's machine to ours; it is verified on arrival."""
        partial = self._home.partial(step, self._epoch)
        for attempt in range(1, _ATTEMPTS + 1):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with self._receiving("send-checkpoint", self._remote_path(step)) as stream:
                    read_archive(stream, partial)
                break
            except CheckpointDamaged as damage:
                if attempt == _ATTEMPTS or self._closed:
                    raise TransferFailed(f"{damage} {last_lines(self._log, 1)}") from damage
        self._home.publish(step, self._epoch)
        self._home.prune(self._keep, newest=step)

    def _mark_trusted(self, event: CheckpointTrusted) -> None:
        if event.step in self._home.steps():
            mark = TrustMark(step=event.step, state_hash=event.state_hash, checks=event.checks)
            self._home.mark_trusted(event.step, mark)

    def _left_behind(self, step: int, problem: TransferFailed) -> Fallback:
        return Fallback(
            what=f"checkpoint {step}",
            asked="in the run directory",
            used=f"left on the machine of chips.{self._label}",
            reason=str(problem),
        )

    # Processes behind the launch prefix

    @contextlib.contextmanager
    def _sending(self, verb: str, place: str) -> Iterator[IO[bytes]]:
        """Standard input of a process on the chip's machine."""
        with self._process(verb, place, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            with PatientPipe(process.stdin, self._patience_seconds) as pipe, contextlib.suppress(BrokenPipeError):
                yield cast(IO[bytes], pipe)  # a process that has ended early says why by its status

    @contextlib.contextmanager
    def _receiving(self, verb: str, place: str) -> Iterator[IO[bytes]]:
        """Standard output of a process on the chip's machine."""
        with self._process(verb, place, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            with io.BufferedReader(PatientPipe(process.stdout, self._patience_seconds)) as stream:
                yield stream

    @contextlib.contextmanager
    def _process(
        self, verb: str, place: str, *, stdin: int, stdout: int | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process of `transfer` on the chip's machine, to its end. Raises TransferFailed for a bad end."""
        command = chip_command(self._chip, "beringia.supervise.transfer", verb, place)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                command, bufsize=0, stdin=stdin, stdout=stdout, stderr=log, start_new_session=True
            )
        self._under_way = process
        try:
            yield process
            status = process.wait(self._patience_seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            self._under_way = None
            _kill(process)
            process.wait()
        if status != 0:
            raise TransferFailed(
                f"{verb} on the machine of chips.{self._label} ended with status {status}: "
                f"{last_lines(self._log, 1) or 'it said nothing'}"
            )


def open_root(label: str, recipe: Recipe, run: RunDirectory, epoch: int) -> SharedRoot | RemoteRoot:
    """The run directory on this chip's machine."""
    return SharedRoot(run) if recipe.chips[label].root is None else RemoteRoot(label, recipe, run, epoch)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what the launch prefix started for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
