"""Carries one run from its recipe to its end: starts a worker, follows it, decides, starts the next.

Vendor-free: imports no torch and opens no device. Everything it knows about a chip comes from that chip's worker, as
events. Reads the recipe; writes `events.jsonl`, the lock and the epoch of the run directory.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from beringia.errors import Refusal, TransferFailed
from beringia.records.events import (
    AnyEvent,
    ChipOpened,
    Decision,
    Event,
    Fallback,
    Fault,
    RunFinished,
    RunStarted,
    StepDone,
    Unqualified,
    parse_event,
)
from beringia.records.identity import ChipIdentity
from beringia.records.messages import Ended, EventLine, FromWorker, Go, Heartbeat, Hello, Order, StepNumbers, Stop
from beringia.records.recipe import ChipSection, Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.crossing import CrossingInProgress
from beringia.supervise.decide import TRANSFER, UNREACHABLE, Situation, decide, read_situation
from beringia.supervise.event_log import EventLog
from beringia.supervise.follower import RankReports, follow, lead, rank_in
from beringia.supervise.greeting import greet_later_chips
from beringia.supervise.lock import RunLock
from beringia.supervise.qualification import admission
from beringia.supervise.remote_root import open_root
from beringia.supervise.run_files import discard_abandoned, taking_run
from beringia.supervise.worker_process import (
    WorkerProcess,
    check_hello,
    check_launcher,
    error_called,
    how_ended,
)
from beringia.version import __version__

_POLL_SECONDS = 0.1
_RECENT_STEPS = 512
"""Of which a new worker is told: what the guard's spike test remembers."""

# After a worker's last word it only has to close its device; a driver that hangs in that is killed.
_END_SECONDS = 10.0


def supervise(
    recipe: Recipe, recipe_text: str, run: RunDirectory, *, on_event: Callable[[AnyEvent], None] | None = None
) -> RunFinished:
    """Run to the end, through whatever happens, and return how it ended.

    Going on with a run that was interrupted is the same call. Raises an InputError when the user must change something,
    Refusal when the run was given up.
    """
    for label in recipe.train.prefer:
        check_launcher(label, recipe.chips[label])
    if rank_in() > 0:
        follow(recipe, run)
        return RunFinished(status="done", step=recipe.train.steps, message="the first rank reports")
    with taking_run(recipe, recipe_text, run, on_event) as taken:
        try:
            with stopping_on_signals() as stop:
                return Supervisor(taken.recipe, run, taken.lock, taken.log, stop, taken.identity).carry()
        finally:
            lead(run, None)


class StopRequest:
    """Whether the user asked to stop (SIGTERM or SIGINT), and by which signal."""

    signal: int | None = None


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request while the context lasts."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """One life of a supervisor over a run."""

    def __init__(
        self, recipe: Recipe, run: RunDirectory, lock: RunLock, log: EventLog, stop: StopRequest, identity: str
    ) -> None:
        self._recipe = recipe
        self._identity = identity
        self._run = run
        self._lock = lock
        self._log = log
        self._stop = stop

    def carry(self) -> RunFinished:
        """Decide and work in turns until the run is over."""
        done = self._finished_before()
        if done is not None:
            return done
        greeted = {label for event in self._log.history if isinstance(event, RunStarted) for label in event.prefer}
        greet_later_chips(self._recipe, self._run, greeted)
        self._append(
            RunStarted(
                name=self._recipe.name,
                recipe_hash=self._recipe.hash,
                beringia=__version__,
                steps=self._recipe.train.steps,
                prefer=self._recipe.train.prefer,
                run_identity=self._identity,
            )
        )
        while True:
            decision = decide(self._log.history, self._recipe)
            assert decision is not None, "a finished run is noticed where it finishes"
            self._append(decision, chip=read_situation(self._log.history).chip)
            if decision.action == "stop":
                return self._give_up(decision)
            finished = self._work()
            if finished is not None:
                return finished

    def _work(self) -> RunFinished | None:
        """One worker's life. Returns the end of the run, or None when there is something to decide."""
        situation = read_situation(self._log.history)
        self._pause(situation)
        epoch = self._lock.advance()
        discard_abandoned(self._run, situation, epoch)
        return _WorkerWatch(self, situation, epoch, time.monotonic()).follow()

    def _pause(self, situation: Situation) -> None:
        """Give a machine that does not answer time to come back, twice as long each time."""
        if situation.unanswered == 0:
            return
        until = time.monotonic() + self._recipe.supervise.restart_seconds * 2 ** (situation.unanswered - 1)
        while time.monotonic() < until and self._stop.signal is None:
            time.sleep(_POLL_SECONDS)

    def _finished_before(self) -> RunFinished | None:
        last = next((event for event in reversed(self._log.history) if isinstance(event, RunFinished)), None)
        return last if last is not None and read_situation(self._log.history).finished else None

    def _give_up(self, decision: Decision) -> RunFinished:
        trouble = read_situation(self._log.history).trouble
        step = read_situation(self._log.history).step
        if isinstance(trouble, Fault) and trouble.category == "ours":
            self._append(RunFinished(status="stopped", step=step, message=decision.reason))
            raise error_called(trouble.code, trouble.message)
        if isinstance(trouble, Unqualified):
            # Not given up: with a certificate the same command goes on.
            self._append(RunFinished(status="stopped", step=step, message=decision.reason))
            raise Refusal(
                f"The run was stopped at step {step}: {decision.reason}. Qualify a chip for this model, put its signed "
                f"certificate into {self._run.certificates} and give the same command again; or let the recipe say "
                '[qualify] unqualified = "allow".'
            )
        self._append(RunFinished(status="given-up", step=step, message=decision.reason))
        raise Refusal(f"The run was given up at step {step}: {decision.reason}.")

    def _append(self, event: Event, chip: str | None = None) -> AnyEvent:
        return self._log.append(event, epoch=self._lock.epoch, chip=chip)


class _WorkerWatch:
    """Follows one worker: answers its handshake, records its events, notices when it hangs or dies."""

    def __init__(self, supervisor: Supervisor, situation: Situation, epoch: int, decided_at: float) -> None:
        assert situation.chip is not None
        self._recipe = supervisor._recipe
        self._run = supervisor._run
        self._log = supervisor._log
        self._stop = supervisor._stop
        self._label = situation.chip
        self._chip: ChipSection = self._recipe.chips[self._label]
        self._epoch = epoch
        self._root = open_root(self._label, self._recipe, self._run, epoch)
        self._order = _order(self._recipe, situation, self._log, self._root.root, epoch)
        self._crossing = CrossingInProgress.of(self._log.history, situation, decided_at)
        self._other_ranks = RankReports(self._run, epoch)
        self._progress_at = time.monotonic()
        self._stepping = False
        self._unusable = False
        self._told_to_stop: float | None = None
        self._trouble = False
        self._ended: Ended | None = None

    def follow(self) -> RunFinished | None:
        """From its start to its end. Returns the end of the run, or None when there is something to decide."""
        lead(self._run, self._order)
        worker = WorkerProcess(
            self._label, self._chip, self._order, self._run.logs / f"{self._label}-{self._epoch}.log"
        )
        ended_here = False
        try:
            for message in worker.messages():
                if message is not None:
                    self._receive(message, worker)
                    self._progress_at = time.monotonic()  # after, since what was received may have taken a while here
                self._hear_other_ranks(worker)
                self._note_arrivals(worker)
                ended_here = self._check_patience(worker) or self._unusable
                if ended_here or self._ended is not None:
                    break
        except BaseException:
            worker.kill()
            raise
        finally:
            status = worker.end(_END_SECONDS if self._ended is not None else 0.0)
            self._close_root(worker)
        if not ended_here:  # this rank may only have felt what another one knows the cause of
            self._hear_other_ranks(worker)
        self._note_arrivals(worker)
        return self._outcome(worker, status)

    def _hear_other_ranks(self, worker: WorkerProcess) -> None:
        for event in self._other_ranks.new():
            self._record(parse_event(event), worker)

    def _note_arrivals(self, worker: WorkerProcess) -> None:
        """Record what waited for a checkpoint to come home."""
        for ready in self._root.arrived():
            self._record(ready, worker)

    def _close_root(self, worker: WorkerProcess) -> None:
        """Wait for checkpoints on their way home, unless the user has waited long enough for the run to stop."""
        try:
            while self._root.waiting and not self._out_of_grace():
                if self._stop.signal is not None and self._told_to_stop is None:
                    self._told_to_stop = time.monotonic()
                time.sleep(_POLL_SECONDS)
                self._note_arrivals(worker)
        finally:
            self._root.close()

    def _receive(self, message: FromWorker, worker: WorkerProcess) -> None:
        match message:
            case Hello():
                worker.shook_hands = True
                check_hello(self._label, message)
                if self._crossing is not None:
                    self._crossing.imports_seconds = message.imports_seconds
            case EventLine():
                for ready in self._root.receive(parse_event(message.event)):
                    self._record(ready, worker)
            case Ended():
                self._ended = message
            case Heartbeat():
                pass

    def _record(self, event: Event, worker: WorkerProcess) -> None:
        earlier = _last_opened(self._log.history, self._label) if isinstance(event, ChipOpened) else None
        stamped = self._log.append(event, epoch=self._epoch, chip=self._label)
        match stamped:
            case ChipOpened() if earlier is not None and earlier.identity_hash != stamped.identity_hash:
                self._append(_another_chip(earlier.identity, stamped.identity))
            case StepDone():
                self._stepping = True
                if self._crossing is not None:
                    self._append(self._crossing.event(self._label))
                    self._crossing = None
            case _:
                pass
        if self._crossing is not None:
            self._crossing.note(stamped)
        self._trouble = self._trouble or stamped.kind in ("alarm", "fault", "rejected", "unqualified")
        if isinstance(stamped, ChipOpened):
            self._admit(stamped, worker)

    def _admit(self, opened: ChipOpened, worker: WorkerProcess) -> None:
        """Let a chip train that is qualified, or that the recipe lets train without; the others get no state."""
        told = admission(opened, self._recipe, self._run)
        if told is not None:
            self._record(told, worker)
        if isinstance(told, Unqualified):
            self._unusable = True
        else:
            self._send_state(worker)

    def _send_state(self, worker: WorkerProcess) -> None:
        """What the worker needs, then its go; without it this worker is of no use."""
        try:
            problem: Event | None = self._root.send_state(self._order)
        except TransferFailed as failure:
            problem = Fault(step=None, code=TRANSFER, category="transient", message=str(failure))
        if problem is None:
            worker.send(Go())
        else:
            self._record(problem, worker)
            self._unusable = True

    def _check_patience(self, worker: WorkerProcess) -> bool:
        """Pass a stop on, and end a worker that hangs. Returns whether to stop listening."""
        now = time.monotonic()
        if self._stop.signal is not None and self._told_to_stop is None:
            self._told_to_stop = now
            worker.send(Stop())
        if self._out_of_grace():
            return True
        limits = self._recipe.supervise
        patience = limits.hang_seconds if self._stepping else max(limits.start_seconds, limits.hang_seconds)
        if now - self._progress_at <= patience:
            return False
        self._append(Fault(step=None, code="hang", category="transient", message=f"no progress for {patience:g} s"))
        self._trouble = True
        return True

    def _out_of_grace(self) -> bool:
        """Whether the user asked to stop, and has waited as long as the recipe says."""
        asked = self._told_to_stop
        return asked is not None and time.monotonic() - asked > self._recipe.supervise.grace_seconds

    def _outcome(self, worker: WorkerProcess, status: int) -> RunFinished | None:
        situation = read_situation(self._log.history)
        step, ended = situation.step, self._ended
        if ended is not None and ended.why == "done" and situation.newest == step:
            return self._finish("done", step, "all steps done")
        if self._told_to_stop is not None:
            return self._finish(
                "stopped", step, f"stopped by signal {self._stop.signal}; the same command goes on from here"
            )
        if not self._trouble:
            self._append(self._unexplained_end(worker, status))
        return None

    def _unexplained_end(self, worker: WorkerProcess, status: int) -> Fault:
        """The fault that stands for the end of a worker that did not say why."""
        ended = self._ended
        if ended is not None and ended.why == "error":
            return Fault(step=None, code=ended.error or "error", category="ours", message=ended.message)
        if ended is not None and ended.why == "done":
            message = "the last checkpoint did not come home from the chip's machine"
            return Fault(step=None, code=TRANSFER, category="transient", message=message)
        if worker.shook_hands:
            message = f"the worker was lost ({how_ended(status)}): {worker.last_log_lines() or 'no last words'}"
            return Fault(step=None, code="exit", category="transient", message=message)
        message = worker.did_not_start(status)
        if _last_opened(self._log.history, self._label) is not None:
            # What has worked before is not misspelt: the machine is gone, for now or for good.
            return Fault(step=None, code=UNREACHABLE, category="transient", message=message)
        return Fault(step=None, code="HandshakeError", category="ours", message=message)

    def _finish(self, status: str, step: int, message: str) -> RunFinished:
        finished = self._append(RunFinished.model_validate({"status": status, "step": step, "message": message}))
        assert isinstance(finished, RunFinished)
        return finished

    def _append(self, event: Event) -> AnyEvent:
        return self._log.append(event, epoch=self._epoch, chip=self._label)


def _order(recipe: Recipe, situation: Situation, log: EventLog, root: str, epoch: int) -> Order:
    assert situation.chip is not None
    target = situation.resume_step
    canary = situation.canary_due and target is not None
    return Order(
        root=root,
        chip=situation.chip,
        recipe=recipe,
        epoch=epoch,
        resume_step=target,
        canary_from=situation.canary_from if canary else None,
        canary_compute_dtype=_compute_dtype(log.history, situation.came_from) if canary else None,
        ranks=recipe.chips[situation.chip].ranks - len(situation.excluded),
        excluded_devices=tuple(sorted(situation.excluded)),
        recent=_recent(log.steps_before(target or 0)),
        accepted_spikes=tuple(situation.accepted_spikes),
    )


def _recent(steps: Sequence[StepDone]) -> tuple[StepNumbers, ...]:
    """The numbers of these steps, as far as they are numbers."""
    return tuple(
        StepNumbers(loss=step.loss, mtp_loss=step.mtp_loss, gradient_norm=step.gradient_norm)
        for step in steps[-_RECENT_STEPS:]
        if step.loss is not None and step.gradient_norm is not None
    )


def _compute_dtype(history: Sequence[AnyEvent], label: str | None) -> str | None:
    last = _last_opened(history, label)
    return last.compute_dtype if last is not None else None


def _last_opened(history: Sequence[AnyEvent], label: str | None) -> ChipOpened | None:
    opened = (event for event in reversed(history) if isinstance(event, ChipOpened) and event.chip == label)
    return next(opened, None)


def _another_chip(before: ChipIdentity, now: ChipIdentity) -> Fallback:
    """What differs in the identity of a chip that goes by the same label."""
    changed = before.differences(now)
    asked, used = (", ".join(f"{name} {pair[side]}" for name, pair in changed.items()) for side in (0, 1))
    reason = "the chip under this label is not as it was; the run goes on, but not bitwise as it would have"
    return Fallback(what="chip identity", asked=asked, used=used, reason=reason)
