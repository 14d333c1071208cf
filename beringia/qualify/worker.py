"""The process that has the chip: `python -m beringia.qualify.worker`, a `Job` as JSON on standard input.

Writes evidence to the file that the job names, and says what it is doing on standard error. A fault of the chip ends it
with a finding; it may also hang or die, which its parent notices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import BeringiaError, ChipUnavailable
from beringia.machine.memory import keep_freed_memory
from beringia.qualify.bundle import read_bundle
from beringia.qualify.candidate import Extent, probe_candidate
from beringia.qualify.evidence import Begun, Ended, Failed, Job, Line, Opened, Probed
from beringia.qualify.fitting import check_fits
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import DecoderSubject
from beringia.qualify.trace import Plan
from beringia.records.certificate import ProbeResult
from beringia.records.jsonl import JsonLinesWriter

Write = Callable[[Line], None]


def main() -> int:
    """Do one job."""
    keep_freed_memory()
    job = Job.model_validate_json(sys.stdin.read(), strict=False)
    writer = JsonLinesWriter(Path(job.evidence))
    try:
        _work(job, lambda line: writer.append(line.model_dump(mode="json")))
    except BeringiaError as problem:
        writer.append(Failed(error=type(problem).__name__, message=str(problem)).model_dump(mode="json"))
        return problem.exit_code
    return 0


def _work(job: Job, write: Write) -> None:
    chip = open_chip(job.chip, faults=job.faults, seed=job.seed)
    dtype = _dtype(job.compute_dtype, chip)
    write(Opened(name=chip.name, identity=chip.identity, compute_dtype=str(dtype).removeprefix("torch.")))
    if job.task == "describe":
        return
    check_fits(job.model, job.layers)
    subject = DecoderSubject(job.model, job.seed, job.samples, job.tokens, job.layers)
    if job.task == "reference":
        _make_reference(job, subject, chip, dtype, write)
    else:
        _probe(job, subject, chip, write)
    write(Ended())


def _make_reference(job: Job, subject: DecoderSubject, chip: Chip, dtype: torch.dtype, write: Write) -> None:
    plan = Plan(job.batches, job.steps)

    def say(text: str) -> None:
        write(Begun(probe=text))

    make_bundle(subject, chip, dtype, Path(job.bundle), plan=plan, limit_bytes=job.limit_bytes, say=say)


def _probe(job: Job, subject: DecoderSubject, chip: Chip, write: Write) -> None:
    extent = Extent(job.longest, job.memory_bytes, job.soak_seconds, job.speed)
    begun = "opening"
    try:
        for line in probe_candidate(chip, subject, read_bundle(Path(job.bundle)), extent):
            if isinstance(line, Begun):
                begun = line.probe
                _say(line.probe)
            write(line)
    except RuntimeError as problem:
        fault = chip.classify(problem)
        if fault is None:
            raise
        write(Probed(result=fault_result(begun, f"the chip reported {fault.code}: {fault.message}")))


def fault_result(probe: str, what: str) -> ProbeResult:
    """A chip that fails while it is probed can be used for nothing."""
    return ProbeResult(
        probe=probe, subject="the chip", outcome="failed", rules_out="infer", summary=f"while probing {probe}: {what}"
    )


def _dtype(name: str | None, chip: Chip) -> torch.dtype:
    if name is None:
        return chip.capabilities.compute_dtype
    dtype = getattr(torch, name, None)
    if dtype not in chip.capabilities.dtypes:
        raise ChipUnavailable(f"{chip.name} does not compute in {name!r}: choose one that it has, or leave it out.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # As in training: taking the interpreter down only costs time, and torch may abort there.
    os._exit(status)
