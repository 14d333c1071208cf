"""Gradients are clipped as asked: what a trace of AdamW's steps hardly shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from beringia.chips.cpu import Cpu
from beringia.chips.open import open_chip
from beringia.qualify.clipping import DEPARTURE, departed_clipping, probe_clipping
from beringia.qualify.subject import DecoderSubject, ModuleSubject
from beringia.records.certificate import ProbeResult

SUBJECT = DecoderSubject("r2-nano", layers=1)
SOUND = nn.utils.clip_grad_norm_


def found(chip: Any, dtype: torch.dtype) -> ProbeResult:
    result = probe_clipping(chip, SUBJECT, dtype)
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
@given(times=st.floats(0.1, 0.9) | st.floats(1.1, 100.0))
def test_a_limit_that_is_another_than_asked_rules_training_out(times: float) -> None:
    def clip(parameters: Any, most: float) -> torch.Tensor:
        return SOUND(parameters, times * most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", clip)
        result = found(Cpu(), torch.bfloat16)
    assert (result.outcome, result.rules_out) == ("failed", "train")
    clipped = next(measure for measure in result.measures if measure.name == "clipped gradients")
    assert clipped.value == pytest.approx(abs(min(times, 4.0) - 1.0), rel=1e-3), "beyond four times nothing is clipped"
    assert departed_clipping(result).quantity == DEPARTURE


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
    assert probe_clipping(Cpu(), module, torch.float32) is None
