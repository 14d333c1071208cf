"""Before a run begins, or goes on with more chips: those that it may need later say hello, so that a mistake shows now
and not in mid-run.

Asked are chips of this machine, without opening them. What is behind a launch prefix may be a machine that is not there
yet (a queue's, a cloud's), and is asked when it is needed.
"""

from __future__ import annotations

from collections.abc import Collection

from beringia.processes.child import lines_of
from beringia.records.orders import Order
from beringia.records.recipe import Recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.stop_request import StopRequest
from beringia.supervise.training_worker import start_worker


def greet_later_chips(recipe: Recipe, run: RunDirectory, known: Collection[str], stop: StopRequest) -> None:
    """Start, and end, a worker of every local chip of `train.prefer` but the first and those already `known`. Raises
    what its worker says is wrong (HandshakeError, ChipUnavailable), and its death where the user wants to stop."""
    for label in recipe.train.prefer[1:]:
        if label not in known and not recipe.chips[label].launch:
            _greet(label, recipe, run, stop)


def _greet(label: str, recipe: Recipe, run: RunDirectory, stop: StopRequest) -> None:
    order = Order(
        root=str(run.root.resolve()),
        chip=label,
        recipe=recipe,
        recipe_hash=recipe.hash,
        epoch=0,
        resume_step=None,
        greeting=True,
    )
    worker = start_worker(label, recipe, order, run, f"{label}-greeting")
    with stop.ending(worker.kill, 0.0):
        lines_of(worker)
