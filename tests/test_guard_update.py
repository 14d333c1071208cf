"""The optimizer's update is checked element by element: torch's own passes, every wrong formula is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from beringia.records.recipe import TrainSection
from beringia.train.guard.checks.update import judge_update, slice_before
from beringia.train.optimizer import make_optimizer, set_learning_rate

TRAIN = TrainSection(prefer=("x",), steps=100)


def stepped(fused: bool, steps: int, spoil: Callable[[Any], None] | None = None) -> float:
    """Largest share of its bound that the last of some updates used."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(300, 100, generator=generator) * 0.02)
    optimizer = make_optimizer([("p", parameter)], TRAIN, fused=fused)
    used = 0.0
    for step in range(1, steps + 1):
        set_learning_rate(optimizer, 1e-3 * step)
        parameter.grad = torch.randn(300, 100, generator=generator) * 10.0 ** -(step % 7)
        before = slice_before(optimizer, "p", parameter, draw=step * 7919)
        assert before is not None
        optimizer.step()
        if spoil is not None and step == steps:
            spoil((optimizer, parameter))
        used = max(finding.used for finding in judge_update(optimizer, before))
    return used


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_torchs_own_update_stays_below_the_bound(fused: bool, steps: int) -> None:
    assert 0.01 < stepped(fused, steps) < 0.7


def test_a_weight_off_by_thirty_roundoffs_is_seen() -> None:
    def spoil(state: Any) -> None:
        state[1].data *= 1 + 30 * 2.0**-24

    assert stepped(False, 3, spoil) > 1


def test_an_update_of_a_weight_that_was_skipped_is_seen() -> None:
    def spoil(state: Any) -> None:
        optimizer, parameter = state
        parameter.data += 1e-4 * optimizer.state[parameter]["exp_avg"].sign()

    assert stepped(True, 3, spoil) > 100


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_moment_with_a_wrong_factor_is_seen(moment: str) -> None:
    def spoil(state: Any) -> None:
        optimizer, parameter = state
        optimizer.state[parameter][moment] *= 1.0001

    assert stepped(False, 5, spoil) > 1


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    assert slice_before(make_optimizer([("p", parameter)], TRAIN, fused=False), "p", parameter, 0) is None
