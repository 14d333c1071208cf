"""The chip's machine while it is qualified: what the work there reads is sent first, where it has files of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from beringia.processes.command import Command
from beringia.processes.files.remote import FarFiles
from beringia.processes.patience import Patience
from beringia.qualify.evidence import QualifyOrder
from beringia.qualify.probing import Evidence, gather


@dataclass(frozen=True)
class FarChip:
    """Where a chip is, and how long its machine is waited for."""

    command: Command
    directory: Path
    """For logs, on this machine."""
    patience_seconds: float

    @classmethod
    def of(cls, command: Command, directory: Path, patience_seconds: float) -> FarChip:
        """Its machine as the command reaches it."""
        return cls(command, directory, patience_seconds)

    def log(self, name: str) -> Path:
        """Of one process."""
        return self.directory / f"{name}.log"

    def sent(self, order: QualifyOrder) -> QualifyOrder:
        """The order as it is read there: model, fault script and bundle have gone there, by hash. Raises
        TransferFailed, InputError."""
        if self.command.root is None:
            return order
        files = FarFiles(self.command, self.log("files"), Patience(silence_seconds=self.patience_seconds))
        kinds = {"model": order.model, "faults": order.faults, "bundle": order.bundle}
        named = {kind: Path(path) for kind, path in kinds.items() if path and path != "." and Path(path).exists()}
        return order.model_copy(update={kind: files.send_input(path, kind) for kind, path in named.items()})

    def gather(self, order: QualifyOrder, say: Callable[[str], None] = lambda text: None) -> Evidence:
        """Evidence from there."""
        return gather(order, self.command, self.log(order.task), patience_seconds=self.patience_seconds, say=say)
