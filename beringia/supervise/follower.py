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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beringia.errors import HandshakeError, InputError
from beringia.processes.child import Child, Message
from beringia.processes.patience import PEERS_SECONDS, POLL_SECONDS
from beringia.processes.protocol import Line
from beringia.processes.ranks import Ranks, ranks_from_environment
from beringia.processes.words import last_lines
from beringia.records.files import write_bytes
from beringia.records.jsonl import JsonLinesWriter, read_lines
from beringia.records.orders import Order
from beringia.records.recipe import Recipe
from beringia.records.record import canonical_json
from beringia.records.run_directory import RunDirectory
from beringia.supervise.training_worker import start_worker

_FOLLOWED = "followed.json"


def rank_in(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those that torchrun or Slurm started; 0 alone. Raises InputError for variables that
    no launcher left so."""
    return (ranks_from_environment(environment) or Ranks()).rank


@contextmanager
def meeting_other_ranks(run: RunDirectory) -> Iterator[None]:
    """Before the first start: all ranks of the job show themselves in the run directory, while the context lasts.

    Raises InputError where they do not come: variables that a launcher left in a shell look like a launcher's.
    """
    ranks = ranks_from_environment()
    if ranks is None or ranks.count == 1:
        yield
        return
    mine = _shown(run, ranks.rank)
    write_bytes(mine, b"")
    try:
        _wait_for_others(run, ranks)
        yield
    finally:
        mine.unlink(missing_ok=True)


def _wait_for_others(run: RunDirectory, ranks: Ranks) -> None:
    wanted = {rank for rank in range(ranks.count)} if ranks.first else {0}
    deadline = time.monotonic() + PEERS_SECONDS
    while missing := [rank for rank in sorted(wanted) if not _shown(run, rank).exists()]:
        if time.monotonic() > deadline:
            raise InputError(
                f"{ranks.source} says that this is rank {ranks.rank} of {ranks.count}, but rank {missing[0]} has not "
                f"come to {run.root} within {PEERS_SECONDS:g} s. Start all ranks, with a run directory that all of "
                f"them see; or, if a launcher left its variables in this shell, give the command without them: "
                f"env {' '.join(f'-u {name}' for name in ranks.variables)} beringia ..."
            )
        time.sleep(POLL_SECONDS)


def _shown(run: RunDirectory, rank: int) -> Path:
    return run.rank_report(0, rank).with_name(f"here-{_job()}-{rank}")


def lead(run: RunDirectory, order: Order | None) -> None:
    """Tell the other ranks what to do; None is the end of the run."""
    job = _job()
    if job is not None:
        write_bytes(
            run.root / _FOLLOWED, canonical_json({"job": job, "order": order and order.model_dump(mode="json")})
        )


def follow(recipe: Recipe, run: RunDirectory) -> None:
    """Carry out the first rank's orders until it says that the run is over."""
    current: Order | None = None
    worker: Child | None = None
    messages: Iterator[Message | None] = iter(())
    try:
        while True:
            told = _read(run.root / _FOLLOWED)
            if told is not None and told["order"] is None:
                return
            if told is not None and (current is None or told["order"]["epoch"] != current.epoch):
                if worker is not None:
                    worker.end(0.0)
                current = Order.model_validate_json(json.dumps(told["order"]))
                worker = _start(recipe, run, current)
                messages = _passing_on(worker, run.rank_report(current.epoch, rank_in()))
            elif worker is not None and worker.failed:
                raise HandshakeError(f"The worker of rank {rank_in()} failed: {last_lines(worker.log, 1)}.")
            if next(messages, None) is None:
                time.sleep(POLL_SECONDS)
    finally:
        if worker is not None:
            worker.end()


class RankReports:
    """What the workers of the other ranks report under one epoch, for the first rank's supervisor."""

    def __init__(self, run: RunDirectory, epoch: int) -> None:
        self._directory = run.rank_report(epoch, 0).parent
        self._pattern = f"{epoch}-*.jsonl" if _job() is not None else None
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


def _job() -> str | None:
    """What tells this job's orders from those that an earlier one left; None outside of one."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or os.environ.get("MASTER_PORT")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    told: dict[str, Any] = json.loads(path.read_bytes())
    return told if told["job"] == _job() else None
