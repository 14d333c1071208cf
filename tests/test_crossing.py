"""A run that crosses: from an emulated chip that fails it to the CPU, with state, data and evidence intact."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from small_runs import beringia, events, first_rank_tells_slowly, of_kind, small_recipe, start, write_recipe

from beringia.train.canary import WIDEST_BAND

PERSISTENT = """
summary = "attention's backward is wrong from step 25 on"
[[faults]]
kind = "wrong-backward"
from_step = 25
operator = "attention"
length = 8
strength = 0.8
"""


def crossing_recipe(tmp_path: Path, **fallback: object) -> Path:
    script = tmp_path / "persistent.toml"
    script.write_text(PERSISTENT)
    chips = {
        "preferred": {"use": "emulated:ascend-910b", "faults": str(script)},
        "fallback": {"use": "cpu", **fallback},
    }
    return write_recipe(
        tmp_path,
        small_recipe(
            chips=chips,
            train={"prefer": ["preferred", "fallback"], "steps": 45, "checkpoint_every": 10, "keep": 2},
            guard={"share": 0.5},
        ),
    )


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that crossed from an emulated chip to the CPU."""
    directory = tmp_path_factory.mktemp("crossed")
    done = beringia("train", str(crossing_recipe(directory)), "--out", str(directory / "run"))
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_a_persistently_wrong_chip_is_left_after_one_rollback(crossed: Path) -> None:
    actions = [event.action for event in of_kind(crossed, "decision")]
    assert actions == ["start", "rollback", "cross"]
    assert of_kind(crossed, "finish")[-1].status == "done"


def test_the_alarm_names_a_layer_and_lies_beyond_its_bound(crossed: Path) -> None:
    for alarm in of_kind(crossed, "alarm"):
        assert alarm.site.startswith("layers.") and alarm.value > alarm.bound


def test_the_live_state_on_the_new_chip_hashes_to_what_it_was_on_the_old(crossed: Path) -> None:
    (crossing,) = of_kind(crossed, "crossing")
    assert crossing.state_hash_before == crossing.state_hash_after != ""
    written = {event.step: event.state_hash for event in of_kind(crossed, "checkpoint") if event.chip == "preferred"}
    assert crossing.state_hash_before == written[crossing.step]


def test_the_next_batch_on_the_new_chip_is_the_one_that_was_due(crossed: Path) -> None:
    (crossing,) = of_kind(crossed, "crossing")
    first = next(event for event in of_kind(crossed, "step") if event.chip == "fallback")
    assert (first.step, first.cursor) == (crossing.step + 1, (crossing.step + 1) * 4)


def test_the_canary_lies_within_its_band_and_the_band_means_something(crossed: Path) -> None:
    (canary,) = of_kind(crossed, "canary")
    assert canary.passed and 0 < canary.difference <= canary.band <= WIDEST_BAND < 1


def test_what_was_lost_is_work_and_counted(crossed: Path) -> None:
    lost = sum(event.lost_steps for event in of_kind(crossed, "decision"))
    done = len(of_kind(crossed, "step"))
    assert done == 45 + lost


def test_every_step_comes_from_a_trusted_checkpoint_of_the_same_chip_or_a_crossing(crossed: Path) -> None:
    trusted = {event.step for event in of_kind(crossed, "trusted")}
    for decision in of_kind(crossed, "decision"):
        if decision.action in ("rollback", "cross"):
            assert decision.to_step is None or decision.to_step in trusted


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_chip_that_computes_wrongly_is_refused_by_the_canary_and_the_next_one_takes_over(
    tmp_path: Path, ranks: int
) -> None:
    lost, wrong = tmp_path / "lost.toml", tmp_path / "wrong.toml"
    lost.write_text(
        'summary = "lost at step 45"\n[[faults]]\nkind = "exception"\nat_step = 45\ncode = "HBM MULTI BIT ECC ERROR"\n'
    )
    wrong.write_text(PERSISTENT.replace("from_step = 25", "from_step = 1"))
    chips = {
        "first": {"use": "emulated:ascend-910b", "faults": str(lost)},
        "second": {"use": "emulated:h800", "faults": str(wrong), "ranks": ranks},
        "third": {"use": "cpu"},
    }
    train = {"prefer": ["first", "second", "third"], "steps": 50, "checkpoint_every": 10}
    recipe = write_recipe(tmp_path, small_recipe(chips=chips, train=train, guard={"share": 0.5}))
    slow = first_rank_tells_slowly(tmp_path / "slow")
    done = beringia("train", str(recipe), "--out", str(tmp_path / "run"), **slow)
    assert done.returncode == 0, done.stderr
    assert [event.action for event in of_kind(tmp_path / "run", "decision")] == ["start", "cross", "cross"]
    refused, passed = of_kind(tmp_path / "run", "canary")
    assert (refused.chip, refused.passed, passed.chip, passed.passed) == ("second", False, "third", True)
    assert refused.difference > refused.band
    assert not [event for event in of_kind(tmp_path / "run", "step") if event.chip == "second"]


@pytest.mark.slow
def test_a_machine_that_goes_away_in_mid_run_is_tried_again_and_then_left(tmp_path: Path) -> None:
    gone, process = tmp_path / "gone", tmp_path / "process"
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f"#!/bin/sh\n[ -e {gone} ] && {{ echo 'node7: no route to host' >&2; exit 255; }}\n"
        f'case "$*" in *train.worker*) echo $$ > {process};; esac\nexec "$@"\n'
    )
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    chips = {
        "far": {"use": "emulated:h800", "launch": [str(launcher)], "root": str(tmp_path / "far")},
        "near": {"use": "cpu"},
    }
    document = small_recipe(
        chips=chips,
        train={"prefer": ["far", "near"], "steps": 60, "checkpoint_every": 10},
        supervise={"transient_retries": 2, "restart_seconds": 0.2},
        guard={"share": 0.5},
    )
    run = tmp_path / "run"
    with start("train", str(write_recipe(tmp_path, document)), "--out", str(run)) as running:
        while not ((run / "events.jsonl").exists() and len(of_kind(run, "trusted")) >= 2):
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        gone.touch()
        os.kill(int(process.read_text()), signal.SIGKILL)
        _, errors = running.communicate()
    assert running.returncode == 0, errors
    decisions = of_kind(run, "decision")
    assert [decision.action for decision in decisions] == ["start", "retry", "retry", "cross"]
    assert [fault.code for fault in of_kind(run, "fault")] == ["exit", "unreachable", "unreachable"]
    assert "no route to host" in decisions[-1].reason
    (crossing,) = of_kind(run, "crossing")
    assert crossing.state_hash_before == crossing.state_hash_after != ""
    trusted_far_away = [event.step for event in of_kind(run, "trusted") if event.chip == "far"]
    assert crossing.step == decisions[-1].to_step == max(trusted_far_away)


@pytest.mark.slow
def test_the_second_chip_may_be_on_another_machine_with_its_own_files_and_environment(tmp_path: Path) -> None:
    """The launcher gives the worker its own mount namespace, in which the supervisor's run directory is empty."""
    machine = tmp_path / "machine"
    environment = machine / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    (site / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n{Path(__file__).parents[1]}\n")
    run = tmp_path / "run"
    launcher = tmp_path / "launcher"
    hide = f'mount -t tmpfs tmpfs "{run}" && ' if os.geteuid() == 0 and shutil.which("unshare") else ""
    launcher.write_text(
        f"#!/bin/sh\necho 'Welcome to node7'\nexec unshare -m sh -c '{hide}cd / && exec \"$@\"' sh \"$@\"\n"
    )
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    recipe = crossing_recipe(
        tmp_path, launch=[str(launcher)], python=str(environment / "bin" / "python"), root=str(machine / "run")
    )
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    (crossing,) = of_kind(run, "crossing")
    assert crossing.state_hash_before == crossing.state_hash_after
    last = max((run / "checkpoints").glob("step-*"))
    assert last.name == "step-000045" and (last / "manifest.json").exists(), "the last checkpoint came home"
    assert (last / "trusted.json").exists()
    assert events(run)[-1].kind == "finish"
