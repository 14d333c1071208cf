"""The run directory as a chip on another machine sees it, and moving state there and back.

Where a chip shares this file system there is nothing to move. Where its section of the recipe names a `root`, files go
through the chip's own launch prefix, over the streams of a short-lived process, and are checked by hash on arrival.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from beringia.checkpoint.archive import read_archive
from beringia.checkpoint.directory import CheckpointDirectory
from beringia.errors import HandshakeError
from beringia.records.messages import Order
from beringia.records.recipe import ChipSection
from beringia.records.run_directory import RunDirectory
from beringia.supervise.transfer import write_files
from beringia.supervise.worker_process import chip_command


class SharedRoot:
    """The chip's machine sees our run directory: nothing is moved."""

    def __init__(self, run: RunDirectory) -> None:
        self.root = str(run.root.resolve())

    def send_state(self, order: Order) -> None:
        """Nothing to send."""

    def fetch_checkpoint(self, step: int) -> None:
        """Nothing to fetch."""


class RemoteRoot:
    """The chip's machine has a run directory of its own."""

    def __init__(self, label: str, chip: ChipSection, run: RunDirectory, root: str) -> None:
        self._label = label
        self._chip = chip
        self._run = run
        self.root = root

    def send_state(self, order: Order) -> None:
        """Send what the order needs: recipe, epoch, data and the checkpoints it names."""
        files = [self._run.resolved_recipe, self._run.epoch, *sorted(self._run.data.rglob("*"))]
        self._pipe_out("files", self.root, (path for path in files if path.is_file()))
        for step in {order.resume_step, order.canary_from} - {None, 0}:
            assert step is not None
            self._send_checkpoint(step)

    def fetch_checkpoint(self, step: int) -> None:
        """Bring a checkpoint (or its mark of trust) home; it is verified on arrival."""
        ours = CheckpointDirectory(self._run.checkpoints)
        command = chip_command(self._chip, "beringia.supervise.transfer", "send-checkpoint", self._remote_path(step))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            if ours.path(step).exists():
                ours.discard(step)
            read_archive(process.stdout, ours.path(step))
        self._check(process.returncode, command)

    def _send_checkpoint(self, step: int) -> None:
        source = CheckpointDirectory(self._run.checkpoints).path(step)
        command = chip_command(self._chip, "beringia.supervise.transfer", "receive-checkpoint", self._remote_path(step))
        sender = ["-m", "beringia.checkpoint.archive", "send", str(source)]
        with subprocess.Popen([sys.executable, *sender], stdout=subprocess.PIPE) as sending:
            status = subprocess.run(command, stdin=sending.stdout, check=False).returncode
        self._check(status or sending.returncode, command)

    def _pipe_out(self, what: str, destination: str, files: Iterable[Path]) -> None:
        command = chip_command(self._chip, "beringia.supervise.transfer", f"receive-{what}", destination)
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            write_files(self._run.root, files, process.stdin)
            process.stdin.close()
        self._check(process.returncode, command)

    def _remote_path(self, step: int) -> str:
        ours = CheckpointDirectory(self._run.checkpoints).path(step)
        return str(Path(self.root) / ours.relative_to(self._run.root))

    def _check(self, status: int, command: list[str]) -> None:
        if status != 0:
            raise HandshakeError(
                f"chips.{self._label}: moving state with {' '.join(command[:6])} ... failed with status {status}. "
                "Check that the launch prefix passes standard input and output through."
            )


def open_root(label: str, chip: ChipSection, run: RunDirectory) -> SharedRoot | RemoteRoot:
    """The run directory on this chip's machine."""
    return SharedRoot(run) if chip.root is None else RemoteRoot(label, chip, run, chip.root)
