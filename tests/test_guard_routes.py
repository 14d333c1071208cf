"""The choice of experts is recomputed: near-ties may fall either way, anything else is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guarded import alarms_of_a_full_check, trainer
from hypothesis import given
from hypothesis import strategies as st

from beringia.model import preset
from beringia.model.experts import Router
from beringia.train.guard.routes import judge_routes, shortfall


def routers(made: Any) -> list[Router]:
    return [module for module in made.decoder.modules() if isinstance(module, Router)]


@given(st.integers(0, 10_000), st.sampled_from([(1, 1), (4, 2), (2, 1)]))
def test_the_best_experts_of_scores_within_their_margins_are_never_missed(seed: int, groups: tuple[int, int]) -> None:
    """However scores are moved within the margins, the choice that is best for the moved ones is accepted."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(replace(preset("r2-nano"), n_group=groups[0], topk_group=groups[1]))
    scores_TE = (torch.rand(16, 8, generator=generator, dtype=torch.float64) * 5).round() / 5  # full of ties
    margins_TE = torch.full_like(scores_TE, 0.01)
    moved_TE = scores_TE + 0.01 * (2 * torch.rand(16, 8, generator=generator, dtype=torch.float64) - 1)
    assert shortfall(scores_TE, margins_TE, router.choose(moved_TE, None), *groups) <= 1.0


def test_an_expert_that_was_passed_over_though_it_is_clearly_better_is_seen() -> None:
    scores_TE = torch.tensor([[0.9, 0.8, 0.1, 0.2]], dtype=torch.float64)
    margins_TE = torch.full_like(scores_TE, 0.01)
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 1]])) == 0.0
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 3]])) == pytest.approx(0.6 / 0.02)
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 0]])) == float("inf")


@pytest.mark.parametrize("none", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1)])
@pytest.mark.parametrize("place", range(4))
def test_experts_chosen_by_what_is_no_number_are_seen(none: float, groups: tuple[int, int], place: int) -> None:
    scores_TE = torch.tensor([[0.9, 0.8, 0.1, 0.2]], dtype=torch.float64)
    scores_TE[0, place] = none
    assert shortfall(scores_TE, torch.full((1, 4), 0.01), torch.tensor([[2, 3]]), *groups) == float("inf")


def test_an_expert_of_a_group_that_was_not_among_the_best_is_seen() -> None:
    scores_TE = torch.tensor([[0.9, 0.8, 0.85, 0.1]], dtype=torch.float64)
    margins_TE = torch.full_like(scores_TE, 0.01)
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 1]]), 2, 1) == 0.0
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 2]]), 2, 1) > 1.0
    assert shortfall(scores_TE, margins_TE, torch.tensor([[0, 2]]), 1, 1) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_in_fewer_bits_than_asked_for_is_told_from_a_sound_one(dtype: torch.dtype) -> None:
    router = routers(trainer(share=None))[0]
    x_MD = torch.randn(512, router.weight.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    bias_E = router.e_score_correction_bias
    sound_MK = router.choose(router.scores(x_MD), bias_E)
    assert not judge_routes("shadow", "layers.1", router, x_MD, sound_MK).alarming
    narrow_MK = router.choose(router.scores(x_MD).to(torch.bfloat16).float(), bias_E)
    assert judge_routes("shadow", "layers.1", router, x_MD, narrow_MK).alarming


def test_wrong_experts_on_the_chip_are_an_alarm_of_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()
    router = routers(made)[1]
    own = router.choose
    monkeypatch.setattr(router, "choose", lambda scores, bias: (own(scores, bias) + 1) % router.num_experts)
    alarms = alarms_of_a_full_check(made)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.2", "mlp.experts")]
