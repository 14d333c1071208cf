"""Products of matrices as a chip's matrix unit makes them.

The `exact` fidelity is `exact_products.py`. In the `fast` one the sum over K is cut into chunks of 128 terms. A chunk's
sum is computed in float32 by the CPU; the accumulator takes it and is rounded once, as the unit's `final` rounding and
`result_bits` say. So a truncating unit's bias toward zero and its growth with K are there, smaller than on hardware,
which truncates after each block of 4 to 32 terms.

Works on CPU tensors. Letters of shapes: M and N rows and columns of the result, K the reduced dimension, E groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from beringia.chips.arithmetic.exact_products import ExactUnit
from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.profile import Direction, Format, MatrixUnit, Profile, read_profile
from beringia.chips.arithmetic.rounding import floor_beside_, flush_subnormals_, round_fraction_

CHUNK = 128
"""Terms between two roundings of the accumulator."""

_BY_DTYPE: Mapping[torch.dtype, Format] = {
    torch.float64: "float64",
    **{form.dtype: name for name, form in FORMATS.items() if form.dtype != torch.float32},
}
Fidelity = Literal["fast", "exact"]


class Products:
    """`products(a, b)`: float32 accumulators of a @ b, for matrices or batches of matrices of one dtype."""

    def __init__(self, profile: Profile, fidelity: Fidelity = "fast") -> None:
        self._profile = profile
        self._fidelity = fidelity
        self._units: dict[Format, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
        if fidelity == "exact":  # what cannot be computed so is refused now, not in the middle of a run
            self._units = {format_: self._unit(format_) for format_ in profile.units}

    def __call__(self, a: torch.Tensor, b: torch.Tensor, format_: Format | None = None) -> torch.Tensor:
        """a is (..., M, K), b is (..., K, N); the result is float32 (float64 and integers stay what they are).

        `format_` chooses the unit for float32 operands; None: the one that the profile's default switches choose.
        Raises RuntimeError for a dtype that the part's matrix unit does not take.
        """
        if not a.dtype.is_floating_point:
            return a @ b
        if a.dtype != b.dtype:
            raise RuntimeError(f"expected both operands to have the same dtype, but got: {a.dtype} and {b.dtype}")
        if format_ is None:
            format_ = self._profile.float32_products.format if a.dtype == torch.float32 else _BY_DTYPE[a.dtype]
        if format_ not in self._profile.units:
            raise RuntimeError(
                f"{self._profile.part} has no matrix unit for {a.dtype}: it takes {', '.join(self._profile.units)}."
            )
        if format_ not in self._units:
            self._units[format_] = self._unit(format_)
        return self._units[format_](a, b)

    def _unit(self, format_: Format) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        unit = self._profile.units[format_]
        if format_ == "float64":
            return torch.matmul
        prepare = Operand(unit, format_, self._profile.float32_products.input_rounding)
        multiply = ExactUnit(unit, format_) if self._fidelity == "exact" else Chain(unit)
        return lambda a, b: multiply(prepare(a), prepare(b))


class Operand:
    """What the unit takes in: operands as float32 numbers, cut to its format, subnormals flushed where it does so."""

    def __init__(self, unit: MatrixUnit, format_: Format, cut: Direction) -> None:
        self._cut = cut if format_ in ("tfloat32", "hfloat32") else None
        self._bits = FORMATS[format_].fraction_bits
        self._flushes = unit.subnormals_in == "flushed"
        self._smallest_normal = 2.0 ** FORMATS[format_].smallest

    def __call__(self, number: torch.Tensor) -> torch.Tensor:
        exact = number.float()
        if self._cut is None and not self._flushes:
            return exact
        if exact is number:
            exact = number.clone()
        if self._cut is not None:
            round_fraction_(exact, self._bits, self._cut)
        return flush_subnormals_(exact, self._smallest_normal) if self._flushes else exact


class Chain:
    """One unit's chain of accumulations in the fast fidelity."""

    def __init__(self, unit: MatrixUnit) -> None:
        self._unit = unit
        # A float32 addition rounded to nearest is what the CPU does.
        self._as_cpu_adds = unit.final == "nearest-even" and unit.result_bits == 23
        self._floors = unit.accumulator_bits if unit.accumulator_rounding == "floor" else None

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self._unit.scheme == "sequential":
            return self._result(a @ b)
        terms = a.shape[-1]
        total = a[..., :CHUNK] @ b[..., :CHUNK, :]
        if terms > CHUNK or self._unit.result_bits < 23:
            total = self._as_cpu(a, b, total) if self._as_cpu_adds else self._rounded(a, b, total)
        return self._result(total)

    def _as_cpu(self, a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        for start in range(CHUNK, a.shape[-1], CHUNK):
            chunk = a[..., start : start + CHUNK] @ b[..., start : start + CHUNK, :]
            if self._floors:
                floor_beside_(total, chunk, self._floors)
            total += chunk
        return total

    def _rounded(self, a: torch.Tensor, b: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The accumulator lives in float64, where the sum of two float32 numbers loses nothing that is kept."""
        bits, final = self._unit.result_bits, self._unit.final
        total = round_fraction_(first.double(), bits, final)
        for start in range(CHUNK, a.shape[-1], CHUNK):
            chunk = a[..., start : start + CHUNK] @ b[..., start : start + CHUNK, :]
            if self._floors:
                total = floor_beside_(total.float(), chunk, self._floors).double()
            total += chunk
            round_fraction_(total, bits, final)
        return total.float()

    def _result(self, total: torch.Tensor) -> torch.Tensor:
        return flush_subnormals_(total) if self._unit.subnormals_out == "flushed" else total


def grouped(
    products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """Products of groups, as `torch._grouped_mm` has them: rows of a (or its columns and b's rows) cut at `ends`.

    a (M, K) with b (E, K, N): (M, N), rows past the last end are zero; a (M, K) with b (K, N): (E, M, N), groups cut K;
    a (E, M, K) with b (K, N): (M, N), groups cut N; both three-dimensional: a batch.
    """
    if a.dim() == 3 and b.dim() == 3:
        return products(a, b)
    assert ends is not None, "groups of matrices need their ends"
    cuts = [0, *ends.tolist()]
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    if a.dim() == 2 and b.dim() == 3:
        result = a.new_zeros((a.shape[0], b.shape[-1]), dtype=torch.float32)
        for group, (start, end) in enumerate(spans):
            result[start:end] = products(a[start:end], b[group])
        return result
    if a.dim() == 2:
        return torch.stack([products(a[:, start:end], b[start:end]) for start, end in spans])
    return torch.cat([products(a[group], b[:, start:end]) for group, (start, end) in enumerate(spans)], dim=-1)


def matmul(
    a: torch.Tensor, b: torch.Tensor, *, unit: str, fidelity: Fidelity = "exact", format: Format | None = None
) -> torch.Tensor:
    """The float32 accumulator of a @ b on the matrix unit of a profile, e.g. `unit="h100"`.

    a is (..., M, K), b is (..., K, N), CPU tensors of one dtype; `format` (such as "tfloat32") chooses the unit for
    float32 operands. Raises ChipUnavailable for an unknown profile or a unit that cannot be computed exactly here.
    """
    return Products(read_profile(unit), fidelity)(a, b, format)
