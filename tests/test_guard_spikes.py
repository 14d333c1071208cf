"""Spikes alarm, learning curves do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from beringia.train.cross_entropy import LEAST_RISE
from beringia.train.guard.checks.spikes import (
    FALSE_ALARMS_PER_VALUE,
    FIRST_STEPS,
    LEAST_GRADIENT_RISE,
    Spikes,
)


def alarms(values: list[float], name: str = "loss") -> list[int]:
    spikes = Spikes({name: LEAST_RISE if name == "loss" else LEAST_GRADIENT_RISE})
    return [step for step, value in enumerate(values) if any(f.alarming for f in spikes.judge({name: value}))]


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


def test_the_bound_lies_where_the_tail_leaves_about_the_false_alarms_allowed() -> None:
    """For exponential tails the quantile is known; the largest of a window tells the scale within some 20 %."""
    shares = []
    for seed in range(40):
        spikes = Spikes({"norm": LEAST_RISE})
        for value in np.exp(np.random.default_rng(seed).laplace(scale=0.6, size=600)):
            findings = spikes.judge({"norm": float(value)})
        shares.append(findings[0].bound / (0.6 * math.log(0.5 / FALSE_ALARMS_PER_VALUE)))
    assert 0.9 < float(np.median(shares)) < 1.2 and min(shares) > 0.7 and max(shares) < 2.0


def test_a_rise_that_one_step_explains_alarms_when_it_lasts() -> None:
    quiet = noisy(200, noise=0.05)
    assert alarms([*quiet, 1.7, *noisy(20, noise=0.05, seed=1)]) == []
    lasting = [*quiet, *noisy(6, level=1.7, noise=0.05, seed=2)]
    assert alarms(lasting) == [203, 204, 205]
    assert alarms(lasting, "gradient of layers.0") == []


@pytest.mark.parametrize(("high", "alarming"), [(3, []), (4, [204]), (6, [204, 205, 206])])
def test_a_step_that_the_data_explain_is_none_of_those_in_which_a_rise_lasts(high: int, alarming: list[int]) -> None:
    spikes = Spikes({"loss": LEAST_RISE})
    found = []
    for step, value in enumerate([*noisy(200, noise=0.05), 9.0, *noisy(high, level=1.7, noise=0.05), 1.0]):
        if any(finding.alarming for finding in spikes.judge({"loss": value})):
            found.append(step)
        if step == 200:
            spikes.explained()
    assert found == [200, *alarming]


CORRUPTED_AT_150 = [
    1.462,
    1.434,
    1.414,
    1.411,
    1.495,
    1.434,
    1.427,
    1.42,
    1.325,
    1.575,
    1.377,
    1.469,
    1.453,
    1.583,
    1.473,
    1.332,
    1.303,
    1.495,
    1.519,
    1.404,
    1.331,
    1.336,
    1.476,
    1.429,
    1.467,
    1.25,
    1.543,
    1.411,
    1.395,
    1.372,
    1.416,
    1.52,
    1.491,
    1.482,
    1.448,
    1.431,
    1.372,
    1.545,
    1.387,
    1.467,
    1.481,
    1.342,
    1.458,
    1.504,
    1.543,
    1.376,
    1.484,
    1.423,
    1.489,
    1.375,
    1.937,
    1.514,
    1.546,
    1.469,
    1.383,
    1.481,
    1.413,
    1.467,
    1.385,
    1.203,
    1.433,
    1.586,
    1.355,
    1.416,
    1.415,
    1.379,
    1.424,
    1.53,
    1.561,
    1.443,
    3.37,
    3.295,
    2.372,
    2.793,
    3.191,
    3.058,
    2.787,
    2.168,
    1.936,
    1.793,
    1.746,
]
"""Losses of r2-nano from step 80 on; at step 150 a thousand bits of the first layer's weights flip."""


def test_a_corruption_of_weights_that_was_recorded_is_seen_within_four_steps() -> None:
    found = [80 + place for place in alarms(CORRUPTED_AT_150)]
    assert found and 150 <= found[0] <= 153
    assert alarms(CORRUPTED_AT_150[: 150 - 80]) == []


def test_a_run_whose_gradients_rise_a_hundredfold_now_and_then_does_not_alarm() -> None:
    """As sound runs do, about once in three hundred steps."""
    generator = np.random.default_rng(1)
    rare = (generator.random(3000) < 1 / 300) * math.log(100)
    values = np.exp(generator.normal(scale=0.2, size=3000) + rare)
    assert alarms([float(value) for value in values], "gradient of layers.0") == []
