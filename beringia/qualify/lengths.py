"""Attention at lengths beyond what was captured: masks and kernels that change past a length are wrong only there.

The chip computes whole sequences, forward and backward; compared are blocks of rows around the lengths at which kernels
are known to change, at the beginning and at the end. The output's gradient is zero in all other rows, so that gradients
of keys and values can be computed in float64 from these rows alone.

Letters: H heads, T queries and keys, R rows compared, D head size, V value head size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from beringia.chips.chip import Chip
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.operators.bounds import TERMS_AT_WORST, TRUNCATION, Bound
from beringia.qualify.operators.check import judge_tensor
from beringia.qualify.operators.float64 import Attention
from beringia.records.certificate import Direction, Measure, OperatorCheck, ProbeResult

LENGTHS = (520, 2056, 8200)
"""A little past 512, 2,048 and 8,192."""
BLOCK = 16
"""Rows in each compared block."""
_HEADS = 2
OPERATOR = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Heads:
    """Sizes of a model's attention heads."""

    width: int
    values: int


@dataclass
class _Pass:
    """What the chip computed, on the CPU."""

    inputs: tuple[torch.Tensor, ...]
    grad: torch.Tensor
    results: dict[str, torch.Tensor]


def probe_lengths(
    chip: Chip,
    dtype: torch.dtype,
    heads: Heads,
    lengths: tuple[int, ...],
    seed: int,
    *,
    begin_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[ProbeResult, OperatorCheck | None]]:
    """One result a length and direction; with a check where it is wrong."""
    for length in lengths:
        began = time.perf_counter()
        begin_step()
        rows = rows_compared(length)
        done = _on_chip(chip, dtype, heads, length, rows, seed)
        yield from _judged(done, rows, length, began)


def rows_compared(length: int) -> torch.Tensor:
    """Indices of the compared rows: blocks at the beginning, around powers of two from 128 on, and at the end."""
    starts = [0, *(2**power - BLOCK // 2 for power in range(7, 16) if 2**power + BLOCK // 2 < length), length - BLOCK]
    blocks = [torch.arange(start, start + BLOCK) for start in starts]
    rows: torch.Tensor = torch.cat(blocks).unique()  # type: ignore[no-untyped-call]  # untyped in torch
    return rows


def _on_chip(chip: Chip, dtype: torch.dtype, heads: Heads, length: int, rows: torch.Tensor, seed: int) -> _Pass:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length)

    def drawn(width: int) -> torch.Tensor:
        return torch.randn(1, _HEADS, length, width, generator=generator).to(dtype)

    inputs = drawn(heads.width), drawn(heads.width), drawn(heads.values)
    grad = torch.zeros(1, _HEADS, length, heads.values, dtype=dtype)
    grad[:, :, rows] = drawn(heads.values)[:, :, rows]
    # Copies: on the CPU the drawn tensors themselves would take part in autograd.
    q, k, v = (tensor.to(chip.device, copy=True).requires_grad_() for tensor in inputs)
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    output.backward(grad.to(chip.device))  # type: ignore[no-untyped-call]  # untyped in torch
    assert q.grad is not None and k.grad is not None and v.grad is not None
    results = {"output": output, "query.gradient": q.grad, "key.gradient": k.grad, "value.gradient": v.grad}
    return _Pass(inputs, grad, {name: tensor.detach().cpu() for name, tensor in results.items()})


def _judged(
    done: _Pass, rows: torch.Tensor, length: int, began: float
) -> Iterator[tuple[ProbeResult, OperatorCheck | None]]:
    q, k, v = (tensor.double() for tensor in done.inputs)
    hidden = torch.arange(length) > rows.unsqueeze(-1)
    bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -torch.inf)
    scale = q.shape[-1] ** -0.5
    attention = Attention(q[:, :, rows], k, v, k.shape[1], bias, False, scale, done.grad[:, :, rows].double())
    dtype = done.inputs[0].dtype
    storing, computing = 2.0 * UNIT_ROUNDOFF[dtype], TERMS_AT_WORST * TRUNCATION * UNIT_ROUNDOFF[torch.float32]
    bound = Bound([], "two products and a softmax, weights stored between them", length, True)
    forward = replace(attention, grad_BHTV=None)
    yield _result(
        "forward",
        length,
        [
            (
                "output",
                done.results["output"][:, :, rows],
                forward.forward()[0],
                forward.forward_allowed(storing, computing)[0],
                forward.stored(dtype)[0],
            )
        ],
        bound,
        rows,
        began,
    )
    names = ("query.gradient", "key.gradient", "value.gradient")
    found = [done.results[name] for name in names]
    found[0] = found[0][:, :, rows]
    parts = zip(
        names,
        found,
        attention.gradients(),
        attention.gradients_allowed(storing, computing),
        attention.stored(dtype),
        strict=True,
    )
    yield _result("backward", length, list(parts), bound, rows, began)


_Part = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Name, the chip's result, float64's, what is allowed, float64's with the weights stored."""


@dataclass(frozen=True)
class _Compared:
    """One result of attention beside float64's."""

    name: str
    measures: tuple[Measure, ...]
    place: tuple[int, ...]
    """Of the worst element, by its position in the sequence."""
    found: float | None
    expected: float | None
    error: float | None
    share: float
    """Of wrong elements."""

    @property
    def used(self) -> float:
        return max(measure.used for measure in self.measures)


def _compared(part: _Part, bound: Bound, rows: torch.Tensor) -> _Compared:
    name, found, exact, allowed, stored = part
    judged = judge_tensor(found, exact, allowed, bound, stored)
    assert judged is not None
    measures, worst, error = judged
    assert worst is not None
    place = worst.element
    if name in ("output", "query.gradient"):
        place = (*place[:2], int(rows[place[2]]), place[3])
    finite = error if error is not None and math.isfinite(error) else None
    return _Compared(name, measures, place, worst.found, worst.expected, finite, worst.share)


def _result(
    direction: Direction, length: int, parts: list[_Part], bound: Bound, rows: torch.Tensor, began: float
) -> tuple[ProbeResult, OperatorCheck | None]:
    worst = max((_compared(part, bound, rows) for part in parts), key=lambda compared: compared.used)
    wrong = worst.used > 1.0
    where = f"wrong at position {worst.place[2]}" if wrong else "as in float64"
    result = ProbeResult(
        probe="lengths",
        subject=f"attention over {length} tokens, {direction}",
        outcome="failed" if wrong else "passed",
        rules_out="infer" if direction == "forward" else "train",
        summary=f"attention over {length} tokens, {direction}: {worst.name} is {where}",
        measures=worst.measures,
        seconds=time.perf_counter() - began,
    )
    return result, _check(direction, length, worst) if wrong else None


def _check(direction: Direction, length: int, worst: _Compared) -> OperatorCheck:
    """So that it can be the first wrong operator. Only some rows were compared: where the wrong ones begin and end is
    not known, but that the worst is one of them."""
    return OperatorCheck(
        module=f"attention over {length} tokens",
        operator=OPERATOR,
        direction=direction,
        ordinal=0,
        position=0,
        shapes=(),
        dtype="",
        basis="two products and a softmax, weights stored between them",
        error=worst.error,
        measures=worst.measures,
        worst_element=worst.place,
        found=worst.found,
        expected=worst.expected,
        wrong_share=worst.share,
        wrong_from=worst.place,
        wrong_to=worst.place,
    )
