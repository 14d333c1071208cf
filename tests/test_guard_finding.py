"""What a finding says, whatever its numbers are."""

from __future__ import annotations

import json
import math

import pytest
from guarded import changed_output, trainer
from hypothesis import given
from hypothesis import strategies as st

from beringia.train.guard.finding import Finding

NUMBERS = st.floats().map(abs)


@given(NUMBERS, NUMBERS)
def test_events_hold_numbers_alone_and_only_a_number_within_a_bound_is_no_alarm(value: float, bound: float) -> None:
    finding = Finding("detector", "layers.0", "output", value, bound, "relative error")
    alarm, check = finding.alarm(3), finding.check(3, 0.1)
    for event in (alarm, check):
        json.dumps(event.model_dump(mode="json"), allow_nan=False)
    assert finding.beyond is not (value <= bound)
    assert alarm.unexplained == (not math.isfinite(value) or math.isnan(bound))
    assert (finding.used > 1.0) == finding.beyond or value == bound or bound == math.inf
    assert "\n" not in alarm.message


@pytest.mark.parametrize("none", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_step_with_an_output_that_is_no_number_is_told_at_every_site_in_numbers(none: float, layer: int) -> None:
    made = trainer()
    made.train_step()
    guard = made.guard
    assert guard is not None
    guard.take_events()

    def spoiled(output):  # type: ignore[no-untyped-def]
        mask = output.new_zeros(output.shape)
        mask[-1, -1, 0] = none
        return output + mask

    for site in guard.sites:
        with changed_output(made.decoder.model.layers[layer], spoiled):
            made.check_sites((site,))
        for event in guard.take_events():
            json.dumps(event.model_dump(mode="json"), allow_nan=False)
