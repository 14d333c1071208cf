"""Faults of the foreign benchmark strike what they say, where they are planted, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import opened
from torch.nn import functional as F

from benchmarks.foreign import clean
from benchmarks.foreign.faults import ALL, FIRST, SECOND, Fault, Kind, Strength, coarse, drawn, truncated
from benchmarks.qualify_foreign import right_verdicts, severity

KINDS = {kind.name: kind for kind in (*FIRST, *SECOND)}
SEVERE = Strength(severe=True, draw=0.5)


def fault(kind: Kind, chip: str) -> Fault:
    return Fault(kind, 0, "grouped", "float32", chip, SEVERE)


def test_a_fault_of_the_emulated_device_strikes_while_it_is_planted() -> None:
    with opened("emulated:exact") as chip:
        row, matrix = (torch.ones(shape, device=chip.device) for shape in ((1, 4), (4, 3)))
        with fault(KINDS["single_row_too_large"], chip.name).planted(chip):
            struck = (row @ matrix).cpu()
            spared = (matrix.T @ matrix).cpu()
        assert torch.allclose(struck, torch.full((1, 3), 4.4))
        assert torch.equal(spared, torch.full((3, 3), 4.0))
        assert torch.equal((row @ matrix).cpu(), torch.full((1, 3), 4.0))


def test_a_replaced_kernel_of_the_cpu_leaves_float64_alone_and_is_gone_afterwards() -> None:
    x = torch.linspace(-3, 3, 50)
    sound = F.silu(x)
    with opened("cpu") as chip, fault(KINDS["coarse_silu"], "cpu").planted(chip):
        struck, exact = F.silu(x), F.silu(x.double())
    assert torch.equal(struck, coarse(sound, 5)) and not torch.equal(struck, sound)
    assert torch.equal(exact, F.silu(x.double())) and torch.equal(F.silu(x), sound)


def test_every_kind_is_named_once_and_both_halves_are_large() -> None:
    assert len(KINDS) == len(FIRST) + len(SECOND) >= 40
    assert min(len(FIRST), len(SECOND)) >= 20
    faults = drawn([*FIRST, *SECOND], 3)
    assert len({one.name for one in faults}) == len(faults) >= 120
    assert {one.model for one in faults} == set(ALL) and {one.strength.severe for one in faults} == {True, False}
    assert [one.name for one in drawn(FIRST, 2)] == [one.name for one in drawn(FIRST, 2)], "the same every time"


def test_sound_variants_are_many_and_mostly_of_trained_models() -> None:
    names = [variant.name for variant in clean.variants()]
    assert len(set(names)) == len(names) >= 250
    assert sum(variant.model != "r2-nano" for variant in clean.variants()) >= 150


@given(st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False), st.integers(2, 20))
def test_a_coarse_number_is_within_half_of_its_last_bit(number: float, bits: int) -> None:
    x = torch.tensor(number)
    assert abs(float(coarse(x, bits)) - float(x)) <= 2.0**-bits * abs(float(x))


@given(st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False))
def test_a_truncated_number_is_never_the_larger(number: float) -> None:
    x = torch.tensor(number)
    cut = truncated(x, torch.bfloat16).float()
    assert 0 <= float(cut) / float(x) <= 1.0 if number else float(cut) == 0.0


@pytest.mark.parametrize(
    ("inference", "training", "how", "right"),
    [
        (9.0, 9.0, "clear", ("unfit",)),
        (1.0, 9.0, "clear", ("infer",)),
        (3.0, 9.0, "clear", ("infer", "unfit")),
        (3.0, 1.0, "moderate", ("infer", "unfit", "inconclusive")),
        (1.9, 1.9, "harmless", ("train", "inconclusive")),
    ],
)
def test_the_right_verdict_follows_from_harm(inference: float, training: float, how: str, right: tuple[str]) -> None:
    result = {"harm": {"inference": inference, "training": training}}
    assert severity(result) == how and right_verdicts(result) == right
