"""A rank beyond the first in an environment that torchrun or Slurm has set up: follows the first rank's supervisor.

`torchrun --nproc-per-node=8 -m beringia train recipe.toml` starts the same command in every rank. The first is the
run's supervisor, as ever, and its worker is rank 0. The others find its orders in the run directory, which all of
them see, and start a worker of their own for each; when a new order appears, the worker of the old one is ended. What
their workers report lies in a file a rank, which the first rank's supervisor reads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beringia.processes.child import Child, Message
from beringia.processes.patience import END_SECONDS, POLL_SECONDS
from beringia.processes.protocol import Line, Stop
from beringia.processes.ranks import Ranks, ranks_from_environment
from beringia.records.events import Fault
from beringia.records.files import write_bytes
from beringia.records.jsonl import JsonLinesWriter, read_lines
from beringia.records.orders import Order
from beringia.records.recipe import Recipe
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory
from beringia.supervise.meeting import job_name, orders_file
from beringia.supervise.stop_request import StopRequest
from beringia.supervise.training_worker import start_worker


def rank_in(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those that torchrun or Slurm started; 0 alone. Raises InputError for variables that
    no launcher left so."""
    return (ranks_from_environment(environment) or Ranks()).rank


def lead(run: RunDirectory, order: Order | None) -> None:
    """Tell the other ranks what to do; None is the end of the run."""
    if job_name() is not None:
        write_bytes(orders_file(run), canonical_json({"order": order and order.model_dump(mode="json")}))


def follow(recipe: Recipe, run: RunDirectory, stop: StopRequest) -> None:
    """Carry out the first rank's orders until it says that the run is over.

    A wish to stop is handed on to the worker: all ranks save together, and the first one's supervisor, which is asked
    too, ends the run. It is waited for as long as the recipe gives a worker.
    """
    following = _Following(recipe, run, stop)
    try:
        while not following.out_of_grace() and not following.over():
            if not following.hears():
                time.sleep(POLL_SECONDS)
    finally:
        following.end()


_NOTHING_MORE = object()


class _Following:
    """One rank's worker after another, as the first rank's orders say."""

    def __init__(self, recipe: Recipe, run: RunDirectory, stop: StopRequest) -> None:
        self._recipe, self._run, self._stop = recipe, run, stop
        self._order: Order | None = None
        self._worker: Child | None = None
        self._messages: Iterator[Message | None] = iter(())
        self._heard_out = False
        """The worker has ended, and all that it said was handed on."""
        self._told_to_stop: Child | None = None
        self._asked: float | None = None

    def over(self) -> bool:
        """Take the newest order, where there is another; whether it is that the run is over."""
        told = _read(orders_file(self._run))
        if told is not None and told["order"] is None:
            return True
        if told is not None and (self._order is None or told["order"]["epoch"] != self._order.epoch):
            self._begin(Order.model_validate_json(json.dumps(told["order"])))
        elif self._worker is not None and self._heard_out:
            self._leave(self._worker)
        return False

    def _leave(self, worker: Child) -> None:
        """A worker that has ended; why is told where it did not say so. The first rank's supervisor decides what is
        done about it, and its next order is waited for. That all is done only the first rank says: the others exit."""
        status = worker.end()
        self._worker, self._messages = None, iter(())
        ended = worker.ended
        if ended is not None and ended.error is not None:
            self._tell(Fault(step=None, code=ended.error.code, category="ours", message=ended.error.message))
        elif ended is None and status != 0 and not (worker.death().by_stop_signal and self._stop.comes()):
            self._tell(Fault(step=None, code="exit", category="transient", message=worker.death().sentence))

    def _tell(self, fault: Fault) -> None:
        assert self._order is not None
        writer = JsonLinesWriter(self._run.rank_report(self._order.epoch, rank_in()))
        writer.append(fault.model_copy(update={"rank": rank_in()}).model_dump(mode="json"), durable=True)
        writer.close()

    def hears(self) -> bool:
        """Whether its worker says something, which is handed on, as is the wish to stop."""
        if self._stop.signal is not None and self._worker is not None and self._told_to_stop is not self._worker:
            self._worker.send(Stop())
            self._told_to_stop = self._worker
        message = next(self._messages, _NOTHING_MORE)
        self._heard_out = message is _NOTHING_MORE
        return message is not None and not self._heard_out

    def out_of_grace(self) -> bool:
        """Whether the first rank had its time to end the run."""
        if self._stop.signal is not None and self._asked is None:
            self._asked = time.monotonic()
        grace = self._recipe.supervise.grace_seconds + END_SECONDS
        return self._asked is not None and time.monotonic() - self._asked > grace

    def end(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.end()

    def _begin(self, order: Order) -> None:
        if self._worker is not None:
            self._worker.end(0.0)
        self._order, self._heard_out = order, False
        self._worker = _start(self._recipe, self._run, order)
        self._messages = _passing_on(self._worker, self._run.rank_report(order.epoch, rank_in()))


class RankReports:
    """What the workers of the other ranks report under one epoch, for the first rank's supervisor."""

    def __init__(self, run: RunDirectory, epoch: int) -> None:
        self._directory = run.rank_report(epoch, 0).parent
        self._pattern = f"{epoch}-*.jsonl" if job_name() is not None else None
        self._read_to: dict[Path, int] = {}

    def new(self) -> Iterator[dict[str, Any]]:
        """Events that were not told before; none outside of torchrun's and Slurm's environments."""
        if self._pattern is None:
            return
        for path in sorted(self._directory.glob(self._pattern)):
            for offset, event in read_lines(path, self._read_to.get(path, 0)):
                self._read_to[path] = offset
                yield event


def _passing_on(worker: Child, report: Path) -> Iterator[Message | None]:
    """The worker's messages; its events are written to the report on the way."""
    writer = JsonLinesWriter(report)
    try:
        for message in worker.follow(POLL_SECONDS):
            if isinstance(message, Line):
                writer.append(message.line, durable=True)
            yield message
    finally:
        writer.close()


def _start(recipe: Recipe, run: RunDirectory, order: Order) -> Child:
    # Its go is the first rank's: only that rank's supervisor knows whether the chip may train.
    return start_worker(order.chip, recipe, order, run, f"{order.chip}-{order.epoch}-rank{rank_in()}")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    told: dict[str, Any] = json.loads(path.read_bytes())
    return told
