"""A training that diverges is told apart from a chip that computes wrongly: on a sound chip nothing is crossed from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from guarded import changed_output, recipe, trainer
from histories import last_decision, next_decision, play, situation_of, step, trusted, written
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import beringia, of_kind, small_recipe, write_recipe

from beringia.model import fusing_attention, load_model
from beringia.processes.ranks import Ranks
from beringia.records.events import DIVERGENCE, Alarm
from beringia.records.recipe import Recipe
from beringia.supervise.next_order import order_for
from beringia.train import divergence as divergence_module
from beringia.train import session as session_module
from beringia.train.divergence import Divergence, _agreed, _limits, beyond_judging, divergence
from beringia.train.guard.check import GRADIENT
from beringia.train.session import Session
from beringia.train.state import live_tensors
from beringia.train.trainer import Trainer


def nothing() -> None:
    pass


def step_beyond_judging(made: Trainer, steps: int = 40) -> int | None:
    """Train until a step is beyond judging, and put back the state before it. Returns the step."""
    for _ in range(steps):
        before = {name: tensor.detach().clone() for name, tensor in live_tensors(made.decoder, made.optimizer).items()}
        at = made.step, made.cursor
        result = made.train_step()
        if beyond_judging(made, dict(result.numbers) | {GRADIENT: result.gradient_norm}) is not None:
            with torch.no_grad():
                for name, tensor in live_tensors(made.decoder, made.optimizer).items():
                    tensor.copy_(before[name])
            made.step, made.cursor = at
            return result.step
    return None


@settings(max_examples=8, deadline=None)
@given(
    rate=st.floats(1.0, 30.0).map(lambda exponent: 10.0**exponent),
    decay=st.sampled_from([0.0, 0.01, 1.0]),
    clip=st.sampled_from([1.0, 1e30]),
    chip=st.sampled_from(["cpu", "emulated:h800"]),
)
def test_whatever_makes_a_training_diverge_is_found_on_the_cpu_as_well(
    rate: float, decay: float, clip: float, chip: str
) -> None:
    asked = recipe(chip, learning_rate=rate, weight_decay=decay, clip=clip, warmup_steps=2)
    made = trainer(chip, share=None, asked=asked)
    with closing(made.chip):
        if step_beyond_judging(made) is not None:
            assert divergence(made, nothing) is not None


@contextmanager
def numbers_that_are_none(made: Trainer) -> Iterator[None]:
    """A chip on which the second layer's output has a NaN."""

    def spoil(output_BTD: torch.Tensor) -> torch.Tensor:
        mask_BTD = torch.zeros_like(output_BTD)
        mask_BTD[-1, -1, 0] = math.nan
        return output_BTD + mask_BTD

    with changed_output(made.decoder.model.layers[1], spoil):
        yield


def test_what_only_the_chip_gives_is_the_chips() -> None:
    made = trainer(share=None)
    made.train_step()
    with numbers_that_are_none(made):
        assert divergence(made, nothing) is None
    assert divergence(made, nothing) is None


def test_asking_changes_nothing_of_the_run() -> None:
    asked, other = trainer(share=None), trainer(share=None)
    for made in (asked, other):
        made.train_step()
    divergence(asked, nothing)
    assert asked.train_step().numbers == other.train_step().numbers


def test_one_weight_that_is_no_number_is_found_with_the_value_of_a_single_sample() -> None:
    made = trainer(share=None)
    with torch.no_grad():
        made.decoder.lm_head.weight[0, 0] = math.nan
    found = divergence(made, nothing)
    assert found is not None and math.isnan(found.value)


def test_a_loss_far_worse_than_guessing_is_beyond_judging_and_a_bad_one_is_not() -> None:
    made = trainer(share=None)
    guess = math.log(made.decoder.config.vocab_size)
    good = {"loss": 3.0 * guess, "mtp loss": 3.0 * guess, GRADIENT: 1e6}
    assert beyond_judging(made, good) is None
    assert beyond_judging(made, good | {"loss": 11.0 * guess}) is not None
    assert beyond_judging(made, good | {GRADIENT: math.inf}) is not None


QUIET = trainer(share=None)


def answers_of_ranks(owns: list[Divergence | None], monkeypatch: pytest.MonkeyPatch) -> list[Divergence | None]:
    """What each rank is told where these are the ranks' own findings."""
    made = QUIET
    told: list[torch.Tensor] = []

    def answers() -> list[Divergence | None]:
        found = []
        for rank, own in enumerate(owns):
            made.ranks = Ranks(rank=rank, local=rank, count=len(owns))
            found.append(_agreed(own, made, _limits(made)))
        return found

    monkeypatch.setattr(divergence_module, "sum_of_host_values", lambda values, device: told.append(values) or values)
    answers()
    monkeypatch.setattr(divergence_module, "sum_of_host_values", lambda values, device: torch.stack(told).sum(0))
    return answers()


@given(st.lists(st.none() | st.sampled_from([50.0, 1e9, math.inf, math.nan]), min_size=1, max_size=4))
def test_all_ranks_are_told_the_same_so_that_they_do_the_same(losses: list[float | None]) -> None:
    limit = _limits(QUIET)["loss"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        owns = [None if loss is None else Divergence("loss", loss, limit) for loss in losses]
        answers = answers_of_ranks(owns, monkeypatch)
    beyond = [loss for loss in losses if loss is not None]
    if not beyond:
        assert answers == [None] * len(losses)
        return
    assert len({repr(answer) for answer in answers}) == 1
    answer = answers[0]
    assert answer is not None and answer.limit == limit and not answer.layers_judged
    largest = math.nan if any(map(math.isnan, beyond)) else max(beyond)
    assert math.isnan(answer.value) if math.isnan(largest) else answer.value == pytest.approx(largest)


@pytest.mark.parametrize("name", ["loss", GRADIENT])
def test_without_a_guard_a_divergence_is_told_with_no_layer_judged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of a run may be taken away while a step of it is in doubt."""
    made = trainer(share=None)
    told: list[Alarm] = []
    session = Session.__new__(Session)
    session._trainer, session.ranks, session.chip = made, made.ranks, made.chip
    session.order = SimpleNamespace(doubted_steps=(made.step + 1,))  # type: ignore[assignment]
    session.channel = SimpleNamespace(beat=nothing, event=told.append)  # type: ignore[assignment]
    found = Divergence(name, math.inf, _limits(made)[name])
    monkeypatch.setattr(session_module, "divergence", lambda trainer, beat: found)
    assert session._diverges()
    assert [(event.detector, event.tensor) for event in told] == [(DIVERGENCE, name)]


def test_one_kernel_of_attention_on_the_cpu_is_the_same_attention() -> None:
    decoder = load_model("r2-nano", seed=1)
    tokens_BT = torch.arange(24).view(2, 12) % decoder.config.vocab_size
    plain = decoder(tokens_BT)
    with fusing_attention(decoder):
        fused = decoder(tokens_BT)
    assert not torch.equal(plain, fused) and torch.allclose(plain, fused, atol=1e-5)


# What is decided


def none(number: int, detector: str = "non-finite") -> Alarm:
    return Alarm(step=number, detector=detector, site="model", tensor="loss", value=None, bound=1.0, message="nan")


def test_a_step_without_numbers_is_taken_again_under_doubt_and_then_given_up_or_crossed_from() -> None:
    begun = [written(50), trusted(50), step(90), none(90), "decide"]
    history = play(*begun)
    assert (last_decision(history).action, last_decision(history).to_step) == ("rollback", 50)
    assert situation_of(history).doubted == {90}
    diverged, again = play(*begun, none(90, DIVERGENCE), "decide"), play(*begun, step(90), none(90), "decide")
    assert last_decision(diverged).action == "stop" and "learning_rate" in last_decision(diverged).reason
    assert (last_decision(again).action, last_decision(again).to_chip) == ("cross", "second")
    assert situation_of(again).doubted == set()


def test_the_worker_that_goes_back_is_told_of_the_doubted_step() -> None:
    asked = recipe()
    history = play(written(50), trusted(50), step(90), none(90), "decide")
    situation = situation_of(history)
    situation.chip = "first"
    assert order_for(asked, situation, "run", epoch=2).doubted_steps == (90,)


def test_where_no_rollback_is_allowed_there_is_one_to_find_out() -> None:
    history = play(written(50), trusted(50), step(90), none(90))
    strict = Recipe.model_validate(recipe().model_dump() | {"supervise": {"rollbacks": 0}})
    decision = next_decision(history, strict)
    assert decision is not None and decision.action == "rollback"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["cpu", "emulated:h800"])
@pytest.mark.parametrize(("rate", "decay"), [(100.0, 0.1), (1e5, 0.01)])
def test_a_run_that_diverges_is_given_up_on_its_first_chip(
    tmp_path: Path, chip: str, rate: float, decay: float
) -> None:
    chips = {"first": {"use": chip}, "second": {"use": "cpu"}}
    train = {"prefer": ["first", "second"], "learning_rate": rate, "weight_decay": decay, "checkpoint_every": 5}
    run = tmp_path / "run"
    done = beringia("train", str(write_recipe(tmp_path, small_recipe(chips=chips, train=train))), "--out", str(run))
    assert done.returncode == 3 and "diverges" in done.stderr, done.stderr
    assert [decision.action for decision in of_kind(run, "decision")] == ["start", "rollback", "stop"]
    assert of_kind(run, "alarm")[-1].detector == DIVERGENCE
