"""Reads by indices that do not exist: `python -m beringia.qualify.arithmetic.index_process`, a `Job` on standard input.

Writes a line to its report for each case. After a refusal it tries a sum: where a refused index has broken the device's
context, as an assertion on a device does, this process ends and the parent starts another one for the cases left.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.errors import InputError
from beringia.qualify.arithmetic.attempts import first_line
from beringia.records.jsonl import JsonLinesWriter
from beringia.records.record import Record

ROWS, COLUMNS = 64, 8
"""Of the table that is read."""
BROKEN_CONTEXT = 9
"""Exit code: the device refused, and can do nothing more in this process."""


class Job(Record):
    """What a process is told."""

    chip: str
    faults: str | None
    cases: tuple[str, ...]
    report: str
    time_out_seconds: float


class IndexReport(Record):
    """What became of one case."""

    case: str
    state: Literal["begun", "raised", "numbers", "unavailable"]
    text: str = ""
    """The error's first line, or the numbers that were returned."""


Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

READS: dict[str, Read] = {
    "embedding": lambda table, index: F.embedding(index, table),
    "index_select": lambda table, index: table.index_select(0, index),
    "gather": lambda table, index: table.gather(0, index.unsqueeze(-1).expand(-1, COLUMNS)),
    "advanced indexing": lambda table, index: table[index],
    "cross-entropy's target": lambda table, index: F.cross_entropy(
        table[:, :COLUMNS].repeat(1, ROWS // COLUMNS)[: index.numel()], index, reduction="none"
    ),
}
"""Operators by which models read; each has `ROWS` to choose from."""

INDICES: dict[str, int] = {"one past the end": ROWS, "far past the end": 2**20, "negative": -1 - ROWS}
"""Negative beyond what wraps around, and not -100, which cross-entropy leaves out on purpose."""

CASES = tuple(f"{operator}: {where}" for operator in READS for where in INDICES)


def main() -> int:
    """Try the cases until one breaks the device."""
    job = Job.model_validate_json(sys.stdin.buffer.read())
    faulthandler.dump_traceback_later(job.time_out_seconds, exit=True)
    report = JsonLinesWriter(Path(job.report))
    try:
        chip = open_chip(job.chip, faults=job.faults)
    except InputError as error:
        _append(report, IndexReport(case="opening", state="unavailable", text=str(error)))
        return error.exit_code
    chip.begin_step(1)
    for case in job.cases:
        _append(report, IndexReport(case=case, state="begun"))
        found = read(chip, case)
        _append(report, found)
        if found.state == "raised" and not still_works(chip):
            return BROKEN_CONTEXT
    return 0


def read(chip: Chip, case: str) -> IndexReport:
    """One case: a right index and a wrong one in the same call."""
    operator, where = case.split(": ")
    table = (torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 1).to(chip.device)
    index = torch.tensor([0, INDICES[where]]).to(chip.device)
    try:
        found = READS[operator](table, index).cpu()
        chip.synchronize()
    except (RuntimeError, IndexError) as error:
        return IndexReport(case=case, state="raised", text=first_line(error))
    numbers = " ".join(f"{number:.6g}" for number in found[-1:].flatten().tolist()[:4])
    return IndexReport(case=case, state="numbers", text=numbers)


def still_works(chip: Chip) -> bool:
    """Whether the device can still add."""
    try:
        total = float(torch.ones(8, device=chip.device).sum().cpu())
        chip.synchronize()
    except RuntimeError:
        return False
    return total == 8.0


def _append(report: JsonLinesWriter, line: IndexReport) -> None:
    report.append(line.model_dump(mode="json"))


if __name__ == "__main__":
    sys.exit(main())
