"""Does a chip refuse indices that do not exist, or silently return what lies there.

A token beyond the vocabulary that reads garbage trains a model on garbage without any error. The reads are made in a
process of their own (see `index_work.py`): on some chips a refusal breaks the device's context for the whole
process, and then another process makes the cases that are left.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from beringia.errors import InputError
from beringia.processes.child import start
from beringia.processes.command import Command
from beringia.processes.patience import Patience
from beringia.processes.protocol import Line
from beringia.qualify.arithmetic.index_work import CASES, READS, IndexOrder, IndexReport
from beringia.qualify.exact_measures import none_allowed
from beringia.records.certificate import ProbeResult

_MODULE = "beringia.qualify.arithmetic.index_work"
_HERE = Command("the chip")


def probe_indices(
    chip_name: str,
    *,
    faults: str | None = None,
    command: Command = _HERE,
    log: Path = Path(os.devnull),
    time_out_seconds: float = 60.0,
) -> list[ProbeResult]:
    """One finding for each operator that reads by index. Raises ChipUnavailable where the chip cannot be opened."""
    began, left = time.perf_counter(), list(CASES)
    reports: dict[str, IndexReport] = {}
    start_one = partial(_run, replace(command, module=_MODULE), log, time_out_seconds)
    while left:
        for report in start_one(IndexOrder(chip=chip_name, faults=faults, cases=tuple(left))):
            reports[report.case] = report
        # A process that ends before its first case has said nothing of it: the next would end so too.
        done = [case for case in left if case in reports] or left
        left = [case for case in left if case not in done]
    seconds = (time.perf_counter() - began) / len(READS)
    return [_judged(operator, reports, seconds) for operator in READS]


def _run(command: Command, log: Path, time_out_seconds: float, order: IndexOrder) -> list[IndexReport]:
    """One process: what it reported before it ended, or before it was ended because it did not get on."""
    child = start(command, order, log, patience=Patience(silence_seconds=time_out_seconds))
    try:
        lines = [message.line for message in child.follow() if isinstance(message, Line)]
    finally:
        child.end()
    # How it ended says no more than its lines: a device's assertion may end it in many ways.
    problem = child.ended.error.error() if child.ended is not None and child.ended.error is not None else None
    if isinstance(problem, InputError):
        raise problem
    return [IndexReport.model_validate(line) for line in lines]


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
