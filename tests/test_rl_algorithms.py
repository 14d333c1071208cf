"""Each algorithm's objective, on a case that was computed by hand, and what all of them have in common."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beringia.rl.algorithms.algorithm import Algorithm, Tokens
from beringia.rl.algorithms.choose import NAMES, make_algorithm
from beringia.rl.algorithms.dapo import too_long
from beringia.rl.algorithms.dr_grpo import DrGrpo

MAX_TOKENS = 4
RATIOS = torch.tensor([[1.5, 0.5, 1.1, 1.0], [1.3, 1.0, 1.0, 1.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0], [-2.0]], dtype=torch.float64).expand(2, 4)
SAMPLED = torch.tensor([[True, True, True, False], [True, False, False, False]])
OLD = torch.full((2, 4), -1.0, dtype=torch.float64)

BY_HAND = {
    # min(1.5, 1.2) + min(0.5, 0.8) + min(1.1, 1.1) = 2.8 over three tokens; -2 * max(1.3, 1.2) = -2.6 over one
    "grpo": (2.8 / 3.0 - 2.6, 2, 1),
    "dr-grpo": (2.8 - 2.6, 2 * MAX_TOKENS, 1),
    # min(1.5, 1.28) + 0.5 + 1.1 = 2.88
    "dapo": (2.88 - 2.6, 4, 1),
    # s_1 = (1.5 * 0.5 * 1.1)^(1/3) = 0.938 is below 1 - 3e-4, and the advantage is positive: not clipped;
    # s_2 = 1.3, the advantage is negative: not clipped
    "gspo": ((1.5 * 0.5 * 1.1) ** (1.0 / 3.0) - 2.0 * 1.3, 2, 0),
    # weights 1.28, 0.5, 1.1 and -2 * 1.28, times the log-probabilities -1 + log rho
    "cispo": (
        1.28 * (math.log(1.5) - 1) + 0.5 * (math.log(0.5) - 1) + 1.1 * (math.log(1.1) - 1)
        - 2.0 * 1.28 * (math.log(1.3) - 1),
        4,
        2,
    ),
}  # fmt: skip
"""Gain (the loss with its sign turned), what it is divided by, tokens that were clipped."""


def algorithm(name: str) -> Algorithm:
    return make_algorithm(name, max_tokens=MAX_TOKENS)


def tokens(
    ratios: torch.Tensor = RATIOS, advantages: torch.Tensor = ADVANTAGES, corrections: torch.Tensor | None = None
) -> Tokens:
    logprobs = (OLD + ratios.log()).requires_grad_()
    return Tokens(logprobs, OLD, advantages, SAMPLED, torch.ones_like(OLD) if corrections is None else corrections)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_as_computed_by_hand(name: str) -> None:
    found = algorithm(name).loss(tokens())
    gain, count, clipped = BY_HAND[name]
    assert found.loss.item() == pytest.approx(-gain, abs=1e-12)
    assert (algorithm(name).count(SAMPLED), int(found.clipped)) == (count, clipped)


@pytest.mark.parametrize("name", NAMES)
def test_before_any_update_the_gradient_is_that_of_reinforce(name: str) -> None:
    """d/dlogp of rho A is A where rho is 1: whatever is clipped, every algorithm begins there."""
    given = tokens(torch.ones_like(RATIOS))
    algorithm(name).loss(given).loss.backward()
    lengths = SAMPLED.sum(-1, keepdim=True) if name in ("grpo", "gspo") else 1.0
    assert given.logprobs_NT.grad is not None
    assert torch.allclose(given.logprobs_NT.grad, -ADVANTAGES * SAMPLED / lengths)


@pytest.mark.parametrize("name", NAMES)
def test_clipping_stops_the_gradient_of_what_went_too_far_and_cispo_s_does_not(name: str) -> None:
    ratios = torch.full_like(RATIOS, 1.0)
    ratios[0, :3] = 2.0  # with a positive advantage
    given = tokens(ratios)
    algorithm(name).loss(given).loss.backward()
    assert given.logprobs_NT.grad is not None
    moved = bool(given.logprobs_NT.grad[0].any())
    assert moved == (name == "cispo")


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_was_not_sampled_counts_for_nothing(name: str) -> None:
    other, advantages, corrections = RATIOS.clone(), ADVANTAGES.clone(), torch.ones_like(OLD)
    for part, value in ((other, 7.0), (advantages, math.nan), (corrections, math.nan)):
        part[~SAMPLED] = value
    found, plain = tokens(other, advantages, corrections), tokens()
    for one in (found, plain):
        algorithm(name).loss(one).loss.backward()
    assert found.logprobs_NT.grad is not None and plain.logprobs_NT.grad is not None
    assert torch.equal(found.logprobs_NT.grad, plain.logprobs_NT.grad)
    assert algorithm(name).loss(found).loss.item() == algorithm(name).loss(plain).loss.item()


@pytest.mark.parametrize("name", NAMES)
def test_corrections_weigh_what_they_are_of(name: str) -> None:
    only_first = torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, 4)
    both, first, second = (
        algorithm(name).loss(tokens(corrections=weights)).loss.item() for weights in (None, only_first, 1 - only_first)
    )
    assert both == pytest.approx(first + second)
    assert algorithm(name).loss(tokens(corrections=3.0 * only_first)).loss.item() == pytest.approx(3.0 * first)


@pytest.mark.parametrize("name", NAMES)
@given(rewards=st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=2, max_size=16))
def test_advantages_of_a_group_add_up_to_nothing_and_say_nothing_where_all_are_equal(
    name: str, rewards: list[float]
) -> None:
    assert not algorithm(name).advantages(torch.tensor(rewards[:1])).any(), "a group of one says nothing"
    found = algorithm(name).advantages(torch.tensor(rewards))
    assert abs(float(found.sum())) < 1e-4
    if len(set(rewards)) == 1:
        assert not found.any()
    else:
        assert torch.equal(found.argsort(stable=True), torch.tensor(rewards).argsort(stable=True))


def test_grpo_divides_by_the_deviation_and_dr_grpo_does_not() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    deviation = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert algorithm("grpo").advantages(rewards).tolist() == pytest.approx(
        [0.75 / deviation, *[-0.25 / deviation] * 3], rel=1e-5
    )
    assert algorithm("dr-grpo").advantages(rewards).tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize(("length", "lost"), [(10, 0.0), (12, 0.0), (14, -0.5), (16, -1.0), (20, -1.0)])
def test_samples_near_the_limit_lose_reward(length: int, lost: float) -> None:
    assert too_long(length, max_tokens=16, buffer=4) == lost


def test_bounds_that_are_given_are_used() -> None:
    given = make_algorithm("dr-grpo", max_tokens=9, clip_low=0.1, clip_high=0.3)
    assert given == DrGrpo(0.1, 0.3, max_tokens=9)
    with pytest.raises(KeyError):
        make_algorithm("ppo", max_tokens=9)
