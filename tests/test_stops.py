"""A run that is asked to stop, wherever it is and however the wish reaches its processes: nothing that was trained is
lost, and the exit code says who asked."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import (
    beringia,
    events,
    final_hash,
    first_rank_tells_slowly,
    gone,
    of_kind,
    small_recipe,
    start,
    worker_of,
    write_recipe,
)
from waiting import until

EVALUATED = {"steps": 30, "checkpoint_every": 20, "evaluate_every": 10, "evaluation_sequences": 64}


def steps(run: Path) -> list[int]:
    return [event.step for event in of_kind(run, "step")] if (run / "events.jsonl").exists() else []


def of(run: Path, kind: str) -> list[int]:
    return [event.step for event in of_kind(run, kind)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that evaluates every 10 steps, with its recipe beside it."""
    place = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(place, small_recipe(train=EVALUATED, guard={"share": 0}))
    assert beringia("train", str(recipe), "--out", str(place / "run")).returncode == 0
    return place


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_in_the_middle_of_an_evaluation_saves_and_the_evaluation_is_made_up_for(
    evaluated: Path, tmp_path: Path, ranks: int
) -> None:
    run, recipe = tmp_path / "run", str(evaluated / "small.toml")
    same = ("train", recipe, "--out", str(run), "--set", f"chips.first.ranks={ranks}")
    with start(*same, "--set", "train.evaluation_sequences=10000000") as process:
        until(lambda: 10 in steps(run), "step 10")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert (of(run, "checkpoint"), of(run, "evaluation")) == ([10], [])
    assert beringia(*same).returncode == 0
    assert of(run, "evaluation") == [10, 20, 30] and of(run, "resume") == [0, 10]
    assert steps(run) == list(range(1, 31))
    if ranks == 1:
        assert final_hash(run) == final_hash(evaluated / "run")
        losses = [event.loss for event in of_kind(run, "evaluation")]
        assert losses == [event.loss for event in of_kind(evaluated / "run", "evaluation")]


@pytest.mark.slow
def test_a_stop_is_over_when_the_first_rank_has_told_of_its_checkpoint(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = ("--set", "chips.first.ranks=2", "--set", "train.steps=40000")
    slow = first_rank_tells_slowly(tmp_path / "slow")
    with start("train", str(evaluated / "small.toml"), "--out", str(run), *endless, **slow) as process:
        until(lambda: 3 in steps(run), "step 3")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert of(run, "checkpoint") == steps(run)[-1:]


@pytest.mark.slow
def test_a_rank_that_is_done_before_the_first_one_is_no_fault(torchrun: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(torchrun, **first_rank_tells_slowly(tmp_path / "slow")) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert of_kind(run, "fault") == []
    assert [event.status for event in of_kind(run, "finish")] == ["done"]


@pytest.mark.slow
def test_the_last_evaluation_is_made_up_for_too(evaluated: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", str(evaluated / "small.toml")
    with start("train", recipe, "--out", str(run), "--set", "train.evaluate_every=1000") as process:
        until(lambda: 20 in steps(run), "step 20")
        process.send_signal(signal.SIGTERM)
    endless = ("--set", "train.evaluate_every=1000", "--set", "train.evaluation_sequences=10000000")
    with start("train", recipe, "--out", str(run), *endless) as process:
        until(lambda: 30 in of(run, "checkpoint"), "the last checkpoint")
        process.kill()
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    assert of(run, "evaluation")[-1] == 30 and len(set(of(run, "evaluation"))) == len(of(run, "evaluation"))
    assert final_hash(run) == final_hash(evaluated / "run")


@pytest.mark.slow
def test_a_stop_at_a_saved_step_writes_no_second_checkpoint_and_takes_no_trust_back(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, small_recipe(train={"steps": 20, "checkpoint_every": 10}))
    run = tmp_path / "run"
    assert beringia("train", str(recipe), "--out", str(run)).returncode == 0
    more = ("train", str(recipe), "--out", str(run), "--set", "train.steps=40000")
    with start(*more) as process:
        until(lambda: len(of_kind(run, "chip")) == 2, "the second start")
        process.send_signal(signal.SIGTERM)
    written = of(run, "checkpoint")
    assert len(written) == len(set(written))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("delay", ["at once", "while it imports"])
def test_a_stop_that_reaches_every_process_before_the_first_step_is_a_stop(
    evaluated: Path, tmp_path: Path, number: signal.Signals, delay: str
) -> None:
    """As a terminal, a batch system or torchrun asks all processes of a job."""
    run = tmp_path / "run"
    process = start("train", str(evaluated / "small.toml"), "--out", str(run))
    until(lambda: worker_of(process.pid) is not None, "a worker")
    worker = worker_of(process.pid)
    assert worker is not None
    if delay == "while it imports":
        maps = Path(f"/proc/{worker}/maps")
        until(lambda: "libtorch" in maps.read_text(), "torch")
    os.kill(worker, number)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number, said
    assert "did not start" not in said and gone(worker)
    assert [event.status for event in of_kind(run, "finish")] == ["stopped"]
    assert of_kind(run, "fault") == []


@pytest.mark.slow
def test_a_worker_alone_that_is_ended_before_its_hello_is_started_again(evaluated: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("train", str(evaluated / "small.toml"), "--out", str(run))
    until(lambda: worker_of(process.pid) is not None, "a worker")
    os.kill(worker_of(process.pid) or 0, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert [event.category for event in of_kind(run, "fault")] == ["transient"]
    assert final_hash(run) == final_hash(evaluated / "run")


# ---- inside torchrun, with a port of its own: every attempt has the same name


@pytest.fixture
def torchrun(evaluated: Path, tmp_path: Path) -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        free_port = found.getsockname()[1]
    runner = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}"]
    recipe = str(evaluated / "small.toml")
    return [*runner, "-m", "beringia", "train", recipe, "--out", str(tmp_path / "run")]


def started(command: list[str], *more: str, **environment: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_a_stop_that_torchrun_hands_to_its_ranks_saves_the_last_step(torchrun: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(torchrun, "--set", "train.steps=4000") as process:
        until(lambda: 13 in steps(run), "step 13")
        process.send_signal(signal.SIGTERM)
    assert of_kind(run, "fault") == []
    assert of(run, "checkpoint")[-1] == steps(run)[-1]
    assert [event.signal for event in of_kind(run, "finish")] == [15]


@pytest.mark.slow
def test_after_a_kill_of_all_the_same_command_goes_on_inside_torchrun(torchrun: list[str], tmp_path: Path) -> None:
    """The orders and marks that the killed attempt left have this one's name, and are not taken for its own."""
    run = tmp_path / "run"
    with started(torchrun) as process:
        until(lambda: 23 in steps(run), "step 23")
        for one in [process.pid, *below(process.pid)]:
            os.kill(one, signal.SIGKILL)
    with started(torchrun) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert of(run, "resume") == [0, 20] and steps(run)[-1] == 30
    assert [event.status for event in of_kind(run, "finish")] == ["done"]
    assert not list((run / "ranks").glob("here-*")), [event.kind for event in events(run)]


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["decision", "step"])
def test_where_torchrun_is_killed_its_ranks_stop_and_the_same_command_goes_on(
    torchrun: list[str], tmp_path: Path, seen: str
) -> None:
    """Before its ranks have met there is nothing to meet in any more; later they would train on unseen."""
    run = tmp_path / "run"
    with started(torchrun, "--set", "supervise.grace_seconds=5.0") as process:
        until(lambda: (run / "events.jsonl").exists() and of_kind(run, seen) != [], f"the first {seen}")
        ranks = below(process.pid)
        process.kill()
    until(lambda: all(gone(one) for one in ranks), "nothing is left of it")
    (finish,) = of_kind(run, "finish")
    assert (finish.status, finish.signal) == ("stopped", 15) and "torchrun, which has ended" in finish.message
    assert of_kind(run, "fault") == []
    with started(torchrun) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert steps(run) == list(range(1, 31)) and of_kind(run, "finish")[-1].status == "done"


def below(process: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    children = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(one for child in children for one in below(child))]
