"""Faults of arithmetic: casts, accumulators, numbers too large or too small, elementary functions.

Letters: M, K, N as in products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.arithmetic.rounding import flush_subnormals_, round_fraction_
from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated.attention import Attention, plain_cast, wide
from beringia.chips.emulated.device import Kernel
from beringia.chips.emulated.kernels import CAST_BITS, product_kernels
from beringia.chips.emulated.planted import FIRST_FACTOR, PRODUCTS, Host, WrongResult, belongs_to, main_results

aten = torch.ops.aten


class WrongCast(WrongResult):
    """See `script.WrongCast`."""

    fault: script.WrongCast
    # Operator -> position of what is converted.
    _SOURCES = {aten._to_copy.default: 0, aten.copy_.default: 1}

    def matches(self, func: OpOverload) -> bool:
        return func in self._SOURCES

    def applies(self, numbers: list[torch.Tensor], func: OpOverload, args: tuple[Any, ...]) -> bool:
        return numbers[0].dtype in CAST_BITS and args[self._SOURCES[func]].dtype == torch.float32

    def instead_of(
        self, numbers: list[torch.Tensor], func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        source, dtype = args[self._SOURCES[func]].expand(numbers[0].shape), numbers[0].dtype
        if self.fault.rounding == "scaled":
            return [(source * (1.0 + self.fault.strength)).to(dtype)]
        return [round_fraction_(source.clone(), CAST_BITS[dtype], self.fault.rounding).to(dtype)]


class ShortAccumulator(WrongResult):
    """See `script.ShortAccumulator`."""

    fault: script.ShortAccumulator

    def __init__(self, fault: script.ShortAccumulator, position: int, device: Host) -> None:
        super().__init__(fault, position, device)
        self._kernels = {func: k for func, k in product_kernels(self._product, plain_cast).items() if func in PRODUCTS}
        if fault.attention:
            self._kernels |= Attention(self._product, torch.exp).kernels()

    def matches(self, func: OpOverload) -> bool:
        return func in self._kernels

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        compared = super().interpose(func, kernel)
        if func not in PRODUCTS or self.position > 0:  # faults before this one strike the sound product
            return compared
        first, short = FIRST_FACTOR.get(func, 0), self._kernels[func]

        def compute(*args: Any, **kwargs: Any) -> Any:
            if not self.present or self.is_awaited() or not args[first].is_floating_point():
                return compared(*args, **kwargs)
            # A sound product beside this one would only tell whether they differ, and nobody asks.
            return short(*args, **kwargs) if self.strikes_here() else kernel(*args, **kwargs)

        return compute

    def instead_of(
        self, numbers: list[torch.Tensor], func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        return main_results(func, self._kernels[func](*args, **kwargs))

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (..., M, K) @ b (..., K, N)."""
        a, b, terms = wide(a), wide(b), self.fault.terms
        total = a[..., :terms] @ b[..., :terms, :]
        round_fraction_(total, self.fault.bits, "truncate")
        for start in range(terms, a.shape[-1], terms):
            total += a[..., start : start + terms] @ b[..., start : start + terms, :]
            round_fraction_(total, self.fault.bits, "truncate")
        return total


class Saturate(WrongResult):
    """See `script.Saturate`."""

    fault: script.Saturate

    def matches(self, func: OpOverload) -> bool:
        return belongs_to(func, self.fault.operator)

    def wrong(self, result: torch.Tensor) -> torch.Tensor:
        return result.clamp(-self.fault.limit, self.fault.limit)


class Flush(WrongResult):
    """See `script.Flush`."""

    fault: script.Flush

    def matches(self, func: OpOverload) -> bool:
        return belongs_to(func, self.fault.operator)

    def wrong(self, result: torch.Tensor) -> torch.Tensor:
        return flush_subnormals_(result.clone(), self.fault.threshold)


class WrongFunction(WrongResult):
    """See `script.WrongFunction`."""

    fault: script.WrongFunction

    def matches(self, func: OpOverload) -> bool:
        return belongs_to(func, self.fault.operator)

    def wrong(self, result: torch.Tensor) -> torch.Tensor:
        wrong = result * (1.0 + self.fault.strength)
        if self.fault.beyond is not None:
            wrong = torch.where(result.abs() > self.fault.beyond, wrong, result)
        return _with_first_rows_of(result, wrong, self.fault.length)


def _with_first_rows_of(right: torch.Tensor, wrong: torch.Tensor, length: int) -> torch.Tensor:
    """Rows (the last dimension but one; a vector's elements) before `length` are right; a single number is row 0."""
    if right.dim() == 0:
        return right if length > 0 else wrong
    dim = max(right.dim() - 2, 0)
    count = min(length, right.shape[dim])
    wrong.narrow(dim, 0, count).copy_(right.narrow(dim, 0, count))
    return wrong
