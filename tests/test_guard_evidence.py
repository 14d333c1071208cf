"""Errors that no single sample betrays add up over samples, and chance does not."""

from __future__ import annotations

import random

import pytest
import torch
from guarded import alarms_of_a_full_check, changed_output, recipe, trainer

from beringia.train.guard.evidence import BOUND, DRAWS, Evidence

PLACE = ("layers.0", "output", "signed error")


def test_a_bet_that_wins_as_often_as_chance_allows_does_not_win_on_average() -> None:
    wins = 1.0 / (DRAWS + 1)
    assert wins * 4.0 + (1.0 - wins) * 0.25 == pytest.approx(1.0)


def test_one_sample_more_than_is_believed_to_be_chance_is_needed() -> None:
    evidence = Evidence()
    for _ in range(BOUND + 1):
        assert evidence.score(PLACE) <= BOUND
        evidence.add(PLACE, largest=True)
    assert evidence.score(PLACE) == BOUND + 1


def test_a_chip_that_is_the_largest_as_often_as_any_draw_gathers_no_evidence() -> None:
    draw, evidence, most = random.Random(4), Evidence(), 0
    for _ in range(100_000):
        evidence.add(PLACE, largest=draw.random() < 1.0 / (DRAWS + 1))
        most = max(most, evidence.score(PLACE))
    assert 3 < most <= BOUND // 2 + 1  # log of 100,000 samples to the base of 4 is 8.3


def test_a_factor_below_the_bound_of_one_sample_is_seen_in_many() -> None:
    """0.6 % too large throughout: in bfloat16 within what storing a result truncated would cost."""
    made = trainer(dtype=torch.bfloat16, asked=recipe(batch=24))
    made.train_step()
    with changed_output(made.decoder.layers[1].self_attn, lambda output: (output.float() * 1.006).to(output.dtype)):
        alarms = alarms_of_a_full_check(made)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.1", "self_attn.output")]
    assert "samples, net, in which the signed error" in alarms[0].message


def test_evidence_of_small_batches_adds_up_over_visits() -> None:
    made = trainer(dtype=torch.bfloat16, asked=recipe(batch=4))
    made.train_step()
    with changed_output(made.decoder.layers[1].self_attn, lambda output: (output.float() * 1.006).to(output.dtype)):
        visits = 1
        while not (alarms := alarms_of_a_full_check(made)):
            visits += 1
            assert visits < 10
    assert visits == (BOUND + 1 + 3) // 4
    assert alarms[0].site == "layers.1"
