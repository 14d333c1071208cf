"""The measures of mismatch on numbers that can be checked by hand, and the weights that correct for it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.rl.corrections import MOST_LOG_RATIO, NAMES, Correction
from beringia.rl.mismatch import by_position, by_probability, measure

SAMPLED = torch.tensor([[False, True, True, True], [False, True, False, False]])
RATIOS = torch.tensor([[9.0, 2.0, 1.0, 0.5], [9.0, 4.0, 9.0, 9.0]], dtype=torch.float64)
SAMPLER = torch.tensor([[0.9, 0.25, 0.5, 0.9], [0.9, 0.005, 0.9, 0.9]], dtype=torch.float64).log()
LEARNER = SAMPLER + RATIOS.log()


def test_the_measures_are_as_computed_by_hand() -> None:
    found = measure(LEARNER, SAMPLER, SAMPLED)
    two, four = math.log(2), math.log(4)
    assert found.tokens == 4
    assert found.log_ppl_diff == pytest.approx((0.0 + -four) / 2)  # of samples, not of tokens
    assert found.mean_abs == pytest.approx((two + 0 + two + four) / 4)
    assert found.max_abs == pytest.approx(four)
    assert found.k1 == pytest.approx(-(two + 0 - two + four) / 4)
    assert found.k3 == pytest.approx(((2 - two - 1) + 0 + (0.5 + two - 1) + (4 - four - 1)) / 4)
    assert found.chi_square == pytest.approx((4 + 1 + 0.25 + 16) / 4 - 1)
    assert found.sample_size == pytest.approx(7.5**2 / (4 * 21.25))
    assert found.mult_prob_error == pytest.approx((2 + 1 + 2 + 4) / 4)


def test_equal_policies_have_none() -> None:
    found = measure(SAMPLER, SAMPLER, SAMPLED)
    nothing = (found.log_ppl_diff, found.mean_abs, found.max_abs, found.k1, found.k3, found.chi_square)
    assert not any(nothing)
    assert (found.sample_size, found.mult_prob_error) == (1.0, 1.0)


def test_without_a_token_nothing_is_known() -> None:
    found = measure(LEARNER, SAMPLER, torch.zeros_like(SAMPLED))
    assert found.tokens == 0 and math.isnan(found.k3)


def test_every_token_is_in_one_class_of_probability_and_one_of_position() -> None:
    classes = by_probability(LEARNER, SAMPLER, SAMPLED)
    assert [(part.words, part.tokens) for part in classes] == [
        ("probability 0 to 0.01", 1),
        ("probability 0.1 to 0.5", 1),
        ("probability 0.5 to 0.9", 1),
        ("probability 0.9 to 1", 1),
    ]
    assert classes[0].mean_abs == pytest.approx(math.log(4))
    places = by_position(LEARNER, SAMPLER, SAMPLED)
    assert [(part.words, part.tokens) for part in places] == [
        ("new token 0 to 0", 2),
        ("new token 1 to 1", 1),
        ("new token 2 to 2", 1),
    ]
    assert places[0].mean_abs == pytest.approx((math.log(2) + math.log(4)) / 2)


BY_HAND = {
    "none": [[0, 1, 1, 1], [0, 1, 0, 0]],
    "token-truncated": [[0, 2, 1, 0.5], [0, 2, 0, 0]],
    "sequence-truncated": [[0, 1, 1, 1], [0, 2, 0, 0]],
    "sequence-mask": [[0, 1, 1, 1], [0, 0, 0, 0]],
    "icepop": [[0, 2, 1, 0.5], [0, 4, 0, 0]],
    "geometric": [[0, 1, 1, 1], [0, 0, 0, 0]],
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_as_computed_by_hand(name: str) -> None:
    assert torch.allclose(Correction(name).weights(RATIOS.log(), SAMPLED), torch.tensor(BY_HAND[name]).double())


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mismatch_every_weight_is_one(name: str) -> None:
    assert torch.equal(Correction(name).weights(torch.zeros(2, 4), SAMPLED), SAMPLED.float())


@pytest.mark.parametrize("name", NAMES)
@given(ratios=st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=8))
def test_weights_are_finite_and_within_their_bounds_whatever_the_ratios_are(name: str, ratios: list[float]) -> None:
    correction = Correction(name)
    weights = correction.weights(torch.tensor(ratios, dtype=torch.float64).view(2, 4), SAMPLED)
    assert bool(weights.isfinite().all()) and bool((weights >= 0).all()) and not weights[~SAMPLED].any()
    high = correction.bounds[1]
    assert float(weights.max()) <= (1.0 if name in ("none", "geometric") else min(high, math.exp(MOST_LOG_RATIO)))


def test_bounds_that_are_given_are_used_and_an_unknown_name_is_refused() -> None:
    assert Correction("icepop", high=1.5).bounds == (0.5, 1.5)
    assert Correction("icepop", high=1.5).weights(RATIOS.log(), SAMPLED)[1].sum() == 0
    with pytest.raises(KeyError):
        Correction("ice-pop")
