"""One rank of the collectives' probe: `python -m beringia.qualify.hardware.collective_rank`, a `Job` on standard input.

Appends a line to its report before and after each case, so that the parent knows what a rank that never returns was
doing. Comes to an end by itself when the parent is gone: after the job's time-out it prints its stacks and exits.
"""

from __future__ import annotations

import faulthandler
import hashlib
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not declared so

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import InputError
from beringia.qualify.arithmetic.attempts import first_line
from beringia.qualify.hardware.bandwidth import measure_bandwidth
from beringia.qualify.hardware.collective_calls import communicate
from beringia.qualify.hardware.collective_cases import (
    SUMS,
    Case,
    CaseReport,
    Job,
    cases,
    check,
    given,
    sum_bound,
)
from beringia.records.jsonl import JsonLinesWriter
from beringia.train.ranks import Ranks
from beringia.train.sharding import join, leave

ABSENT = "a peer that does not come"
ABSENT_SECONDS = 3.0
"""Time-out of the group in which one rank stays away."""
_GRACE_SECONDS = 10.0
_ALIKE = frozenset({"all-reduce", "all-gather", "broadcast"})
"""Of these all ranks have the same result."""


def main() -> int:
    """Make every case and report it."""
    job = Job.model_validate_json(sys.stdin.buffer.read())
    faulthandler.dump_traceback_later(job.time_out_seconds + _GRACE_SECONDS, exit=True)
    report = JsonLinesWriter(Path(job.report))
    try:
        chip = open_chip(job.chip, index=job.index, faults=job.faults, seed=job.seed)
    except InputError as error:
        said = CaseReport(rank=job.rank, subject="opening", name="opening", state="unavailable", reason=str(error))
        _append(report, said)
        return error.exit_code
    chip.begin_step(1)
    join(Ranks(job.rank, job.ranks, job.index, port=job.port, agent_hosts_store=True), chip, epoch=0)
    for case in cases(chip.capabilities.compute_dtype):
        _append(report, CaseReport(rank=job.rank, subject=case.subject, name=case.name, state="begun"))
        found = run(case, chip, job)
        _append(report, found)
        if found.state == "fault":
            # The peers wait for this rank now, and a fault of the device ends a real run too.
            return 1
    if job.bandwidth:
        for measured in measure_bandwidth(chip, job.rank, job.ranks):
            _append(report, measured)
    _stay_away(chip, job, report)
    leave()
    return 0


def run(case: Case, chip: Chip, job: Job) -> CaseReport:
    """One case, twice."""
    began = time.perf_counter()
    contributed = given(case, job.seed, job.rank, job.ranks)
    try:
        first, second = (communicate(case, contributed, chip, job.ranks) for _ in range(2))
    except RuntimeError as error:  # NotImplementedError is one
        state = "refused" if chip.classify(error) is None else "fault"
        return CaseReport.model_validate(
            {
                "rank": job.rank,
                "subject": case.subject,
                "name": case.name,
                "state": state,
                "reason": first_line(error),
            }
        )
    wrong, error_of_sum = check(case, first, job.seed, job.rank, job.ranks)
    return CaseReport(
        rank=job.rank,
        subject=case.subject,
        name=case.name,
        state="ran",
        wrong=wrong,
        error=error_of_sum,
        bound=sum_bound(case.dtype, job.ranks) if case.collective in SUMS else 1.0,
        repeats=_bytes(first) == _bytes(second),
        digest=hashlib.sha256(_bytes(first)).hexdigest() if case.collective in _ALIKE else "",
        seconds=time.perf_counter() - began,
    )


def _stay_away(chip: Chip, job: Job, report: JsonLinesWriter) -> None:
    """The last rank does not come to an all-reduce: what becomes of the others."""
    group = dist.new_group(timeout=timedelta(seconds=ABSENT_SECONDS))
    store = TCPStore("127.0.0.1", job.port, is_master=False)
    done = [f"gave-up-{rank}" for rank in range(job.ranks - 1)]
    _append(report, CaseReport(rank=job.rank, subject=ABSENT, name=ABSENT, state="begun"))
    if job.rank == job.ranks - 1:
        store.wait(done, timedelta(seconds=job.time_out_seconds))
    else:
        _append(report, _wait_for_absent(chip, group, job.rank))
        store.set(done[job.rank], "")


def _wait_for_absent(chip: Chip, group: dist.ProcessGroup | None, rank: int) -> CaseReport:
    began, reason = time.perf_counter(), ""
    try:
        dist.all_reduce(torch.ones(8, device=chip.device), group=group)
        chip.synchronize()
    except RuntimeError as error:
        reason = first_line(error)
    seconds = time.perf_counter() - began
    return CaseReport(rank=rank, subject=ABSENT, name=ABSENT, state="ran", reason=reason, seconds=seconds)


def _append(report: JsonLinesWriter, line: CaseReport) -> None:
    report.append(line.model_dump(mode="json"))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    sys.exit(main())
