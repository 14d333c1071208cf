"""The guard inside a run: it changes no bit of it, trusts what it has seen, and names what is wrong."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from guarded import alarms_of_a_full_check, recipe, steps_until_alarm, trainer
from small_runs import beringia, of_kind, small_recipe, write_recipe

from beringia.numerics.state_hash import hash_state
from beringia.records.events import Alarm, CheckDone
from beringia.records.orders import StepNumbers
from beringia.train.guard.finding import Finding
from beringia.train.state import live_tensors
from beringia.train.trainer import Trainer


def state_after(steps: int, share: float | None, dtype: torch.dtype = torch.float32) -> str:
    made = trainer(share=share, dtype=dtype)
    for _ in range(steps):
        made.train_step()
    return hash_state(live_tensors(made.decoder, made.optimizer), {})


def test_a_run_with_the_guard_is_bitwise_the_run_without_it() -> None:
    assert state_after(20, share=0.5) == state_after(20, share=None)


def test_every_kind_of_check_runs_and_reports_what_it_used_of_its_bound() -> None:
    made = trainer(share=0.5)
    assert made.guard is not None
    checks: list[CheckDone | Alarm] = []
    for _ in range(100):  # the spike test is told every 50 steps, once FIRST_STEPS are seen
        made.train_step()
        checks += made.guard.take_events()
    assert not [event for event in checks if isinstance(event, Alarm)]
    assert {event.detector for event in checks} >= {"layer-shadow", "products", "update", "memory", "spike"}
    assert {event.site for event in checks if event.detector == "layer-shadow"} == set(made.guard.sites)
    assert all(event.value is not None and event.value <= event.bound for event in checks)


def test_a_checkpoint_is_trusted_once_every_site_was_clean_after_it() -> None:
    made = trainer(share=0.5)
    assert made.guard is not None
    visited: set[str] = set()
    while len(visited) < len(made.guard.sites):
        assert made.guard.clean_since(0) is None
        made.train_step()
        visited |= {event.site for event in made.guard.take_events() if event.detector == "layer-shadow"}
    checks = made.guard.clean_since(0)
    assert checks is not None and {check.site for check in checks} == set(made.guard.sites)
    assert min(check.step for check in checks) >= 1
    assert made.guard.clean_since(made.step) is None


def test_checks_two_sites_at_a_time_let_the_last_checkpoint_be_trusted_and_leave_no_trace() -> None:
    made = trainer(share=0.01)
    made.train_step()
    assert made.guard is not None
    before = hash_state(live_tensors(made.decoder, made.optimizer), {})
    for first in range(0, len(made.guard.sites), 2):
        assert made.guard.clean_since(made.step) is None
        made.check_sites(made.guard.sites[first : first + 2])
    assert hash_state(live_tensors(made.decoder, made.optimizer), {}) == before
    assert made.guard.clean_since(made.step) is not None
    assert all(int(count.sum()) == 0 for count in made.decoder.expert_counts().values())
    assert all(parameter.grad is None for parameter in made.decoder.parameters())


def test_the_seconds_of_checks_are_told_with_the_step() -> None:
    made = trainer(share=0.5)
    assert made.guard is not None
    checked = 0.0
    for _ in range(20):
        result = made.train_step()
        # A look at the memory begins in one step and ends in the next.
        checks = [event for event in made.guard.take_events() if event.kind == "check" and event.detector != "memory"]
        assert sum(check.seconds for check in checks) <= result.guard_seconds <= result.seconds
        checked += sum(check.seconds for check in checks)
    assert checked > 0


def test_a_weight_that_is_not_a_number_is_an_alarm_in_that_step() -> None:
    made = trainer(share=0.01)
    made.train_step()
    made.decoder.lm_head.weight.data[3, 3] = math.nan
    _, alarms = steps_until_alarm(made, 1)
    assert ("non-finite", "loss") in [(alarm.detector, alarm.tensor) for alarm in alarms]
    assert alarms[0].value is None and "nan" in alarms[0].message


@pytest.mark.parametrize("accepted", [(), (1,)])
def test_a_spike_right_after_a_restart_is_seen_by_what_came_before_unless_it_is_accepted(accepted: tuple[int]) -> None:
    made = trainer(share=0.01)
    assert made.guard is not None
    loss = [4.0 + 0.1 * math.sin(step) for step in range(100)]
    made.guard.remember([StepNumbers(loss=one, mtp_loss=one, gradient_norm=1.0) for one in loss])
    made.guard.accept_spikes(accepted)
    made.decoder.lm_head.weight.data *= 100.0
    _, alarms = steps_until_alarm(made, 1)
    assert ("spike", "model", "loss") in [(alarm.detector, alarm.site, alarm.tensor) for alarm in alarms] or accepted
    assert not (accepted and alarms)


def test_an_alarm_says_which_layer_which_tensor_and_how_far_from_the_bound() -> None:
    finding = Finding("layer-shadow", "layers.4", "mlp.output", 0.5, 0.1, "relative error against the replay")
    assert finding.alarm(7, others=["output"]).message == (
        "mlp.output of layers.4 at step 7: relative error against the replay is 0.5, 5 times its bound of 0.1. "
        "Beyond their bounds too: output."
    )


def test_a_value_that_is_not_a_number_is_beyond_every_bound() -> None:
    assert Finding("a", "b", "c", math.nan, 1.0, "value").alarming
    assert not Finding("a", "b", "c", 1.0, 1.0, "value").alarming


def emulated(tmp_path: Path, chip: str, fault: str, share: float = 0.3) -> Trainer:
    script = tmp_path / "fault.toml"
    script.write_text(f'summary = "planted"\n[[faults]]\n{fault}\n')
    return trainer(chip, faults=str(script), share=share, asked=recipe(chip))


@pytest.mark.parametrize("chip", [pytest.param("emulated:h800", marks=pytest.mark.slow), "emulated:ascend-910b"])
def test_emulated_chips_without_faults_do_not_alarm(chip: str) -> None:
    made = trainer(chip, share=0.3, asked=recipe(chip))
    assert made.guard is not None
    with closing(made.chip):
        _, alarms = steps_until_alarm(made, 30)
        alarms += alarms_of_a_full_check(made)
    assert not alarms


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "detectors"),
    [
        ('kind = "wrong-backward"\nfrom_step = 5\nlength = 8\nstrength = 0.8', {"layer-shadow"}),
        ('kind = "wrong-backward"\noperator = "linear"\nfrom_step = 5\nstrength = 0.5', {"layer-shadow", "products"}),
        ('kind = "mask-ignored"\nfrom_step = 5\nlength = 8', {"layer-shadow"}),
        ('kind = "stuck-tile"\nfrom_step = 5', {"layer-shadow", "products"}),
        ('kind = "nondeterministic-reduction"\nfrom_step = 5', {"repeat"}),
        (
            'kind = "bit-flip"\ntarget = "weights"\nfrom_step = 5\nsites = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\nflips = 3',
            {"memory", "non-finite", "spike"},
        ),
        (
            'kind = "bit-flip"\ntarget = "activations"\nfrom_step = 5\nflips = 3',
            {"repeat", "layer-shadow", "non-finite"},
        ),
    ],
)
def test_a_planted_fault_is_found_by_a_detector_that_can_see_it(
    tmp_path: Path, fault: str, detectors: set[str]
) -> None:
    made = emulated(tmp_path, "emulated:ascend-910b", fault)
    with closing(made.chip):
        step, alarms = steps_until_alarm(made, 60)
    assert step is not None and step >= 5
    assert {alarm.detector for alarm in alarms} & detectors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_run_is_checked_and_does_not_alarm() -> None:
    made = trainer(share=0.3)
    if made.chip.compiler_missing():
        pytest.skip("no compiler here")
    assert made.guard is not None
    made.compile()
    step, alarms = steps_until_alarm(made, 30)
    assert not alarms and made.guard.clean_since(0) is not None


@pytest.mark.slow
def test_a_fault_on_one_of_two_devices_is_an_alarm_of_that_rank(tmp_path: Path) -> None:
    script = tmp_path / "second.toml"
    script.write_text(
        'summary = "the second device ignores the mask"\n'
        '[[faults]]\nkind = "mask-ignored"\nfrom_step = 5\nlength = 4\ndevice = 1\n'
    )
    chips = {"first": {"use": "emulated:ascend-910b", "ranks": 2, "faults": str(script)}}
    document = small_recipe(chips=chips, train={"steps": 40, "checkpoint_every": 10})
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    alarms = of_kind(tmp_path / "run", "alarm")
    assert done.returncode == 3, done.stderr[-2000:]  # rolled back, alarmed again, no other chip
    assert alarms and {alarm.rank for alarm in alarms} == {1}
    assert alarms[0].tensor == "self_attn.output"
