"""One rank of the collectives' probe, as work of a far end: its document is a `RankOrder`.

Says a line before and after each case, so that its starter knows what a rank that never returns was doing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.processes.ranks import Ranks
from beringia.qualify.hardware.bandwidth import measure_bandwidth
from beringia.qualify.hardware.collective_calls import communicate
from beringia.qualify.hardware.collective_cases import (
    SUMS,
    Case,
    CaseReport,
    RankOrder,
    cases,
    check,
    given,
    sum_bound,
)
from beringia.qualify.refusals import first_line
from beringia.train.sharding import join, leave

ABSENT = "a peer that does not come"
ABSENT_SECONDS = 3.0
"""Time-out of the group in which one rank stays away."""
_ALIKE = frozenset({"all-reduce", "all-gather", "broadcast"})
"""Of these all ranks have the same result."""


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Make every case and say what came of it."""
    order = RankOrder.model_validate(document, strict=False)
    say = far_end.channel.line
    chip = open_chip(order.chip, index=order.index, faults=order.faults, seed=order.seed)
    chip.begin_step(1)
    join(Ranks(order.rank, order.ranks, order.index, port=order.port, agent_hosts_store=True), chip, epoch=0)
    far_end.afterwards(leave)
    for case in cases(chip.capabilities.compute_dtype):
        say(CaseReport(rank=order.rank, subject=case.subject, name=case.name, state="begun"))
        found = run(case, chip, order)
        say(found)
        if found.state == "fault":
            # The peers wait for this rank now, and a fault of the device ends a real run too.
            return Ended(why="fault", message=found.reason)
    if order.bandwidth:
        for measured in measure_bandwidth(chip, order.rank, order.ranks):
            say(measured)
    _stay_away(chip, order, say)
    return Ended(why="done")


def run(case: Case, chip: Chip, order: RankOrder) -> CaseReport:
    """One case, twice."""
    began = time.perf_counter()
    contributed = given(case, order.seed, order.rank, order.ranks)
    try:
        first, second = (communicate(case, contributed, chip, order.ranks) for _ in range(2))
    except RuntimeError as error:  # NotImplementedError is one
        state = "refused" if chip.classify(error) is None else "fault"
        return CaseReport.model_validate(
            {
                "rank": order.rank,
                "subject": case.subject,
                "name": case.name,
                "state": state,
                "reason": first_line(error),
            }
        )
    wrong, error_of_sum = check(case, first, order.seed, order.rank, order.ranks)
    return CaseReport(
        rank=order.rank,
        subject=case.subject,
        name=case.name,
        state="ran",
        wrong=wrong,
        error=error_of_sum,
        bound=sum_bound(case.dtype, order.ranks) if case.collective in SUMS else 1.0,
        repeats=_bytes(first) == _bytes(second),
        digest=hashlib.sha256(_bytes(first)).hexdigest() if case.collective in _ALIKE else "",
        seconds=time.perf_counter() - began,
    )


def _stay_away(chip: Chip, order: RankOrder, say: Callable[[CaseReport], None]) -> None:
    """The last rank does not come to an all-reduce: what becomes of the others."""
    group = dist.new_group(timeout=timedelta(seconds=ABSENT_SECONDS))
    store = TCPStore("127.0.0.1", order.port, is_master=False)
    done = [f"gave-up-{rank}" for rank in range(order.ranks - 1)]
    say(CaseReport(rank=order.rank, subject=ABSENT, name=ABSENT, state="begun"))
    if order.rank == order.ranks - 1:
        store.wait(done, timedelta(seconds=order.time_out_seconds))
    else:
        say(_wait_for_absent(chip, group, order.rank))
        store.set(done[order.rank], "")


def _wait_for_absent(chip: Chip, group: dist.ProcessGroup | None, rank: int) -> CaseReport:
    began, reason = time.perf_counter(), ""
    try:
        dist.all_reduce(torch.ones(8, device=chip.device), group=group)
        chip.synchronize()
    except RuntimeError as error:
        reason = first_line(error)
    seconds = time.perf_counter() - began
    return CaseReport(rank=rank, subject=ABSENT, name=ABSENT, state="ran", reason=reason, seconds=seconds)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
