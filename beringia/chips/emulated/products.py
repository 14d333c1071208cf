"""Products of matrices as a chip's matrix unit makes them, in the `fast` fidelity.

The sum over K is cut into chunks of 128 terms. A chunk's sum is computed in float32 by the CPU; the accumulator takes
it and is rounded once, as the unit's `final` rounding and `result_bits` say. So a truncating unit's bias toward zero
and its growth with K are there, smaller than on hardware, which truncates after each block of 4 to 32 terms.

Works on CPU tensors. Letters of shapes: M and N rows and columns of the result, K the reduced dimension, E groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from beringia.chips.emulated.profile import Direction, Format, MatrixUnit, Profile
from beringia.chips.emulated.rounding import floor_below, flush_subnormals_, round_fraction_

CHUNK = 128
"""Terms between two roundings of the accumulator."""

_FORMATS: Mapping[torch.dtype, Format] = {
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
    torch.float8_e5m2: "float8_e5m2",
}
_SMALLEST_NORMAL: Mapping[str, float] = {
    "float32": 2.0**-126,
    "tfloat32": 2.0**-126,
    "hfloat32": 2.0**-126,
    "bfloat16": 2.0**-126,
    "float16": 2.0**-14,
    "float8_e4m3": 2.0**-6,
    "float8_e4m3fnuz": 2.0**-7,
    "float8_e5m2": 2.0**-14,
}
_SHORT_FLOAT32_BITS = 10
"""Fraction bits of tfloat32 and hfloat32."""


class Products:
    """`products(a, b)`: float32 accumulators of a @ b, for matrices or batches of matrices of one dtype."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._chains: dict[torch.dtype, Chain] = {}

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a is (..., M, K), b is (..., K, N); the result is float32 (float64 and integers stay what they are).

        Raises RuntimeError for a dtype that the part's matrix unit does not take.
        """
        if not a.dtype.is_floating_point:
            return a @ b
        if a.dtype != b.dtype:
            raise RuntimeError(f"expected both operands to have the same dtype, but got: {a.dtype} and {b.dtype}")
        chain = self._chains.get(a.dtype)
        if chain is None:
            chain = self._chains[a.dtype] = self._chain(a.dtype)
        return chain(a, b)

    def _chain(self, dtype: torch.dtype) -> Chain:
        is_float32 = dtype == torch.float32
        format_: Format = self._profile.float32_products.format if is_float32 else _FORMATS[dtype]
        unit = self._profile.units.get(format_)
        if unit is None:
            raise RuntimeError(
                f"{self._profile.part} has no matrix unit for {dtype}: it takes {', '.join(self._profile.units)}."
            )
        cut = self._profile.float32_products.input_rounding if format_ in ("tfloat32", "hfloat32") else None
        return Chain(unit, _SMALLEST_NORMAL.get(format_, 0.0), cut, in_float64=dtype == torch.float64)


class Chain:
    """One unit's chain of accumulations in the fast fidelity."""

    def __init__(
        self, unit: MatrixUnit, smallest_normal: float, cut: Direction | None = None, *, in_float64: bool = False
    ) -> None:
        self._unit = unit
        self._smallest_normal = smallest_normal
        self._cut = cut
        self._in_float64 = in_float64
        # A float32 addition rounded to nearest is what the CPU does.
        self._as_cpu_adds = unit.final == "nearest-even" and unit.result_bits == 23
        self._floors = unit.accumulator_rounding == "floor" and unit.accumulator_bits is not None

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self._in_float64:
            return a @ b
        a, b = self._operand(a), self._operand(b)
        if self._unit.scheme == "sequential":
            return self._result(a @ b)
        terms = a.shape[-1]
        total = a[..., :CHUNK] @ b[..., :CHUNK, :]
        if terms > CHUNK or self._unit.result_bits < 23:
            total = self._as_cpu(a, b, total) if self._as_cpu_adds and not self._floors else self._rounded(a, b, total)
        return self._result(total)

    def _as_cpu(self, a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        for start in range(CHUNK, a.shape[-1], CHUNK):
            total += a[..., start : start + CHUNK] @ b[..., start : start + CHUNK, :]
        return total

    def _rounded(self, a: torch.Tensor, b: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The accumulator lives in float64, where the sum of two float32 numbers loses nothing that is kept."""
        bits, final = self._unit.result_bits, self._unit.final
        total = round_fraction_(first.double(), bits, final)
        for start in range(CHUNK, a.shape[-1], CHUNK):
            chunk = a[..., start : start + CHUNK] @ b[..., start : start + CHUNK, :]
            if self._floors:
                total = self._floored(total, chunk)
            total += chunk
            round_fraction_(total, bits, final)
        return total.float()

    def _floored(self, total: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        assert self._unit.accumulator_bits is not None
        largest = torch.maximum(total.abs(), chunk.abs().double())
        return floor_below(total, torch.frexp(largest).exponent - 1, self._unit.accumulator_bits)

    def _operand(self, number: torch.Tensor) -> torch.Tensor:
        exact = number.float()
        if self._cut is None and self._unit.subnormals_in == "kept":
            return exact
        if exact is number:
            exact = number.clone()
        if self._cut is not None:
            round_fraction_(exact, _SHORT_FLOAT32_BITS, self._cut)
        if self._unit.subnormals_in == "flushed":
            flush_subnormals_(exact, self._smallest_normal)
        return exact

    def _result(self, total: torch.Tensor) -> torch.Tensor:
        return flush_subnormals_(total) if self._unit.subnormals_out == "flushed" else total


def grouped(products: Products, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None) -> torch.Tensor:
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


def scale_for(size: int, scale: float | None) -> float:
    """Attention's factor: 1/sqrt(head size) where none is given."""
    return size**-0.5 if scale is None else scale
