"""AdamW with float32 state, its learning-rate schedule, and its state under names that outlive this process.

The state of parameter `p` is named `optimizer.exp_avg.p` and `optimizer.exp_avg_sq.p`. The step count is not a tensor
of its own: it is the run's step, set on loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from beringia.records.recipe import TrainSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], train: TrainSection, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the parameters; matrices decay, vectors (norms, biases) do not.

    `fused` is one kernel for the whole update where the chip has it. Moments are made at once, as zeros, so that they
    have names and places before the first step.
    """
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=train.betas,
        fused=fused,
        foreach=None if fused else True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    return optimizer


def moments(
    named: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, live tensor) of every moment."""
    for name, parameter in named:
        if parameter.requires_grad:
            for moment in MOMENTS:
                yield f"optimizer.{moment}.{name}", optimizer.state[parameter][moment]


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates done, which AdamW's bias correction needs."""
    for state in optimizer.state.values():
        state["step"].fill_(float(step))


def learning_rate(train: TrainSection, step: int) -> float:
    """Learning rate of step `step` (from 1): linear warm-up from 0, then down to `final_learning_rate` of the peak at
    the schedule's horizon, where it stays."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    done = min(1.0, _done(train, step))
    if train.schedule == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    return train.learning_rate * (1.0 - (1.0 - train.final_learning_rate) * done)


def _done(train: TrainSection, step: int) -> float:
    """How much of the decay lies behind a step after the warm-up."""
    first: float = train.warmup_steps
    if train.schedule == "wsd":
        first = max(first, train.horizon - max(1.0, train.decay_fraction * train.horizon))
    return max(0.0, step - first) / max(1, train.horizon - first)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
