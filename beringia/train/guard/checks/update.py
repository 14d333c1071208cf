"""The optimizer's update of a slice of one tensor, recomputed on the CPU in float64.

AdamW as torch has it (Loshchilov and Hutter 2019, algorithm 2, with the decay before the step). Held against the bound
element by element: each operation of the update rounds once, in float32, and the bound adds up the roundings, with
`ELEMENTARY_ULPS` for root and quotient. Sharded tensors are checked by the rank's own part.

Weights w, moments m and v, gradient g, all flat slices; u is the unit roundoff of truncation, 2^-23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from beringia.numerics.metrics import ELEMENTARY_ULPS, UNIT_ROUNDOFF
from beringia.train.guard.check import Check, Moment, Step, Training, Turns, When
from beringia.train.guard.finding import Finding
from beringia.train.sharding import local

SLICE_ELEMENTS = 16384
_ROUNDOFF = 2.0 * UNIT_ROUNDOFF[torch.float32]
_FLUSHED = 2.0**-126
"""A chip may flush what is below float32's smallest normal number to zero."""

Numbers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Before:
    """A slice of one tensor and its moments before the update, float64 on the CPU."""

    name: str
    parameter: nn.Parameter
    start: int
    values: Numbers
    step: int


class Update(Check[Before]):
    """A tensor in turn."""

    name = "update"
    when = When(look=Moment.BEFORE_UPDATE, judge=(Moment.AFTER_UPDATE,), weight=0.065, order=20)

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        named = training.decoder.named_parameters()
        self._turns = Turns([(name, parameter) for name, parameter in named if parameter.requires_grad])

    def look(self, step: Step) -> Sequence[Before]:
        before = slice_before(self.training.optimizer, *self._turns.next(), step.draw("slice"))
        return [] if before is None else [before]

    def judge(self, look: Before, step: Step) -> Sequence[Finding]:
        return judge_update(self.training.optimizer, look)


def slice_before(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter, draw: int) -> Before | None:
    """Remember a drawn slice before the update; None for a tensor that has no gradient in this step."""
    if parameter.grad is None:
        return None
    length = local(parameter).numel()
    start = draw % max(1, length - SLICE_ELEMENTS + 1) if length else 0
    state = optimizer.state[parameter]
    tensors = {"w": parameter, "g": parameter.grad, "m": state["exp_avg"], "v": state["exp_avg_sq"]}
    return Before(name, parameter, start, _slices(tensors, start), int(state["step"].item()) + 1)


def judge_update(optimizer: torch.optim.Optimizer, before: Before) -> list[Finding]:
    """Compare weights and moments after the update with what they had to become."""
    state = optimizer.state[before.parameter]
    after = _slices({"m": state["exp_avg"], "v": state["exp_avg_sq"], "w": before.parameter}, before.start)
    expected, bounds = _update(before.values, _group(optimizer, before.parameter), before.step)
    names = {"m": "exp_avg", "v": "exp_avg_sq", "w": "weight"}
    return [
        Finding(
            Update.name,
            before.name,
            names[key],
            ((after[key] - expected[key]).abs() / bounds[key]).max().item() if len(bounds[key]) else 0.0,
            1.0,
            "largest error of an element over what its roundings allow",
        )
        for key in names
    ]


def _slices(tensors: Mapping[str, torch.Tensor], start: int) -> Numbers:
    return {
        key: local(tensor.detach()).reshape(-1)[start : start + SLICE_ELEMENTS].cpu().to(torch.float64)
        for key, tensor in tensors.items()
    }


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(other is parameter for other in group["params"]))


def _update(values: Numbers, group: Mapping[str, Any], step: int) -> tuple[Numbers, Numbers]:
    """What the update must give, and how far from it each element may be."""
    w, g, m, v = (values[key] for key in "wgmv")
    beta_m, beta_v = group["betas"]
    rate, u = group["lr"], _ROUNDOFF
    new_m = beta_m * m + (1 - beta_m) * g
    new_v = beta_v * v + (1 - beta_v) * g * g
    root = (new_v / (1 - beta_v**step)).sqrt() + group["eps"]
    pace = rate / (1 - beta_m**step)
    change = pace * new_m / root
    new_w = w * (1 - rate * group["weight_decay"]) - change
    # m: a difference, a product with a rounded constant, a sum. v: two products, a square, a sum, constants.
    bound_m = 4 * u * (new_m.abs() + (1 - beta_m) * (g.abs() + m.abs())) + _FLUSHED
    bound_v = 6 * u * new_v + _FLUSHED
    # The change inherits m's error, half of v's relative error, root and quotient, and the roundings of four constants.
    bound_change = pace * bound_m / root + change.abs() * u * (3 + 2 * ELEMENTARY_ULPS + 4)
    bound_w = 3 * u * w.abs() + u * new_w.abs() + bound_change + _FLUSHED
    return {"m": new_m, "v": new_v, "w": new_w}, {"m": bound_m, "v": bound_v, "w": bound_w}
