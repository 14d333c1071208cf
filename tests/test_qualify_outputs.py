"""Outputs judged alone, for software that infers and does not train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.qualify.effects import OVERALL_ALLOWED, RoundingNoise, judge_outputs, judge_trace
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


# ---- all groups together

GROUPS = 20


def groups(error: float, seed: int = 0, apart: float = 0.0) -> Trace:
    """Gradients of many parameters in six batches. Soundly different chips share most of their errors with the
    reference, whose numbers they round; `apart` is the share that they do not."""
    fixed, shared, drawn = (torch.Generator().manual_seed(number) for number in (99, 7, seed))
    sketches = {}
    for name in (f"gradient/{batch}/weight-{group}" for group in range(GROUPS) for batch in range(BATCHES)):
        exact, same, own = (torch.randn(2000, generator=one, dtype=torch.float64) for one in (fixed, shared, drawn))
        sketches[name] = exact + error * ((1.0 - apart**2) ** 0.5 * same + apart * own)
    return Trace(sketches, torch.zeros(BATCHES), torch.zeros(BATCHES))


EXACT = groups(0.0)
OVERALL = RoundingNoise.of(EXACT, groups(1e-3), [groups(1e-3, seed, apart=1.0) for seed in (1, 2, 3, 4)])
ROUNDS_ONCE = replace(OVERALL, rounds_once=True)


@settings(max_examples=10, deadline=None)
@given(times=st.floats(0.5, 1.15) | st.floats(1.27, 1.3), apart=st.floats(0.0, 1.0), seed=st.integers(10, 1000))
def test_a_chip_that_is_a_little_worse_in_everything_is_told_from_a_sound_one(
    times: float, apart: float, seed: int
) -> None:
    results = {result.subject: result for result in judge_trace(ROUNDS_ONCE, groups(times * 1e-3, seed, apart))}
    overall = results.pop("distance overall")
    (measure,) = overall.measures
    assert measure.value == pytest.approx(max(times - 1.0, 0.0), abs=0.04)
    assert OVERALL_ALLOWED - 1.0 < measure.bound < 1.05 * OVERALL_ALLOWED - 1.0
    assert (overall.outcome, overall.rules_out) == ("told" if times > 1.25 else "passed", "neither")
    assert not {result.subject for result in results.values() if result.outcome == "failed"}, "no group says so alone"


def test_one_group_that_is_off_says_nothing_of_all() -> None:
    found = groups(1e-3, 5, apart=0.5)
    off = {name: 2.0 * sketch for name, sketch in found.sketches.items() if name.endswith("weight-3")}
    results = judge_trace(ROUNDS_ONCE, replace(found, sketches={**found.sketches, **off}))
    assert [result.subject for result in results if result.outcome == "failed"] == ["gradient weight-3"]


def test_where_sums_round_as_often_as_results_the_reference_s_own_distance_says_nothing_of_all() -> None:
    assert "distance overall" not in {result.subject for result in judge_trace(OVERALL, groups(1e-3, 5))}
