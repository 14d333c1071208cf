"""How a run stands, in a line, whatever became of it; and asking disturbs nobody."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import beringia, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.records.run_directory import RunDirectory
from beringia.report.status import RunStatus, status_of
from beringia.supervise.lock import RunLock


def status(run: Path) -> RunStatus:
    done = beringia("status", str(run), "--json")
    assert done.returncode == 0, done.stderr
    return RunStatus.model_validate(json.loads(done.stdout))


@pytest.mark.slow
def test_a_run_is_seen_at_work_killed_stopped_and_done(tmp_path: Path) -> None:
    recipe, run = (
        str(write_recipe(tmp_path, small_recipe(train={"steps": 400, "checkpoint_every": 50}))),
        tmp_path / "run",
    )
    with start("train", recipe, "--out", str(run)) as supervisor:
        until(lambda: (run / "events.jsonl").exists() and len(of_kind(run, "step")) > 5, "steps")
        working = status_of(RunDirectory(run))
        supervisor.kill()
    assert (working.standing, working.planned_steps, working.chip) == ("running", 400, "first")
    assert working.step > 0 and working.tokens_per_second is not None and working.tokens_per_second > 0
    assert "(real)" in working.line() and "tokens/s" in working.line() and "left" in working.line()
    killed = status(run)
    assert killed.standing == "ended" and "the same command goes on" in killed.line()
    with start("train", recipe, "--out", str(run)) as supervisor:
        until(lambda: status_of(RunDirectory(run)).step > killed.step + 10, "more steps")
        supervisor.send_signal(signal.SIGTERM)
    stopped = status(run)
    assert (stopped.standing, stopped.newest_checkpoint) == ("stopped", stopped.step)
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    assert status(run).standing == "done"


def test_what_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    done = beringia("status", str(tmp_path))
    assert done.returncode == 2 and "not a run" in done.stderr


def test_a_supervisor_that_starts_while_the_lock_is_looked_at_is_not_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with RunLock(run):
        pass
    looking = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(); time.sleep(0.04)"
    with subprocess.Popen([sys.executable, "-c", looking, str(run.lock)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None and reader.stdout.readline()
        with RunLock(run) as lock:
            assert lock.epoch == 2


@pytest.mark.parametrize("standing", ["running", "done", "given-up", "stopped", "ended"])
def test_a_run_without_a_step_has_a_line_too(standing: str) -> None:
    nothing = dict.fromkeys(["chip", "loss", "tokens_per_second", "seconds_left", "newest_checkpoint"])
    told = {"name": "r", "standing": standing, "message": "", "step": 0, "planned_steps": None, "chip_name": "no chip"}
    more = {"trusted_checkpoint": None, "seconds_since_event": None}
    assert RunStatus.model_validate(told | nothing | more).line().startswith("r: ")
