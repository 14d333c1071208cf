"""Gradients are clipped as asked: what a trace of AdamW's steps hardly shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SmallSubject, opened
from torch import nn
from wrong_kernels import emulated_with

from beringia.chips.cpu import Cpu
from beringia.chips.open import open_chip
from beringia.errors import Refusal
from beringia.qualify.clipping import DEPARTURE, departed_clipping, probe_clipping
from beringia.qualify.effects import RoundingNoise
from beringia.qualify.qualification import qualify_here
from beringia.qualify.reference import make_bundle
from beringia.qualify.subject import DecoderSubject, ModuleSubject
from beringia.qualify.trace import Trace, TraceExtent
from beringia.records.certificate import ProbeResult

SUBJECT = DecoderSubject("r2-nano", layers=1)
SOUND = nn.utils.clip_grad_norm_


def noise(floor: float) -> RoundingNoise:
    """Updates that rounding brings so far from float64's, relative to their size."""
    cell, nothing = ("update", "model.norm", ""), torch.zeros(0)
    exact = Trace({"update/model.norm.weight": torch.ones(4, dtype=torch.float64)}, nothing, nothing)
    return RoundingNoise(exact, {cell: 2.0 * floor}, ({cell: 2.0 * floor},), nothing, nothing)


NOISE = {torch.float32: noise(1e-5), torch.bfloat16: noise(0.03), torch.float16: noise(0.004)}


def found(chip: Any, dtype: torch.dtype) -> ProbeResult:
    result = probe_clipping(chip, SUBJECT, dtype, NOISE[dtype])
    assert result is not None
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cpu", "emulated:h100", "emulated:mi250x", "emulated:ascend-910b"])
def test_a_sound_chip_clips_as_asked(name: str, dtype: torch.dtype) -> None:
    chip = open_chip(name)
    try:
        result = found(chip, dtype)
    finally:
        chip.close()
    assert result.outcome == "passed"
    assert max(measure.used for measure in result.measures) < 0.2


@settings(max_examples=15, deadline=None)
@given(times=st.floats(0.1, 0.4) | st.floats(1.6, 1000.0))
def test_a_limit_that_is_another_than_asked_rules_training_out(times: float) -> None:
    def clip(parameters: Any, most: float) -> torch.Tensor:
        return SOUND(parameters, times * most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", clip)
        result = found(Cpu(), torch.bfloat16)
    assert (result.outcome, result.rules_out) == ("failed", "train")
    clipped = next(measure for measure in result.measures if measure.name == "clipped gradients")
    assert clipped.value == pytest.approx(abs(min(times, 100.0) - 1.0), rel=1e-3), "beyond that nothing is clipped"
    assert departed_clipping(result).quantity == DEPARTURE


@settings(max_examples=15, deadline=None)
@given(times=st.floats(0.7, 1.4))
def test_what_moves_an_update_by_less_than_rounding_does_is_no_harm(times: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, most: SOUND(parameters, times * most))
        assert found(Cpu(), torch.bfloat16).outcome == "passed"
        assert abs(times - 1.0) < 1e-3 or found(Cpu(), torch.float32).outcome == "failed"


def largest(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Clips by the largest gradient."""
    return SOUND(parameters, most, norm_type=float("inf"))


def each(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Clips every tensor by itself."""
    return torch.stack([SOUND([parameter], most) for parameter in parameters]).norm()


def the_first(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Clips all but the first."""
    return SOUND(parameters[1:], most)


def nothing(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Finds the norm and clips nothing."""
    return SOUND(parameters, float("inf"))


def to_nan(parameters: list[nn.Parameter], most: float) -> torch.Tensor:
    """Gives no number."""
    return SOUND(parameters, float("nan"))


@pytest.mark.parametrize("wrong", [largest, each, the_first, nothing, to_nan])
def test_other_ways_of_clipping_are_found(wrong: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", wrong)
    for dtype in (torch.float32, torch.bfloat16):
        assert found(Cpu(), dtype).outcome == "failed"


def test_a_model_without_weights_has_nothing_to_clip() -> None:
    module = ModuleSubject(
        "mine", nn.Identity, lambda number: {"x": torch.ones(1)}, lambda model, batch: batch["x"].sum(), lambda *_: None
    )
    assert probe_clipping(Cpu(), module, torch.float32, NOISE[torch.float32]) is None


PLAN = TraceExtent(batches=3, steps=1)


@pytest.fixture
def no_clipping_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chip, and not the CPU, clips nothing."""

    def clip(parameters: Any, most: float) -> torch.Tensor:
        own = list(parameters)
        return SOUND(own, most if own[0].device.type == "cpu" else float("inf"))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)


@pytest.mark.usefixtures("no_clipping_there")
def test_a_chip_that_leaves_out_clipping_may_serve_and_is_told_why_not_train() -> None:
    with opened("emulated:h800") as chip:
        certificate = qualify_here(chip, SmallSubject("llama"), PLAN)
    assert "clipping" in [probe.probe for probe in certificate.probes if probe.outcome == "failed"]
    assert certificate.verdict in ("infer", "inconclusive"), "with so few batches serving may be open"
    assert any("clipped" in reason for reason in certificate.reasons)


def test_a_chip_without_the_operator_of_the_norm_may_not_train_and_is_told_which() -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no norm of lists here")

    norms = (torch.ops.aten._foreach_norm.Scalar, torch.ops.aten.linalg_vector_norm.default)
    with emulated_with(dict.fromkeys(norms, missing)) as chip:
        certificate = qualify_here(chip, SmallSubject("llama"), PLAN)
    assert certificate.verdict in ("infer", "inconclusive")
    assert any("does not have it (no norm of lists here)" in reason for reason in certificate.reasons)


def test_weights_that_are_not_trained_are_not_clipped() -> None:
    def make() -> nn.Module:
        model = nn.Linear(8, 8)
        model.frozen = nn.Parameter(torch.full((100,), 1e6), requires_grad=False)
        model.codes = nn.Parameter(torch.ones(5, dtype=torch.int8), requires_grad=False)
        return model

    module = ModuleSubject("mine", make, lambda number: {}, lambda model, batch: model.bias.sum(), lambda *_: None)
    result = probe_clipping(Cpu(), module, torch.float32, NOISE[torch.float32])
    assert result is not None and result.outcome == "passed" and "of norm 1e+" not in result.summary


@pytest.mark.usefixtures("no_clipping_there")
def test_nor_is_it_a_reference(tmp_path: Path) -> None:
    with opened("emulated:h800") as chip, pytest.raises(Refusal, match="is not sound: .*clipped to"):
        make_bundle(SmallSubject("llama"), chip, torch.bfloat16, tmp_path / "x.bundle", plan=PLAN, limit_bytes=0)
    assert not (tmp_path / "x.bundle").exists()
