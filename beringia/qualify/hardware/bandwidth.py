"""How fast devices exchange data: an all-reduce and an all-gather, timed on every rank.

Rates are bus bandwidths, as NCCL's tests define them (nccl-tests, doc/PERFORMANCE.md): what every link has to carry,
so that they do not depend on the number of ranks and may stand beside what a datasheet says of links.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from beringia.chips.chip import Chip
from beringia.chips.datasheets import Quantity, datasheet_of_device
from beringia.qualify.hardware.collective_calls import single
from beringia.qualify.hardware.collective_cases import CaseReport
from beringia.qualify.hardware.rates import STRETCHES, Timing, Work, seconds_of
from beringia.qualify.hardware.speed import rate_words, share_words

SUBJECT = "bandwidth"
BUFFER_BYTES = 64 * 2**20
"""Of the whole buffer, as large as a gradient bucket or a layer's weights."""
CALLS = 4
"""In a stretch; the same on every rank."""


def measure_bandwidth(chip: Chip, rank: int, ranks: int) -> Iterator[CaseReport]:
    """One report a collective; its reason says how fast it was."""
    count = BUFFER_BYTES // 4 // ranks * ranks
    whole = torch.zeros(count, device=chip.device)
    piece = torch.zeros(count // ranks, device=chip.device)
    works: dict[str, Work] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: single("all-gather")(whole, piece),
    }
    for name, work in works.items():
        began = time.perf_counter()
        work()  # the first call connects
        stretches = [seconds_of(chip, work, CALLS) for _ in range(STRETCHES)]
        median = statistics.median(stretches)
        timing = Timing(median, (max(stretches) - min(stretches)) / median)
        rate = bus_bandwidth(name, ranks, median)
        yield CaseReport(
            rank=rank,
            subject=SUBJECT,
            name=f"{name} of {BUFFER_BYTES >> 20} MiB, {ranks} ranks",
            state="ran",
            reason=f"bus bandwidth {rate_words(rate, 1e9, 'GB/s', timing)}{share_words(rate, _link(chip))}",
            seconds=time.perf_counter() - began,
        )


def bus_bandwidth(collective: str, ranks: int, seconds: float) -> float:
    """Bytes a second that every link carries while the buffer is exchanged in so many seconds: its share of the buffer
    is sent on by all ranks but one, in an all-reduce twice."""
    passes = {"all-reduce": 2, "all-gather": 1}[collective]
    return passes * (ranks - 1) / ranks * BUFFER_BYTES / seconds


def _link(chip: Chip) -> Quantity | None:
    """What the datasheet says of the links inside a node, in one direction."""
    sheet = datasheet_of_device(chip.identity.sku) if chip.identity.truth == "real" else None
    published = None if sheet is None else sheet.links.scale_up
    if sheet is None or published is None or not sheet.links.scale_up_is_both_directions:
        return published
    return published.model_copy(update={"value": published.value / 2})
