"""Attention at lengths beyond what was captured: masks and kernels that change past a length are wrong only there.

The chip computes whole sequences, forward and backward; compared are blocks of rows around the lengths at which kernels
are known to change, at the beginning and at the end. The output's gradient is zero in all other rows, so that gradients
of keys and values can be computed in float64 from these rows alone.

What is beyond the bounds of an operator call is told; what rules a use out is the effect, as everywhere: the distance
from float64 over that of float64 with operands moved as rounding may move them, block by block.

Letters: H heads, T queries and keys, R rows compared, D head size, V value head size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from beringia.chips.chip import Chip
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.effects import EFFECT_ALLOWED
from beringia.qualify.operators.bounds import TERMS_AT_WORST, TRUNCATION, Bound
from beringia.qualify.operators.check import judge_tensor
from beringia.qualify.operators.float64 import Attention
from beringia.qualify.refusals import REFUSALS, raised_words
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.records.certificate import NOISE_FLOORS, Direction, Measure, OperatorCheck, ProbeResult, Use

LENGTHS = (520, 2056, 8200)
"""A little past 512, 2,048 and 8,192."""
BLOCK = 16
"""Rows in each compared block."""
_HEADS = 2
_DRAWS = 2
"""Of moved operands: a block has hundreds of numbers."""
_NOTHING = 1e-300
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
    """Of the backward pass none where it raised something, of the forward pass, too, where that did."""
    raised: str = ""
    """What, for a sentence that begins with the chip."""


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
    results: dict[str, torch.Tensor] = {}
    try:
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        results["output"] = output.detach().cpu()
        output.backward(grad.to(chip.device))  # type: ignore[no-untyped-call]  # untyped in torch
        assert q.grad is not None and k.grad is not None and v.grad is not None
        gradients = {"query.gradient": q.grad, "key.gradient": k.grad, "value.gradient": v.grad}
        results |= {name: tensor.detach().cpu() for name, tensor in gradients.items()}
    except REFUSALS as error:  # the chip's own call, alone: a finding
        if chip.classify(error) is not None:
            raise
        return _Pass(inputs, grad, results, raised_words(chip, error))
    return _Pass(inputs, grad, results)


def _judged(
    done: _Pass, rows: torch.Tensor, length: int, began: float
) -> Iterator[tuple[ProbeResult, OperatorCheck | None]]:
    dtype = done.inputs[0].dtype
    attention = _attention(done, rows, length)
    floors = _floors(done, rows, length)
    storing, computing = 2.0 * UNIT_ROUNDOFF[dtype], TERMS_AT_WORST * TRUNCATION * UNIT_ROUNDOFF[torch.float32]
    bound = Bound([], "two products and a softmax, weights stored between them", length, True)
    forward = replace(attention, grad_BHTV=None)
    parts: dict[Direction, Iterable[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]] = {
        "forward": zip(
            ("output",),
            forward.forward()[:1],
            forward.forward_allowed(storing, computing)[:1],
            forward.stored(dtype)[:1],
            strict=True,
        ),
        "backward": zip(
            ("query.gradient", "key.gradient", "value.gradient"),
            attention.gradients(),
            attention.gradients_allowed(storing, computing),
            attention.stored(dtype),
            strict=True,
        ),
    }
    for direction, named in parts.items():
        if ("output" if direction == "forward" else "query.gradient") not in done.results:
            yield _raised(direction, length, done.raised, began), None
            return
        made = [
            _Part(name, _rows_of(name, done.results[name], rows), exact, floors[name], allowed, stored)
            for name, exact, allowed, stored in named
        ]
        yield _result(direction, length, made, bound, rows, began)


def _raised(direction: Direction, length: int, what: str, began: float) -> ProbeResult:
    subject = f"attention over {length} tokens, {direction}"
    return ProbeResult(
        probe="lengths",
        subject=subject,
        outcome="failed",
        rules_out=_use(direction),
        summary=f"{subject}: the chip {what}",
        seconds=time.perf_counter() - began,
    )


def _use(direction: Direction) -> Use:
    return "infer" if direction == "forward" else "train"


def _rows_of(name: str, result: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return result[:, :, rows] if name in ("output", "query.gradient") else result


def _floors(done: _Pass, rows: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
    """Squares of what rounding does to each element: the mean over draws of moved operands."""
    exact = _all_of(_attention(done, rows, length))
    squares = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    for seed in range(_DRAWS):
        draw = RoundingDraw(seed, done.inputs[0].dtype)
        # Sums run over positions: turned, so that a draw moves each operand by what adding so many up costs.
        turned = (draw(f"{place}", tensor.double().mT).mT for place, tensor in enumerate(done.inputs))
        moved = replace(done, inputs=tuple(turned), grad=draw("grad", done.grad.double().mT).mT)
        for name, tensor in _all_of(_attention(moved, rows, length)).items():
            squares[name] += (tensor - exact[name]).square() / _DRAWS
    return squares


def _all_of(attention: Attention) -> dict[str, torch.Tensor]:
    names = ("query.gradient", "key.gradient", "value.gradient")
    output = replace(attention, grad_BHTV=None).forward()[0]
    return {"output": output, **dict(zip(names, attention.gradients(), strict=True))}


def _attention(done: _Pass, rows: torch.Tensor, length: int) -> Attention:
    """In float64, of the compared rows."""
    q, k, v = (tensor.double() for tensor in done.inputs)
    hidden = torch.arange(length) > rows.unsqueeze(-1)
    bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, -torch.inf)
    scale = q.shape[-1] ** -0.5
    return Attention(q[:, :, rows], k, v, k.shape[1], bias, False, scale, done.grad[:, :, rows].double())


@dataclass(frozen=True)
class _Part:
    """One result of attention, and what it is held against."""

    name: str
    found: torch.Tensor
    exact: torch.Tensor
    squares: torch.Tensor
    """Of what rounding does."""
    allowed: torch.Tensor
    stored: torch.Tensor
    """Float64's, with the weights stored."""

    def effect(self) -> float:
        """The distance from float64 over rounding's, in the block of rows where it is largest."""
        error = torch.split((self.found.double() - self.exact).square(), BLOCK, dim=-2)
        floor = torch.split(self.squares, BLOCK, dim=-2)
        ratios = [float(one.sum()) / max(float(other.sum()), _NOTHING) for one, other in zip(error, floor, strict=True)]
        return math.sqrt(max(ratios)) if all(map(math.isfinite, ratios)) else math.inf


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
    effect: float

    @property
    def used(self) -> float:
        return max(measure.used for measure in self.measures)


def _compared(part: _Part, bound: Bound, rows: torch.Tensor) -> _Compared:
    name = part.name
    judged = judge_tensor(part.found, part.exact, part.allowed, bound, part.stored)
    assert judged is not None
    measures, worst, error = judged
    assert worst is not None
    place = worst.element
    if name in ("output", "query.gradient"):
        place = (*place[:2], int(rows[place[2]]), place[3])
    finite = error if error is not None and math.isfinite(error) else None
    return _Compared(name, measures, place, worst.found, worst.expected, finite, worst.share, part.effect())


def _result(
    direction: Direction, length: int, parts: list[_Part], bound: Bound, rows: torch.Tensor, began: float
) -> tuple[ProbeResult, OperatorCheck | None]:
    compared = [_compared(part, bound, rows) for part in parts]
    worst = max(compared, key=lambda one: one.used)
    effect = max(one.effect for one in compared)
    wrong, harmful = worst.used > 1.0, effect > EFFECT_ALLOWED
    where = f"wrong at position {worst.place[2]}" if wrong else "as in float64"
    result = ProbeResult(
        probe="lengths",
        subject=f"attention over {length} tokens, {direction}",
        outcome="failed" if wrong or harmful else "passed",
        rules_out=_use(direction) if harmful else "neither",
        summary=f"attention over {length} tokens, {direction}: {worst.name} is {where}"
        + (f"; its effect is {effect:.3g} times what rounding explains" if wrong or harmful else ""),
        measures=(*worst.measures, _effect_measure(effect)),
        seconds=time.perf_counter() - began,
    )
    return result, _check(direction, length, worst) if wrong else None


def _effect_measure(effect: float) -> Measure:
    return Measure(
        name="effect",
        value=effect if math.isfinite(effect) else None,
        bound=EFFECT_ALLOWED,
        unit=NOISE_FLOORS,
        reason="distance from float64 in the worst block of rows, over that of operands moved by one last place",
    )


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
