"""What a person sees of a run while it goes on."""

from __future__ import annotations

import pytest
from histories import CANDIDATE, alarm, recipe, step

from beringia.progress import showing_progress


def test_a_line_about_another_role_than_the_learner_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress(recipe()) as show:
        show(alarm(7))
        show(alarm(8).model_copy(update={"role": CANDIDATE}))
        show(step(9).model_copy(update={"role": CANDIDATE}))
    assert capsys.readouterr().err.splitlines() == [
        "alarm at step 7: wrong",
        "candidate:second: alarm at step 8: wrong",
    ]
