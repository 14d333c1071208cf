"""The run directory as a chip on another machine sees it, and moving state there and back.

Where a chip shares this file system there is nothing to move. Where its section of the recipe names a `root`, files go
through the chip's own launch prefix (`processes/files/`), by hash and only what the receiver lacks. Checkpoints come
home in the background, one after another, and count only once they are here: what the events of a run call complete or
trusted can be loaded without the machine that wrote it.
"""

from __future__ import annotations

import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from beringia.checkpoint.directory import CheckpointDirectory, Owner, read_manifest
from beringia.errors import CheckpointDamaged, InputError, RunError, TransferFailed
from beringia.processes.child import lines_of, start
from beringia.processes.command import Command
from beringia.processes.files.exchange import Offered, files_below, offer_directory
from beringia.processes.files.remote import FarFiles
from beringia.processes.patience import Patience
from beringia.records.events import (
    AnyEvent,
    CheckpointRejected,
    CheckpointTrusted,
    CheckpointWritten,
    Event,
    Fallback,
)
from beringia.records.manifest import CheckpointManifest, TrustMark
from beringia.records.orders import Order, PackOrder
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command
from beringia.supervise.sent_inputs import send_inputs

_ATTEMPTS = 3


class SharedRoot:
    """The chip's machine sees our run directory: nothing is moved, every event can be told at once."""

    waiting = False

    def __init__(self, run: RunDirectory) -> None:
        self.root = str(run.root.resolve())

    def recipe_there(self, recipe: Recipe) -> Recipe:
        """The recipe as the worker reads it."""
        return recipe

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

    def __init__(self, label: str, recipe: Recipe, run: RunDirectory, epoch: int, owner: Owner) -> None:
        chip = recipe.chips[label]
        assert chip.root is not None
        self.root = chip.root
        self._label = label
        self._recipe = recipe
        self._run = run
        self._epoch = epoch
        self._owner = owner
        hang = recipe.supervise.hang_seconds
        self._log = run.logs / f"{label}-{epoch}-transfer.log"
        # Its machine has answered before, or is about to be told that it does not: both are a matter of seconds.
        patience = Patience(start_seconds=hang, silence_seconds=hang)
        self._files = FarFiles(chip_command(label, chip, run=run), self._log, patience)
        self._transfers = ThreadPoolExecutor(1, thread_name_prefix="beringia-transfer")
        self._awaited: deque[tuple[CheckpointWritten | CheckpointTrusted, Future[None]]] = deque()
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether events wait for their checkpoints."""
        return bool(self._awaited)

    def recipe_there(self, recipe: Recipe) -> Recipe:
        """The recipe as the worker reads it: what it names by path is sent first. Raises TransferFailed, InputError,
        StorageFull."""
        return send_inputs(self._files, self._label, recipe)

    def send_state(self, order: Order) -> CheckpointRejected | None:
        """Send what the order needs: recipe, epoch, packed data and the checkpoints it names; returns the checkpoint
        that cannot be sent because ours is damaged. Raises TransferFailed, InputError, StorageFull."""
        self._pack()
        root = self._run.root
        names = [str(path.relative_to(root)) for path in (self._run.resolved_recipe, self._run.epoch) if path.exists()]
        below = str(self._run.data.relative_to(root))
        self._files.send(root, [*names, *(f"{below}/{name}" for name in files_below(self._run.data))])
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
            self._awaited.append((event, self._transfers.submit(self._bring_home, event)))
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
        self._files.close()
        self._transfers.shutdown()

    @property
    def _home(self) -> CheckpointDirectory:
        return CheckpointDirectory(self._run.checkpoints)

    def _there(self, step: int) -> str:
        """A checkpoint's directory, relative to either root."""
        return str(self._home.path(step).relative_to(self._run.root))

    def _send_checkpoint(self, step: int) -> None:
        ours = self._home.path(step)
        offered = offer_directory(ours)
        _compare(offered, ours)
        self._files.send_directory(ours, self._there(step), offered)

    def _pack(self) -> None:
        """Pack folders of text or chats here: the chip's machine does not see them. Torch reads the tokenizer, so this
        is work of a process of its own."""
        if self._recipe.data.task is not None:
            return
        command = Command("packing", "beringia.data.packing_work")
        lines_of(start(command, PackOrder(recipe=self._recipe, directory=str(self._run.data)), self._log))

    # In the thread of transfers

    def _bring_home(self, told: CheckpointWritten) -> None:
        """A checkpoint from the chip's machine to ours; it is verified on arrival."""
        step = told.step
        partial = self._home.partial(step, self._epoch)
        for attempt in range(1, _ATTEMPTS + 1):
            shutil.rmtree(partial, ignore_errors=True)
            try:
                manifest = _compare(self._files.fetch_directory(self._there(step), partial), partial)
                if manifest.state_hash != told.state_hash:
                    raise TransferFailed(f"Checkpoint {step} there is not the one that its worker has told of.")
                break
            except (CheckpointDamaged, InputError, TransferFailed) as problem:
                if attempt == _ATTEMPTS or self._closed:
                    raise TransferFailed(str(problem)) from problem
        self._home.publish(step, self._epoch, self._owner)
        self._home.prune(self._recipe.train.keep, self._owner, newest=step)

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


def open_root(label: str, recipe: Recipe, run: RunDirectory, epoch: int, owner: Owner) -> SharedRoot | RemoteRoot:
    """The run directory on this chip's machine."""
    return SharedRoot(run) if recipe.chips[label].root is None else RemoteRoot(label, recipe, run, epoch, owner)


def _compare(received: list[Offered], checkpoint: Path) -> CheckpointManifest:
    """Every file arrived with the hash that it had there; here that is held against the manifest's. Raises
    CheckpointDamaged."""
    manifest = read_manifest(checkpoint)
    digests = {one.name: one.sha256 for one in received}
    for entry in manifest.files:
        if digests.get(entry.name) != entry.sha256:
            path = str(checkpoint / entry.name)
            raise CheckpointDamaged(f"{entry.name} is not the file that its checkpoint's manifest lists.", path)
    return manifest
