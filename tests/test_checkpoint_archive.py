"""A checkpoint as a stream: what arrives is what was sent, complete or not at all."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beringia.checkpoint.archive import read_archive, write_archive
from beringia.checkpoint.directory import CheckpointDirectory, verify_checkpoint
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import CheckpointDamaged, RunError
from beringia.records.manifest import TrustMark


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / "here"
    store = CheckpointStore(root, epoch=1, epoch_file=None, keep=1, recipe_hash="r", chip_identity="c")
    manifest = store.save(7, {"w": torch.arange(50.0), "b": torch.ones(3).bfloat16()}, {"step": 7}).result()
    store.mark_trusted(7, TrustMark(step=7, state_hash=manifest.state_hash, checks=()))
    store.close()
    return root / "step-000007"


def archive_of(checkpoint: Path) -> bytes:
    stream = io.BytesIO()
    write_archive(checkpoint, stream)
    return stream.getvalue()


def test_a_checkpoint_arrives_with_every_byte_and_its_trust(checkpoint: Path, tmp_path: Path) -> None:
    there = tmp_path / "there" / checkpoint.name
    manifest = read_archive(io.BytesIO(archive_of(checkpoint)), there)
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert verify_checkpoint(there) == manifest
    assert CheckpointDirectory(there.parent).trusted_steps() == [7]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(where=st.floats(0, 1, exclude_max=True))
def test_a_stream_cut_anywhere_leaves_nothing(checkpoint: Path, tmp_path: Path, where: float) -> None:
    archive = archive_of(checkpoint)
    with pytest.raises(CheckpointDamaged):
        read_archive(io.BytesIO(archive[: int(where * len(archive))]), tmp_path / "cut" / "step-000007")
    assert list((tmp_path / "cut").iterdir()) == []


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_stream_with_any_bit_flipped_leaves_nothing(checkpoint: Path, tmp_path: Path, where: float, bit: int) -> None:
    archive = bytearray(archive_of(checkpoint))
    archive[int(where * len(archive))] ^= 1 << bit
    with pytest.raises(CheckpointDamaged):
        read_archive(io.BytesIO(archive), tmp_path / "flipped" / "step-000007")
    assert list((tmp_path / "flipped").iterdir()) == []


def test_a_file_damaged_before_sending_is_not_sent_as_good(checkpoint: Path, tmp_path: Path) -> None:
    path = next(checkpoint.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    stream = io.BytesIO()
    with pytest.raises(CheckpointDamaged, match=path.name):
        write_archive(checkpoint, stream)
    stream.seek(0)
    with pytest.raises(CheckpointDamaged):
        read_archive(stream, tmp_path / "there")


def test_names_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    for name in ("../evil", "/tmp/evil", ".hidden", "a/b"):
        stream = io.BytesIO(f"BERINGIA-CHECKPOINT 1\n{name} 0 {'0' * 64}\nEND 1\n".encode())
        with pytest.raises(CheckpointDamaged):
            read_archive(stream, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_not_touched(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(RunError, match="exists already"):
        read_archive(io.BytesIO(archive_of(checkpoint)), checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_two_processes_hand_it_over_through_a_pipe(checkpoint: Path, tmp_path: Path) -> None:
    module, there = "beringia.checkpoint.archive", tmp_path / "there" / "step-000007"
    send = subprocess.Popen([sys.executable, "-m", module, "send", str(checkpoint)], stdout=subprocess.PIPE)
    assert send.stdout is not None
    with send.stdout:
        received = subprocess.run([sys.executable, "-m", module, "receive", str(there)], stdin=send.stdout)
    assert (send.wait(), received.returncode) == (0, 0)
    verify_checkpoint(there)


def test_a_sender_without_a_checkpoint_says_so_and_exits_with_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "beringia.checkpoint.archive", "send", str(tmp_path / "none")], capture_output=True
    )
    assert result.returncode == 2
    assert b"There is no checkpoint" in result.stderr
