"""Products of matrices bit for bit as published models of matrix units make them: the `exact` fidelity.

The arithmetic is in `exact.c`, compiled when it is first needed. Here operands are laid out for it and work is spread
over threads. Models: MMA-Sim (arXiv 2511.10909) and "Accurate Models of NVIDIA Tensor Cores" (arXiv 2512.07004); what a
unit's numbers are and where they come from stands in its profile.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional as F

from beringia.chips.arithmetic.formats import FORMATS
from beringia.chips.arithmetic.profile import Format, MatrixUnit
from beringia.errors import ChipUnavailable
from beringia.machine.c_library import NotCompiled, compile_c

LANES = 64
"""Columns that the compiled loops take at once."""
_LARGEST_SUM_BITS = 51
"""Sums below 2**51 in units of their last kept bit: float64, which they are rounded from, holds those exactly."""
_SCHEMES = ("block", "halves", "pairwise", "sequential")
_DIRECTIONS = ("truncate", "floor", "nearest-even", "half-away")
_NO_EXPONENT = -100000
"""`NO_EXPONENT` of exact.c."""


class _Unit(ctypes.Structure):
    """`unit_t` of exact.c."""

    _fields_: ClassVar = [
        (name, ctypes.c_int64)
        for name in (
            *("scheme", "block", "fraction_bits", "alignment", "sum_bits", "sum_rounding"),
            *("accumulator_bits", "accumulator_rounding", "result_bits", "final", "flushes_out", "infinite_products"),
            *("operand_bits", "zero_exponent"),
        )
    ]


class _Operand(ctypes.Structure):
    """`operand_t` of exact.c: addresses of float32 numbers, int32 significands and int32 exponents."""

    _fields_: ClassVar = [(name, ctypes.c_void_p) for name in ("number", "significand", "exponent")]


class ExactUnit:
    """One matrix unit: `unit(a, b)` is the float32 accumulator of a @ b."""

    def __init__(self, unit: MatrixUnit, format_: Format) -> None:
        """Raises ChipUnavailable for a unit that cannot be computed exactly here, or without a C compiler."""
        _refuse_wide(unit, format_)
        self._library = _library()
        self._format = FORMATS[format_]
        self._flushes_in = unit.subnormals_in == "flushed"
        fraction_bits = unit.fraction_bits or 0
        self._unit = _Unit(
            scheme=_SCHEMES.index(unit.scheme),
            block=unit.block,
            fraction_bits=fraction_bits,
            alignment=_DIRECTIONS.index(unit.alignment),
            sum_bits=fraction_bits if unit.sum_bits is None else unit.sum_bits,
            sum_rounding=_DIRECTIONS.index(unit.sum_rounding),
            accumulator_bits=-1 if unit.accumulator_bits is None else unit.accumulator_bits,
            accumulator_rounding=_DIRECTIONS.index(unit.accumulator_rounding),
            result_bits=unit.result_bits,
            final=_DIRECTIONS.index(unit.final),
            flushes_out=unit.subnormals_out == "flushed",
            infinite_products=unit.large_products == "infinite",
            operand_bits=self._format.fraction_bits,
            zero_exponent=_NO_EXPONENT if unit.zero_exponent is None else unit.zero_exponent,
        )

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (..., M, K), b (..., K, N), float32 tensors of numbers of the unit's format; returns (..., M, N)."""
        if a.numel() == 0 or b.numel() == 0:
            return a @ b
        rows, columns = a.shape[-2], b.shape[-1]
        # A product does not care which operand is left: the wider side fills the lanes.
        if rows * _padded(columns) > columns * _padded(rows):
            return self._multiply(b.mT, a.mT).mT.contiguous()
        return self._multiply(a, b)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        (rows, terms), columns = a.shape[-2:], b.shape[-1]
        padded = _padded(columns)
        a_XMK = self._decoded(a.expand(*batch, rows, terms).reshape(-1, rows, terms))
        b_XKN = self._decoded(F.pad(b, (0, padded - columns)).expand(*batch, terms, padded).reshape(-1, terms, padded))
        c_XMN = torch.zeros(a_XMK[0].shape[0], rows, padded)

        def work(place: int, first: int, last: int) -> None:
            self._library.multiply(
                ctypes.byref(self._unit),
                *(first, last, terms, padded),
                ctypes.byref(_Operand(*(part[place].data_ptr() for part in a_XMK))),
                ctypes.byref(_Operand(*(part[place].data_ptr() for part in b_XKN))),
                ctypes.c_void_p(c_XMN[place].data_ptr()),
            )

        _share_out(work, len(c_XMN), rows, cost=terms * padded)
        return c_XMN[..., :columns].reshape(*batch, rows, columns)

    def _decoded(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        numbers = numbers.contiguous()
        if self._flushes_in:
            numbers = numbers + 0.0  # flushed operands are +0, also negative ones
        significands, exponents = (torch.empty(numbers.shape, dtype=torch.int32) for _ in range(2))
        address, *results = (ctypes.c_void_p(part.data_ptr()) for part in (numbers, significands, exponents))
        form = self._format
        self._library.decode(address, numbers.numel(), form.fraction_bits, form.smallest, *results)
        return numbers, significands, exponents


_SMALLEST_SHARE = 2**18
"""Multiply-adds below which another thread costs more than it saves: about a millisecond's."""


def _share_out(work: Callable[[int, int, int], None], batches: int, rows: int, *, cost: int) -> None:
    """Call `work(batch, first row, last row)` for everything, on as many threads as torch has."""
    threads = min(torch.get_num_threads(), 1 + batches * rows * cost // _SMALLEST_SHARE)
    if threads == 1:
        for batch in range(batches):
            work(batch, 0, rows)
        return
    pieces = -(-threads * 2 // batches)  # two a thread, so that a slow core holds nobody up for long
    size = max(1, -(-rows // pieces))
    jobs = [(batch, first, min(first + size, rows)) for batch in range(batches) for first in range(0, rows, size)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda job: work(*job), jobs):
            pass


def _padded(columns: int) -> int:
    return -(-columns // LANES) * LANES


def _refuse_wide(unit: MatrixUnit, format_: Format) -> None:
    if unit.scheme == "sequential":
        return
    if unit.scheme == "pairwise":
        if unit.block & (unit.block - 1) or unit.block > 32:
            raise ChipUnavailable(
                f"A tree of {unit.block} terms was asked for in {format_}; "
                "the exact fidelity adds powers of two up to 32."
            )
        return
    widest = max(unit.fraction_bits or 0, unit.sum_bits or 0, unit.accumulator_bits or 0)
    needed = widest + 2 + (unit.block + 1).bit_length()  # significands of products are below 4
    if unit.fraction_bits is None or needed > _LARGEST_SUM_BITS:
        found = "has no fraction_bits, so it loses none" if unit.fraction_bits is None else f"needs {needed}"
        raise ChipUnavailable(
            f"The exact fidelity was asked for, which holds sums of up to {_LARGEST_SUM_BITS} bits; the profile's unit "
            f"for {format_} {found}. Use the fast fidelity."
        )


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        # Contracted multiply-adds would round less often than the unit does.
        library = compile_c(Path(__file__).with_name("exact.c").read_text(), "-ffp-contract=off")
    except NotCompiled as reason:
        raise ChipUnavailable(f"The exact fidelity is compiled C, and {reason}. Install gcc, or use `fast`.") from None
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    library.decode.argtypes = [pointer, int64, int64, int64, pointer, pointer]
    library.multiply.argtypes = [pointer, int64, int64, int64, int64, pointer, pointer, pointer]
    library.decode.restype = library.multiply.restype = None
    return library
