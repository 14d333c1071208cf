"""Does a chip refuse indices that do not exist, or silently return what lies there.

A token beyond the vocabulary that reads garbage trains a model on garbage without any error. The reads are made in a
process of their own (see `index_process.py`): on some chips a refusal breaks the device's context for the whole
process, and then another process makes the cases that are left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from beringia.errors import ChipUnavailable
from beringia.machine.threads import prepare_threads
from beringia.qualify.arithmetic.index_process import CASES, READS, IndexReport, Job
from beringia.qualify.hardware.measures import none_allowed
from beringia.records.certificate import ProbeResult
from beringia.records.jsonl import read_lines

COMMAND: Sequence[str] = (sys.executable, "-m", "beringia.qualify.arithmetic.index_process")


def probe_indices(chip_name: str, *, faults: str | None = None, time_out_seconds: float = 60.0) -> list[ProbeResult]:
    """One finding for each operator that reads by index. Raises ChipUnavailable where the chip cannot be opened."""
    began, left = time.perf_counter(), list(CASES)
    reports: dict[str, IndexReport] = {}
    while left:
        for report in _run(chip_name, faults, tuple(left), time_out_seconds):
            if report.state == "unavailable":
                raise ChipUnavailable(report.text)
            reports[report.case] = report
        # A process that ends before its first case has said nothing of it: the next would end so too.
        done = [case for case in left if case in reports] or left
        left = [case for case in left if case not in done]
    seconds = (time.perf_counter() - began) / len(READS)
    return [_judged(operator, reports, seconds) for operator in READS]


def _run(chip: str, faults: str | None, cases: tuple[str, ...], time_out_seconds: float) -> list[IndexReport]:
    """One process: what it reported before it ended, or before it was killed because it did not end."""
    environment = dict(os.environ)
    prepare_threads(environment)
    with tempfile.TemporaryDirectory(prefix="beringia-indices-") as directory:
        report = Path(directory, "report.jsonl")
        job = Job(chip=chip, faults=faults, cases=cases, report=str(report), time_out_seconds=time_out_seconds)
        # Its exit code says no more than its report: a device's assertion may end it in many ways. After its own
        # time-out it ends by itself.
        subprocess.run(COMMAND, input=job.model_dump_json().encode(), capture_output=True, env=environment, check=False)
        return [IndexReport.model_validate(line) for _, line in read_lines(report)]


def _judged(operator: str, reports: dict[str, IndexReport], seconds: float) -> ProbeResult:
    cases = [case for case in CASES if case.startswith(f"{operator}: ")]
    silent = [reports[case] for case in cases if case in reports and reports[case].state == "numbers"]
    raised = [reports[case] for case in cases if case in reports and reports[case].state == "raised"]
    if silent:
        outcome = "failed"
        parts = [f"{report.case.partition(': ')[2]} ({report.text})" for report in silent]
        text = f"An index that does not exist gives numbers and no error: {', '.join(parts)}."
    elif len(raised) == len(cases):
        outcome = "passed"
        text = f"Every index that does not exist is refused: {raised[0].text}."
    else:
        outcome = "inconclusive"
        lost = [case.partition(": ")[2] for case in cases if case not in reports or reports[case].state == "begun"]
        text = f"The process ended without an answer to: {', '.join(lost)}."
    return ProbeResult.model_validate(
        {
            "probe": "arithmetic",
            "subject": f"indices: {operator}",
            "outcome": outcome,
            "rules_out": "train",
            "summary": text,
            "measures": (none_allowed("indices not refused", len(silent), "there is nothing to read"),),
            "seconds": seconds,
        }
    )
