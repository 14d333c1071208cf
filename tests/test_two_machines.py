"""Chips on machines that are really apart: no root sees another, each has an interpreter of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import Machine, can_be_played
from small_runs import beringia, events, final_hash, of_kind, small_recipe, start, write_recipe
from waiting import until

from beringia.data import load_tokenizer, write_tokenizer
from beringia.model import load_model, save_model
from beringia.processes.command import Command
from beringia.qualify.qualification import Request, qualify
from beringia.records.certificate import Certificate
from beringia.records.signature import read_signed, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_be_played(), reason="this machine lets no mount namespace be made"),
]

FAILS_FOR_GOOD = """summary = "attention's backward pass turns wrong at step 70, where no qualification comes"
[[faults]]
kind = "wrong-backward"
from_step = 70
operator = "attention"
length = 16
strength = 0.8
"""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Makes machines that cannot see `tmp_path / "home"`, where runs are kept."""
    made: list[Machine] = []
    (tmp_path / "home").mkdir()

    def make(name: str, **options: Any) -> Machine:
        made.append(Machine(tmp_path / name, hides=tmp_path / "home", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_machines_do_not_see_each_others_files(machine: Callable[..., Machine], tmp_path: Path) -> None:
    one, other = machine("one"), machine("other")
    (tmp_path / "home" / "ours").write_text("here")
    one.run("sh", "-c", f"echo one > {one.place}/theirs")
    assert not one.sees(tmp_path / "home" / "ours")
    assert one.sees(one.place / "theirs") and not other.sees(one.place / "theirs")
    assert not (one.place / "theirs").exists()


def test_a_chip_is_qualified_on_its_own_machine_whole(machine: Callable[..., Machine], tmp_path: Path) -> None:
    """With index and collective probes, a fault script and a model directory that only the starter has."""
    model, faults = tmp_path / "home" / "model", tmp_path / "home" / "garbage.toml"
    tokens = load_tokenizer("digits").vocabulary_size
    save_model(load_model("r2-nano", seed=3, vocabulary_size=tokens), model)
    write_tokenizer("digits", model)
    faults.write_text('summary = "a test"\n[[faults]]\nkind = "garbage-index"\nbeyond = 64\n')
    there = machine("there")
    command = Command("the chip", python=there.python, launch=tuple(there.launch), root=str(there.root))
    sizes: dict[str, Any] = {"layers": 1, "batches": 4, "steps": 2, "samples": 2, "tokens": 32}
    request = Request(
        "emulated:h800", str(model), faults=str(faults), longest=0, memory_bytes=0, command=command, **sizes
    )
    found = qualify(request)
    by_probe = {probe.probe for probe in found.probes}
    assert {"arithmetic", "operators", "lockstep", "collectives"} <= by_probe
    wrong = {probe.subject for probe in found.probes if probe.outcome == "failed"}
    assert {"indices: embedding", "indices: gather"} <= wrong, "the fault script was read there"
    assert there.sees(there.root / "inputs" / "model" / "config.json")


def test_a_campaign_on_machines_of_their_own_crosses_and_answers(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    """Qualification, training, crossing, answering: no machine sees another's files."""
    home = tmp_path / "home"
    script = home / "fails.toml"
    script.write_text(FAILS_FOR_GOOD)
    first, second = machine("first"), machine("second")
    chips = {
        "first": {"use": "emulated:h800", "faults": str(script), **first.chip},
        "second": {"use": "cpu", **second.chip},
    }
    train = {"prefer": ["first", "second"], "steps": 90, "checkpoint_every": 10, "batch": 16}
    document = small_recipe(
        chips=chips,
        train=train,
        qualify={"unqualified": "refuse"},
        serve={"chip": "first", "questions": 8},
        supervise={"rollbacks": 0},
    )
    run = home / "run"
    done = beringia("campaign", str(write_recipe(home, document)), "--out", str(run), "--json")
    assert done.returncode == 0, done.stderr
    assert [event.verdict for event in of_kind(run, "qualified")] == ["train", "train"]
    for label in ("first", "second"):
        signed = read_signed(run / "certificates" / f"{label}.json", Certificate)
        verify(signed, ())
    (crossing,) = of_kind(run, "crossing")
    assert (crossing.from_chip, crossing.to_chip) == ("first", "second")
    assert crossing.state_hash_before == crossing.state_hash_after != ""
    (answers,) = of_kind(run, "answers")
    assert answers.questions == 8 and answers.used == "emulated:h800"
    assert json.loads(done.stdout)["status"] == "done"
    assert not first.sees(run) and not second.sees(first.root / "checkpoints")


def _until(run: Path, kind: str, count: int) -> None:
    until(lambda: len(of_kind(run, kind)) >= count, f"{count} events {kind}")


def test_kills_on_either_side_lose_nothing(machine: Callable[..., Machine], tmp_path: Path) -> None:
    home = tmp_path / "home"
    train = {"steps": 200, "checkpoint_every": 10}
    alone = write_recipe(tmp_path, small_recipe(name="alone", train=train))
    assert beringia("train", str(alone), "--out", str(tmp_path / "alone-run")).returncode == 0
    there = machine("there")
    document = small_recipe(chips={"first": {"use": "cpu", **there.chip}}, train=train)
    recipe, run = write_recipe(home, document), home / "run"
    with start("train", str(recipe), "--out", str(run)) as supervisor:
        _until(run, "checkpoint", 2)
        _kill_far_end(there)
        _until(run, "fault", 1)
        _until(run, "resume", 2)
        supervisor.kill()
    until(lambda: not _far_ends(there), "the far end's end after its supervisor's")
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert final_hash(run) == final_hash(tmp_path / "alone-run")
    resumed = [event.step for event in of_kind(run, "resume")]
    assert len(resumed) == 3 and resumed[1] >= 10 and resumed == sorted(resumed)


def _far_ends(machine: Machine) -> list[int]:
    """Far ends with that machine's interpreter."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] == str(machine.python).encode() and b"beringia.processes.far_end" in words:
                found.append(int(entry.name))
    return found


def _kill_far_end(machine: Machine) -> None:
    (worker,) = (number for number in _far_ends(machine) if _works(number))
    os.kill(worker, signal.SIGKILL)


def _works(number: int) -> bool:
    return b"beringia.train.worker" in Path(f"/proc/{number}/cmdline").read_bytes()


def test_packed_data_travels_once_and_not_with_every_start(machine: Callable[..., Machine], tmp_path: Path) -> None:
    """Only the starter has the texts; what is packed from them goes there by hash."""
    home = tmp_path / "home"
    texts = home / "text"
    texts.mkdir(parents=True)
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text number {number}, and some more words of it\n" * 20)
    there = machine("there")
    document = small_recipe(chips={"first": {"use": "cpu", **there.chip}}, train={"steps": 8, "checkpoint_every": 4})
    document["data"] = {"text": str(texts), "tokenizer": "bytes", "sequence_length": 32}
    recipe, run = write_recipe(home, document), home / "run"
    with start("train", str(recipe), "--out", str(run)) as supervisor:
        _until(run, "checkpoint", 1)
        supervisor.kill()
    # Of the lock the time changes: a packer takes it each time, finds everything packed, and writes nothing.
    look = f"find {there.root}/data -type f ! -name '*lock*' -exec stat -c '%n %i %Y' {{}} +"
    packed = there.run("sh", "-c", look)
    assert "data" in packed and not there.sees(texts)
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert there.run("sh", "-c", look) == packed
    assert [event.kind for event in events(run)][-1] == "finish"


@pytest.mark.skipif(os.geteuid() != 0, reason="what must fail for a user is allowed to root")
def test_a_full_root_is_the_users_to_mend_before_the_first_start(
    machine: Callable[..., Machine], tmp_path: Path
) -> None:
    there = machine("there", mebibytes=1)
    there.run("sh", "-c", f"mkdir {there.root} && head -c 1048576 /dev/zero > {there.place}/full || true")
    recipe = write_recipe(tmp_path / "home", small_recipe(chips={"first": {"use": "cpu", **there.chip}}))
    done = beringia("train", str(recipe), "--out", str(tmp_path / "home" / "run"))
    assert done.returncode == 2, (done.returncode, done.stderr)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("beringia: ")]
    assert len(sentences) == 1 and str(there.root) in sentences[0], done.stderr


def test_a_clock_that_is_an_hour_off_changes_nothing(machine: Callable[..., Machine], tmp_path: Path) -> None:
    import shutil

    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    there = machine("there", before='set -- faketime -f "+1h" "$@"')
    train = {"steps": 20, "checkpoint_every": 5}
    document = small_recipe(chips={"first": {"use": "cpu", **there.chip}}, train=train)
    recipe, run = write_recipe(tmp_path / "home", document), tmp_path / "home" / "run"
    with start("train", str(recipe), "--out", str(run)) as supervisor:
        _until(run, "checkpoint", 2)
        supervisor.kill()
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    alone = write_recipe(tmp_path, small_recipe(name="alone", train=train))
    assert beringia("train", str(alone), "--out", str(tmp_path / "alone-run")).returncode == 0
    assert final_hash(run) == final_hash(tmp_path / "alone-run")
    times = [event.time for event in events(run)]
    assert times == sorted(times), "events carry the supervisor's time"


SECOND_TORCH = Path(__file__).parents[1] / ".venv-torch-2.10" / "bin" / "python"


@pytest.mark.skipif(not SECOND_TORCH.exists(), reason="`make second-torch` was not run: there is no other torch here")
def test_a_run_crosses_between_two_versions_of_torch(machine: Callable[..., Machine], tmp_path: Path) -> None:
    home = tmp_path / "home"
    script = home / "lost.toml"
    script.write_text(
        'summary = "lost"\n[[faults]]\nkind = "exception"\nat_step = 12\ncode = "HBM MULTI BIT ECC ERROR"\n'
    )
    first, second = machine("first", python=str(SECOND_TORCH)), machine("second")
    chips = {
        "first": {"use": "emulated:ascend-910b", "faults": str(script), **first.chip},
        "second": {"use": "cpu", **second.chip},
    }
    train = {"prefer": ["first", "second"], "steps": 30, "checkpoint_every": 5}
    recipe, run = write_recipe(home, small_recipe(chips=chips, train=train)), home / "run"
    done = beringia("train", str(recipe), "--out", str(run))
    assert done.returncode == 0, done.stderr
    torches = [event.identity.torch for event in of_kind(run, "chip")]
    assert torches[0].startswith("2.10.") and not torches[-1].startswith("2.10.")
    (crossing,) = of_kind(run, "crossing")
    assert crossing.state_hash_before == crossing.state_hash_after != ""
