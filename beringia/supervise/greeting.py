"""Before a run begins, or goes on with more chips: those that it may need later say hello, so that a mistake shows now
and not in mid-run.

Asked are chips of this machine, without opening them. What is behind a launch prefix may be a machine that is not there
yet (a queue's, a cloud's), and is asked when it is needed.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from beringia.errors import HandshakeError
from beringia.records.messages import Ended, Hello, Order
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.worker_process import WorkerProcess, check_hello, error_called

_END_SECONDS = 10.0


def greet_later_chips(recipe: Recipe, run: RunDirectory, known: Collection[str] = ()) -> None:
    """Start, and end, a worker of every local chip of `train.prefer` but the first and those already `known`. Raises
    what its worker says is wrong: HandshakeError, ChipUnavailable."""
    for label in recipe.train.prefer[1:]:
        if label not in known and not recipe.chips[label].launch:
            _greet(label, recipe, run)


def _greet(label: str, recipe: Recipe, run: RunDirectory) -> None:
    order = Order(root=str(run.root), chip=label, recipe=recipe, epoch=0, resume_step=None, greeting=True)
    worker = WorkerProcess(label, recipe.chips[label], order, run.logs / f"{label}-greeting.log")
    ended: Ended | None = None
    until = time.monotonic() + recipe.supervise.start_seconds
    try:
        for message in worker.messages():
            if isinstance(message, Hello):
                check_hello(label, message)
            elif isinstance(message, Ended):
                ended = message
                break
            if time.monotonic() > until:
                break
    finally:
        status = worker.end(_END_SECONDS if ended is not None else 0.0)
    if ended is None:
        raise HandshakeError(worker.did_not_start(status))
    if ended.why == "error":
        raise error_called(ended.error, ended.message)
