"""Saving and loading a run's state: `CheckpointStore`.

A save stops training only while the state is copied and hashed in memory; a thread then writes the files, checks that
this process may still publish, and renames the directory into place. A load checks every byte that it reads. Reads
and writes `checkpoints/` of one run directory and reads its `epoch`; what a checkpoint looks like is described in
`directory.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from beringia.checkpoint import plan
from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.checkpoint.epoch import holding_epoch
from beringia.checkpoint.plan import State
from beringia.checkpoint.rank_group import RankGroup
from beringia.checkpoint.staging import Staging, copying_pool
from beringia.checkpoint.storage import StagedWriter, VerifiedReader, tensor_entries
from beringia.chips.chip import Chip
from beringia.errors import BeringiaError, CheckpointDamaged, RunError
from beringia.numerics.keyed_sum import KeyedSumKernel, open_kernel
from beringia.numerics.state_hash import combine, hash_tensor
from beringia.records.error_document import ErrorDocument
from beringia.records.files import reporting_storage
from beringia.records.manifest import MANIFEST_SCHEMA, CheckpointManifest, Chunk, FileEntry, TrustMark
from beringia.version import __version__


@dataclass
class PendingSave:
    """A checkpoint on its way to the disk."""

    step: int
    bytes: int
    """What this rank writes."""
    pause_seconds: float
    """How long `save` kept the caller, waiting for the previous save included."""
    _written: Future[tuple[CheckpointManifest, float]] = field(repr=False)
    _collected: bool = field(default=False, repr=False)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._written.done()

    def result(self) -> CheckpointManifest:
        """Wait until it is complete on disk. Raises StorageFull, StaleEpoch, or whatever else stopped the write."""
        self._collected = True
        return self._written.result()[0]

    @property
    def write_seconds(self) -> float:
        """From the end of the pause until it was complete; waits like `result`."""
        return self._written.result()[1]


@dataclass(frozen=True)
class _Layout:
    """What stays the same from save to save."""

    fingerprint: tuple[Any, ...]
    planner: DefaultSavePlanner
    plan: SavePlan
    metadata: Metadata


class CheckpointStore:
    """The checkpoints of one run, for the ranks of one job. Constructing, saving and loading are collective.

    >>> store = CheckpointStore(run.checkpoints, epoch=3, epoch_file=run.epoch, keep=2,
    ...                         recipe_hash=recipe.hash, chip_identity=chip.identity.hash, chip=chip)
    >>> pending = store.save(400, state, {"step": 400, "cursor": 12800})   # training goes on
    >>> pending.result().state_hash
    >>> progress = store.load(400, state)                                  # into the live tensors

    `run_identity`: of the run; None outside one. `epoch_file`: the run's; None publishes without asking (a notebook, an
    export). `process_group`: the job's, None for one process. `chip`: needed for tensors that are not in host memory.
    """

    def __init__(
        self,
        directory: Path,
        *,
        epoch: int,
        epoch_file: Path | None,
        keep: int,
        recipe_hash: str,
        chip_identity: str,
        run_identity: str | None = None,
        process_group: dist.ProcessGroup | None = None,
        chip: Chip | None = None,
    ) -> None:
        self.directory = CheckpointDirectory(directory)
        self.epoch = epoch
        self.keep = keep
        self.chip = chip
        self.clock: Callable[[], float] = time.perf_counter
        """What the pause of a save is measured by."""
        self._epoch_file = epoch_file
        self._recipe_hash = recipe_hash
        self._owner = Owner(run_identity, frozenset({recipe_hash}))
        self._chip_identity = chip_identity
        self._ranks = RankGroup(process_group)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="beringia-checkpoint")
        self._copiers = copying_pool()
        self._layout: _Layout | None = None
        self._staging: Staging | None = None
        self._pending: PendingSave | None = None
        self._cleaned = False

    @property
    def hash_kernel(self) -> KeyedSumKernel:
        """Whether the state hash runs compiled on the host, and why not: to be reported where it does not."""
        return open_kernel()

    def prepare(self, state: State) -> None:
        """Plan, allocate buffers and open the hash kernel, so that the first save pauses no longer than others."""
        self._settle()
        open_kernel()
        layout = self._layout_for(state)
        if self._staging is None:
            self._staging = Staging(layout.plan, self._ranks.rank, self.chip)

    def save(self, step: int, state: State, progress: Mapping[str, Any]) -> PendingSave:
        """Copy and hash the live tensors, then write in the background. `progress`: JSON, the same on every rank.

        Waits for the previous save and raises its error if nobody has collected it.
        """
        started = self.clock()
        self.prepare(state)
        assert self._layout is not None and self._staging is not None
        planner = self._layout.planner
        planner.set_up_planner(dict(state), is_coordinator=self._ranks.rank == 0)
        live = [planner.lookup_object(piece.item.index) for piece in self._staging.pieces]
        values = self._staging.take(live, self._copiers)
        pause_seconds = self.clock() - started
        written = self._writer.submit(self._write, step, self._layout, self._staging, values, dict(progress))
        self._pending = PendingSave(step, self._staging.bytes, pause_seconds, written)
        return self._pending

    def load(self, step: int, state_template: State) -> dict[str, Any]:
        """Fill the live tensors from the checkpoint of `step` and return its progress.

        Any number of ranks reads what any number wrote; every file that a rank needs a part of is read whole and
        checked. Raises RunError where names, shapes or dtypes differ, CheckpointDamaged (on every rank) for a file
        that is not as it was written; the tensors' content is then worthless.
        """
        self._settle()
        damage: CheckpointDamaged | RunError | None = None
        progress: dict[str, Any] = {}
        try:
            progress = self._load_here(step, state_template)
        except (CheckpointDamaged, RunError) as error:
            damage = error
        self._raise_everywhere(damage)
        return progress

    def state_hash(self, state: State, progress: Mapping[str, Any]) -> str:
        """The hash of the live tensors and the progress; equal to the manifest's where the state is the same."""
        self._settle()
        layout = self._layout_for(state)
        planner = layout.planner
        planner.set_up_planner(dict(state), is_coordinator=self._ranks.rank == 0)
        on_device = self.chip is not None and self.chip.capabilities.exact_int64
        values: dict[str, int] = {}
        for item in layout.plan.items:
            assert item.tensor_data is not None and item.tensor_data.chunk is not None
            live, chunk = planner.lookup_object(item.index).detach(), item.tensor_data.chunk
            value = hash_tensor(
                live, item.index.fqn, offsets=chunk.offsets, shape=item.tensor_data.size, on_device=on_device
            )
            values[item.index.fqn] = values.get(item.index.fqn, 0) + value
        return self._combine(layout, values, progress)

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, ascending."""
        return self.directory.steps()

    def manifest(self, step: int) -> CheckpointManifest:
        """The manifest of a complete checkpoint, checked."""
        return self.directory.manifest(step)

    def trusted_steps(self) -> list[int]:
        """Steps of trusted checkpoints, ascending."""
        return self.directory.trusted_steps()

    def mark_trusted(self, step: int, mark: TrustMark) -> None:
        """Say why `step` is trusted from now on. Raises StaleEpoch."""
        with self._publishing():
            self.directory.mark_trusted(step, mark)

    def trust_if_kept(self, step: int, mark: TrustMark) -> bool:
        """`mark_trusted`, unless the step was pruned: the thread that writes may do so at any moment but under this
        lock. Returns whether it is marked."""
        with self._publishing():
            if step not in self.directory.steps():
                return False
            self.directory.mark_trusted(step, mark)
            return True

    def prune(self) -> list[int]:
        """Delete all but the last `keep` and the last two trusted; done after each save too. Raises StaleEpoch."""
        with self._publishing():
            return self.directory.prune(self.keep, self._owner)

    def verify(self, step: int) -> CheckpointManifest:
        """Check every file. Raises CheckpointDamaged naming the first that is not as it was written."""
        return self.directory.verify(step)

    def close(self) -> None:
        """Wait for what is being written, raise its error, and give threads and group back."""
        try:
            self._settle()
        finally:
            self._writer.shutdown()
            self._copiers.shutdown()
            self._ranks.close()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending._collected:
            pending._written.exception()  # waits; the caller has been told
        else:
            pending.result()

    def _publishing(self) -> Any:
        return nullcontext() if self._epoch_file is None else holding_epoch(self._epoch_file, self.epoch)

    def _layout_for(self, state: State) -> _Layout:
        fingerprint = plan.layout_of(state)
        if self._layout is None or self._layout.fingerprint != fingerprint:
            planner, plans, metadata = plan.plan_save(state, self._ranks)
            self._layout = _Layout(fingerprint, planner, plans[self._ranks.rank], metadata)
            self._staging = None
        return self._layout

    def _load_here(self, step: int, state: State) -> dict[str, Any]:
        manifest = self.directory.manifest(step)
        plan.check_fits(state, manifest)
        reader, planner = VerifiedReader(self.directory.path(step), manifest), plan.load_planner()
        metadata = reader.read_metadata()
        coordinator = self._ranks.rank == 0
        planner.set_up_planner(dict(state), metadata, coordinator)
        reader.set_up_storage_reader(metadata, coordinator)
        # Loading needs no agreement between ranks: torch's global load plan is the local plans as they are.
        local = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        with torch.no_grad():
            reader.read_data(local, planner).wait()
        return dict(manifest.progress)

    def _write(
        self, step: int, layout: _Layout, staging: Staging, values: dict[str, int], progress: dict[str, Any]
    ) -> tuple[CheckpointManifest, float]:
        started = time.perf_counter()
        partial = self.directory.partial(step, self.epoch)
        writer = StagedWriter(partial, staging)
        try:
            self._together(self._clean)
            self._together(lambda: self._write_files(writer, layout))
            manifest = self._manifest(step, layout, writer, values, progress)
            self._together(lambda: self._publish(step, layout, writer, manifest))
        finally:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        return manifest, time.perf_counter() - started

    def _clean(self) -> None:
        if not self._cleaned and self._ranks.rank == 0:
            with self._publishing():
                self.directory.clean(self.epoch)
        self._cleaned = True

    def _write_files(self, writer: StagedWriter, layout: _Layout) -> None:
        with reporting_storage(writer.directory):
            writer.directory.mkdir(parents=True, exist_ok=True)
        writer.write_data(layout.plan, layout.planner).wait()

    def _publish(self, step: int, layout: _Layout, writer: StagedWriter, manifest: CheckpointManifest) -> None:
        if self._ranks.rank != 0:
            return
        writer.finish(replace(layout.metadata, storage_data=manifest), [])
        with self._publishing():
            self.directory.publish(step, self.epoch, self._owner)
            self.directory.prune(self.keep, self._owner, newest=step)

    def _manifest(
        self, step: int, layout: _Layout, writer: StagedWriter, values: dict[str, int], progress: dict[str, Any]
    ) -> CheckpointManifest:
        """The same on every rank."""
        state_hash = self._combine(layout, values, progress)
        mine = {
            "files": [entry.model_dump(mode="json") for entry in writer.entries],
            "chunks": [
                [piece.name, chunk.model_dump(mode="json")]
                for piece, chunk in zip(writer.staging.pieces, writer.chunks(), strict=True)
            ],
        }
        everyone = self._ranks.gather(mine)
        files = [FileEntry(**entry) for one in everyone for entry in one["files"]]
        chunks = [
            (name, Chunk.model_validate(chunk, strict=False)) for one in everyone for name, chunk in one["chunks"]
        ]
        return CheckpointManifest(
            schema_version=MANIFEST_SCHEMA,
            beringia=__version__,
            step=step,
            recipe_hash=self._recipe_hash,
            run_identity=self._owner.run_identity,
            epoch=self.epoch,
            chip_identity=self._chip_identity,
            state_hash=state_hash,
            progress=progress,
            tensors=tensor_entries(layout.metadata, chunks),
            files=tuple(sorted(files, key=lambda entry: entry.name)),
        )

    def _combine(self, layout: _Layout, values: dict[str, int], progress: Mapping[str, Any]) -> str:
        """Add each tensor's value over ranks and combine; collective."""
        whole = plan.described(layout.metadata)
        names = sorted(whole)
        sums = self._ranks.add([values.get(name, 0) for name in names])
        return combine(dict(zip(names, sums, strict=True)), whole, progress)

    def _together(self, work: Callable[[], None]) -> None:
        """Do this rank's part, and fail on every rank if one fails: its own error here, its sentence elsewhere."""
        problem: BeringiaError | OSError | None = None
        try:
            work()
        except (BeringiaError, OSError) as error:
            problem = error
        self._raise_everywhere(problem)

    def _raise_everywhere(self, problem: BeringiaError | OSError | None) -> None:
        mine = None if problem is None else ErrorDocument.of(problem).model_dump()
        told = [one for one in self._ranks.gather(mine) if one is not None]
        if problem is not None:
            raise problem
        if told:
            raise ErrorDocument.model_validate(told[0]).error()
