"""What a person sees of a run while it goes on."""

from __future__ import annotations

from datetime import timedelta

import pytest
from histories import CANDIDATE, alarm, fault, opened, recipe, step

from beringia.progress import Pace, describe, showing_progress
from beringia.records.events import Decision, Fallback, RunFinished, StepDone, going_on


def test_a_line_about_another_role_than_the_learner_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(recipe()) as show:
        show(alarm(7))
        show(alarm(8).model_copy(update={"role": CANDIDATE}))
        show(step(9).model_copy(update={"role": CANDIDATE}))
    assert capsys.readouterr().err.splitlines() == [
        "alarm at step 7: wrong",
        "candidate:second: alarm at step 8: wrong",
    ]


def test_where_there_is_no_terminal_a_line_now_and_then_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(number: int, at: float) -> StepDone:
        return step(number).model_copy(update={"time": at, "tokens": 500, "loss": 1.25, "chip": "first"})

    monkeypatch.setattr("beringia.progress.LOG_SECONDS", 0.0)
    planned = recipe().train.last_step
    with showing_progress(recipe()) as show:
        show(done(10, 100.0))
        show(done(12, 104.0))
    first, second = capsys.readouterr().err.splitlines()
    left = timedelta(seconds=2 * (planned - 12))
    assert first.startswith(f"first step 10 of {planned:,}: loss 1.250, ")
    assert second == f"first step 12 of {planned:,}: loss 1.250, 250 tokens/s, {left} left"
    monkeypatch.setattr("beringia.progress.LOG_SECONDS", 3600.0)
    with showing_progress(recipe()) as show:
        show(done(10, 100.0))
    assert capsys.readouterr().err == ""


def test_steps_that_are_taken_again_do_not_slow_the_pace() -> None:
    pace = Pace()
    for number, at in ((50, 100.0), (51, 101.0), (40, 200.0), (41, 202.0)):
        pace.note(step(number).model_copy(update={"time": at}))
    assert pace.seconds_a_step == 2.0


def test_what_a_chip_that_opens_again_says_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    terms = Fallback(what="qualification", asked="certificate", used="none", reason="no certificate")
    with showing_progress(recipe()) as show:
        for event in (opened("first"), terms, opened("first"), terms, opened("second")):
            show(event)
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "first",
        "qualification",
        "second",
    ]


def test_what_the_error_at_the_end_says_is_not_told_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    given_up = Decision(action="stop", reason="no chip is left")
    with showing_progress(recipe()) as show:
        show(fault("ours"))
        show(given_up)
        show(RunFinished(status="given-up", step=3, message="no chip is left", signal=None))
        show(given_up.model_copy(update={"role": CANDIDATE}))
    assert capsys.readouterr().err.splitlines() == ["candidate:second: stop: no chip is left"]


def test_a_run_that_was_interrupted_and_nothing_more_goes_on() -> None:
    def said(to_step: int | None, **more: int) -> str | None:
        return describe(Decision(action="retry", reason=going_on(to_step), to_chip="first", to_step=to_step, **more))

    assert said(88) == "goes on from step 88"
    assert said(80, lost_steps=8) == "goes on from step 80; 8 steps after it were lost"
    assert said(None) == "begins again at step 0"
    fault = Decision(action="retry", reason="the worker ended", to_chip="first", to_step=88)
    assert describe(fault) == "retry from step 88: the worker ended"
