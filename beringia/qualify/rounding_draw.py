"""What rounding may do to a model on a sound chip, drawn at random: the noise floor of qualification.

A draw changes what goes into exact arithmetic, on the CPU, so it is the same on every machine.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.operators.float64 import to_wide
from beringia.qualify.operators.watch import in_backward
from beringia.qualify.sketches import generator_of

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Another parameter for each, by name."""


@dataclass(frozen=True)
class RoundingDraw:
    """One draw of what rounding may do to a model on a sound chip, as changes of what goes into exact arithmetic.

    Weights move by up to a unit in the last place of `dtype`; where `dtype` has the accumulator's precision, by as much
    more as it costs to add a row's products up, products in the backward pass likewise, and elementary functions as
    their makers say. Drawn on the CPU.
    """

    seed: int
    dtype: torch.dtype

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter, moved; whole numbers and truth values are not rounded."""
        if not (weight.is_floating_point() or weight.is_complex()):
            return weight
        # A unit in the last place is two roundoffs.
        largest = 2.0 * UNIT_ROUNDOFF[self.dtype] * _adding_up(weight, self.dtype)
        return (to_wide(weight) * (1.0 + largest * self._drawn(name, weight.shape))).to(weight.dtype)

    def moving_results(self) -> AbstractContextManager[object]:
        """Inside, products and sums of the backward pass are off by what adding them up costs, and elementary functions
        by what their makers say. In 16-bit dtypes that is nothing beside the roundings of results."""
        rounds_to_less = UNIT_ROUNDOFF[self.dtype] > UNIT_ROUNDOFF[_accumulator(self.dtype)]
        return nullcontext() if rounds_to_less else _MovedResults(self)

    def added_up(self, name: str, result: torch.Tensor, squares: torch.Tensor, terms: int) -> torch.Tensor:
        """Sums of so many terms, given the sums of their squares, moved by the error of a sum of random signs: that of
        `_adding_up`, of the size of the terms and not of their sum. Where they nearly cancel, as a trained model's
        gradients do over the rows of a batch, that is most of a gradient's error."""
        largest = math.sqrt(3.0) * UNIT_ROUNDOFF[_accumulator(self.dtype)] * math.sqrt(terms / 6.0)
        return result + largest * self._drawn(name, result.shape).to(result.device, result.dtype) * squares.sqrt()

    def elementary(self, name: str, result: torch.Tensor) -> torch.Tensor:
        """A result of elementary functions, moved by up to `DOCUMENTED_ULPS`."""
        largest = DOCUMENTED_ULPS * 2.0 * UNIT_ROUNDOFF[self.dtype]
        return result * (1.0 + largest * self._drawn(name, result.shape).to(result.device, result.dtype))

    def _drawn(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        draw = torch.empty(tuple(shape), dtype=torch.float64)
        return draw.uniform_(-1.0, 1.0, generator=generator_of(f"{self.seed}/{name}"))


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_SUM = torch.ops.aten.sum.dim_IntList
_ELEMENTARY = re.compile(r"exp2?|expm1|log(2|10|1p)?|rsqrt|erfc?|.*(tanh|sigmoid|silu|gelu|softmax).*")
"""Operators that are made of elementary functions, forward and backward, by their whole name."""
DOCUMENTED_ULPS = 4.0
"""The most that any maker documents for float32 (`operators/bounds.py`)."""


class _MovedResults(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook is untyped
    """Inside, a draw moves the products and sums of the backward pass, and what elementary functions give."""

    def __init__(self, draw: RoundingDraw) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._draw = draw
        self._calls = itertools.count()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if in_backward() and func in (*_PRODUCTS, _SUM) and result.dtype == self._draw.dtype:
            return self._added_up(func, result, args)
        if not _ELEMENTARY.fullmatch(func.overloadpacket.__name__):
            return result
        if not isinstance(result, tuple):
            return self._moved(result)
        # What a forward pass hands on to the backward pass beside its result has roundings of its own.
        own = len(result) if in_backward() else 1
        return (*map(self._moved, result[:own]), *result[own:])

    def _added_up(self, func: OpOverload, result: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        name = f"sum {next(self._calls)}"
        if func is not _SUM:
            one, other = args
            return self._draw.added_up(name, result, one.square() @ other.square(), one.shape[-1])
        squares = _SUM(args[0].square(), *args[1:])
        return self._draw.added_up(name, result, squares, args[0].numel() // max(1, result.numel()))

    def _moved(self, result: Any) -> Any:
        """Of a tensor in the draw's dtype; all else as it is."""
        if not isinstance(result, torch.Tensor) or result.dtype != self._draw.dtype or result.device.type == "meta":
            return result
        return self._draw.elementary(f"elementary {next(self._calls)}", result)


def _adding_up(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """How much larger the error of a product is with the roundings of its sum than without.

    One term after another, rounded to nearest, K terms of random sign are off by u sqrt(K / 6) in root mean square,
    relative to their sum (roundings of u / sqrt(3) of partial sums that grow as sqrt(k); Higham and Mary 2019). A sound
    chip may add so. Weights that move by up to 2 u cost 2 u / sqrt(3). In 16-bit dtypes this is 1.
    """
    if weight.dim() < 2:
        return 1.0
    summed = UNIT_ROUNDOFF[_accumulator(dtype)] * math.sqrt(weight.shape[-1] / 6.0)
    return math.hypot(1.0, summed / (2.0 * UNIT_ROUNDOFF[dtype] / math.sqrt(3.0)))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """In which sums of products are made."""
    return torch.float64 if dtype == torch.float64 else torch.float32
