"""A chip's machine with files of its own: checkpoints come home in the background, and count once they are here."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from small_runs import small_recipe

from beringia.checkpoint.directory import CheckpointDirectory, Owner
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import TransferFailed
from beringia.processes.patient_pipe import PatientPipe
from beringia.records.events import CheckpointTrusted, CheckpointWritten, Event, StepDone
from beringia.records.files import write_text
from beringia.records.manifest import CleanCheck, TrustMark
from beringia.records.orders import Order
from beringia.records.recipe import Recipe, parse_recipe
from beringia.records.run_directory import RunDirectory
from beringia.supervise.remote_root import RemoteRoot

OWNER = Owner(None, frozenset({"r"}))
CHECKS = (CleanCheck(site="layers.0", replica=0, step=9),)


class Machines:
    """Ours, with a run directory, and the chip's, behind a launcher that counts how often it is used."""

    def __init__(self, directory: Path, *, before: str = "", patience_seconds: float = 300.0) -> None:
        directory.mkdir(exist_ok=True)
        self.launches = directory / "launches"
        launcher = directory / "launcher"
        launcher.write_text(f'#!/bin/sh\necho "$@" >> "{self.launches}"\n{before}\nexec "$@"\n')
        launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
        chip = {"use": "cpu", "launch": [str(launcher)], "root": str(directory / "there")}
        document = small_recipe(chips={"first": chip}, train={"keep": 2}, supervise={"hang_seconds": patience_seconds})
        self.recipe: Recipe = parse_recipe(document, "the test's recipe")
        self.run = RunDirectory(directory / "here")
        self.home = CheckpointDirectory(self.run.checkpoints)
        self.there = CheckpointDirectory(RunDirectory(directory / "there").checkpoints)
        write_text(self.run.resolved_recipe, "{}")
        write_text(self.run.epoch, "4")
        self.root = RemoteRoot("first", self.recipe, self.run, epoch=4, owner=OWNER)
        self._store = CheckpointStore(
            self.there.root, epoch=4, epoch_file=None, keep=10, recipe_hash="r", chip_identity="c"
        )

    def save(self, step: int) -> CheckpointWritten:
        """A checkpoint on the chip's machine, and what its worker tells of it."""
        manifest = self._store.save(step, {"w": torch.full((1000,), float(step))}, {"step": step}).result()
        return CheckpointWritten(
            step=step, directory="", bytes=1, state_hash=manifest.state_hash, pause_seconds=0, write_seconds=0
        )

    def trust(self, written: CheckpointWritten) -> CheckpointTrusted:
        """The checkpoint's mark of trust there, and what the worker tells of it."""
        mark = TrustMark(step=written.step, state_hash=written.state_hash, checks=CHECKS)
        self._store.mark_trusted(written.step, mark)
        return CheckpointTrusted(step=written.step, state_hash=written.state_hash, checks=CHECKS)

    def told(self) -> list[Event]:
        """What can be told when everything has come home."""
        told: list[Event] = []
        while self.root.waiting:
            told += self.root.arrived()
            time.sleep(0.01)
        self.root.close()
        return told


def test_a_checkpoint_is_told_of_when_it_has_come_home_and_its_trust_after_it(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    written = machines.save(7)
    trusted = machines.trust(written)
    assert machines.root.receive(written) == machines.root.receive(trusted) == []
    assert machines.told() == [written, trusted]
    assert machines.home.verify(7) == machines.there.verify(7)
    assert machines.home.trust_mark(7) == machines.there.trust_mark(7)


def test_trust_moves_no_checkpoint_a_second_time(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    written = machines.save(7)
    machines.root.receive(written)
    while not machines.root.arrived():
        time.sleep(0.01)
    machines.root.receive(machines.trust(written))
    assert [event.kind for event in machines.told()] == ["trusted"]
    assert len(machines.launches.read_text().splitlines()) == 1


def test_what_is_not_about_checkpoints_is_told_at_once_while_one_is_on_its_way(tmp_path: Path) -> None:
    may_go = tmp_path / "may go"
    machines = Machines(tmp_path, before=f'while [ ! -e "{may_go}" ]; do sleep 0.05; done')
    written = machines.save(7)
    beat = StepDone(step=8, loss=1.0, gradient_norm=1.0, learning_rate=1e-3, tokens=1, seconds=0.1, cursor=8)
    machines.root.receive(written)
    assert machines.root.receive(beat) == [beat]
    assert machines.root.arrived() == []
    may_go.touch()
    assert machines.told() == [written]


def test_home_keeps_what_the_chips_machine_keeps(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    for step in (1, 2, 3, 4, 5, 6):
        written = machines.save(step)
        machines.root.receive(written)
        if step in (2, 3):
            machines.root.receive(machines.trust(written))
    machines.told()
    # The last two, the last two trusted, and the oldest that may still become trusted.
    assert machines.home.steps() == [2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_come_home_is_a_fallback_and_not_counted_on(tmp_path: Path) -> None:
    machines = Machines(tmp_path, before='echo "node7: no route to host" >&2; exit 255')
    written = machines.save(7)
    machines.root.receive(written)
    machines.root.receive(machines.trust(written))
    (told,) = machines.told()
    assert told.kind == "fallback" and told.what == "checkpoint 7" and "no route to host" in told.reason
    assert machines.home.steps() == []


@pytest.mark.slow
def test_a_machine_that_goes_silent_while_sending_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    machines = Machines(tmp_path, before="echo welcome; sleep 3600", patience_seconds=0.5)
    machines.root.receive(machines.save(7))
    (told,) = machines.told()
    assert told.kind == "fallback" and "waited for in vain (its hello, 0.5 s): welcome" in told.reason


def test_closing_ends_a_transfer_under_way(tmp_path: Path) -> None:
    machines = Machines(tmp_path, before="sleep 3600")
    machines.root.receive(machines.save(7))
    while not machines.launches.exists():
        time.sleep(0.01)
    machines.root.close()
    assert machines.home.steps() == [] and not list(machines.home.root.glob(".step-*"))


def order(machines: Machines, **fields: int | None) -> Order:
    values = {"root": machines.root.root, "chip": "first", "recipe": machines.recipe, "recipe_hash": "r", "epoch": 4}
    values |= fields
    return Order.model_validate(values)


def test_state_goes_there_with_everything_that_the_order_names(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    for step in (7, 8):
        machines.root.receive(machines.save(step))
    machines.told()
    third = Machines(tmp_path / "third machine")
    sender = RemoteRoot("first", third.recipe, machines.run, epoch=4, owner=OWNER)
    assert sender.send_state(order(machines, resume_step=8, canary_from=7)) is None
    assert [third.there.verify(step) for step in (7, 8)] == [machines.home.verify(step) for step in (7, 8)]
    assert RunDirectory(Path(third.root.root)).epoch.read_text() == "4"


def test_our_own_damaged_checkpoint_is_rejected_and_the_machine_is_not_to_blame(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.root.receive(machines.save(7))
    machines.told()
    (file,) = machines.home.path(7).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    root = RemoteRoot("first", machines.recipe, machines.run, epoch=4, owner=OWNER)
    rejected = root.send_state(order(machines, resume_step=7))
    assert rejected is not None and rejected.step == 7 and file.name in rejected.message


def test_a_machine_that_cannot_take_the_state_says_why(tmp_path: Path) -> None:
    machines = Machines(tmp_path, before='echo "disk quota exceeded" >&2; exit 1')
    with pytest.raises(TransferFailed, match="disk quota exceeded"):
        machines.root.send_state(order(machines, resume_step=None))


def test_a_pipe_carries_more_than_it_holds(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    content = os.urandom(3_000_000)
    with PatientPipe(os.fdopen(writing, "wb", buffering=0), 5.0) as pipe, os.fdopen(reading, "rb") as far:
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(far.read(len(content))))
        reader.start()
        assert pipe.write(content) == len(content)
        reader.join()
    assert received == [content]


def test_a_pipe_that_nobody_fills_is_given_up(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    near = PatientPipe(os.fdopen(reading, "rb"), 0.1)
    with os.fdopen(writing, "wb"), near, pytest.raises(TransferFailed, match=r"nothing moved for 0.1 s"):
        near.read(1)


def test_a_pipe_that_nobody_empties_is_given_up(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    near = PatientPipe(os.fdopen(writing, "wb", buffering=0), 0.1)
    with os.fdopen(reading, "rb"), near, pytest.raises(TransferFailed, match=r"nothing moved for 0.1 s"):
        near.write(bytes(3_000_000))
