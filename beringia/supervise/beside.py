"""A role beside the learner whose process says events, and is done when it says so: a candidate that is qualified while
the run trains, later a rollout worker.

A death or a fault of it is its own: it is tried again, then left, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from beringia.errors import HandshakeError
from beringia.processes.child import Child
from beringia.processes.protocol import Line
from beringia.records.error_document import BUG
from beringia.records.events import Fault, RunFinished, parse_event
from beringia.supervise.decide import decide_beside
from beringia.supervise.supervision import Supervision


class Beside:
    """One such role. `start` starts its process; `over`: there is nothing left to do."""

    def __init__(
        self, name: str, chip: str, supervision: Supervision, start: Callable[[], Child], *, over: bool = False
    ) -> None:
        self.name = name
        self._chip = chip
        self._supervision = supervision
        self._start = start
        self._child: Child | None = None
        self._over = over

    @property
    def chip(self) -> str | None:
        """Label of the chip that it works on, until it is over."""
        return None if self._over else self._chip

    @property
    def child(self) -> Child | None:
        """Its process."""
        return self._child

    @property
    def over(self) -> bool:
        """It is done, or was left."""
        return self._over

    def advance(self) -> RunFinished | None:
        """Start its process, hear it, decide after its end."""
        try:
            if self._child is None:
                self._decide()
            else:
                self._hear(self._child)
        except HandshakeError as failure:  # another version there, or nothing that could be started
            self.kill()
            self._fault(failure.code, "ours", str(failure))
        return None

    def kill(self) -> None:
        """End its process."""
        if self._child is not None:
            self._child.end(0.0)
            self._child = None

    def _hear(self, child: Child) -> None:
        for message in child.poll(0.0):
            if isinstance(message, Line):
                self._supervision.append(parse_event(message.line), role=self.name, chip=self._chip)
        if child.over or child.impatient():
            self._close(child)

    def _decide(self) -> None:
        situation = self._supervision.log.situation(self.name)
        decision = decide_beside(situation, self._supervision.recipe, self._chip)
        self._supervision.append(decision, role=self.name, chip=self._chip)
        if decision.action == "stop":
            self._over = True
        else:
            self._child = self._start()

    def _close(self, child: Child) -> None:
        child.end()
        self._child = None
        ended = child.ended
        if ended is not None and ended.error is None:
            self._over = True
        elif ended is not None and ended.error is not None:
            category = "transient" if ended.error.code == BUG else "ours"
            self._fault(ended.error.code, category, ended.error.message)
        else:
            self._fault("exit", "transient", child.death().sentence)

    def _fault(self, code: str, category: str, message: str) -> None:
        fault = Fault.model_validate({"step": None, "code": code, "category": category, "message": message})
        self._supervision.append(fault, role=self.name, chip=self._chip)
