"""Outputs judged alone, for software that infers and does not train."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from beringia.qualify.effects import RoundingNoise, judge_outputs, judge_trace
from beringia.qualify.trace import Trace

NAMES = ("outputs/0", "outputs/1", "decode", "gradient/0/model.layers.0.weight", "update/model.layers.0.weight")


def trace(error: float, seed: int = 0) -> Trace:
    """The same numbers in every trace, with errors of this size."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (99, seed))

    def numbers(count: int) -> torch.Tensor:
        exact = torch.randn(count, generator=fixed, dtype=torch.float64)
        return exact + error * torch.randn(count, generator=drawn, dtype=torch.float64)

    return Trace({name: numbers(50) for name in NAMES}, numbers(2), numbers(2))


def outputs(found: Trace) -> Mapping[str, torch.Tensor]:
    return {name: sketch for name, sketch in found.sketches.items() if name.startswith("outputs/")}


NOISE = RoundingNoise.of(trace(0.0), trace(1e-3, 1), [trace(1e-3, seed) for seed in (2, 3)])


@pytest.mark.parametrize(("error", "outcome"), [(1e-3, "passed"), (4e-3, "failed")])
def test_outputs_alone_are_judged_as_in_a_whole_trace(error: float, outcome: str) -> None:
    found = trace(error, 7)
    (whole,) = (result for result in judge_trace(NOISE, found) if result.subject == "outputs")
    assert judge_outputs(NOISE, outputs(found)) == whole and whole.outcome == outcome


def test_outputs_of_a_missing_batch_are_refused() -> None:
    kept = {"outputs/0": NOISE.exact.sketches["outputs/0"]}
    assert judge_outputs(NOISE, kept).outcome == "failed"
    assert judge_outputs(NOISE, kept | {"outputs/1": torch.full((50,), torch.nan)}).outcome == "failed"


# ---- batches that are not alike

BATCHES = 6
TIPPED = "3"
"""The batch in which roundings tip something over."""


def batches(errors: Mapping[str, float], seed: int = 0) -> Trace:
    """One gradient in six batches, with errors of these sizes (`""`: in all others)."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (99, seed))
    sketches = {}
    for batch in map(str, range(BATCHES)):
        exact = torch.randn(50, generator=fixed, dtype=torch.float64)
        error = torch.randn(50, generator=drawn, dtype=torch.float64)
        sketches[f"gradient/{batch}/weight"] = exact + errors.get(batch, errors[""]) * error
    return Trace(sketches, torch.zeros(BATCHES), torch.zeros(BATCHES))


TIPPING = RoundingNoise.of(
    batches({"": 0.0}),
    batches({"": 1e-3, TIPPED: 5e-2}, 1),
    [batches({"": 1e-3, TIPPED: tipped}, seed) for seed, tipped in enumerate((5e-2, 1e-3, 6e-2, 1e-3), 2)],
)


@pytest.mark.parametrize(
    ("errors", "outcome", "why"),
    [
        ({"": 1e-3, TIPPED: 6e-2}, "passed", "tipped over as draws are"),
        ({"": 1e-3, TIPPED: 1e-3}, "passed", "not tipped over"),
        ({"": 1e-3, TIPPED: 2e-1}, "failed", "farther than any draw"),
        ({"": 1e-2, TIPPED: 5e-2}, "failed", "ten times the floor in every other batch"),
        ({"": 1e-3, "4": 2e-1}, "failed", "one batch by itself, farther than any draw in any batch"),
    ],
)
def test_a_batch_that_tips_over_hides_nothing_and_is_not_held_against_a_chip(
    errors: Mapping[str, float], outcome: str, why: str
) -> None:
    (found,) = (r for r in judge_trace(TIPPING, batches(errors, 9)) if r.subject == "gradient weight")
    assert found.outcome == outcome, (why, found.measures)
