"""What is wrong with the input is said in one clear sentence, with exit code 2, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import beringia, final_hash, of_kind, small_recipe, start, worker_of, write_recipe
from waiting import until

from beringia.data.tokenizer import load_tokenizer
from beringia.model import load_model, save_model


def refused(tmp_path: Path, document: dict[str, Any], *arguments: str) -> str:
    """The sentence with which `beringia train` refuses a recipe."""
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2, (done.returncode, done.stderr, done.stdout)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("beringia: ")]
    assert len(sentences) == 1 and "Traceback" not in done.stderr
    return sentences[0]


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "launcher"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_an_unknown_key_is_named_with_the_one_that_was_meant(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(train={"learning_rat": 0.1}))
    assert "'train.learning_rat'" in sentence and "Did you mean 'learning_rate'?" in sentence


def test_a_value_of_another_type_is_named(tmp_path: Path) -> None:
    assert "'train.steps'" in refused(tmp_path, small_recipe(train={"steps": "many"}))


def test_a_preferred_chip_that_the_recipe_does_not_define_is_named(tmp_path: Path) -> None:
    assert "'elsewhere'" in refused(tmp_path, small_recipe(train={"prefer": ["elsewhere"]}))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    done = beringia("train", str(tmp_path / "none.toml"))
    assert done.returncode == 2 and "none.toml" in done.stderr


def test_with_json_an_error_is_json_too(tmp_path: Path) -> None:
    done = beringia("train", str(tmp_path / "none.toml"), "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["error"] == "RecipeError"


def test_a_chip_that_does_not_exist_is_answered_with_those_that_do(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpuu"}}))
    assert "'cpuu'" in sentence and "'cpu'" in sentence


@pytest.mark.slow
def test_a_chip_that_is_not_here_is_said_to_be_missing(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the chip that the test wants to miss")
    assert "cuda" in refused(tmp_path, small_recipe(chips={"first": {"use": "cuda"}}))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        pytest.param({"use": "emulated:h80"}, "'h80'", marks=pytest.mark.slow),
        ({"use": "emulated:h800", "faults": "no-such-script"}, "'no-such-script'"),
        ({"use": "cpu", "python": "/bin/false"}, "chips.second"),
    ],
)
def test_a_chip_that_is_needed_later_is_asked_before_the_first_step(
    tmp_path: Path, second: dict[str, Any], words: str
) -> None:
    chips = {"first": {"use": "cpu"}, "second": second}
    assert words in refused(tmp_path, small_recipe(chips=chips, train={"prefer": ["first", "second"]}))
    assert not of_kind(tmp_path / "run", "chip")


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "python": "/no/such/python"}}))
    assert "/no/such/python" in sentence and "chips.first.python" in sentence


def test_a_launch_prefix_that_does_not_exist_is_named(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "launch": ["no-such-launcher", "x"]}}))
    assert "no-such-launcher" in sentence


def test_a_launch_prefix_that_fails_is_reported_with_its_own_words(tmp_path: Path) -> None:
    launcher = script(tmp_path, "echo 'node7: connection refused' >&2; exit 255")
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "launch": [launcher]}}))
    assert "node7: connection refused" in sentence and "chips.first" in sentence


def test_another_version_of_beringia_on_the_other_side_is_refused_in_the_handshake(tmp_path: Path) -> None:
    code = (
        "import runpy, sys, beringia.version as v; v.__version__ = '0.0.9'; sys.argv = sys.argv[2:]; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    python = script(tmp_path, f'exec "{sys.executable}" -c "{code}" "$@"')
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "python": python}}))
    assert "0.0.9" in sentence and "Install the same Beringia" in sentence


def test_a_model_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    document = small_recipe()
    document["model"] = {"path": str(tmp_path / "model")}
    assert "config.json" in refused(tmp_path, document)


@pytest.mark.slow
def test_an_unsupported_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    document = small_recipe()
    document["model"] = {"path": str(tmp_path / "model")}
    assert "mamba" in refused(tmp_path, document)


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    from beringia.model import load_model, save_model

    save_model(load_model("r2-nano"), tmp_path / "model")
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text number {number}\n" * 20)
    document = small_recipe(data={"text": str(tmp_path / "text"), "tokenizer": "bytes"})
    del document["data"]["task"]
    document["model"] = {"path": str(tmp_path / "model")}
    assert "vocabulary" in refused(tmp_path, document)


def test_empty_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    document = small_recipe(data={"text": str(tmp_path / "text"), "tokenizer": "bytes"})
    del document["data"]["task"]
    assert str(tmp_path / "text") in refused(tmp_path, document)


@pytest.mark.slow
def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    assert "train.batch is 5" in refused(tmp_path, small_recipe(train={"batch": 5, "accumulate": 2}))


@pytest.mark.slow
def test_faults_on_a_real_chip_are_refused(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "faults": "r2-2025"}}))
    assert "r2-2025" in sentence


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of its own needs root to be mounted")
def test_a_full_disk_stops_the_run_at_its_last_complete_checkpoint_and_room_lets_it_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(run)], check=True)
    try:
        recipe = str(write_recipe(tmp_path, small_recipe()))
        full = beringia("train", recipe, "--out", str(run))
        assert full.returncode == 2 and "disk is full" in full.stderr, full.stderr
        written = {event.step for event in of_kind(run, "checkpoint")}
        there = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}
        assert there <= written, "only complete checkpoints are left"
        subprocess.run(["mount", "-o", "remount,size=200m", str(run)], check=True)
        assert beringia("train", recipe, "--out", str(run)).returncode == 0
        assert of_kind(run, "finish")[-1].status == "done"
    finally:
        subprocess.run(["umount", str(run)], check=True)


# ---- machines that cannot be reached, before a chip has first started


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ('printf "root@node7\'s password: "; sleep 3600', "asks something"),
        ('exec "$@" </dev/null', "must hand standard input on"),
        ("exit 0", "did not start (status 0): it said nothing"),
    ],
)
def test_a_prefix_that_does_not_reach_its_machine_is_one_sentence(tmp_path: Path, prefix: str, words: str) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "launch": [script(tmp_path, prefix)]}}))
    assert words in sentence and not of_kind(tmp_path / "run", "chip")


def test_a_root_whose_place_is_missing_is_one_sentence(tmp_path: Path) -> None:
    launch = [script(tmp_path, 'exec "$@"')]
    chip = {"use": "cpu", "launch": launch, "root": str(tmp_path / "not-mounted" / "run")}
    sentence = refused(tmp_path, small_recipe(chips={"first": chip}))
    assert "there is no directory" in sentence and "not-mounted" in sentence
    assert not (tmp_path / "not-mounted").exists()


def test_a_launcher_that_is_not_there_is_answered_with_the_one_that_was_meant(tmp_path: Path) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "launcher": "prefx"}}))
    assert "chips.first.launcher" in sentence and "Did you mean 'prefix'?" in sentence


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_variables_that_a_launcher_left_in_the_shell_are_named(tmp_path: Path, left: dict[str, str]) -> None:
    recipe = str(write_recipe(tmp_path, small_recipe()))
    done = beringia("train", recipe, "--out", str(tmp_path / "run"), **left)
    assert done.returncode == 2, done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("beringia: "))
    assert all(f"-u {name}" in sentence for name in left) and "env" in sentence


@pytest.mark.slow
def test_a_rank_whose_peers_never_come_says_so(tmp_path: Path) -> None:
    """All of a launcher's variables, and no launcher."""
    left = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    recipe = str(write_recipe(tmp_path, small_recipe()))
    done = beringia("train", recipe, "--out", str(tmp_path / "run"), **left)
    assert done.returncode == 2 and "rank 0 has not come" in done.stderr and "env -u RANK" in done.stderr


def test_the_variables_of_slurms_interactive_step_are_no_ranks(tmp_path: Path) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}
    recipe = str(write_recipe(tmp_path, small_recipe(train={"steps": 2})))
    done = beringia("train", recipe, "--out", str(tmp_path / "run"), **step)
    assert done.returncode == 0, done.stderr


# ---- the same, once it has worked: a fault, and nothing is lost


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        "printf 'password: '; sleep 3600",
        "exit 0",
        'exec "$@" </dev/null',
        "export PYTHONPATH={elsewhere}",
    ],
    ids=["asks", "ends", "loses its input", "another version"],
)
def test_a_machine_that_is_broken_for_a_while_in_mid_run_costs_time_and_nothing_else(
    tmp_path: Path, broken: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sitecustomize.py").write_text("import beringia.version as v\nv.__version__ = '0.0.9'\n")
    flag = tmp_path / "broken"
    launcher = script(tmp_path, f'if [ -e "{flag}" ]; then {broken.format(elsewhere=elsewhere)}; fi\nexec "$@"')
    document = small_recipe(chips={"first": {"use": "cpu", "launch": [launcher]}}, supervise={"restart_seconds": 0.1})
    recipe, run = str(write_recipe(tmp_path, document)), tmp_path / "run"
    with start("train", recipe, "--out", str(run)) as supervisor:
        until(lambda: of_kind(run, "checkpoint"), "a checkpoint")
        flag.touch()
        worker = worker_of(supervisor.pid)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        until(lambda: len(of_kind(run, "fault")) >= 2, "a second fault")
        flag.unlink()
        supervisor.communicate()
    assert supervisor.returncode == 0
    assert {fault.code for fault in of_kind(run, "fault")} == {"exit", "unreachable"}
    alone = str(write_recipe(tmp_path, small_recipe(name="alone")))
    assert beringia("train", alone, "--out", str(tmp_path / "alone-run")).returncode == 0
    assert final_hash(run) == final_hash(tmp_path / "alone-run")


def test_a_label_that_would_leave_the_run_directory_is_refused(tmp_path: Path) -> None:
    chips = {'"../../evil"': {"use": "cpu"}}
    assert "'../../evil'" in refused(tmp_path, small_recipe(chips=chips, train={"prefer": ["../../evil"]}))


@pytest.mark.parametrize("root", ["", "relative/root"])
def test_a_root_that_is_no_whole_path_is_refused(tmp_path: Path, root: str) -> None:
    sentence = refused(tmp_path, small_recipe(chips={"first": {"use": "cpu", "root": root}}))
    assert f"chips.first.root is {root!r}" in sentence and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "seconds", ["inf", *(pytest.param(one, marks=pytest.mark.slow) for one in ("1e10", "-1", "nan"))]
)
def test_a_time_that_no_system_call_takes_is_refused(tmp_path: Path, seconds: str) -> None:
    sentence = refused(tmp_path, small_recipe(), "--set", f"supervise.hang_seconds={seconds}")
    assert "supervise.hang_seconds" in sentence


def test_a_directory_where_a_recipe_is_meant_is_named(tmp_path: Path) -> None:
    done = beringia("train", str(tmp_path))
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr


def test_an_out_that_is_a_file_or_below_one_is_one_sentence(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, small_recipe()))
    (tmp_path / "file").write_text("a user's")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        done = beringia("train", recipe, "--out", str(out))
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert (tmp_path / "file").read_text() == "a user's"


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in ("seven", "-1"))])
def test_an_epoch_that_is_no_number_says_what_to_do_and_that_helps(tmp_path: Path, content: str) -> None:
    recipe, run = str(write_recipe(tmp_path, small_recipe(train={"steps": 4}))), tmp_path / "run"
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    (run / "epoch").write_text(content)
    more = ("train", recipe, "--out", str(run), "--set", "train.steps=8")
    done = beringia(*more)
    assert done.returncode == 2 and "Remove it and give the same command again" in done.stderr
    (run / "epoch").unlink()
    assert beringia(*more).returncode == 0
    epochs = [event.epoch for event in of_kind(run, "step")]
    assert epochs == sorted(epochs) and epochs[-1] > epochs[0]


@pytest.mark.parametrize(
    "left",
    [
        {"SLURM_PROCID": "x", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "x", "SLURM_STEP_ID": "0"},
        {"RANK": "\u00b2", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "junk"},
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        },
    ],
)
def test_variables_that_no_launcher_stands_behind_are_one_sentence_at_once(
    tmp_path: Path, left: dict[str, str]
) -> None:
    done = beringia("train", str(write_recipe(tmp_path, small_recipe())), "--out", str(tmp_path / "run"), **left)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "env -u" in done.stderr


@pytest.mark.slow
def test_a_batch_script_of_slurms_is_no_task_of_its_own(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, small_recipe(train={"steps": 4})))
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert beringia("train", recipe, "--out", str(tmp_path / "run"), **batch).returncode == 0


@pytest.mark.slow
def test_a_banner_that_does_not_end_its_line_hides_nothing(tmp_path: Path) -> None:
    launch = [script(tmp_path, "printf 'Welcome '; exec \"$@\"")]
    document = small_recipe(chips={"first": {"use": "cpu", "launch": launch}}, train={"steps": 4})
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert any("Welcome" in log.read_text() for log in (tmp_path / "run" / "logs").glob("*.log"))


@pytest.mark.parametrize(
    "closed",
    ["2>&1 | head -n 1", *(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-", ">&- 2>&-"))],
)
@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path: Path, closed: str) -> None:
    recipe, run = str(write_recipe(tmp_path, small_recipe(train={"steps": 8}))), tmp_path / "run"
    line = f'set -o pipefail; "{sys.executable}" -m beringia train "{recipe}" --out "{run}" {closed}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and of_kind(run, "finish")[-1].status == "done"


@pytest.mark.slow
def test_two_runs_do_not_share_a_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    document = small_recipe(chips={"first": {"use": "cpu", "root": str(root)}}, train={"steps": 4})
    recipe = str(write_recipe(tmp_path, document))
    assert beringia("train", recipe, "--out", str(tmp_path / "one")).returncode == 0
    there = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    refusal = beringia("train", recipe, "--out", str(tmp_path / "other"))
    assert refusal.returncode == 2 and "holds the files of another run" in refusal.stderr
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == there
    assert beringia("train", recipe, "--out", str(tmp_path / "one"), "--set", "train.steps=6").returncode == 0


@pytest.mark.slow
def test_nothing_of_ours_is_left_in_the_users_places(tmp_path: Path) -> None:
    model = tmp_path / "model"
    size = load_tokenizer("digits").vocabulary_size
    save_model(load_model("r2-nano", seed=1, vocabulary_size=size), model)
    before = {path.name for path in model.iterdir()}
    document = small_recipe(
        model={"path": str(model)},
        chips={"first": {"use": "cpu", "root": str(tmp_path / "root")}},
        data={"tokenizer": "digits"},
        train={"steps": 4},
    )
    del document["model"]["preset"]
    done = beringia("train", str(write_recipe(tmp_path, document)), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in model.iterdir()} == before


@pytest.mark.slow
def test_events_of_a_later_schema_are_not_read_as_if_they_were_ours(tmp_path: Path) -> None:
    recipe, run = str(write_recipe(tmp_path, small_recipe(train={"steps": 4}))), tmp_path / "run"
    assert beringia("train", recipe, "--out", str(run)).returncode == 0
    log = run / "events.jsonl"
    log.write_text(log.read_text().replace('"schema_version":3', '"schema_version":4', 1))
    done = beringia("train", recipe, "--out", str(run), "--set", "train.steps=8")
    assert done.returncode == 2 and "line 1" in done.stderr and "schema_version" in done.stderr
