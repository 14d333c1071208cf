"""What a person sees of a run while it goes on."""

from __future__ import annotations

import pytest
from histories import CANDIDATE, alarm, recipe, step

from beringia.progress import describe, showing_progress
from beringia.records.events import Decision, going_on


def test_a_line_about_another_role_than_the_learner_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(recipe()) as show:
        show(alarm(7))
        show(alarm(8).model_copy(update={"role": CANDIDATE}))
        show(step(9).model_copy(update={"role": CANDIDATE}))
    assert capsys.readouterr().err.splitlines() == [
        "alarm at step 7: wrong",
        "candidate:second: alarm at step 8: wrong",
    ]


def test_a_run_that_was_interrupted_and_nothing_more_goes_on() -> None:
    def said(to_step: int | None, **more: int) -> str | None:
        return describe(Decision(action="retry", reason=going_on(to_step), to_chip="first", to_step=to_step, **more))

    assert said(88) == "goes on from step 88"
    assert said(80, lost_steps=8) == "goes on from step 80; 8 steps after it were lost"
    assert said(None) == "begins again at step 0"
    fault = Decision(action="retry", reason="the worker ended", to_chip="first", to_step=88)
    assert describe(fault) == "retry from step 88: the worker ended"
