"""The process itself: `python -m beringia.processes.far_end MODULE`, wherever a launcher has put it.

Says hello before anything heavy is imported, hears its job, imports the module and calls its `work`. Standard output
belongs to messages alone: what a library prints there goes to standard error. Dies with its starter. Where the job
wants several ranks on this machine, torchrun starts this module once for each, and this process hands lines on to them.

A module of work has `work(document, far_end) -> Ended`, where `document` is its own record as JSON. A module that sets
`READS_BYTES = True` reads standard input itself, as bytes, after its job. One that sets `STOPS = True` looks at
`channel.stop_requested`; any other is ended by a signal as any program is.
"""

# ruff: noqa: E402
from __future__ import annotations

import time

_STARTED = time.perf_counter()  # before the imports, which it measures, whichever of them come first

import contextlib
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from beringia.errors import BeringiaError, HandshakeError, RunError
from beringia.machine.aside import file_beside, scratch_directory
from beringia.processes.channel import Channel, Watchdog
from beringia.processes.command import Command
from beringia.processes.endings import kill_marked
from beringia.processes.launchers import torchrun
from beringia.processes.patience import JOB_SECONDS, OWNER_SECONDS, STOP_SECONDS
from beringia.processes.protocol import JOB_VARIABLE, MARK_VARIABLE, Ended, Hello, Job, Ready, schemas
from beringia.processes.ranks import Ranks, ranks_from_environment
from beringia.records.error_document import ErrorDocument
from beringia.version import __version__

OWNER_MARK = ".beringia-run"
"""In a root: whose it is."""


class FarEnd:
    """What a module's `work` is given."""

    def __init__(self, channel: Channel, ranks: Ranks, job: Job) -> None:
        self.channel = channel
        self.ranks = ranks
        self.job = job
        self.root = Path(job.root) if job.root is not None else None
        self._afterwards: list[Callable[[], None]] = []

    def afterwards(self, action: Callable[[], None]) -> None:
        """Have something done once the last word is said: what may take long, or for ever."""
        self._afterwards.append(action)

    def watchdog(self) -> Watchdog | None:
        """What leaves the stacks of a hang in a file, where the job names one."""
        if self.job.stacks is None:
            return None
        file = (self.root or Path()) / self.job.stacks.replace("{rank}", str(self.ranks.rank))
        return Watchdog(file, self.job.patience_seconds)

    def leave(self) -> None:
        """Do it."""
        for action in self._afterwards:
            action()


def main(module: str) -> NoReturn:
    """Do one job."""
    channel = Channel()
    channel.stop_on_signals()  # at once: the starter may be told the same, and what ends is then no death
    ranks: Ranks | None = None
    far_end: FarEnd | None = None
    try:
        ranks = ranks_from_environment()
        if ranks is not None:
            channel.rank = ranks.rank
        if ranks is None or ranks.first:
            channel.send(_hello())
        job = _job(channel, ranks)
        _settle_in(job)
        if ranks is None and job.ranks > 1:
            _exit(_be_parent_of_ranks(module, job, channel), settled_in=True)
        far_end = FarEnd(channel, ranks or Ranks(), job)
        ended = _work(module, far_end)
    except BeringiaError as problem:
        ended = _error(problem)
    except Exception as problem:  # the process boundary: the traceback goes to the log, the rest to the starter
        traceback.print_exc()
        channel.send(_error(problem))
        raise
    if ranks is None or ranks.first or ended.why != "done":
        channel.send(ended)
    if far_end is not None:
        far_end.leave()
    _exit(0, settled_in=far_end is not None)


def _error(problem: Exception) -> Ended:
    return Ended(why="error", message=str(problem), error=ErrorDocument.of(problem))


def _exit(status: int, *, settled_in: bool) -> NoReturn:
    """All is written and said. Taking the interpreter down would only keep the starter waiting (1.5 s), and torch may
    abort there over a group that something still holds. Before it has settled in, this process has started nothing, and
    the mark in its environment is its starter's: a prefix that hands its last words on has that too."""
    sys.stderr.flush()
    if settled_in:
        kill_marked(os.environ[MARK_VARIABLE])
    os._exit(status)


def _hello() -> Hello:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return Hello(
        beringia=__version__,
        schemas=schemas(),
        torch=torch,
        python=f"{platform.python_version()} at {sys.executable}",
    )


def _job(channel: Channel, ranks: Ranks | None) -> Job:
    inherited = os.environ.pop(JOB_VARIABLE, None)
    if inherited is not None and ranks is not None:  # of ranks that share one standard input one alone reads the line
        return Job.model_validate_json(inherited)
    if not channel.readable_within(JOB_SECONDS):
        raise HandshakeError(
            f"No job came over standard input within {JOB_SECONDS:g} s. Does the launch prefix hand standard input on?"
        )
    line = channel.readline()
    if not line:
        raise HandshakeError(
            "Standard input was closed before a job came. The launch prefix must hand standard input on "
            "(ssh without -n, kubectl exec with -i, docker run with -i)."
        )
    return Job.model_validate_json(line)


def _settle_in(job: Job) -> None:
    os.environ.update(job.environment)
    if sys.flags.safe_path:  # what this process starts (ranks, by torchrun) looks for modules where it does
        os.environ["PYTHONSAFEPATH"] = "1"
    # Its own, below its starter's: by it this process ends what it has started, and not the prefix that started it,
    # nor ranks beside it.
    os.environ[MARK_VARIABLE] = f"{os.environ.get(MARK_VARIABLE, job.mark)}/{uuid.uuid4().hex[:8]}"
    if job.root is None:
        return
    root = Path(job.root)
    if not root.parent.is_dir():
        raise RunError(
            f"The root {root} cannot be made on {platform.node()}: there is no directory {root.parent} there. "
            "Mount it, or correct the chip's root."
        )
    try:
        root.mkdir(exist_ok=True)
        with file_beside(root / "probe"):
            pass
        _claim(root, job.owner)
    except OSError as error:
        raise RunError(
            f"Nothing can be written to the root {root} on {platform.node()}: {error.strerror}. "
            "Make it writable, or choose another."
        ) from None


def _claim(root: Path, owner: str | None) -> None:
    """A root belongs to the first that uses it: two runs in one would mix their states."""
    mark = root / OWNER_MARK
    if owner is not None:
        with contextlib.suppress(FileExistsError), open(mark, "x") as file:
            file.write(owner)
    found = mark.read_text() if mark.exists() else owner
    if found == "":  # another process is writing it
        time.sleep(OWNER_SECONDS)
        found = mark.read_text()
    if found != owner:
        raise RunError(
            f"The root {root} on {platform.node()} holds the files of another run: give each run a root of its own, or "
            "remove what lies there."
        )


def _work(module: str, far_end: FarEnd) -> Ended:
    channel = far_end.channel
    channel.watchdog = far_end.watchdog()
    try:
        imported = importlib.import_module(module)
        if not getattr(imported, "STOPS", False):
            channel.end_on_signals()
        if not getattr(imported, "READS_BYTES", False):
            channel.listen()
        if far_end.ranks.first:
            channel.send(Ready(imports_seconds=time.perf_counter() - _STARTED))
        ended: Ended = imported.work(far_end.job.work, far_end)
        return ended
    finally:
        if channel.watchdog is not None:
            channel.watchdog.close()


# ---- several ranks on this machine


def _be_parent_of_ranks(module: str, job: Job, channel: Channel) -> int:
    """Start them, hand on to them what the starter says, and see that none outlives it."""
    command = Command("this machine's ranks", module, launch=(str(job.ranks),), launcher="torchrun")
    with scratch_directory() as logs:
        environment = {torchrun.LOGS_VARIABLE: str(logs)} | os.environ | {JOB_VARIABLE: job.model_dump_json()}
        process = subprocess.Popen(
            torchrun.argv(command), stdin=subprocess.PIPE, stdout=channel.output, env=environment
        )
        assert process.stdin is not None
        threading.Thread(target=_hand_on, args=(channel, process.stdin, process), daemon=True).start()
        status = process.wait()
    return status if status >= 0 else 128 - status  # as a shell says which signal it was


def _hand_on(channel: Channel, ranks: IO[bytes], process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError):
        while line := channel.readline():
            ranks.write(line)
            ranks.flush()
        ranks.close()  # each of them exits by that
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        kill_marked(os.environ[MARK_VARIABLE])


if __name__ == "__main__":
    main(sys.argv[1])
