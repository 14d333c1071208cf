"""Attention at lengths that no batch had: right on a sound chip, and wrong from where a fault begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import opened
from torch._ops import OpOverload
from torch.nn import functional as F

from beringia.chips.emulated import device
from beringia.chips.open import open_chip
from beringia.qualify.lengths import Heads, probe_lengths, rows_compared
from beringia.records.certificate import OperatorCheck, ProbeResult

HEADS = Heads(width=16, values=12)
BF16 = torch.bfloat16


def probed(fault: str, directory: Path, length: int) -> dict[str, tuple[ProbeResult, OperatorCheck | None]]:
    """By direction."""
    with opened("emulated:h800", fault, directory) as chip:
        forward, backward = probe_lengths(chip, BF16, HEADS, (length,), seed=3, begin_step=lambda: chip.begin_step(1))
    return {"forward": forward, "backward": backward}


def outputs_in_float64(length: int) -> torch.Tensor:
    """torch's own, of the same draws."""
    generator = torch.Generator().manual_seed(3 * 1_000_003 + length)
    q, k, v = (
        torch.randn(1, 2, length, width, generator=generator).to(BF16).double()
        for width in (HEADS.width, HEADS.width, HEADS.values)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_attention_of_a_sound_chip_is_as_in_float64_and_names_nothing(tmp_path: Path) -> None:
    for result, check in probed("", tmp_path, 520).values():
        assert result.outcome == "passed" and check is None
        assert all(0 < measure.used < 1 for measure in result.measures if measure.name == "worst element")


def test_the_cpu_itself_is_judged_too() -> None:
    """Its tensors are not copies of what was drawn unless copies are made, and autograd wrote into those."""
    chip = open_chip("cpu")
    for result, check in probe_lengths(chip, BF16, HEADS, (520,), seed=3, begin_step=lambda: None):
        assert result.outcome == "passed" and check is None
    chip.close()


ATTENTION = torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_fused_attention_overrideable_backward.default


@pytest.mark.parametrize(
    ("missing", "found"),
    [
        (ATTENTION, [("forward", "failed", "infer")]),
        (ATTENTION_BACKWARD, [("forward", "passed", "neither"), ("backward", "failed", "train")]),
    ],
    ids=["forward", "backward"],
)
def test_attention_that_a_chip_does_not_have_is_a_finding_of_that_direction_alone(
    missing: OpOverload, found: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(func: OpOverload, kernel: device.Kernel) -> device.Kernel:
        def raising(*_: object, **__: object) -> None:
            raise NotImplementedError("no kernel for 520 tokens")

        return raising if func is missing else kernel

    with opened("emulated:h800") as chip:
        monkeypatch.setattr(device._state, "interposers", (*device._state.interposers, without))
        device._state.handlers.clear()
        results = [result for result, _ in probe_lengths(chip, BF16, HEADS, (520,), seed=3)]
    device._state.handlers.clear()
    assert [(one.subject.split(", ")[1], one.outcome, one.rules_out) for one in results] == found
    assert "raised NotImplementedError: no kernel for 520 tokens" in results[-1].summary


def test_a_mask_that_is_ignored_past_512_is_wrong_from_there_and_right_before(tmp_path: Path) -> None:
    fault = 'kind = "mask-ignored"\nlength = 512'
    result, check = probed(fault, tmp_path, 520)["forward"]
    assert result.outcome == "failed" and result.rules_out == "infer" and check is not None
    assert check.worst_element[2] >= 512 and f"position {check.worst_element[2]}" in result.summary
    # Half a unit in the last place is the most that rounding alone comes to.
    assert check.error is not None and check.error > 2.0**-9
    assert 0 < check.wrong_share < 8 / len(rows_compared(520))
    exact = outputs_in_float64(520)[check.worst_element]
    assert check.expected == pytest.approx(float(exact), rel=1e-9)
    assert check.found != pytest.approx(float(exact), rel=0.01)
    assert probed(fault, tmp_path, 512)["forward"][0].outcome == "passed"


def test_a_wrong_gradient_rules_out_training_and_not_the_forward_pass(tmp_path: Path) -> None:
    found = probed('kind = "wrong-backward"\nlength = 300\nstrength = 0.5', tmp_path, 520)
    result, check = found["backward"]
    assert found["forward"][0].outcome == "passed"
    assert result.outcome == "failed" and result.rules_out == "train"
    assert check is not None and check.direction == "backward" and check.worst_element[2] >= 300


def test_rows_are_compared_at_the_ends_and_around_powers_of_two() -> None:
    rows = set(rows_compared(2056).tolist())
    assert {0, 15, 127, 128, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 2055} <= rows
    assert len(rows) < 120 and max(rows) == 2055


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_cpu_has_effects_well_within_the_bound_at_every_seed(dtype: torch.dtype, seed: int) -> None:
    """In float32 a sum over thousands of positions rounds as often: the floor knows how many there are."""
    with opened("cpu") as chip:
        results = [result for result, _ in probe_lengths(chip, dtype, Heads(64, 32), (520, 2056), seed)]
    effects = [measure.used for result in results for measure in result.measures if measure.name == "effect"]
    assert len(effects) == 4 and max(effects) < 0.9
    assert {result.rules_out for result in results} == {"neither"}
