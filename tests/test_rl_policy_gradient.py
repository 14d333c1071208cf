"""A policy gradient is an objective like another: it trains in the trainer's loop, and the guard watches it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from guarded import alarms_of_a_full_check, guard, recipe, trainer

from beringia.data import Batch, Stream
from beringia.model import IGNORED, Decoder
from beringia.rl.algorithms.algorithm import Tokens
from beringia.rl.algorithms.choose import NAMES, make_algorithm
from beringia.rl.policy_gradient import CLIPPED, ENTROPY, KL, PolicyGradient, RolloutBatch, label_logprobs
from beringia.train.objective import LOSS
from beringia.train.trainer import Trainer

MAX_TOKENS = 32


class Sampled(Stream):
    """Rows of the data as if they had been sampled, each with an advantage of its own."""

    decoder: Decoder

    def samples(self, start: int, count: int) -> Batch:
        rows = super().samples(start, count)
        width = rows.labels_BT.shape[1]
        draws = [torch.randn(3, width, generator=torch.Generator().manual_seed(start + n)) for n in range(count)]
        old_BT, corrections_BT, reference_BT = torch.stack(draws, dim=1)
        with torch.no_grad():
            logits_BTV = self.decoder.logits(rows.tokens_BT.to(device_of(self.decoder)))
        now_BT = label_logprobs(logits_BTV.float().cpu(), rows.labels_BT)
        return RolloutBatch(  # type: ignore[return-value]  # what the objective asks for, and the trainer hands on
            rows.tokens_BT,
            rows.labels_BT,
            old_logprobs_BT=now_BT + 0.05 * old_BT,
            advantages_BT=old_BT[:, :1].expand_as(now_BT),
            corrections_BT=1.0 + 0.1 * corrections_BT,
            reference_logprobs_BT=now_BT + 0.3 * reference_BT,
        )


def device_of(decoder: Decoder) -> torch.device:
    return next(decoder.parameters()).device


def policy_trainer(
    name: str = "grpo",
    *,
    kl_weight: float = 0.05,
    dtype: torch.dtype = torch.float32,
    chip: str = "cpu",
    **train: int,
) -> Trainer:
    objective = PolicyGradient(make_algorithm(name, max_tokens=MAX_TOKENS), kl_weight=kl_weight)
    made = trainer(chip, dtype=dtype, objective=objective, asked=recipe(chip, **train))
    made.stream = Sampled(**vars(made.stream))
    object.__setattr__(made.stream, "decoder", made.decoder)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_step_takes_the_gradient_of_the_algorithm_s_mean_and_of_the_distance(name: str) -> None:
    made = policy_trainer(name)
    (batch,) = made.batches()
    made._accumulate_gradients()
    found = made.decoder.lm_head.weight.grad.clone()
    made.decoder.zero_grad(set_to_none=True)
    logprobs_BT = made.decoder(batch.tokens_BT).double().log_softmax(-1)
    labels_BT, sampled_BT = batch.labels_BT, batch.labels_BT != IGNORED
    logprobs_BT = logprobs_BT.gather(-1, labels_BT.clamp_min(0).unsqueeze(-1)).squeeze(-1) * sampled_BT
    algorithm = make_algorithm(name, max_tokens=MAX_TOKENS)
    given = [getattr(batch, part).double() for part in ("old_logprobs_BT", "advantages_BT", "corrections_BT")]
    loss = algorithm.loss(Tokens(logprobs_BT, given[0], given[1], sampled_BT, given[2])).loss
    apart_BT = (batch.reference_logprobs_BT.double() - logprobs_BT) * sampled_BT
    distance = algorithm.weighted_sum(apart_BT.exp() - apart_BT - 1.0, sampled_BT)
    ((loss + 0.05 * distance) / algorithm.count(sampled_BT)).backward()
    torch.testing.assert_close(found, made.decoder.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_step_tells_loss_distance_share_clipped_and_entropy() -> None:
    made = policy_trainer()
    numbers = made.train_step().numbers
    assert [*numbers] == [LOSS, KL, CLIPPED, ENTROPY]
    assert numbers[KL] > 0.0
    assert 0.0 <= numbers[CLIPPED] < 0.05  # ratios are exp(N(0, 0.05)): beyond 1.2 or 0.8 once in some thousand
    most = math.log(made.decoder.config.vocab_size)
    assert 0.8 * most < numbers[ENTROPY] <= most  # of an untrained model
    assert [*policy_trainer(kl_weight=0.0).train_step().numbers] == [LOSS, CLIPPED, ENTROPY]


def test_the_distance_is_zero_at_the_reference_and_what_was_computed_by_hand_elsewhere() -> None:
    objective = PolicyGradient(make_algorithm("dapo", max_tokens=4), kl_weight=1.0)
    logits_BTV = torch.tensor([[[0.0, 1.0, 2.0], [0.5, 0.0, 0.0]]], dtype=torch.float64)
    labels_BT = torch.tensor([[2, IGNORED]])
    own_BT = label_logprobs(logits_BTV, labels_BT)
    zeros_BT = torch.zeros_like(own_BT)
    targets = {
        "labels_BT": labels_BT,
        "old_logprobs_BT": own_BT,
        "advantages_BT": zeros_BT,
        "corrections_BT": zeros_BT + 1.0,
        "reference_logprobs_BT": own_BT,
    }
    assert objective.sums(logits_BTV, targets)[KL].item() == 0.0
    targets["reference_logprobs_BT"] = own_BT + torch.tensor([[1.0, 5.0]]).log()
    assert objective.sums(logits_BTV, targets)[KL].item() == pytest.approx(0.0)
    targets["reference_logprobs_BT"] = own_BT + torch.tensor([[2.0, 5.0]]).log()
    assert objective.sums(logits_BTV, targets)[KL].item() == pytest.approx(2.0 - 0.6931471805599453 - 1.0)


def test_the_policy_is_the_softmax_over_the_temperature() -> None:
    objective = PolicyGradient(make_algorithm("cispo", max_tokens=4), temperature=0.5)
    logits_BTV, labels_BT = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.float64), torch.tensor([[1]])
    own_BT = label_logprobs(2.0 * logits_BTV, labels_BT)
    ones_BT = torch.ones_like(own_BT)
    targets = {
        "labels_BT": labels_BT,
        "old_logprobs_BT": own_BT,
        "advantages_BT": ones_BT,
        "corrections_BT": ones_BT,
        "reference_logprobs_BT": ones_BT,
    }
    assert objective.sums(logits_BTV, targets)[LOSS].item() == pytest.approx(-own_BT.item())


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_batches_give_the_numbers_of_one(name: str) -> None:
    one, two = (policy_trainer(name, accumulate=count).train_step() for count in (1, 2))
    assert two.numbers == pytest.approx(one.numbers, rel=1e-4, abs=1e-6)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_guard_finds_nothing_wrong_with_sound_steps_of_any_algorithm(name: str) -> None:
    made = policy_trainer(name)
    for _ in range(2):
        made.train_step()
    assert alarms_of_a_full_check(made) == []


@pytest.mark.parametrize("chip", ["cpu", "emulated:ascend-910b"])
def test_the_guard_finds_nothing_wrong_in_bfloat16(chip: str) -> None:
    made = policy_trainer(dtype=torch.bfloat16, chip=chip)
    made.train_step()
    assert alarms_of_a_full_check(made) == []
    made.chip.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_another_algorithm_than_the_guard_is_told_of_alarms_at_the_head(name: str) -> None:
    """So the head's check depends on the algorithm's formula, and not on its name."""
    made = policy_trainer(name)
    made.train_step()
    trained = made.objective
    assert isinstance(trained, PolicyGradient)
    made.objective = replace(trained, kl_weight=0.0, temperature=1.3)
    made.guard = guard(made, 0.2)
    made.objective = trained
    assert [(alarm.site, alarm.tensor) for alarm in alarms_of_a_full_check(made)] == [("head", "logits.gradient")]
