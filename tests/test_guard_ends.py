"""What a step was given, the loss, gradients at the two ends and the clipping are recomputed: sound ones pass, wrong
ones are seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from guarded import alarms_of_a_full_check, changed_output, steps_until_alarm, trainer
from torch import nn

from beringia.records.events import Alarm
from beringia.train.guard.check import GRADIENT
from beringia.train.guard.checks.clipping import Unclipped, judge_clipping
from beringia.train.guard.products import ProductLog, judge_sum
from beringia.train.trainer import Trainer


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def trained(request: pytest.FixtureRequest) -> Trainer:
    made = trainer(dtype=request.param)
    for _ in range(4):
        made.train_step()
    return made


def places(alarms: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.site, alarm.tensor) for alarm in alarms]


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """Another last element."""
    other = tensor.clone()
    other[-1, -1] = (other[-1, -1] + 1) % 3 + 3
    return other


def test_a_token_that_changed_on_its_way_to_the_chip_is_seen(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = trained.decoder
    monkeypatch.setattr(trained, "_forward", lambda tokens_BT, **options: decoder(changed(tokens_BT), **options))
    assert places(alarms_of_a_full_check(trained)) == [("embed_tokens", "tokens")]


def test_a_label_that_changed_on_its_way_to_the_chip_is_seen(trained: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(tokens_BT: torch.Tensor, *, targets: Any, **options: Any) -> Any:
        return trained.decoder(tokens_BT, targets={"labels_BT": changed(targets["labels_BT"])}, **options)

    monkeypatch.setattr(trained, "_forward", forward)
    assert places(alarms_of_a_full_check(trained)) == [("head", "labels_BT")]


def test_positions_that_changed_on_their_way_to_the_chip_are_seen(trained: Trainer) -> None:
    def shift(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0], tuple(table.roll(1, 0) for table in inputs[1]), *inputs[2:])

    handle = trained.decoder.layers[1].register_forward_pre_hook(shift)
    alarms = alarms_of_a_full_check(trained)
    handle.remove()
    assert places(alarms) == [("layers.1", "positions")]


def test_a_loss_that_is_a_thousandth_too_large_is_seen(trained: Trainer) -> None:
    with changed_output(trained.decoder, lambda sums: {name: 1.001 * value for name, value in sums.items()}):
        alarms = alarms_of_a_full_check(trained)
    assert [alarm.site for alarm in alarms] == ["head"]
    assert "mtp loss" in alarms[0].message


@pytest.mark.parametrize(
    ("name", "site", "tensor"),
    [
        ("lm_head.weight", "head", "lm_head.weight.gradient"),
        ("model.norm.weight", "head", "norm.weight.gradient"),
        ("model.layers.3.enorm.weight", "layers.3", "enorm.weight.gradient"),
        ("model.layers.3.eh_proj.weight", "layers.3", "eh_proj.weight.gradient"),
        ("model.layers.3.shared_head.norm.weight", "layers.3", "shared_head.norm.weight.gradient"),
    ],
)
def test_a_weights_gradient_that_is_wrong_in_part_is_seen(trained: Trainer, name: str, site: str, tensor: str) -> None:
    weight = trained.decoder.get_parameter(name)
    handle = weight.register_hook(lambda gradient: torch.cat((0.8 * gradient[:16], gradient[16:])))
    alarms = alarms_of_a_full_check(trained)
    handle.remove()
    assert places(alarms) == [(site, tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_over_rows_is_held_against_its_terms(dtype: torch.dtype) -> None:
    terms = torch.randn(8, 300, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with ProductLog() as log:
        terms.sum((0, 1))
    (added,) = log.sums
    assert 0.0 < judge_sum("layers.0", added).used < 1.0
    without_the_last = terms[:-1].sum((0, 1))
    assert judge_sum("layers.0", replace(added, result=without_the_last)).alarming


def clipped(factor: float, *, norm: float = 2.0, limit: float = 1.0) -> Unclipped:
    before = torch.linspace(-1.0, 1.0, 100, dtype=torch.float64)
    after = (before.float() * (factor * min(1.0, limit / (norm + 1e-6)))).double()
    return Unclipped("layers.0", norm, 100, nn.Parameter(before), 0, before, after)


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_gradients_that_were_clipped_by_their_norm_pass_and_others_do_not(norm: float) -> None:
    def tensors(look: Unclipped, told: float, of_all: float) -> list[str]:
        findings = judge_clipping(look, of_all, {f"{GRADIENT} of layers.0": told}, 1.0)
        return [finding.tensor for finding in findings if finding.alarming]

    assert tensors(clipped(1.0, norm=norm), norm, norm) == []
    assert tensors(clipped(1.001, norm=norm), norm, norm) == ["clipped gradient"]
    assert tensors(clipped(1.0, norm=norm), 1.001 * norm, 1.001 * norm)[0] == "gradient norm"
    assert tensors(clipped(1.0, norm=norm), norm, 1.001 * norm)[0] == "gradient norm"
    assert judge_clipping(clipped(1.0), math.nan, {f"{GRADIENT} of layers.0": 1.0}, 1.0) == []


@pytest.mark.parametrize("own", [math.nan, math.inf])
def test_a_norm_that_the_chip_tells_as_a_number_though_a_gradient_is_none_is_beyond_its_bound(own: float) -> None:
    findings = judge_clipping(clipped(1.0, norm=own), 2.0, {f"{GRADIENT} of layers.0": 2.0}, 1.0)
    assert findings[0].alarming and findings[0].tensor == "gradient norm"


def scaled(clip: Callable[[], tuple[torch.Tensor, torch.Tensor]], factor: float) -> Any:
    def wrong() -> tuple[torch.Tensor, torch.Tensor]:
        norm, norms_G = clip()
        return norm * factor, norms_G

    return wrong


def test_a_norm_that_is_wrong_in_a_run_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(share=0.5)
    assert steps_until_alarm(made, 20) == (None, [])
    monkeypatch.setattr(made.clipping, "clip", scaled(made.clipping.clip, 1.01))
    _, alarms = steps_until_alarm(made, 100)
    assert [(alarm.detector, alarm.site, alarm.tensor) for alarm in alarms] == [("clipping", "model", "gradient norm")]
