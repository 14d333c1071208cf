"""Sums of products that are chosen term by term, made on a chip.

A term is a product of two operands of the format. A case is a list of terms by place in the sum; all cases of a
question go into one product of matrices, whose shape is always the same, so that a library takes the same kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from beringia.chips.arithmetic.formats import OperandFormat

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""a (M, K) times b (K, N) on the chip, from CPU tensors of the format's dtype to a float32 CPU tensor (M, N)."""

LENGTH = 64
"""Terms of every sum: at least two blocks of the longest unit known (32 terms)."""
CASES = 64
"""Rows and columns of every product."""


@dataclass(frozen=True)
class Term:
    """`left * right * 2**exponent`, of an operand with each significand (1 or 1.5: every format has them)."""

    left: float
    exponent: int
    right: float = 1.0
    left_exponent: int | None = None
    """How much of the exponent the first operand has; None: about half."""


Case = Mapping[int, Term]
"""Terms by place; other places are zero."""


class Sums:
    """`sums(cases)`: the float32 result of each case on the chip."""

    def __init__(self, multiply: Multiply, format_: OperandFormat) -> None:
        self._multiply = multiply
        self.format = format_

    def __call__(self, cases: Sequence[Case]) -> list[float]:
        """One number a case, at most CASES of them."""
        assert len(cases) <= CASES
        a_MK, b_KN = torch.zeros(CASES, LENGTH, dtype=torch.float64), torch.zeros(LENGTH, CASES, dtype=torch.float64)
        for number, case in enumerate(cases):
            for place, term in case.items():
                a_MK[number, place], b_KN[place, number] = self._operands(term)
        operands = [operand.to(self.format.dtype) for operand in (a_MK, b_KN)]
        assert all(torch.equal(narrow.double(), wide) for narrow, wide in zip(operands, (a_MK, b_KN), strict=True))
        return self._multiply(*operands).diagonal()[: len(cases)].tolist()

    def _operands(self, term: Term) -> tuple[float, float]:
        """Two numbers of the format whose product is the term: normal ones where its exponent allows."""
        first = term.left_exponent
        if first is None:
            form = self.format
            subnormal = form.smallest - form.fraction_bits
            first = min(max(term.exponent // 2, form.smallest), term.exponent - subnormal, form.largest)
        return term.left * 2.0**first, term.right * 2.0 ** (term.exponent - first)
