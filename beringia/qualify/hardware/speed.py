"""How fast a chip multiplies matrices, by dtype and shape, and how fast it copies, beside the datasheet's figures.

Nothing is judged: a slow chip is not an unfit one. An emulated chip's times are the emulator's on this host and are
compared with no datasheet. Links between devices: `bandwidth.py`; passes of the model are timed with its trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from beringia.chips.chip import Chip
from beringia.chips.datasheets import Datasheet, Quantity, datasheet_of_device
from beringia.qualify.attempts import RefusedAttempt
from beringia.qualify.hardware.rates import Timing, Work, product, square_size, time_calls
from beringia.records.certificate import ProbeResult

PRODUCTS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8",
    torch.int8: "int8",
}
"""Dtypes of products -> what a datasheet calls them."""
CALL_SECONDS = 0.05
"""At most so long for one product, so that several fill a stretch."""
DECODE_ROWS = 16
"""Rows of a product when a few sequences are decoded: bound by memory, not by the matrix unit."""
COPY_BYTES = 256 * 2**20
"""Larger than any cache of the parts in the catalogue but one (MI300X: 256 MiB)."""


def probe_speed(chip: Chip) -> list[ProbeResult]:
    """Rates of products by dtype, and of copies. All are told."""
    dtypes = [dtype for dtype in PRODUCTS if dtype in chip.capabilities.dtypes]
    sheet = datasheet_of_device(chip.identity.sku) if chip.identity.truth == "real" else None
    return [*(_products(chip, dtype, sheet) for dtype in dtypes), *_copies(chip, sheet)]


def _products(chip: Chip, dtype: torch.dtype, sheet: Datasheet | None) -> ProbeResult:
    began, name = time.perf_counter(), str(dtype).removeprefix("torch.")
    size = square_size(chip, dtype, CALL_SECONDS)
    if isinstance(size, RefusedAttempt):
        return _told(chip, f"products of {name}", f"no product of {name}: {size.reason}", began)
    # Square; few rows; and a weight's gradient, whose sums are long.
    shapes = ((size, size, size), (DECODE_ROWS, size, size), (size // 2, 4 * size, size // 2))
    peak = None if sheet is None else {str(key): value for key, value in sheet.peak.items()}.get(PRODUCTS[dtype])
    rates = []
    for rows, length, columns in shapes:
        # Integer products have a least number of rows on some chips.
        rows = max(rows, 32) if dtype == torch.int8 else rows
        timing = time_calls(chip, product(chip, dtype, rows, length, columns))
        rate = 2.0 * rows * length * columns / timing.median
        rates.append(
            f"{rows} x {length} x {columns}: {rate_words(rate, 1e12, 'Tops/s', timing)}{share_words(rate, peak)}"
        )
    return _told(chip, f"products of {name}", "; ".join(rates), began)


def _copies(chip: Chip, sheet: Datasheet | None) -> list[ProbeResult]:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=chip.device)
    target = torch.zeros_like(source)
    bandwidth = None if sheet is None else sheet.memory.bandwidth
    # A copy on the device reads every byte and writes it.
    results = [_copy(chip, "copies on the device", lambda: target.copy_(source), 2 * COPY_BYTES, bandwidth)]
    if chip.device.type != "cpu" and chip.identity.truth == "real":
        host = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=chip.capabilities.pinned_memory)
        crossings: dict[str, Callable[[], object]] = {
            "copies from the host": lambda: target.copy_(host),
            "copies to the host": lambda: host.copy_(source),
        }
        results += [_copy(chip, subject, work, COPY_BYTES, None) for subject, work in crossings.items()]
    return results


def _copy(chip: Chip, subject: str, work: Work, moved_bytes: int, published: Quantity | None) -> ProbeResult:
    began = time.perf_counter()
    work()
    timing = time_calls(chip, work)
    rate = moved_bytes / timing.median
    return _told(chip, subject, f"{rate_words(rate, 1e9, 'GB/s', timing)}{share_words(rate, published)}", began)


def rate_words(rate: float, unit: float, name: str, timing: Timing) -> str:
    """`12.3 GB/s (spread 4%)`."""
    return f"{rate / unit:.4g} {name} (spread {timing.spread:.0%})"


def share_words(rate: float, published: Quantity | None) -> str:
    """What part of the datasheet's figure a rate is; nothing where there is none."""
    if published is None:
        return ""
    return f", {rate / published.base:.0%} of the datasheet's {published.value:g} {published.unit} ({published.mark})"


def _told(chip: Chip, subject: str, text: str, began: float) -> ProbeResult:
    emulated = chip.identity.truth == "emulated"
    whose = " The time is the emulator's on this host, not the part's." if emulated else ""
    return ProbeResult(
        probe="speed",
        subject=subject,
        outcome="told",
        summary=f"{text[0].upper()}{text[1:]}.{whose}",
        seconds=time.perf_counter() - began,
    )
