"""Does what is copied to a chip and back keep its bits.

Token numbers that change rule the chip out. What floats that lose bits on the way do to a model, whose weights are
copied so, is measured there; but a checkpoint would not hold what was trained, so whether the chip may train is open.
"""

from __future__ import annotations

import time

import torch

from beringia.chips.chip import Chip
from beringia.qualify.attempts import RefusedAttempt, attempt, exact_result
from beringia.qualify.exact_measures import none_allowed
from beringia.records.certificate import ProbeResult

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Integers as wide as a float, by bytes: a float's bits, as they travel without being a float."""
_COUNT = 4099
"""Numbers: no multiple of any vector's length."""


def probe_transfers(chip: Chip) -> list[ProbeResult]:
    """One finding for integers and one for floats."""
    integers, floats = _judged(chip, "integers", INTEGERS), _judged(chip, "floats", FLOATS)
    if floats.outcome == "failed":
        why = f"{floats.summary} A checkpoint would not hold what was trained: whether the chip may train is open."
        floats = floats.model_copy(update={"outcome": "inconclusive", "rules_out": "train", "summary": why})
    return [integers, floats]


def _judged(chip: Chip, subject: str, kinds: tuple[torch.dtype, ...]) -> ProbeResult:
    began = time.perf_counter()
    found = {dtype: _changed(chip, _numbers(dtype)) for dtype in kinds if dtype in chip.capabilities.dtypes}
    refused = [f"{dtype_word(dtype)} ({one.reason})" for dtype, one in found.items() if isinstance(one, RefusedAttempt)]
    changed = {dtype: one for dtype, one in found.items() if not isinstance(one, RefusedAttempt)}
    wrong = sum(changed.values())
    lost = ", ".join(f"{count:,} of {_COUNT:,} in {dtype_word(dtype)}" for dtype, count in changed.items() if count)
    text = f"Numbers come back as others: {lost}." if wrong else "What is copied there and back keeps its bits."
    beside = f" Refused, so not measured: {'; '.join(refused)}." if refused else ""
    measure = none_allowed("numbers that changed", wrong, "a copy keeps every bit")
    seconds = time.perf_counter() - began
    return exact_result(f"transfers: {subject}", wrong, len(changed), f"{text}{beside}", measure, seconds)


def _numbers(dtype: torch.dtype) -> torch.Tensor:
    """All digits of the format are used; of floats no NaN, whose payload nobody promises, and no subnormal numbers,
    which some chips do not have."""
    generator = torch.Generator().manual_seed(7)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        drawn = torch.randint(limits.min, limits.max, (_COUNT,), generator=generator, dtype=dtype)
        drawn[:2] = torch.tensor([limits.min, limits.max], dtype=dtype)
        return drawn
    edges = [torch.finfo(dtype).tiny, torch.finfo(dtype).max, -torch.finfo(dtype).max, -0.0]
    signs = torch.randint(2, (_COUNT,), generator=generator) * 2 - 1
    numbers = signs * (0.5 + torch.rand(_COUNT, generator=generator, dtype=torch.float64))
    numbers[: len(edges)] = torch.tensor(edges, dtype=torch.float64)
    return numbers.to(dtype)


def _changed(chip: Chip, numbers: torch.Tensor) -> int | RefusedAttempt:
    def there_and_back() -> int:
        back = numbers.to(chip.device).cpu()
        return int((_bits(back) != _bits(numbers)).sum())

    return attempt(chip, there_and_back)


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.view(BITS[numbers.element_size()]) if numbers.is_floating_point() else numbers


def dtype_word(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
