"""Carries one run from its recipe to its end: starts a worker, follows it, decides, starts the next.

Vendor-free: imports no torch and opens no device. Everything it knows about a chip comes from that chip's worker, as
events. Reads the recipe; writes `events.jsonl`, the lock and the epoch of the run directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from beringia.errors import Refusal
from beringia.history.log import EventLog
from beringia.history.situation import Situation
from beringia.processes.command import check_command
from beringia.processes.patience import POLL_SECONDS
from beringia.records.error_document import ErrorDocument
from beringia.records.events import AnyEvent, Decision, Event, Fault, RunFinished, RunStarted, Unqualified
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.chip_command import chip_command
from beringia.supervise.decide import decide
from beringia.supervise.follower import follow, lead, meeting_other_ranks, rank_in
from beringia.supervise.greeting import greet_later_chips
from beringia.supervise.learner import Learner
from beringia.supervise.lock import RunLock
from beringia.supervise.run_files import discard_abandoned, prepare_run
from beringia.supervise.stop_request import StopRequest, stopping_on_signals
from beringia.version import __version__

_LISTEN_SECONDS = 1.0
"""At most between two looks at a worker's patience."""


def supervise(
    recipe: Recipe, recipe_text: str, run: RunDirectory, *, on_event: Callable[[AnyEvent], None] | None = None
) -> RunFinished:
    """Run to the end, through whatever happens, and return how it ended.

    Going on with a run that was interrupted is the same call. Raises an InputError when the user must change something,
    Refusal when the run was given up.
    """
    for label in recipe.train.prefer:
        check_command(chip_command(label, recipe.chips[label]))
    if rank_in() > 0:
        with meeting_other_ranks(run):
            follow(recipe, run)
        return RunFinished(status="done", step=recipe.train.steps, message="the first rank reports")
    with RunLock(run) as lock, meeting_other_ranks(run):
        prepare_run(recipe, recipe_text, run)
        log = EventLog(run, on_event)
        try:
            with stopping_on_signals() as stop:
                return Supervisor(recipe, run, lock, log, stop).carry()
        finally:
            lead(run, None)
            log.close()


class Supervisor:
    """One life of a supervisor over a run."""

    def __init__(self, recipe: Recipe, run: RunDirectory, lock: RunLock, log: EventLog, stop: StopRequest) -> None:
        self._recipe = recipe
        self._run = run
        self._lock = lock
        self._log = log
        self._stop = stop

    def carry(self) -> RunFinished:
        """Decide and work in turns until the run is over."""
        done = self._finished_before()
        if done is not None:
            return done
        if self._log.fold.last(RunStarted) is None:
            greet_later_chips(self._recipe, self._run)
        self._append(
            RunStarted(
                name=self._recipe.name,
                recipe_hash=self._recipe.hash,
                beringia=__version__,
                steps=self._recipe.train.steps,
                prefer=self._recipe.train.prefer,
            )
        )
        while True:
            decision = decide(self._log.situation(), self._recipe)
            assert decision is not None, "a finished run is noticed where it finishes"
            self._append(decision, chip=self._log.situation().chip)
            if decision.action == "stop":
                return self._give_up(decision)
            finished = self._work()
            if finished is not None:
                return finished

    def _work(self) -> RunFinished | None:
        """One worker's life. Returns the end of the run, or None when there is something to decide."""
        situation = self._log.situation()
        self._pause(situation)
        epoch = self._lock.advance()
        discard_abandoned(self._run, situation, epoch)
        learner = Learner(self._recipe, self._run, self._log, self._stop, situation, epoch)
        try:
            learner.start()
            while not learner.hear(_LISTEN_SECONDS):
                pass
            learner.close()
        except BaseException:
            learner.kill()
            raise
        return self._outcome(learner)

    def _outcome(self, learner: Learner) -> RunFinished | None:
        situation = self._log.situation()
        step, ended = situation.step, learner.ended
        if ended is not None and ended.why == "done" and situation.newest == step and situation.alarm is None:
            return self._finish("done", step, "all steps done", situation.chip)
        if learner.told_to_stop is not None:
            message = f"stopped by signal {self._stop.signal}; the same command goes on from here"
            return self._finish("stopped", step, message, situation.chip)
        fault = learner.unexplained
        if fault is not None:
            self._append(fault, chip=situation.chip)
        return None

    def _finish(self, status: str, step: int, message: str, chip: str | None) -> RunFinished:
        finished = RunFinished.model_validate({"status": status, "step": step, "message": message})
        stamped = self._append(finished, chip=chip)
        assert isinstance(stamped, RunFinished)
        return stamped

    def _pause(self, situation: Situation) -> None:
        """Give a machine that does not answer time to come back, twice as long each time."""
        if situation.unanswered == 0:
            return
        until = time.monotonic() + self._recipe.supervise.restart_seconds * 2 ** (situation.unanswered - 1)
        while time.monotonic() < until and self._stop.signal is None:
            time.sleep(POLL_SECONDS)

    def _finished_before(self) -> RunFinished | None:
        return self._log.fold.last(RunFinished) if self._log.fold.finished else None

    def _give_up(self, decision: Decision) -> RunFinished:
        trouble = self._log.situation().trouble
        step = self._log.situation().step
        if isinstance(trouble, Fault) and trouble.category == "ours":
            self._append(RunFinished(status="stopped", step=step, message=decision.reason))
            raise ErrorDocument(code=trouble.code, message=trouble.message).error()
        if isinstance(trouble, Unqualified):
            # Not given up: with a certificate the same command goes on.
            self._append(RunFinished(status="stopped", step=step, message=decision.reason))
            raise Refusal(
                f"The run was stopped at step {step}: {decision.reason}. Qualify a chip for this model, put its signed "
                f"certificate into {self._run.certificates} and give the same command again; or let the recipe say "
                '[qualify] unqualified = "allow" (another recipe: choose another run directory).'
            )
        self._append(RunFinished(status="given-up", step=step, message=decision.reason))
        raise Refusal(f"The run was given up at step {step}: {decision.reason}.")

    def _append(self, event: Event, chip: str | None = None) -> AnyEvent:
        return self._log.append(event, epoch=self._lock.epoch, chip=chip)
