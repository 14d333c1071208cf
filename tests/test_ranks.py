"""Several ranks: FSDP2 and DDP compute what one rank computes, state moves between any numbers of them."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import guarded
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import beringia, events, of_kind, small_recipe, write_recipe
from waiting import GIVE_UP_SECONDS

from beringia.errors import Refusal
from beringia.processes.child import Child
from beringia.processes.ranks import Ranks, ranks_from_environment
from beringia.records.events import Fault
from beringia.records.jsonl import JsonLinesWriter
from beringia.records.recipe import parse_recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.next_order import ranks_for
from beringia.supervise.supervisor import supervise

# One rank and two add the same float32 terms in another order: a few roundoffs a step, amplified by AdamW's division
# in the first steps. Measured 0 to 3e-6 over these steps; a wrong average over ranks is off by a factor of two.
SAME_LOSS = 1e-4

STEPS = {"steps": 12, "checkpoint_every": 4}


def losses(run: Path) -> list[float]:
    return [event.loss for event in of_kind(run, "step")]


def inside_torchrun(recipe: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """The same command in two ranks that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "beringia"]
    return subprocess.run(
        [*command, "train", str(recipe), "--out", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=GIVE_UP_SECONDS,
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one")
    done = beringia("train", str(write_recipe(directory, small_recipe(train=STEPS))), "--out", str(directory / "run"))
    assert done.returncode == 0, done.stderr
    return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("use", "sharding"), [("cpu", "fsdp2"), ("emulated:exact", "ddp")])
def test_two_ranks_compute_what_one_rank_computes(one_rank: Path, tmp_path: Path, use: str, sharding: str) -> None:
    document = small_recipe(chips={"first": {"use": use, "ranks": 2}}, train=STEPS | {"compute": "float32"})
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert of_kind(tmp_path / "run", "chip")[0].sharding == sharding
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), abs=SAME_LOSS)
    assert of_kind(tmp_path / "run", "trusted")[-1].step == 12


@pytest.mark.slow
def test_a_run_of_several_ranks_leaves_nothing_among_the_temporary_files(tmp_path: Path) -> None:
    """torchrun makes a directory for logs there at each start, and leaves it."""
    scratch, recipe = tmp_path / "scratch", write_recipe(tmp_path, small_recipe(train=STEPS))
    scratch.mkdir()
    same = ("train", str(recipe), "--out", str(tmp_path / "run"), "--set", "chips.first.ranks=2")
    done = beringia(*same, TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == STEPS["steps"]
    assert [path.name for path in scratch.iterdir() if "inductor" not in path.name] == []


def test_accumulating_gradients_computes_what_one_batch_computes() -> None:
    whole, halves = (guarded.trainer(share=None, asked=guarded.recipe(accumulate=parts)) for parts in (1, 2))
    found = [[made.train_step().loss for _ in range(12)] for made in (whole, halves)]
    assert len(halves.batches()) == 2 and len(whole.batches()) == 1
    assert found[1] == pytest.approx(found[0], abs=SAME_LOSS)


@pytest.mark.slow
def test_a_lost_device_of_two_is_left_out_and_the_state_goes_to_the_remaining_one(
    tmp_path: Path, one_rank: Path
) -> None:
    script = tmp_path / "lost.toml"
    script.write_text(
        'summary = "the second device is lost at step 6"\n'
        '[[faults]]\nkind = "exception"\nat_step = 6\nonce = true\ncode = "HBM MULTI BIT ECC ERROR"\ndevice = 1\n'
    )
    chips = {"first": {"use": "emulated:ascend-910b", "ranks": 2, "faults": str(script)}}
    document = small_recipe(chips=chips, train=STEPS | {"compute": "float32"})
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    decisions = [(event.action, event.excluded_device) for event in of_kind(tmp_path / "run", "decision")]
    assert ("exclude", 1) in decisions
    assert [event.ranks for event in of_kind(tmp_path / "run", "chip")] == [2, 1]
    resumed = of_kind(tmp_path / "run", "resume")[-1]
    assert resumed.step == 4 and resumed.state_hash == resumed.state_hash_expected


@given(st.integers(1, 64), st.integers(1, 4), st.integers(2, 16), st.data())
def test_where_devices_are_left_out_the_others_share_the_batch_evenly(
    shares: int, accumulate: int, ranks: int, data: st.DataObject
) -> None:
    left_out = data.draw(st.integers(1, ranks - 1))
    batch = shares * accumulate
    document = small_recipe(
        chips={"first": {"use": "cpu", "ranks": ranks}}, train={"batch": batch, "accumulate": accumulate}
    )
    recipe = parse_recipe(document, "test")
    assert ranks_for(recipe, "first", 0) == ranks
    used = ranks_for(recipe, "first", left_out)
    more = range(used + 1, ranks - left_out + 1)
    assert batch % (accumulate * used) == 0 and all(batch % (accumulate * count) for count in more)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_four_devices_without_one_as_many_go_on_as_share_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "lost.toml"
    script.write_text(
        'summary = "the second device is lost at step 6"\n'
        '[[faults]]\nkind = "exception"\nat_step = 6\nonce = true\ncode = "HBM MULTI BIT ECC ERROR"\ndevice = 1\n'
    )
    chips = {"first": {"use": "emulated:ascend-910b", "ranks": 4, "faults": str(script)}}
    document = small_recipe(chips=chips, train=STEPS | {"compute": "float32", "batch": 8})
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert [event.ranks for event in of_kind(tmp_path / "run", "chip")] == [4, 2]
    (told,) = [event for event in of_kind(tmp_path / "run", "fallback") if event.what == "ranks"]
    assert (told.asked, told.used) == ("3 devices that are left", "2")
    assert {event.tokens for event in of_kind(tmp_path / "run", "step")} == {8 * 24}


@pytest.mark.slow
def test_the_same_command_runs_inside_an_environment_that_torchrun_has_set_up(one_rank: Path, tmp_path: Path) -> None:
    done = inside_torchrun(write_recipe(tmp_path, small_recipe(train=STEPS)), tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert of_kind(tmp_path / "run", "chip")[0].ranks == 2
    assert losses(tmp_path / "run") == pytest.approx(losses(one_rank), abs=SAME_LOSS)
    # Done already, the first rank is gone again at once: no other may miss it.
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = inside_torchrun(tmp_path / "small.toml", tmp_path / "run")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    assert not list((tmp_path / "run" / "ranks").glob("here-*"))


@pytest.mark.slow
def test_inside_torchrun_no_rank_goes_on_with_a_chip_that_may_not_train(tmp_path: Path) -> None:
    document = small_recipe(train=STEPS, qualify={"unqualified": "refuse"})
    done = inside_torchrun(write_recipe(tmp_path, document), tmp_path / "run")
    assert done.returncode != 0 and "first may not train" in done.stderr
    kinds = [event.kind for event in events(tmp_path / "run")]
    assert kinds == ["run", "decision", "chip", "unqualified", "decision", "finish"]


def test_what_another_rank_feels_of_a_refusal_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gloo group breaks when the first rank's worker is ended, and it says so before it is ended too."""
    recipe = parse_recipe(small_recipe(train=STEPS, qualify={"unqualified": "refuse"}), "test")
    run = RunDirectory(tmp_path / "run")
    felt = Fault(step=0, code="communication", category="transient", message="Connection closed by peer")
    end = Child.end

    def end_and_be_felt(worker: Child, seconds: float | None = None) -> int:
        (opened,) = of_kind(run.root, "chip")
        with closing(JsonLinesWriter(run.rank_report(opened.epoch, rank=1))) as report:
            report.append(felt.model_dump(mode="json"), durable=True)
        return end(worker, seconds)

    monkeypatch.setattr(Child, "end", end_and_be_felt)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with pytest.raises(Refusal, match="first may not train"):
        supervise(recipe, "", run)
    kinds = [event.kind for event in events(run.root)]
    assert kinds == ["run", "decision", "chip", "unqualified", "decision", "finish"]


@pytest.mark.slow
def test_a_fault_of_another_rank_inside_torchrun_is_recorded_by_its_own_code(one_rank: Path, tmp_path: Path) -> None:
    script = tmp_path / "once.toml"
    script.write_text(
        'summary = "the second device fails once, at step 6"\n'
        '[[faults]]\nkind = "exception"\nat_step = 6\nonce = true\ncode = "507014"\ndevice = 1\n'
    )
    chips = {"first": {"use": "emulated:ascend-910b", "faults": str(script)}}
    recipe = write_recipe(tmp_path, small_recipe(chips=chips, train=STEPS | {"compute": "float32"}))
    done = inside_torchrun(recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "507014" in [event.code for event in of_kind(tmp_path / "run", "fault")]
    assert of_kind(tmp_path / "run", "step")[-1].step == 12
    assert {event.action for event in of_kind(tmp_path / "run", "decision")} == {"start", "retry"}


def test_a_slurm_environment_says_which_rank_this_is() -> None:
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-09,12]",
        "SLURM_JOB_ID": "4711",
    }
    ranks = ranks_from_environment(environment)
    assert ranks is not None
    assert (ranks.rank, ranks.count, ranks.local, ranks.address) == (5, 8, 1, "gpu07")


def test_without_a_launcher_a_process_is_alone() -> None:
    assert ranks_from_environment({}) is None
    assert Ranks().first and Ranks().count == 1
