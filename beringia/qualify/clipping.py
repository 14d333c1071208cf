"""Whether gradients are clipped as asked: the one number that a step makes of all of them, and what it does to each.

In a trace clipping hardly shows. AdamW divides by the size of the gradients it has seen, so a factor that all steps
share cancels, and one batch's norm may be below the limit. Here the weights stand in the place of their gradients, and
the limit is a hundredth of their norm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.numerics.metrics import UNIT_ROUNDOFF
from beringia.qualify.effects import EFFECT_ALLOWED, RoundingNoise, sizes
from beringia.qualify.subject import TRAINING, Subject
from beringia.records.certificate import Departure, Measure, ProbeResult
from beringia.train.clipping import EPSILON

DEPARTURE = "clipping before the update"
_SHARE = 0.01
"""Of the norm: the limit."""


def probe_clipping(chip: Chip, subject: Subject, dtype: torch.dtype, noise: RoundingNoise) -> ProbeResult | None:
    """The norm that the chip finds, and its clipped gradients, beside float64's; None for a model without weights, or
    of whose updates the noise says nothing."""
    model = subject.place(subject.build(), chip.device, dtype)
    parameters = [one for one in model.parameters() if one.requires_grad and one.is_floating_point()]
    norm = _norm(_on_cpu(parameter) for parameter in parameters)
    updates = relative_updates(noise)
    if norm == 0.0 or not updates:
        return None
    limit = _SHARE * norm
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    told = float(nn.utils.clip_grad_norm_(parameters, limit))
    factor = limit / (norm + EPSILON)
    off = _norm(_on_cpu(parameter.grad) - factor * _on_cpu(parameter) for parameter in parameters) / limit
    bound = allowed(statistics.median(updates), sum(parameter.numel() for parameter in parameters))
    measures = (_measure("norm", abs(told / norm - 1.0), bound), _measure("clipped gradients", off, bound))
    failed = any(measure.used > 1.0 for measure in measures)
    return ProbeResult(
        probe="clipping",
        subject="gradients",
        outcome="failed" if failed else "passed",
        rules_out="train",
        summary=f"gradients of norm {norm:.4g}, clipped to {limit:.4g}, are off by {off:.2g} of that"
        + (f"; the norm was found to be {told:.4g}" if failed else ""),
        measures=measures,
    )


def allowed(update: float, num_weights: int) -> float:
    """Relative error of a clipped gradient that does no harm, where rounding brings an update so far from float64's,
    relative to its size. A factor on one step's gradients moves AdamW's update by 1 - beta1 of it, which may be as much
    as any effect may; beside it the norm's own error, rounding added up at random over all squares in float32."""
    return EFFECT_ALLOWED * update / (1.0 - TRAINING.betas[0]) + UNIT_ROUNDOFF[torch.float32] * math.sqrt(num_weights)


def relative_updates(noise: RoundingNoise) -> list[float]:
    """How far rounding brings each layer's update from float64's, over its size."""
    size = sizes(noise.exact)
    floors = {(*group, ""): floor.overall for group, floor in noise.floors().items() if group[0] == "update"}
    return [floor / size[cell] for cell, floor in floors.items() if size[cell]]


def departed_clipping(result: ProbeResult) -> Departure:
    """What is first wrong where only clipping is."""
    times = max(measure.used for measure in result.measures)
    return Departure(module="", quantity=DEPARTURE, times=times if math.isfinite(times) else None)


def _measure(name: str, error: float, bound: float) -> Measure:
    reason = f"what moves an update by {EFFECT_ALLOWED:g} noise floors, and adding up as many squares as weights"
    return Measure(name=name, value=error if math.isfinite(error) else None, bound=bound, reason=reason)


def _on_cpu(tensor: torch.Tensor | None) -> torch.Tensor:
    return torch.tensor(math.nan) if tensor is None else tensor.detach().cpu().double()


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))
