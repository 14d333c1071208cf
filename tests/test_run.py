"""A run from its recipe to its end: what it leaves, that it is the same every time, and what interrupts it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import beringia, events, final_hash, gone, of_kind, small_recipe, start, worker_of, write_recipe
from waiting import GIVE_UP_SECONDS, until

from beringia.cli import main
from beringia.records.events import Alarm, RunFinished
from beringia.records.run_directory import RunDirectory


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    finished = beringia("train", str(write_recipe(directory, small_recipe())), "--out", str(directory / "run"))
    assert finished.returncode == 0, finished.stderr
    return directory / "run"


def test_a_run_takes_every_step_once_and_trusts_its_last_checkpoint(uninterrupted: Path) -> None:
    assert [event.step for event in of_kind(uninterrupted, "step")] == list(range(1, 61))
    assert of_kind(uninterrupted, "trusted")[-1].step == 60
    assert of_kind(uninterrupted, "finish")[-1].status == "done"
    assert [event.sequence for event in events(uninterrupted)] == list(range(len(events(uninterrupted))))


def test_a_single_rank_starts_no_process_group(uninterrupted: Path) -> None:
    begun, opened = of_kind(uninterrupted, "run")[0], of_kind(uninterrupted, "chip")[0]
    assert (opened.ranks, opened.sharding) == (1, "none")
    assert json.loads((uninterrupted / "recipe.json").read_text())["hash"] == begun.recipe_hash


def test_the_loss_falls(uninterrupted: Path) -> None:
    losses = [event.loss for event in of_kind(uninterrupted, "step")]
    assert sum(losses[-9:]) < sum(losses[:9])


def test_a_finished_run_is_not_run_again(uninterrupted: Path) -> None:
    before = len(events(uninterrupted))
    again = beringia("train", str(uninterrupted / "recipe.toml"), "--out", str(uninterrupted), "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["status"] == "done"
    assert len(events(uninterrupted)) == before


@dataclass(frozen=True)
class Contested:
    """A run that a second supervisor wanted too while the first was at it."""

    run: Path
    first: subprocess.Popen[str]
    second: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def contested(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Contested:
    recipe, run = str(uninterrupted / "recipe.toml"), tmp_path_factory.mktemp("contested") / "run"
    with start("train", recipe, "--out", str(run)) as first:
        worker = until(lambda: worker_of(first.pid), "the first's worker")
        os.kill(worker, signal.SIGSTOP)  # or the first might be done before the second has begun
        second = beringia("train", recipe, "--out", str(run))
        os.kill(worker, signal.SIGCONT)
        first.communicate()
    return Contested(run, first, second)


def test_a_second_supervisor_is_refused_and_the_first_is_not_disturbed(contested: Contested) -> None:
    assert contested.second.returncode == 2 and f"process {contested.first.pid}" in contested.second.stderr
    assert contested.first.returncode == 0


def test_the_same_recipe_gives_bitwise_the_same_run(uninterrupted: Path, contested: Contested) -> None:
    assert final_hash(contested.run) == final_hash(uninterrupted)
    losses = [[event.loss for event in of_kind(run, "step")] for run in (uninterrupted, contested.run)]
    assert losses[0] == losses[1]


def _wait_for_step(run: Path, step: int) -> None:
    until(lambda: any(event.step >= step for event in of_kind(run, "step")), f"step {step}")


@pytest.fixture(scope="module")
def terminated(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGTERM ended after its first steps."""
    run = tmp_path_factory.mktemp("terminated") / "run"
    with start("train", str(uninterrupted / "recipe.toml"), "--out", str(run)) as supervisor:
        _wait_for_step(run, 2)
        supervisor.send_signal(signal.SIGTERM)
        supervisor.communicate()
    assert supervisor.returncode == 128 + signal.SIGTERM
    return run


@pytest.mark.slow
def test_a_spike_that_comes_again_at_the_very_step_does_not_end_a_run(tmp_path: Path) -> None:
    """As training's own do: bits that flip whenever that step is taken, and nothing that a layer computes wrongly."""
    script = tmp_path / "spike.toml"
    script.write_text(
        'summary = "a spike at step 90, every time"\n[[faults]]\nkind = "bit-flip"\nat_step = 90\n'
        'target = "weights"\nsites = [1, 2, 3]\nflips = 4096\nbits = [25, 25]\n'
    )
    chips = {"first": {"use": "emulated:h800", "faults": str(script)}}
    train = {"steps": 100, "batch": 16, "checkpoint_every": 20, "learning_rate": 3e-3, "warmup_steps": 20}
    train["keep"] = 9  # all: on a busy machine one may be rotated out before it is trusted
    recipe = write_recipe(tmp_path, small_recipe(chips=chips, train=train, guard={"share": 0.05}))
    run = tmp_path / "run"
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    alarms = of_kind(run, "alarm")
    assert {alarm.detector for alarm in alarms} == {"spike"}
    decisions = of_kind(run, "decision")
    assert [decision.action for decision in decisions] == ["start", "rollback", "rollback"]
    assert decisions[-1].accepted_spike == alarms[0].step and "training's own" in decisions[-1].reason
    assert {event.step for event in of_kind(run, "trusted")} == {20, 40, 60, 80, 100}


@pytest.mark.slow
def test_killing_worker_supervisor_or_both_at_random_moments_changes_nothing_but_time(
    uninterrupted: Path, tmp_path: Path
) -> None:
    moments = random.Random(5)
    recipe, run = str(uninterrupted / "recipe.toml"), tmp_path / "run"
    for victims in ("worker", "supervisor", "both", "worker", "both"):
        with start("train", recipe, "--out", str(run)) as supervisor:
            time.sleep(moments.uniform(0.5, 6.0))
            worker = worker_of(supervisor.pid)
            if victims in ("supervisor", "both"):
                supervisor.kill()
            if victims in ("worker", "both") and worker is not None:
                os.kill(worker, signal.SIGKILL)
            if victims == "worker":
                supervisor.wait(GIVE_UP_SECONDS)
            if worker is not None:
                until(lambda worker=worker: gone(worker), "the worker's end after its supervisor's")  # type: ignore[misc]
            supervisor.kill()
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    assert final_hash(run) == final_hash(uninterrupted)
    assert not list((run / "checkpoints").glob(".*")), "half-written files are cleaned up"


def test_sigterm_ends_in_a_checkpoint_and_the_same_command_goes_on(
    uninterrupted: Path, terminated: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(terminated, tmp_path / "run"))
    assert of_kind(run, "checkpoint")[-1].step == of_kind(run, "step")[-1].step < 60
    assert beringia("train", str(uninterrupted / "recipe.toml"), "--out", str(run)).returncode == 0
    assert final_hash(run) == final_hash(uninterrupted)
    assert not [event for event in of_kind(run, "fallback") if event.what != "qualification"]


def test_an_alarm_that_coincides_with_a_stop_is_decided_about_when_the_run_goes_on(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """The record of a run whose last checkpoint, at step 60, was still pending when an alarm and then a stop came."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    told = [
        event for event in events(run) if event.kind != "finish" and not (event.kind == "trusted" and event.step == 60)
    ]
    told += [
        Alarm(step=60, detector="shadow", site="layers.0", tensor="output", value=2.0, bound=1.0, message="wrong"),
        RunFinished(status="stopped", step=60, message="stopped by signal 15"),
    ]
    (run / "events.jsonl").write_text("".join(event.model_dump_json() + "\n" for event in told))
    assert beringia("train", str(run / "recipe.toml"), "--out", str(run)).returncode == 0
    decision = of_kind(run, "decision")[-1]
    assert (decision.action, decision.to_step, decision.lost_steps) == ("rollback", 40, 20)
    assert of_kind(run, "resume")[-1].step == 40
    assert final_hash(run) == final_hash(uninterrupted)


@pytest.mark.slow
def test_a_chip_that_comes_back_with_other_settings_is_told(terminated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(terminated, tmp_path / "run"))
    assert beringia("train", str(run / "recipe.toml"), "--out", str(run), OMP_NUM_THREADS="2").returncode == 0
    told = [event for event in of_kind(run, "fallback") if event.what == "chip identity"]
    assert len(told) == 1 and told[0].asked != told[0].used and "threads" in told[0].asked


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_back_to_the_one_before(
    uninterrupted: Path, tmp_path: Path
) -> None:
    recipe, run = str(uninterrupted / "recipe.toml"), tmp_path / "run"
    with start("train", recipe, "--out", str(run)) as supervisor:
        _wait_for_step(run, 45)
        supervisor.kill()
    newest = max((run / "checkpoints").glob("step-*"))
    data = next(newest.glob("*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    assert any(data.name in event.message for event in of_kind(run, "rejected"))
    assert list((run / "set-aside").glob(f"{newest.name}-*"))
    assert final_hash(run) == final_hash(uninterrupted)


def test_a_run_directory_of_another_recipe_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = write_recipe(tmp_path, small_recipe(seed=99))
    refused = beringia("train", str(other), "--out", str(uninterrupted))
    assert refused.returncode == 2 and "another recipe" in refused.stderr


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["export", str(tmp_path), "--to", str(tmp_path / "out")])
    assert refused.value.code == 2 and "not a run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hang_on_the_device_leaves_the_stacks_of_every_rank_and_is_retried(tmp_path: Path) -> None:
    script = tmp_path / "hang.toml"
    script.write_text('summary = "hangs once"\n[[faults]]\nkind = "hang"\nat_step = 5\nonce = true\n')
    document = small_recipe(
        chips={"first": {"use": "emulated:exact", "ranks": 2, "faults": str(script)}},
        train={"steps": 8, "compute": "float32"},
        supervise={"hang_seconds": 20.0},
    )
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert [event.code for event in of_kind(tmp_path / "run", "fault")] == ["hang"]
    stacks = {path.name: path.read_text() for path in RunDirectory(tmp_path / "run").logs.glob("stacks-*")}
    assert len(stacks) == 2 and all("train_step" in text for text in stacks.values()), stacks.keys()


@pytest.mark.slow
def test_without_a_compiler_the_run_is_eager_and_an_event_says_so(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small_recipe(train={"steps": 2, "compile": True}))
    done = beringia("train", str(recipe), "--out", str(tmp_path / "run"), CXX="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    (fallback,) = (event for event in of_kind(tmp_path / "run", "fallback") if event.what == "torch.compile")
    assert fallback.used == "eager" and "/no/such/compiler" in fallback.reason


@pytest.mark.slow
def test_a_frozen_worker_is_noticed_and_the_run_goes_on(tmp_path: Path) -> None:
    document = small_recipe(supervise={"hang_seconds": 10.0, "start_seconds": 240.0})
    recipe, run = write_recipe(tmp_path, document), tmp_path / "run"
    with start("train", str(recipe), "--out", str(run)) as supervisor:
        _wait_for_step(run, 2)
        worker = worker_of(supervisor.pid)
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)  # frozen: not even its watchdog runs, the supervisor must notice
        supervisor.communicate()
    assert supervisor.returncode == 0
    assert [fault.code for fault in of_kind(run, "fault")] == ["hang"]
