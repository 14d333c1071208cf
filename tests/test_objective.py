"""The objective is a value: another one trains in the same loop, under the same guard, and nothing else knows which.

The other one here weighs each token (by numbers of both signs, as a policy gradient does), adds a penalty on large
normalisers (z-loss, PaLM section 5), and measures a share that it does not train on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from guarded import alarms_of_a_full_check, changed_output, changing_gradient, guard, recipe, trainer
from hypothesis import given
from hypothesis import strategies as st

from beringia.data import Batch, Stream
from beringia.errors import DataError, ModelError
from beringia.model import IGNORED, Sums, Targets
from beringia.records.events import Alarm, CheckDone
from beringia.train.cross_entropy import CrossEntropy
from beringia.train.objective import Objective, Term
from beringia.train.trainer import Trainer


@dataclass(frozen=True)
class WeightedBatch(Batch):
    weights_BT: torch.Tensor


class WeightedStream(Stream):
    def samples(self, start: int, count: int) -> WeightedBatch:
        batch = super().samples(start, count)
        rows = [
            torch.randn(batch.labels_BT.shape[1], generator=torch.Generator().manual_seed(start + n))
            for n in range(count)
        ]
        return WeightedBatch(batch.tokens_BT, batch.labels_BT, 1.0 + torch.stack(rows))


class Weighted(Objective):
    name = "weighted"
    carries = ("labels_BT", "weights_BT")
    terms = (Term("loss"), Term("z loss", 1e-3), Term("share below zero", 0.0))

    def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
        labels_BT, weights_BT = targets["labels_BT"], targets["weights_BT"]
        kept_BT = (labels_BT != IGNORED).to(weights_BT.dtype)
        normaliser_BT = logits_BTV.logsumexp(-1)
        chosen_BT = logits_BTV.gather(-1, labels_BT.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        losses_BT = weights_BT * (normaliser_BT - chosen_BT)
        return {
            "loss": (losses_BT * kept_BT).sum(),
            "z loss": (normaliser_BT.square() * kept_BT).sum(),
            "share below zero": ((losses_BT < 0).to(kept_BT.dtype) * kept_BT).sum().detach(),
        }

    def counts(self, targets: Targets) -> Mapping[str, int]:
        kept = int((targets["labels_BT"] != IGNORED).sum())
        return dict.fromkeys(("loss", "z loss", "share below zero"), kept)


def weighted_trainer(dtype: torch.dtype = torch.float32, chip: str = "cpu", **train: int) -> Trainer:
    made = trainer(chip, dtype=dtype, objective=Weighted(), asked=recipe(chip, **train))
    made.stream = WeightedStream(**vars(made.stream))
    return made


def test_a_step_takes_the_gradient_of_the_terms_weighted_means() -> None:
    made = weighted_trainer()
    (batch,) = made.batches()
    made._accumulate_gradients()
    found = made.decoder.lm_head.weight.grad.clone()
    made.decoder.zero_grad(set_to_none=True)
    logits_BTV = made.decoder(batch.tokens_BT).double()
    kept_BT = batch.labels_BT != IGNORED
    log_probabilities_BTV = logits_BTV.log_softmax(-1)
    chosen_BT = log_probabilities_BTV.gather(-1, batch.labels_BT.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    losses_BT = -batch.weights_BT * chosen_BT + 1e-3 * logits_BTV.logsumexp(-1).square()
    losses_BT[kept_BT].mean().backward()
    torch.testing.assert_close(found, made.decoder.lm_head.weight.grad)


def test_a_step_tells_every_term_by_its_name_and_the_loss_falls() -> None:
    made = weighted_trainer()
    results = [made.train_step() for _ in range(30)]
    assert [*results[0].numbers] == ["loss", "z loss", "share below zero"]
    assert results[0].loss == results[0].numbers["loss"] and results[0].mtp_loss is None
    assert 0.05 < results[0].numbers["share below zero"] < 0.3  # of draws from N(1, 1), one in six
    assert results[-1].loss < results[0].loss - 1.0
    assert made.guard is not None and not [e for e in made.guard.take_events() if isinstance(e, Alarm)]


def test_accumulated_batches_give_the_numbers_of_one() -> None:
    one, two = (weighted_trainer(accumulate=count).train_step().numbers for count in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
def test_the_guard_finds_nothing_wrong_with_sound_steps_of_another_objective(dtype: torch.dtype) -> None:
    made = weighted_trainer(dtype)
    for _ in range(3):
        made.train_step()
        assert alarms_of_a_full_check(made) == []
    assert made.guard is not None
    made.check_sites(["head"])
    (check,) = [event for event in made.guard.take_events() if event.site == "head"]
    assert isinstance(check, CheckDone) and check.value is not None and 0 < check.value < check.bound


def test_the_guard_finds_nothing_wrong_on_an_emulated_chip() -> None:
    made = weighted_trainer(torch.bfloat16, chip="emulated:ascend-910b", accumulate=2)
    for _ in range(2):
        made.train_step()
    assert alarms_of_a_full_check(made) == []
    made.chip.close()


def forget_first_tokens(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * (torch.arange(gradient.shape[-1]) > 3).to(gradient.dtype)


@DTYPES
def test_a_wrong_backward_pass_of_the_head_is_seen_under_another_objective(dtype: torch.dtype) -> None:
    made = weighted_trainer(dtype)
    made.train_step()
    with changed_output(made.decoder.lm_head, changing_gradient(forget_first_tokens)):
        alarms = alarms_of_a_full_check(made)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("head", "lm_head.input.gradient")]


@DTYPES
def test_a_loss_that_sends_back_a_wrong_gradient_is_seen_under_another_objective(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = weighted_trainer(dtype)
    made.train_step()
    sound, change = made.decoder._head, changing_gradient(forget_first_tokens)
    monkeypatch.setattr(made.decoder, "_head", lambda hidden_BTD: change(sound(hidden_BTD)))
    alarms = alarms_of_a_full_check(made)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("head", "logits.gradient")]


def test_a_guard_that_is_told_of_another_objective_than_is_trained_alarms_at_the_head() -> None:
    """So the check of the head depends on the objective, and on every target that it carries."""

    class Unweighted(Weighted):
        def sums(self, logits_BTV: torch.Tensor, targets: Targets) -> Sums:
            return super().sums(logits_BTV, {**targets, "weights_BT": torch.ones_like(targets["weights_BT"])})

    made = weighted_trainer()
    made.train_step()
    trained, made.objective = made.objective, Unweighted()
    made.guard = guard(made, 0.2)
    made.objective = trained
    assert [(alarm.site, alarm.tensor) for alarm in alarms_of_a_full_check(made)] == [("head", "logits.gradient")]


def test_a_term_that_may_be_negative_is_followed_by_no_spike_test_but_must_be_finite() -> None:
    made = weighted_trainer()
    assert made.guard is not None
    group_norms = {"head": 1.0}
    for step in range(1, 202):
        made.guard.begin_step(step)
        terms = {
            "loss": -1.0 if step % 2 else 1000.0,
            "z loss": 1.0,
            "share below zero": 0.0 if step < 201 else math.nan,
        }
        made.guard.end_step(terms, 1.0, group_norms)
    events = made.guard.take_events()
    alarms = [(event.step, event.detector, event.tensor) for event in events if isinstance(event, Alarm)]
    assert alarms == [(201, "non-finite", "share below zero")]
    assert {event.tensor for event in events if event.detector == "spike"} == {"gradient"}


def test_a_batch_that_lacks_what_the_objective_needs_is_refused_in_one_sentence() -> None:
    made = trainer(objective=Weighted())
    with pytest.raises(DataError, match="objective weighted needs weights_BT of every batch"):
        made.train_step()


def test_an_objective_with_a_term_of_a_layer_that_the_model_lacks_is_refused() -> None:
    made = trainer(share=None)
    made.decoder.model.layers = made.decoder.layers
    assert CrossEntropy.of(made.decoder, made.recipe.train) == CrossEntropy(0.0)
    with pytest.raises(ModelError, match="mtp loss"):
        Trainer(made.recipe, made.chip, made.ranks, made.decoder, CrossEntropy(0.1), made.stream)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_cross_entropy_sends_back_softmax_minus_one_at_the_label(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 3.0 * torch.randn(2, 5, 7, generator=generator, dtype=dtype)
    labels_BT = torch.randint(0, 7, (2, 5), generator=generator)
    labels_BT[0, 2] = IGNORED
    scale = torch.rand((), generator=generator)
    found_BTV = CrossEntropy().logits_gradient(logits_BTV, {"labels_BT": labels_BT}, {"loss": scale})
    expected_BTV = logits_BTV.softmax(-1) - torch.nn.functional.one_hot(labels_BT.clamp_min(0), 7)
    expected_BTV[0, 2] = 0.0
    torch.testing.assert_close(found_BTV, scale.to(dtype) * expected_BTV)
