"""Reads by indices that do not exist, as work of a far end: its document is an `IndexOrder`.

Says a line for each case. After a refusal it tries a sum: where a refused index has broken the device's
context, as an assertion on a device does, this work ends and its starter starts another one for the cases left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from beringia.chips.chip import Chip
from beringia.chips.open import open_chip
from beringia.processes.far_end import FarEnd
from beringia.processes.protocol import Ended
from beringia.qualify.refusals import REFUSALS, first_line
from beringia.records.record import Record

ROWS, COLUMNS = 64, 8
"""Of the table that is read."""


class IndexOrder(Record):
    """Which cases to try."""

    chip: str
    faults: str | None
    cases: tuple[str, ...]


class IndexReport(Record):
    """What became of one case."""

    case: str
    state: Literal["begun", "raised", "numbers"]
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


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Try the cases until one breaks the device."""
    order = IndexOrder.model_validate(document, strict=False)
    chip = open_chip(order.chip, faults=order.faults)
    chip.begin_step(1)
    for case in order.cases:
        far_end.channel.line(IndexReport(case=case, state="begun"))
        found = read(chip, case)
        far_end.channel.line(found)
        if found.state == "raised" and not still_works(chip):
            return Ended(why="fault", message="the device refused, and can do nothing more in this process")
    return Ended(why="done")


def read(chip: Chip, case: str) -> IndexReport:
    """One case: a right index and a wrong one in the same call."""
    operator, where = case.split(": ")
    table = (torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 1).to(chip.device)
    index = torch.tensor([0, INDICES[where]]).to(chip.device)
    try:
        found = READS[operator](table, index).cpu()
        chip.synchronize()
    except REFUSALS as error:
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
