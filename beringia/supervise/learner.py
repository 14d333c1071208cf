"""The learner: the role that trains. Decides, starts a worker on the chip that the decision names, follows it, decides
again, until the run is over."""

from __future__ import annotations

import time
from collections.abc import Sequence

from beringia.errors import Refusal
from beringia.processes.child import Child
from beringia.records.error_document import ErrorDocument
from beringia.records.events import LEARNER, AnyEvent, Decision, Event, Fault, RunFinished, Unqualified
from beringia.supervise.decide import decide
from beringia.supervise.role import Role
from beringia.supervise.run_checkpoints import set_aside, untold_checkpoints
from beringia.supervise.supervision import Supervision
from beringia.supervise.worker_life import WorkerLife


class Learner:
    """The role without which there is no run."""

    name = LEARNER
    over = False
    """It ends with the run, which `advance` says."""

    def __init__(self, supervision: Supervision, others: Sequence[Role] = ()) -> None:
        self._supervision = supervision
        self._others = others
        self._life: WorkerLife | None = None
        self._undecided = True
        self._not_before = 0.0
        """On the monotonic clock: a machine that does not answer gets time to come back."""

    @property
    def chip(self) -> str | None:
        """Label of the chip in use."""
        return self._supervision.log.situation().chip

    @property
    def child(self) -> Child | None:
        """The worker's process."""
        return None if self._life is None else self._life.child

    def advance(self) -> RunFinished | None:
        """Decide, start, or hear the worker."""
        if self._undecided:
            self._decide()
        if self._life is None:
            self._begin()
            return None
        if not self._life.hear():
            return None
        life, self._life = self._life, None
        self._undecided = True
        try:
            life.close()
        except BaseException:
            life.kill()
            raise
        return self._outcome(life)

    def kill(self) -> None:
        """End the worker."""
        if self._life is not None:
            self._life.kill()
            self._life = None

    def _decide(self) -> None:
        supervision = self._supervision
        for event in untold_checkpoints(supervision.run, supervision.log.situation(), supervision.owner):
            self._append(event, chip=self.chip)
        situation = supervision.log.situation()
        decision = decide(situation, supervision.recipe, launched=supervision.launched)
        assert decision is not None, "a finished run is noticed where it finishes"
        self._append(decision, chip=situation.chip)
        if decision.action == "stop":
            self._give_up(decision)
        self._undecided = False
        # Twice as long each time.
        wait = self._supervision.recipe.supervise.restart_seconds * 2 ** (situation.unanswered - 1)
        self._not_before = time.monotonic() + (wait if situation.unanswered else 0.0)

    def _begin(self) -> None:
        """Start a worker, once it is time and no other role works on its chip."""
        in_use = any(role.chip == self.chip for role in self._others if not role.over)
        waits = time.monotonic() < self._not_before or in_use
        if waits and self._supervision.stop.signal is None:
            return
        epoch = self._supervision.lock.advance()
        set_aside(self._supervision.run, self._supervision.log.situation(), self._supervision.owner, epoch)
        self._life = WorkerLife(self._supervision)
        self._life.start()

    def _outcome(self, life: WorkerLife) -> RunFinished | None:
        situation = self._supervision.log.situation()
        step, ended = situation.step, life.ended
        if ended is not None and ended.why == "done" and situation.newest == step and situation.alarm is None:
            return self._finish("done", step, "all steps done")
        if life.told_to_stop is not None or (life.asked_to_end and self._supervision.stop.comes()):
            return stopped(self._supervision)
        fault = life.unexplained
        if fault is not None:
            self._append(fault, chip=situation.chip)
        return None

    def _give_up(self, decision: Decision) -> None:
        situation = self._supervision.log.situation()
        trouble, step = situation.trouble, situation.step
        if isinstance(trouble, Fault) and trouble.category == "ours":
            self._finish("stopped", step, decision.reason)
            raise ErrorDocument(code=trouble.code, message=trouble.message).error()
        if isinstance(trouble, Fault) and trouble.category == "device-lost" and self._supervision.launched:
            # Not given up: with the device left out the same command goes on.
            self._finish("stopped", step, decision.reason, told=True)
            raise Refusal(
                f"The run was stopped at step {step}: {decision.reason}. Leave the device, or its machine, out of what "
                "the launcher uses, and start again with fewer ranks: the run goes on from its newest checkpoint."
            )
        if isinstance(trouble, Unqualified):
            # Not given up: with a certificate the same command goes on.
            self._finish("stopped", step, decision.reason)
            raise Refusal(
                f"The run was stopped at step {step}: {decision.reason}. Qualify a chip for this model, put its signed "
                f"certificate into {self._supervision.run.certificates} and give the same command again; or let the "
                'recipe say [qualify] unqualified = "allow".'
            )
        self._finish("given-up", step, decision.reason)
        raise Refusal(f"The run was given up at step {step}: {decision.reason}.")

    def _finish(self, status: str, step: int, message: str, *, told: bool = False) -> RunFinished:
        return _finished(self._supervision, status, step, message, told=told)

    def _append(self, event: Event, chip: str | None) -> AnyEvent:
        return self._supervision.append(event, role=LEARNER, chip=chip)


def stopped(supervision: Supervision) -> RunFinished:
    """The end of a run that the user has asked to stop."""
    number, step = supervision.stop.signal, supervision.log.situation().step
    message = f"{supervision.stop.why}; the same command goes on from here"
    return _finished(supervision, "stopped", step, message, number)


def _finished(
    supervision: Supervision, status: str, step: int, message: str, signal: int | None = None, *, told: bool = False
) -> RunFinished:
    how = {"status": status, "step": step, "message": message, "signal": signal, "told": told}
    finished = RunFinished.model_validate(how)
    stamped = supervision.append(finished, role=LEARNER, chip=supervision.log.situation().chip)
    assert isinstance(stamped, RunFinished)
    return stamped
