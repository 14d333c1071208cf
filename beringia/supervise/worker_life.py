"""One training worker's life: its handshake answered, its events recorded, its silence or death noticed."""

from __future__ import annotations

import time
from dataclasses import replace

from beringia.errors import BeringiaError, HandshakeError, InputError, StorageFull, TransferFailed
from beringia.processes.child import Child, Message
from beringia.processes.patience import POLL_SECONDS
from beringia.processes.protocol import Ended, Go, Heartbeat, Line, Ready, Stop
from beringia.records.error_document import ErrorDocument
from beringia.records.events import (
    LEARNER,
    TRANSFER,
    UNREACHABLE,
    AnyEvent,
    Canary,
    CheckpointTrusted,
    ChipOpened,
    Event,
    Fallback,
    Fault,
    StepDone,
    Unqualified,
    parse_event,
)
from beringia.records.identity import ChipIdentity
from beringia.records.orders import Order
from beringia.supervise.admission import admission
from beringia.supervise.chip_command import patience_of
from beringia.supervise.crossing import CrossingInProgress
from beringia.supervise.follower import RankReports, lead
from beringia.supervise.next_order import order_for
from beringia.supervise.remote_root import open_root
from beringia.supervise.run_checkpoints import drop_abandoned
from beringia.supervise.supervision import Supervision
from beringia.supervise.training_worker import start_worker


class WorkerLife:
    """`start`, then `hear` again and again until that says that it is over, then `close`; `ended` says how."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._recipe, self._run, self._stop = supervision.recipe, supervision.run, supervision.stop
        self._situation = situation = supervision.log.situation()
        assert situation.chip is not None
        self._label = situation.chip
        epoch = self._epoch = supervision.lock.epoch
        run = supervision.run
        self._root = open_root(self._label, supervision.recipe, run, epoch, supervision.owner)
        self._crossing = CrossingInProgress.of(situation, time.monotonic())
        self._other_ranks = RankReports(run, epoch)
        self._order: Order | None = None
        self._child: Child | None = None
        self._opened = self._unusable = self._trouble = self._impatient = False
        self.told_to_stop: float | None = None
        """When it was, on the monotonic clock."""

    @property
    def child(self) -> Child | None:
        """Its process, once it runs."""
        return self._child

    def start(self) -> None:
        """Send what the recipe names by path, then start the process."""
        try:
            with self._stop.ending(self._root.close, self._recipe.supervise.grace_seconds):
                recipe = self._root.recipe_there(self._recipe)
        except (TransferFailed, InputError, StorageFull) as failure:
            self._fail(failure)
            return
        order = order_for(recipe, self._situation, self._root.root, self._epoch)
        identity = self._supervision.owner.run_identity
        self._order = order.model_copy(update={"recipe_hash": self._supervision.recipe_hash, "run_identity": identity})
        if self._supervision.launched:  # numbers of devices are those of one machine, and ranks may be on several
            self._order = self._order.model_copy(update={"excluded_devices": ()})
        self._tell_idle_devices(self._order.ranks)
        lead(self._run, self._order)
        try:
            self._child = start_worker(
                self._label, self._recipe, self._order, self._run, f"{self._label}-{self._epoch}"
            )
        except HandshakeError as failure:
            self._did_not_start(str(failure))
            return
        limits = self._recipe.supervise
        # Until its first step it opens its chip and loads its state, which may take as long as starting does.
        opening = max(limits.start_seconds, limits.hang_seconds)
        self._child.patience = replace(self._child.patience, silence_seconds=opening)

    def hear(self) -> bool:
        """What it has said. Returns whether there will be nothing more."""
        child = self._child
        if child is None or self._unusable:
            return True
        try:
            for message in child.poll(0.0):
                self._receive(message)
                child.feed()
        except HandshakeError as failure:
            self._did_not_start(str(failure))
        self._hear_other_ranks()
        self._note_arrivals()
        return self._check_patience(child) or self._unusable or child.over

    def close(self) -> None:
        """End it, and wait for what is on its way home."""
        child = self._child
        ended_here = self._unusable or self._impatient or self._out_of_grace()
        try:
            if child is not None:
                child.end()
            self._wait_for_arrivals()
        finally:
            self._root.close()
        if not ended_here:  # this rank may only have felt what another one knows the cause of
            self._hear_other_ranks()
        self._note_arrivals()

    def kill(self) -> None:
        """Because something went wrong here."""
        if self._child is not None:
            self._child.end(0.0)
        self._root.close()

    def _tell_idle_devices(self, used: int) -> None:
        excluded, batch = self._situation.excluded, self._recipe.train.batch
        left = self._recipe.chips[self._label].ranks - len(excluded)
        if excluded and self._supervision.launched:
            asked = f"without device {', '.join(map(str, sorted(excluded)))}"
            reason = "torchrun or Slurm has started the ranks, each on the device that it has there"
            self._append(Fallback(what="devices", asked=asked, used="the launcher's", reason=reason))
        elif excluded and used < left:
            reason = f"no more of them share a batch of {batch} evenly; the others stand idle"
            self._append(Fallback(what="ranks", asked=f"{left} devices that are left", used=str(used), reason=reason))

    @property
    def ended(self) -> Ended | None:
        """Its last word."""
        return None if self._child is None else self._child.ended

    @property
    def asked_to_end(self) -> bool:
        """Whether it ended because a signal asked it to, not its supervisor."""
        told = self.ended is not None and self.ended.why == "stopped"
        return told or (self._child is not None and self.ended is None and self._child.death().by_stop_signal)

    @property
    def unexplained(self) -> Fault | None:
        """The fault that stands for the end of a worker that did not say why; None where what went wrong is told."""
        if self._trouble:
            return None
        ended = self.ended
        if ended is not None and ended.why == "error":
            error = ended.error or ErrorDocument(code="beringia", message=ended.message)
            if not self._opened:
                return self._no_start(error.message, error.code)
            return Fault(step=None, code=error.code, category="ours", message=error.message)
        if ended is not None and ended.why == "done":
            message = "the last checkpoint did not come home from the chip's machine"
            return Fault(step=None, code=TRANSFER, category="transient", message=message)
        assert self._child is not None
        message = self._child.death().sentence
        if self._child.ready is not None or self._child.death().from_outside:
            return Fault(step=None, code="exit", category="transient", message=message)
        return self._no_start(message)

    def _no_start(self, message: str, code: str = HandshakeError.code) -> Fault:
        if self._label in self._situation.opened:
            # What has worked before is not misspelt: the machine is gone, for now or for good.
            return Fault(step=None, code=UNREACHABLE, category="transient", message=message)
        return Fault(step=None, code=code, category="ours", message=message)

    def _did_not_start(self, message: str) -> None:
        self._record(self._no_start(message))
        self._unusable = True

    def _receive(self, message: Message) -> None:
        match message:
            case Ready():
                if self._crossing is not None:
                    self._crossing.imports_seconds = message.imports_seconds
            case Line():
                for ready in self._root.receive(parse_event(message.line)):
                    self._record(ready)
            case Ended() | Heartbeat():
                pass

    def _hear_other_ranks(self) -> None:
        for event in self._other_ranks.new():
            self._record(parse_event(event))

    def _note_arrivals(self) -> None:
        """Record what waited for a checkpoint to come home."""
        for ready in self._root.arrived():
            self._record(ready)

    def _wait_for_arrivals(self) -> None:
        """Unless the user has waited long enough for the run to stop."""
        while self._root.waiting and not self._out_of_grace():
            if self._stop.signal is not None and self.told_to_stop is None:
                self.told_to_stop = time.monotonic()
            time.sleep(POLL_SECONDS)
            self._note_arrivals()

    def _record(self, event: Event) -> None:
        earlier = self._situation.opened.get(self._label) if isinstance(event, ChipOpened) else None
        stamped = self._append(event)
        match stamped:
            case ChipOpened() if earlier is not None and earlier.identity_hash != stamped.identity_hash:
                self._append(_another_chip(earlier.identity, stamped.identity))
            case StepDone():
                self._stepped()
            case CheckpointTrusted():
                drop_abandoned(self._run, stamped.step)
            case _:
                pass
        if self._crossing is not None:
            self._crossing.note(stamped)
        self._trouble = self._trouble or _is_trouble(stamped)
        if isinstance(stamped, ChipOpened):
            self._opened = True
            self._admit(stamped)

    def _stepped(self) -> None:
        assert self._child is not None
        self._child.patience = patience_of(self._recipe.supervise)
        if self._crossing is not None:
            self._append(self._crossing.event(self._label))
            self._crossing = None

    def _admit(self, opened: ChipOpened) -> None:
        """Let a chip train that is qualified, or that the recipe lets train without; the others get no state."""
        told = admission(opened, self._recipe, self._run)
        if told is not None:
            self._record(told)
        if isinstance(told, Unqualified):
            self._unusable = True
        else:
            self._send_state()

    def _send_state(self) -> None:
        """What the worker needs, then its go; without it this worker is of no use."""
        assert self._child is not None and self._order is not None
        try:
            with self._stop.ending(self._root.close, self._recipe.supervise.grace_seconds):
                rejected = self._root.send_state(self._order)
        except (TransferFailed, InputError, StorageFull) as failure:
            self._fail(failure)
            return
        if rejected is None:
            self._child.send(Go())
        else:
            self._record(rejected)
            self._unusable = True

    def _fail(self, failure: BeringiaError) -> None:
        """State did not get there. On a machine that never held any it is the user's to mend, where it says so."""
        if self._stop.signal is not None:
            self.told_to_stop = self._stop.since
            self._unusable = True
            return
        if not self._situation.held_state and not isinstance(failure, TransferFailed):
            self._record(Fault(step=None, code=failure.code, category="ours", message=str(failure)))
        else:
            self._record(Fault(step=None, code=TRANSFER, category="transient", message=str(failure)))
        self._unusable = True

    def _check_patience(self, child: Child) -> bool:
        """Pass a stop on, and give a worker up that hangs. Returns whether to stop listening."""
        if self._stop.signal is not None and self.told_to_stop is None:
            self.told_to_stop = time.monotonic()
            child.send(Stop())
        if self._out_of_grace():
            return True
        self._impatient = child.impatient()
        if self._impatient and child.ready is not None:
            seconds = child.patience.silence_seconds
            message = f"no progress for {seconds:g} s"
            self._append(Fault(step=None, code="hang", category="transient", message=message))
            self._trouble = True
        return self._impatient

    def _out_of_grace(self) -> bool:
        """Whether the user asked to stop, and has waited as long as the recipe says."""
        asked = self.told_to_stop
        return asked is not None and time.monotonic() - asked > self._recipe.supervise.grace_seconds

    def _append(self, event: Event) -> AnyEvent:
        return self._supervision.append(event, role=LEARNER, chip=self._label)


def _is_trouble(event: AnyEvent) -> bool:
    """Whether an event is why a worker ends, so that its end needs no other reason."""
    refused = isinstance(event, Canary) and not event.passed
    return refused or event.kind in ("alarm", "fault", "rejected", "unqualified")


def _another_chip(before: ChipIdentity, now: ChipIdentity) -> Fallback:
    """What differs in the identity of a chip that goes by the same label."""
    changed = before.differences(now)
    asked, used = (", ".join(f"{name} {pair[side]}" for name, pair in changed.items()) for side in (0, 1))
    reason = "the chip under this label is not as it was; the run goes on, but not bitwise as it would have"
    return Fallback(what="chip identity", asked=asked, used=used, reason=reason)
