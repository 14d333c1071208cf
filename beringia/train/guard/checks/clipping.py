"""Clipping: norms of gradients as they lie, and the factor that was applied to them.

The norm of one group in turn (the embedding, a layer, the head) is added up in float64; the norm of all is made from
the groups' own; and a slice of one of the group's tensors must have become what it was, times limit over norm where
that is less than 1 (Pascanu, Mikolov and Bengio 2013).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from beringia.numerics.metrics import UNIT_ROUNDOFF, reduction_floor
from beringia.train.clipping import EPSILON
from beringia.train.guard.check import GRADIENT, Check, Moment, Step, Training, Turns, When
from beringia.train.guard.finding import Finding
from beringia.train.sharding import local, sum_of_host_values

SLICE_ELEMENTS = 16384
ROUNDINGS = 8
"""Of the factor and its use: a sum, a quotient, a product, and a root and a quotient of up to 2 ulp each."""
_ROUNDOFF = 2.0 * UNIT_ROUNDOFF[torch.float32]
_FLUSHED = 2.0**-126
"""A chip may flush what is below float32's smallest normal number to zero."""


@dataclass
class Unclipped:
    """One group's gradients before they are clipped."""

    group: str
    norm: float
    elements: int
    parameter: nn.Parameter
    start: int
    before: torch.Tensor
    after: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class ClippingCheck(Check[Unclipped]):
    """A group in turn."""

    name = "clipping"
    when = When(look=Moment.GRADIENTS, judge=(Moment.BEFORE_UPDATE, Moment.END), weight=0.065, order=25)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        groups = {} if training.clipping is None else training.clipping.groups
        self._turns = Turns([(name, group) for name, group in groups.items() if group])
        self._any = bool(groups)

    def look(self, step: Step) -> Sequence[Unclipped]:
        if not self._any:
            return []
        name, group = self._turns.next()
        present = [parameter for parameter in group if parameter.grad is not None]
        if not present:
            return []
        parameter = present[step.draw("tensor") % len(present)]
        start = step.draw("slice") % max(1, local(parameter).numel() - SLICE_ELEMENTS + 1)
        elements = sum(parameter.numel() for parameter in present)
        return [Unclipped(name, self._norm(present), elements, parameter, start, _slice(parameter, start))]

    def judge(self, look: Unclipped, step: Step) -> Sequence[Finding]:
        if step.moment is Moment.BEFORE_UPDATE:
            look.after = _slice(look.parameter, look.start)
            return []
        assert self.training.clipping is not None
        return judge_clipping(look, step.numbers[GRADIENT], step.layer_numbers, self.training.clipping.limit)

    def _norm(self, group: Sequence[nn.Parameter]) -> float:
        squares = sum(_square(parameter) for parameter in group)
        if self.training.sharding == "fsdp2":
            device = self.training.chip.device
            squares = sum_of_host_values(torch.tensor([squares], dtype=torch.float64), device).item()
        return math.sqrt(squares)


def judge_clipping(look: Unclipped, norm: float, norms: Mapping[str, float], limit: float) -> list[Finding]:
    """Three findings: the group's norm, the norm of all from `norms` by group, and the slice. None where a norm that
    the chip tells is not finite, of which another check tells; that of the guard is beyond the bound then."""
    told = norms.get(f"{GRADIENT} of {look.group}", math.nan)
    if not (math.isfinite(told) and math.isfinite(norm)):
        return []
    name = ClippingCheck.name
    of_all = math.sqrt(sum(value * value for value in norms.values()))
    what = "relative error of the norm"
    return [
        Finding(name, look.group, "gradient norm", _relative(told, look.norm), _allowed(look.elements), what),
        Finding(name, "model", "gradient norm", _relative(norm, of_all), _allowed(len(norms)), what),
        Finding(name, look.group, "clipped gradient", _used(look, norm, limit), 1.0, _OF_A_SLICE),
    ]


_OF_A_SLICE = "largest error of an element over what its roundings allow,"


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / expected if expected else abs(found)


def _allowed(terms: int) -> float:
    """A root halves the relative error of the sum of squares; each square and the root are rounded."""
    return 0.5 * reduction_floor(terms) + ROUNDINGS * _ROUNDOFF


def _used(look: Unclipped, norm: float, limit: float) -> float:
    expected = look.before * min(1.0, limit / (norm + EPSILON))
    bound = ROUNDINGS * _ROUNDOFF * expected.abs() + _FLUSHED
    return ((look.after - expected).abs() / bound).max().item() if len(expected) else 0.0


def _square(parameter: nn.Parameter) -> float:
    assert parameter.grad is not None
    return float(torch.linalg.vector_norm(local(parameter.grad.detach()).cpu(), dtype=torch.float64)) ** 2


def _slice(parameter: nn.Parameter, start: int) -> torch.Tensor:
    assert parameter.grad is not None
    part = local(parameter.grad.detach()).reshape(-1)[start : start + SLICE_ELEMENTS]
    return part.to("cpu", torch.float64, copy=True)
