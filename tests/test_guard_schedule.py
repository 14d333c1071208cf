"""Checks cost what they may cost, come often enough, and come evenly."""

from __future__ import annotations

import pytest

from beringia.train.guard.schedule import AIMED, BLOCK_STEPS, LONGEST_GAP_STEPS, Schedule

STEP = 0.1


def simulate(
    share: float, costs: dict[str, float], steps: int, frequent: float = 0.0
) -> tuple[float, dict[str, list[int]]]:
    """Seconds spent on checks over seconds spent on steps, and the steps of each kind's checks."""
    schedule = Schedule(dict.fromkeys(costs, 1.0), share)
    plan: list[int] = []
    spent, ran = 0.0, {kind: [] for kind in costs}
    for step in range(steps):
        plan = plan or schedule.plan()
        for kind in schedule.due(plan.pop(0)):
            schedule.check_took(kind, costs[kind])
            spent += costs[kind]
            ran[kind].append(step)
        spent += frequent
        schedule.step_took(STEP, frequent)
    return spent / (steps * STEP), ran


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_checks_take_what_is_aimed_at_and_no_more(share: float) -> None:
    found, ran = simulate(share, {"shadow": 0.02, "memory": 0.0003}, 4000)
    assert 0.9 * AIMED * share < found <= 1.02 * AIMED * share
    assert len(ran["memory"]) > 1.5 * len(ran["shadow"])


def test_what_every_step_does_is_paid_out_of_the_same_share() -> None:
    found, ran = simulate(0.01, {"shadow": 0.004}, 4000, frequent=AIMED * 0.01 * STEP / 2)
    _, more = simulate(0.01, {"shadow": 0.004}, 4000)
    assert 0.9 * AIMED * 0.01 < found <= 1.02 * AIMED * 0.01
    assert len(ran["shadow"]) == pytest.approx(len(more["shadow"]) / 2, rel=0.1)


def test_a_check_that_costs_more_than_its_share_still_runs_at_the_least_rate() -> None:
    _, ran = simulate(0.001, {"shadow": 0.5}, 1000)
    gaps = [after - before for before, after in zip(ran["shadow"], ran["shadow"][1:], strict=False)]
    assert len(gaps) > 5 and max(gaps) <= LONGEST_GAP_STEPS + BLOCK_STEPS


def test_every_kind_runs_in_the_first_block() -> None:
    _, ran = simulate(0.01, {"shadow": 0.05, "memory": 0.05}, BLOCK_STEPS)
    assert all(len(steps) == 1 for steps in ran.values())


def test_a_step_that_becomes_faster_gets_fewer_checks() -> None:
    schedule = Schedule({"shadow": 1.0}, 0.1)
    counts = []
    for step_seconds in (0.1, 0.01):
        number = 0
        for _ in range(20):
            for mask in schedule.plan():
                number += mask
                if mask:
                    schedule.check_took("shadow", 0.02)
                schedule.step_took(step_seconds, 0.0)
        counts.append(number)
    assert counts[0] == pytest.approx(160 * AIMED, rel=0.1)
    assert counts[1] < 60
