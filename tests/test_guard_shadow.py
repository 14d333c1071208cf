"""The layer shadow is silent on sound arithmetic and sees what is wrong, where it is wrong.

Faults are planted by hooks inside the model, which the guard cannot know of.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import alarms_of_a_full_check, changed_output, changing_gradient, recipe, trainer

from beringia.model import attention
from beringia.records.events import CheckDone
from beringia.train.guard.check import Step
from beringia.train.guard.evidence import BOUND
from beringia.train.guard.shadow import MARGIN
from beringia.train.trainer import Trainer

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def trained(request: pytest.FixtureRequest) -> Trainer:
    made = trainer(dtype=request.param)
    for _ in range(8):
        made.train_step()
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_sound_arithmetic_stays_below_half_of_every_bound(dtype: torch.dtype) -> None:
    made = trainer(dtype=dtype)
    assert made.guard is not None
    for _ in range(3):
        assert alarms_of_a_full_check(made) == []
        made.train_step()
    made.check_sites(made.guard.sites)
    checks = [event for event in made.guard.take_events() if isinstance(event, CheckDone)]
    shadows = [event for event in checks if event.detector == "layer-shadow"]
    assert len(shadows) >= len(made.guard.sites)
    assert all(event.value is not None and event.value <= 0.5 * event.bound for event in shadows)
    assert any(event.value is not None and event.value > 0.01 * event.bound for event in shadows)


def test_a_first_layer_whose_gradients_are_half_wrong_is_seen_under_a_normal_loss(trained: Trainer) -> None:
    """Ascend/pytorch issue 107: forward sound, gradients of the first layer 50 % off."""
    noise = torch.Generator().manual_seed(1)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        error = torch.randn(gradient.shape, generator=noise).to(gradient.dtype)
        return gradient + 0.5 * gradient.norm() / error.norm() * error

    change = changing_gradient(spoil)
    with changed_output(trained.decoder.layers[0].self_attn, change):
        alarms = alarms_of_a_full_check(trained)
    assert [alarm.site for alarm in alarms] == ["layers.0"]
    assert alarms[0].tensor == "self_attn.input.gradient"
    assert alarms[0].value is not None and alarms[0].value > 5 * alarms[0].bound


def test_what_is_wrong_past_a_length_is_seen_in_the_longest_sample_whichever_is_drawn() -> None:
    made = trainer()
    assert made.guard is not None
    attention, lengths_B = made.decoder.layers[1].self_attn, torch.zeros(0)

    def note(gradient_BTD: torch.Tensor) -> torch.Tensor:
        nonlocal lengths_B
        learned_BT = gradient_BTD.ne(0).any(-1)
        lengths_B = (learned_BT * torch.arange(1, learned_BT.shape[1] + 1)).amax(-1)
        return gradient_BTD

    def spoil(gradient_BTD: torch.Tensor) -> torch.Tensor:
        wrong_BTD = gradient_BTD.clone()
        wrong_BTD[:, drawn_length:] *= 1.5
        return wrong_BTD

    tried = 0
    while tried < 3:
        made.train_step()
        with changed_output(attention, changing_gradient(note)):
            assert alarms_of_a_full_check(made) == []
        drawn_length = int(lengths_B[Step(made.step + 1, made.recipe.seed).draw("sample") % made.recipe.train.batch])
        if drawn_length < lengths_B.max():
            with changed_output(attention, changing_gradient(spoil)):
                assert [alarm.site for alarm in alarms_of_a_full_check(made)] == ["layers.1"]
            tried += 1


def attend_ignoring_the_mask(length: int) -> Any:
    """`attend_in_parts` that lets queries past `length` see everything."""

    def attend(q_BTNH: torch.Tensor, q_BTNP: torch.Tensor, *keys_and_values: Any) -> torch.Tensor:
        *keys_and_values, scale = keys_and_values
        dtype = q_BTNH.dtype
        q_BTNH, q_BTNP, k_BSNH, k_BSP, v_BSNV = (x.float() for x in (q_BTNH, q_BTNP, *keys_and_values))
        shared_BNTS = torch.einsum("btnp,bsp->bnts", q_BTNP, k_BSP)
        scores_BNTS = scale * (torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) + shared_BNTS)
        seen_TS = torch.ones(scores_BNTS.shape[-2:], dtype=torch.bool).tril()
        seen_TS[length:] = True
        weights_BNTS = scores_BNTS.masked_fill(~seen_TS, -torch.inf).softmax(-1)
        return torch.einsum("bnts,bsnv->btnv", weights_BNTS, v_BSNV).flatten(2).to(dtype)

    return attend


@pytest.mark.parametrize("length", [16, 10_000])
def test_a_mask_ignored_past_a_length_is_seen_in_attention(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    assert trained.guard is not None
    layer = trained.decoder.layers[1]
    real = attention.attend_in_parts
    wrong = attend_ignoring_the_mask(length)
    # Wrong on the chip only: the replay's attention is another module, whose calls stay as they are.
    layer.self_attn.register_forward_pre_hook(lambda *_: monkeypatch.setattr(attention, "attend_in_parts", wrong))
    layer.self_attn.register_forward_hook(lambda *_: monkeypatch.setattr(attention, "attend_in_parts", real))
    alarms = alarms_of_a_full_check(trained)
    layer.self_attn._forward_pre_hooks.clear()
    layer.self_attn._forward_hooks.clear()
    if length == 16:
        assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.1", "self_attn.output")]
    else:
        assert alarms == []


def test_a_backward_wrong_past_a_length_is_seen(trained: Trainer) -> None:
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        wrong = gradient.clone()
        wrong[:, 16:] -= 0.8 * gradient[:, 15:-1]
        return wrong

    with changed_output(trained.decoder.layers[2].mlp, changing_gradient(spoil)):
        alarms = alarms_of_a_full_check(trained)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.2", "mlp.input.gradient")]


def test_a_factor_within_the_noise_of_single_elements_is_seen_by_its_sign() -> None:
    """2 % too large throughout: in bfloat16 no element's error is remarkable, their common sign is."""
    made = trainer(dtype=torch.bfloat16)
    with changed_output(made.decoder.layers[1].self_attn, lambda output: output * 1.02):
        alarms = alarms_of_a_full_check(made)
    assert [alarm.site for alarm in alarms] == ["layers.1"]
    assert "signed error" in alarms[0].message


def test_saturation_is_seen(trained: Trainer) -> None:
    def saturate(output: torch.Tensor) -> torch.Tensor:
        limit = 0.5 * output.detach().abs().max().item()
        return output.clamp(-limit, limit)

    with changed_output(trained.decoder.layers[0].mlp, saturate):
        alarms = alarms_of_a_full_check(trained)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.0", "mlp.output")]


def test_one_wrong_element_in_a_layer_is_seen_by_the_largest_error(trained: Trainer) -> None:
    def strike(output: torch.Tensor) -> torch.Tensor:
        struck = output.clone()
        struck[:, 7, 3] += 3 * output.detach().square().mean().sqrt()
        return struck

    with changed_output(trained.decoder.layers[1].mlp, strike):
        alarms = alarms_of_a_full_check(trained)
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("layers.1", "mlp.output")]


@pytest.mark.parametrize(
    ("part", "site", "tensor"),
    [
        ("norm", "head", "norm.output"),
        ("lm_head", "head", "lm_head.output"),
        ("layers.3.enorm", "layers.3", "enorm.output"),
        ("layers.3.shared_head.norm", "layers.3", "shared_head.norm.output"),
        ("embed_tokens", "embed_tokens", "output"),
    ],
)
def test_parts_beside_the_layers_have_their_shadow_too(trained: Trainer, part: str, site: str, tensor: str) -> None:
    module = trained.decoder.lm_head if part == "lm_head" else trained.decoder.model.get_submodule(part)

    def turn(output: torch.Tensor) -> torch.Tensor:
        return output.roll(1, -1) if output.requires_grad else output

    with changed_output(module, turn):
        alarms = alarms_of_a_full_check(trained)
    assert (site, tensor) in [(alarm.site, alarm.tensor) for alarm in alarms]


def test_a_loss_that_sends_back_a_wrong_gradient_is_seen(trained: Trainer) -> None:
    with changed_output(trained.decoder.lm_head, changing_gradient(lambda gradient: gradient * 1.2)):
        alarms = alarms_of_a_full_check(trained)
    assert ("head", "lm_head.input.gradient") in [(alarm.site, alarm.tensor) for alarm in alarms] or (
        "head",
        "logits.gradient",
    ) in [(alarm.site, alarm.tensor) for alarm in alarms]


def test_an_embedding_gradient_that_loses_positions_is_seen(trained: Trainer) -> None:
    embedding = trained.decoder.model.embed_tokens
    handle = embedding.weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) > 5).unsqueeze(1))
    alarms = alarms_of_a_full_check(trained)
    handle.remove()
    assert [(alarm.site, alarm.tensor) for alarm in alarms] == [("embed_tokens", "weight.gradient")]


def test_a_product_on_the_chip_in_fewer_bits_than_asked_for_is_seen() -> None:
    """float32 asked for, operands cut to ten bits of fraction as TF32 and HF32 have: a silent fallback."""
    made = trainer(dtype=torch.float32)

    def cut(output: torch.Tensor) -> torch.Tensor:
        return (output.view(torch.int32) & -8192).view(torch.float32) + 0 * output

    with changed_output(made.decoder.layers[1].self_attn, cut):
        assert [alarm.site for alarm in alarms_of_a_full_check(made)] == ["layers.1"]


def test_what_exceeds_its_bound_by_little_alarms_when_other_samples_agree() -> None:
    made = trainer(dtype=torch.float32)
    assert made.guard is not None
    made.train_step()
    drawn = Step(made.step + 1, made.recipe.seed).draw("sample") % made.recipe.train.batch

    def alarm_at(factor: float, samples: slice) -> float | None:
        """How much of its bound the first alarm used, when the output of these samples' experts is off by a factor."""

        def change(output_BTD: torch.Tensor) -> torch.Tensor:
            changed_BTD = output_BTD.clone()
            changed_BTD[samples] *= 1.0 + factor
            return changed_BTD

        with changed_output(made.decoder.layers[1].mlp, change):
            alarms = alarms_of_a_full_check(made)
        return None if not alarms or alarms[0].value is None else alarms[0].value / alarms[0].bound

    factor = 1e-7
    while (used := alarm_at(factor, slice(None))) is None:
        factor *= 1.2
    assert 1.0 < used < MARGIN
    only = slice(drawn, drawn + 1)
    assert alarm_at(factor, only) is None
    assert alarm_at(10.0 * factor, only) is not None


@pytest.mark.slow
def test_a_small_excess_of_the_only_sample_is_evidence_and_an_alarm_once_it_has_come_often() -> None:
    def visits_until_an_alarm(factor: float, most: int) -> int | None:
        made = trainer(dtype=torch.float32, asked=recipe(batch=1))
        made.train_step()
        with changed_output(made.decoder.layers[1].mlp, lambda output_BTD: output_BTD * (1.0 + factor)):
            return next((visit for visit in range(1, most + 1) if alarms_of_a_full_check(made)), None)

    at_once = 1e-6
    while visits_until_an_alarm(at_once, 1) is None:
        at_once *= 1.2
    # What alarms alone is `MARGIN` times its bound or more.
    assert 1 < (visits_until_an_alarm(0.8 * at_once, 2 * BOUND) or 0) <= 2 * BOUND
