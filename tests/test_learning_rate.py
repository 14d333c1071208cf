"""The learning rate of every step, against the schedules that people know: torch's and transformers' own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.records.recipe import TrainSection
from beringia.train.optimizer import learning_rate

PEAK = 3e-3
CLOSE = 4 * 2.0**-52
"""Relative: both sides evaluate one formula in float64, in another order; a handful of roundings, no cancellation that
is not bounded by the peak, which is what differences are taken relative to."""


def section(**keys: Any) -> TrainSection:
    return TrainSection(prefer=("first",), learning_rate=PEAK, **keys)


def theirs(kind: str, steps: int, **arguments: Any) -> list[float]:
    """Learning rates 1, 2, ... of a scheduler of theirs: it counts from 0, with a first step at rate 0; ours begins at
    its second."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer took no step
        scheduler = get_scheduler(kind, optimizer, **arguments)
        rates = []
        for _ in range(steps):
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
    return rates


def ours(train: TrainSection, steps: int) -> list[float]:
    return [learning_rate(train, step) for step in range(1, steps + 1)]


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=0, abs=CLOSE * PEAK)


LENGTHS = st.tuples(st.integers(0, 40), st.integers(1, 120)).map(lambda pair: (pair[0], sum(pair)))
"""Warm-up steps, and a horizon beyond them."""


@given(lengths=LENGTHS)
def test_linear_is_transformers_linear(lengths: tuple[int, int]) -> None:
    warmup, horizon = lengths
    train = section(steps=horizon, warmup_steps=warmup, final_learning_rate=0.0)
    expected = theirs("linear", horizon + 5, num_warmup_steps=warmup, num_training_steps=horizon)
    assert ours(train, horizon + 5) == close(expected)


@given(lengths=LENGTHS, final=st.floats(0, 1))
def test_cosine_is_transformers_cosine_with_a_smallest_rate(lengths: tuple[int, int], final: float) -> None:
    warmup, horizon = lengths
    train = section(steps=horizon, schedule="cosine", warmup_steps=warmup, final_learning_rate=final)
    expected = theirs(
        "cosine_with_min_lr",
        horizon,  # beyond it theirs rises again
        num_warmup_steps=warmup,
        num_training_steps=horizon,
        scheduler_specific_kwargs={"min_lr_rate": final},
    )
    assert ours(train, horizon) == close(expected)


@given(horizon=st.integers(2, 150), final=st.floats(0, 1))
def test_cosine_without_a_warm_up_is_torchs_annealing(horizon: int, final: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, horizon, eta_min=final * PEAK)
    expected = []
    for _ in range(horizon):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    train = section(steps=horizon, schedule="cosine", warmup_steps=0, final_learning_rate=final)
    # Theirs is a recursion: each step adds roundings of its own.
    assert ours(train, horizon) == pytest.approx(expected, rel=0, abs=CLOSE * horizon * PEAK)


@given(
    warmup=st.integers(0, 40),
    stable=st.integers(0, 60),
    decay=st.integers(1, 60),
    final=st.floats(0, 1),
)
def test_wsd_is_transformers_wsd_with_a_linear_decay(warmup: int, stable: int, decay: int, final: float) -> None:
    horizon = warmup + stable + decay
    train = section(
        steps=horizon,
        schedule="wsd",
        warmup_steps=warmup,
        decay_fraction=decay / horizon,
        final_learning_rate=final,
    )
    expected = theirs(
        "warmup_stable_decay",
        horizon + 5,
        num_warmup_steps=warmup,
        scheduler_specific_kwargs={
            "num_stable_steps": stable,
            "num_decay_steps": decay,
            "min_lr_ratio": final,
            "decay_type": "linear",
        },
    )
    # Their warm-up begins at the smallest rate, ours at 0. Where the decay begins is a rounded product of ours, off by
    # at most an ulp of the horizon, and one step is 1 / decay of the way.
    begun = max(warmup, 1) - 1
    tolerance = (CLOSE + 2.0**-52 * horizon / decay) * PEAK
    assert ours(train, horizon + 5)[begun:] == pytest.approx(expected[begun:], rel=0, abs=tolerance)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@given(lengths=LENGTHS, final=st.floats(0, 1), more=st.integers(1, 200))
def test_a_schedule_rises_falls_and_then_stays(
    schedule: str, lengths: tuple[int, int], final: float, more: int
) -> None:
    """More steps than the schedule has change none of its rates, and those beyond it are its last one."""
    warmup, horizon = lengths
    keys: dict[str, Any] = {"schedule": schedule, "warmup_steps": warmup, "final_learning_rate": final}
    rates = ours(section(steps=horizon, **keys), horizon)
    longer = ours(section(steps=horizon + more, schedule_steps=horizon, **keys), horizon + more)
    assert longer == rates + [rates[-1]] * more
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(final * PEAK, rel=1e-9, abs=CLOSE * PEAK)


def test_wsd_stays_at_its_peak_until_the_decay_and_a_warm_up_that_is_longer_goes_first() -> None:
    train = section(steps=100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_learning_rate=0.0)
    rates = ours(train, 100)
    assert set(rates[9:80]) == {PEAK} and rates[80] < PEAK and rates[89] == pytest.approx(PEAK / 2)
    late = ours(train.model_copy(update={"warmup_steps": 90}), 100)
    assert late[89] == PEAK and late[94] == pytest.approx(PEAK / 2) and late[99] == 0
