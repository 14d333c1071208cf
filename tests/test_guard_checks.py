"""A check is one file: found by being there, it is planned, paid, told of, and heard when it alarms."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import changed_output, changing_gradient, guard, steps_until_alarm, trainer

from beringia.records.events import Alarm
from beringia.train.guard import checks
from beringia.train.guard.check import Check, Moment, When
from beringia.train.guard.checks import all_checks
from beringia.train.guard.guard import Guard

NEW_FILE = '''
"""Gradients of the head's rows cancel: softmax minus one at the label sums to nothing over the vocabulary."""

from beringia.numerics.metrics import accumulation_floor
from beringia.train.guard.check import Check, Moment, When
from beringia.train.guard.finding import Finding


class RowsCancel(Check):
    name = "rows-cancel"
    when = When(look=Moment.GRADIENTS, judge=(Moment.GRADIENTS,), weight=0.1)

    def look(self, step):
        return [self.training.decoder.lm_head.weight.grad.detach().double()]

    def judge(self, gradient_VD, step):
        value = (gradient_VD.sum(0).norm() / gradient_VD.norm(dim=1).sum()).item()
        bound = accumulation_floor(gradient_VD.shape[0], self.training.decoder.lm_head.weight.dtype)
        return [Finding(self.name, "head", "weight.gradient", value, bound, "sum of the rows over that of their norms")]
'''


@pytest.fixture
def new_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows_cancel.py"
    path.write_text(NEW_FILE)
    return path


def check_in(path: Path) -> type[Check[Any]]:
    specification = importlib.util.spec_from_file_location("rows_cancel", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found: type[Check[Any]] = module.RowsCancel
    return found


def test_a_check_from_a_file_of_ones_own_is_run_told_of_and_alarms(new_file: Path) -> None:
    made = trainer(share=None, dtype=torch.float32)
    made.guard = guard(made, 0.5, check_in(new_file))
    told = []
    for _ in range(20):
        made.train_step()
        told += [event for event in made.guard.take_events() if event.detector == "rows-cancel"]
    assert told and not any(isinstance(event, Alarm) for event in told)
    assert all(event.value is not None and 0.0 < event.value < event.bound and event.seconds > 0.0 for event in told)

    def favour_one_token(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1.0 + 0.1 * (torch.arange(gradient.shape[-1]) == 5).to(gradient.dtype))

    with changed_output(made.decoder.lm_head, changing_gradient(favour_one_token)):
        _, alarms = steps_until_alarm(made, 100)
        while "rows-cancel" not in [alarm.detector for alarm in alarms]:
            step, alarms = steps_until_alarm(made, 100)
            assert step is not None
    (alarm,) = [alarm for alarm in alarms if alarm.detector == "rows-cancel"]
    assert (alarm.site, alarm.tensor) == ("head", "weight.gradient")
    assert "sum of the rows over that of their norms" in alarm.message


def test_a_file_beside_the_others_is_found_by_being_there(new_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rows-cancel" not in [check.name for check in all_checks()]
    monkeypatch.setattr(checks, "__path__", [*checks.__path__, str(new_file.parent)])
    made = trainer(share=None)
    found = Guard(
        made.decoder,
        made.optimizer,
        made.objective,
        made.chip,
        made.ranks,
        share=0.1,
        seed=3,
        sharding=made.sharding,
    )
    assert "rows-cancel" in [check.name for check in found.checks]


def test_every_check_has_a_name_of_its_own_and_sites_are_vouched_for() -> None:
    found = all_checks()
    names = ["layer-shadow", "repeat", "update", "clipping", "memory", "non-finite", "spike"]
    assert [check.name for check in found] == names
    assert [check.name for check in found if check.vouches] == ["layer-shadow"]


def test_hooks_that_a_check_puts_in_are_out_before_anything_is_judged() -> None:
    seen: list[tuple[str, int]] = []

    class Hooking(Check[None]):
        name = "hooking"
        when = When(look=Moment.FORWARD, judge=(Moment.GRADIENTS, Moment.END))

        def look(self, step: Any) -> list[None]:
            head = self.training.decoder.lm_head
            step.hooks.callback(head.register_forward_hook(lambda *_: seen.append(("forward", step.number))).remove)
            return [None]

        def judge(self, look: None, step: Any) -> list[Any]:
            seen.append((step.moment.name, step.number))
            assert not self.training.decoder.lm_head._forward_hooks
            return []

    made = trainer(share=None)
    made.guard = guard(made, 0.01, Hooking)
    made.train_step()
    passes = [("forward", 1)] * 2  # the model's own, and the multi-token layer's
    assert seen == [*passes, ("GRADIENTS", 1), ("END", 1)]
