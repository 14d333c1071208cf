"""Spikes alarm, learning curves do not."""

from __future__ import annotations

import numpy as np
import pytest

from beringia.train.guard.spikes import DEVIATIONS_ALLOWED, Spikes


def alarms(values: list[float]) -> list[int]:
    spikes = Spikes(("loss",))
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
    values = noisy(60) + noisy(5, level=1e4)
    assert alarms(values) == [60, 61, 62, 63, 64]


def test_nothing_is_judged_before_the_window_has_seen_enough() -> None:
    assert alarms([1.0, 1.0, 1e6, 1.0]) == []


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_do_not_alarm(seed: int) -> None:
    """Laplace's distribution, for which the threshold was derived, in logarithms: 10^4 values."""
    logs = np.random.default_rng(seed).laplace(scale=0.2, size=10_000)
    assert alarms([float(value) for value in np.exp(logs)]) == []


def test_the_threshold_follows_from_the_false_alarms_allowed() -> None:
    assert pytest.approx(2e-9) == 2.0**-DEVIATIONS_ALLOWED
