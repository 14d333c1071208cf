"""Checkpoints of one session: written in the background, reported when complete, trusted when the guard says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from beringia.checkpoint.store import CheckpointStore, PendingSave
from beringia.processes.ranks import Ranks
from beringia.records.events import CheckpointTrusted, CheckpointWritten
from beringia.records.manifest import TrustMark
from beringia.records.run_directory import RunDirectory
from beringia.train.guard import Guard
from beringia.train.reporting import Reporting


class Saving:
    """What is being written, and what waits to be trusted. `agree` tells whether a flag is set on any rank."""

    def __init__(
        self, store: CheckpointStore, run: RunDirectory, ranks: Ranks, channel: Reporting, agree: Callable[[bool], bool]
    ) -> None:
        self._store = store
        self._run = run
        self._ranks = ranks
        self._channel = channel
        self._agree = agree
        self._writing: tuple[int, PendingSave] | None = None
        self.newest: int | None = None
        """Step of the last state that was saved, or loaded."""
        self.pending: dict[int, str] = {}
        """State hash of each complete checkpoint of this session that is not trusted yet, by step."""

    def save(self, step: int, tensors: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Copy the live state and write it in the background; waits for the save before."""
        self.finish()
        self.newest = step
        self._writing = (step, self._store.save(step, tensors, progress))

    def collect(self) -> None:
        """Report the save under way if it is complete on every rank."""
        if self._writing is not None and not self._agree(not self._writing[1].done()):
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way and report it. Raises StorageFull or StaleEpoch."""
        if self._writing is None:
            return
        (step, saving), self._writing = self._writing, None
        manifest = saving.result()
        self.pending[step] = manifest.state_hash
        if self._ranks.first:
            self._channel.event(
                CheckpointWritten(
                    step=step,
                    directory=str(self._store.directory.path(step).relative_to(self._run.root)),
                    bytes=sum(entry.bytes for entry in manifest.files),
                    state_hash=manifest.state_hash,
                    pause_seconds=saving.pause_seconds,
                    write_seconds=saving.write_seconds,
                )
            )

    def trust(self, guard: Guard | None) -> None:
        """Mark every checkpoint whose sites were all found clean after it."""
        for step in sorted(self.pending):
            checks = guard.clean_since(step) if guard is not None else None
            if checks is None:
                return
            state_hash = self.pending.pop(step)
            mark = TrustMark(step=step, state_hash=state_hash, checks=checks)
            if self._ranks.first and self._store.trust_if_kept(step, mark):
                self._channel.event(CheckpointTrusted(step=step, state_hash=state_hash, checks=checks))
