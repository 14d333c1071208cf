"""Spikes alarm, learning curves do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beringia.train.guard.spikes import FALSE_ALARMS_PER_VALUE, FIRST_STEPS, Spikes


def alarms(values: list[float], name: str = "loss") -> list[int]:
    spikes = Spikes((name,))
    return [step for step, value in enumerate(values) if any(f.alarming for f in spikes.judge([value]))]


def noisy(steps: int, level: float = 1.0, noise: float = 0.1, seed: int = 0) -> list[float]:
    generator = np.random.default_rng(seed)
    return [float(value) for value in level * np.exp(noise * generator.standard_normal(steps))]


def test_a_rise_by_a_factor_of_a_thousand_alarms_at_its_step() -> None:
    values = noisy(100)
    values[80] *= 1000
    assert alarms(values) == [80]


def test_a_loss_that_falls_from_four_to_one_hundredth_does_not_alarm() -> None:
    falling = [4.0 * 0.94**step for step in range(100)]
    assert alarms([a * b for a, b in zip(falling, noisy(100), strict=True)]) == []


def test_values_that_stay_high_alarm_until_the_window_would_believe_them() -> None:
    values = noisy(80) + noisy(5, level=1e4)
    assert alarms(values) == [80, 81, 82, 83, 84]


def test_nothing_is_judged_before_enough_was_seen() -> None:
    assert alarms([*noisy(FIRST_STEPS - 2), 1e6, 1.0]) == []


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_do_not_alarm(seed: int) -> None:
    """Laplace's distribution, for which the threshold was derived, in logarithms: 10^4 values."""
    logs = np.random.default_rng(seed).laplace(scale=0.2, size=10_000)
    assert alarms([float(value) for value in np.exp(logs)]) == []


def test_the_bound_lies_where_the_tail_leaves_the_false_alarms_allowed() -> None:
    """For exponential tails the quantile is known; the estimate may be wider by its own uncertainty, never narrower."""
    spikes = Spikes(("norm",))
    generator = np.random.default_rng(0)
    for value in np.exp(generator.laplace(scale=0.3, size=600)):
        findings = spikes.judge([float(value)])
    exact = 0.3 * math.log(0.5 / FALSE_ALARMS_PER_VALUE)
    assert exact < findings[0].bound < 2.0 * exact


def test_a_run_whose_gradients_rise_a_hundredfold_now_and_then_does_not_alarm() -> None:
    """As sound runs do, about once in three hundred steps."""
    generator = np.random.default_rng(1)
    rare = (generator.random(3000) < 1 / 300) * math.log(100)
    values = np.exp(generator.normal(scale=0.2, size=3000) + rare)
    assert alarms([float(value) for value in values], "gradient of layers.0") == []
