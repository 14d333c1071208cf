"""Is a * b + c rounded once or twice: in one elementwise kernel, in two, and in the matrix unit. Told, not judged.

With h half of a format's p significant bits, rounded up, a = 1 + 2^-h has a square of 1 + 2^(1-h) + 2^-2h whose last
term lies beyond the format: what is left beside c = -(1 + 2^(1-h)) is 2^-2h where the product keeps all its bits until
it is added, and 0 where it was rounded first (the term is at most half of the last place, and a tie goes to even).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from beringia.chips.chip import Chip
from beringia.qualify.attempts import RefusedAttempt, attempt
from beringia.records.certificate import ProbeResult

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COUNT = 1027
"""Elements: the vectors of a kernel's body, and what is left for its tail."""
_LENGTH = 64
"""Terms of the products: two, the others zero."""


def probe_multiply_add(chip: Chip) -> list[ProbeResult]:
    """One finding for each way."""
    dtypes = [dtype for dtype in _DTYPES if dtype in chip.capabilities.dtypes]
    ways: dict[str, Callable[[Chip, torch.dtype], torch.Tensor]] = {
        "addcmul": _addcmul,
        "multiplication, then addition": _two_operators,
        "matrix unit": _matrix_unit,
    }
    return [_told(chip, subject, way, dtypes) for subject, way in ways.items()]


def numbers_for(dtype: torch.dtype) -> tuple[float, float, float]:
    """a, c, and what is left of a * a + c if the product is not rounded."""
    half = -(-significant_bits(dtype) // 2)
    return 1 + 2.0**-half, -(1 + 2.0 ** (1 - half)), 2.0 ** (-2 * half)


def significant_bits(dtype: torch.dtype) -> int:
    """With the leading one: 24 for float32."""
    return 1 - int(torch.tensor(torch.finfo(dtype).eps, dtype=torch.float64).log2())


def _addcmul(chip: Chip, dtype: torch.dtype) -> torch.Tensor:
    a, c = _vectors(chip, dtype)
    return torch.addcmul(c, a, a)


def _two_operators(chip: Chip, dtype: torch.dtype) -> torch.Tensor:
    a, c = _vectors(chip, dtype)
    return a * a + c


def _vectors(chip: Chip, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    a, c, _ = numbers_for(dtype)
    return tuple(torch.full((_COUNT,), number, dtype=dtype).to(chip.device) for number in (a, c))  # type: ignore[return-value]


def _matrix_unit(chip: Chip, dtype: torch.dtype) -> torch.Tensor:
    """c * 1 + a * a in every element."""
    a, c, _ = numbers_for(dtype)
    left_MK, right_KN = torch.zeros(_LENGTH, _LENGTH, dtype=dtype), torch.zeros(_LENGTH, _LENGTH, dtype=dtype)
    left_MK[:, 0], left_MK[:, 1] = c, a
    right_KN[0], right_KN[1] = 1.0, a
    return torch.mm(left_MK.to(chip.device), right_KN.to(chip.device))


def rounding_of(found: torch.Tensor, dtype: torch.dtype) -> str:
    """`rounded once`, `the product rounded first`, or what else was seen."""
    _, _, left = numbers_for(dtype)
    values = set(found.double().flatten().tolist())
    known = {frozenset({left}): "rounded once", frozenset({0.0}): "the product rounded first"}
    if frozenset(values) in known:
        return known[frozenset(values)]
    if values == {0.0, left}:
        return "rounded once in some elements and twice in others"
    return f"neither ({', '.join(f'{value:.3g}' for value in sorted(values)[:3])})"


def _told(
    chip: Chip, subject: str, way: Callable[[Chip, torch.dtype], torch.Tensor], dtypes: list[torch.dtype]
) -> ProbeResult:
    began, parts = time.perf_counter(), []
    for dtype in dtypes:
        found = attempt(chip, lambda dtype=dtype: way(chip, dtype).cpu())  # type: ignore[misc]  # bound at once
        says = f"refused ({found.reason})" if isinstance(found, RefusedAttempt) else rounding_of(found, dtype)
        parts.append(f"{str(dtype).removeprefix('torch.')}: {says}")
    return ProbeResult(
        probe="arithmetic",
        subject=f"multiply and add: {subject}",
        outcome="told",
        summary=f"{'; '.join(parts)}.",
        seconds=time.perf_counter() - began,
    )
