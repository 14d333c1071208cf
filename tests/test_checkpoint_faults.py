"""What goes wrong while a checkpoint is written: kill -9, a full disk, a takeover by another supervisor, leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from waiting import until, waiters

from beringia.checkpoint import tensor_file
from beringia.checkpoint.directory import CheckpointDirectory
from beringia.checkpoint.epoch import advance_epoch, holding_epoch, read_epoch
from beringia.checkpoint.store import CheckpointStore
from beringia.errors import CheckpointDamaged, StaleEpoch, StorageFull
from beringia.records.manifest import TrustMark


def open_store(root: Path, *, epoch: int = 1, epoch_file: Path | None = None, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(
        root, epoch=epoch, epoch_file=epoch_file, keep=keep, recipe_hash="recipe", chip_identity="chip"
    )


def state_of(mebibytes: int, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"w{number}": torch.full((1 << 18,), value) for number in range(mebibytes)}


def partial_directories(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".step-")]


# kill -9

WRITER = """
import sys, time
from pathlib import Path
import torch
from beringia.checkpoint import tensor_file
from beringia.checkpoint.store import CheckpointStore

root, moment = Path(sys.argv[1]), sys.argv[2]
store = CheckpointStore(root, epoch=1, epoch_file=None, keep=3, recipe_hash="r", chip_identity="c")
store.save(1, {"w": torch.ones(1 << 20)}, {"step": 1}).result()

def stop_here(*arguments):
    print("stopped", flush=True)
    time.sleep(60)

if moment == "between pieces":
    write, pieces = tensor_file._write_all, []
    def write_two(file, piece):
        pieces.append(1)
        write(file, piece) if len(pieces) < 4 else stop_here()
    tensor_file._write_all = write_two
elif moment == "before the manifest":
    import beringia.checkpoint.storage as storage
    storage.write_manifest = stop_here
else:
    import beringia.checkpoint.directory as directory
    directory.publish_directory = stop_here
store.save(int(sys.argv[3]), {"w": torch.zeros(1 << 20)}, {"step": 2})
"""


MOMENTS = [
    ("between pieces", 2),
    ("before the rename", 1),
    pytest.param("between pieces", 1, marks=pytest.mark.slow),
    pytest.param("before the manifest", 2, marks=pytest.mark.slow),
    pytest.param("before the manifest", 1, marks=pytest.mark.slow),
    pytest.param("before the rename", 2, marks=pytest.mark.slow),
]
"""When the writer dies, and the step that it was saving beside step 1, or again."""


@pytest.mark.parametrize(("moment", "step"), MOMENTS)
def test_kill_minus_nine_leaves_the_previous_checkpoint_and_no_half_one(tmp_path: Path, moment: str, step: int) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), moment, str(step)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"stopped\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert partial_directories(tmp_path)
    store = open_store(tmp_path, epoch=2)
    store.directory.clean(2)
    assert store.steps() == [1]
    loaded = {"w": torch.zeros(1 << 20)}
    assert store.load(1, loaded) == {"step": 1}
    assert loaded["w"].min() == 1
    store.save(3, loaded, {}).result()
    assert partial_directories(tmp_path) == []
    store.close()


def test_kills_at_random_moments_never_leave_an_unreadable_checkpoint(tmp_path: Path) -> None:
    code = WRITER.split("def stop_here")[0] + "step = 1\nwhile True:\n"
    code += "    step += 1\n    store.save(step, {'w': torch.full((1 << 20,), float(step))}, {'step': step}).result()\n"
    generator = torch.Generator().manual_seed(5)
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), "-"])
    directory = CheckpointDirectory(tmp_path)
    until(directory.steps, "a first checkpoint")
    time.sleep(0.5 * torch.rand(1, generator=generator).item())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert directory.steps()
    for step in directory.steps():
        assert directory.verify(step).step == step


# Full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_the_last_complete_checkpoint_and_no_partial_files(small_disk: Path) -> None:
    store = open_store(small_disk)
    store.save(1, state_of(4), {"step": 1}).result()
    with pytest.raises(StorageFull, match="disk is full"):
        store.save(2, state_of(4, 2.0), {"step": 2}).result()
    assert store.steps() == [1]
    assert partial_directories(small_disk) == []
    loaded = state_of(4, 0.0)
    assert store.load(1, loaded) == {"step": 1}
    assert all(tensor.min() == 1 for tensor in loaded.values())
    store.close()


def test_a_full_disk_that_nobody_waited_for_is_raised_by_the_next_save(small_disk: Path) -> None:
    store = open_store(small_disk)
    store.save(1, state_of(8), {})
    with pytest.raises(StorageFull):
        store.save(2, state_of(8), {})
    store.close()
    assert store.steps() == []


def test_saving_goes_on_when_there_is_room_again(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(4 << 20))
    store = open_store(small_disk)
    with pytest.raises(StorageFull):
        store.save(1, state_of(3), {}).result()
    ballast.unlink()
    store.save(2, state_of(3), {}).result()
    store.close()
    assert store.steps() == [2]


@pytest.mark.parametrize("written", [0, 1 << 20, (1 << 20) + 5])
def test_a_write_that_the_system_cuts_short_is_continued_or_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    # Without privileges too: the last raw write takes a part, then the system says that the disk is full.
    class FillingFile:
        def __init__(self, room: int) -> None:
            self.room = room

        def write(self, piece: memoryview) -> int:
            if self.room == 0:
                raise OSError(28, "No space left on device")
            taken = min(self.room, len(piece))
            self.room -= taken
            return taken

    with pytest.raises(OSError, match="No space left"):
        tensor_file._write_all(FillingFile(written), memoryview(bytes(2 << 20)))  # type: ignore[arg-type]  # a stand-in
    tensor_file._write_all(FillingFile(2 << 20), memoryview(bytes(2 << 20)))  # type: ignore[arg-type]  # a stand-in


# Epochs


def test_each_takeover_adds_one_to_the_epoch(tmp_path: Path) -> None:
    epoch_file = tmp_path / "epoch"
    assert read_epoch(epoch_file) == 0
    assert [advance_epoch(epoch_file) for _ in range(3)] == [1, 2, 3]
    assert read_epoch(epoch_file) == 3
    with pytest.raises(StaleEpoch, match="belongs to epoch 2 .* says 3"), holding_epoch(epoch_file, 2):
        pass


def test_a_takeover_waits_for_a_publication_that_has_begun(tmp_path: Path) -> None:
    epoch_file = tmp_path / "epoch"
    epoch = advance_epoch(epoch_file)
    code = "import pathlib, sys; from beringia.checkpoint import epoch; epoch.advance_epoch(pathlib.Path(sys.argv[1]))"
    with holding_epoch(epoch_file, epoch):
        other = subprocess.Popen([sys.executable, "-c", code, str(epoch_file)])
        until(lambda: waiters(tmp_path / "epoch.lock") == 1 or other.poll() is not None, "it waits for the lock")
        assert other.poll() is None
        assert read_epoch(epoch_file) == epoch
    assert other.wait() == 0
    assert read_epoch(epoch_file) == epoch + 1


def test_an_epoch_file_that_holds_no_number_shuts_everyone_out(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("one\n")
    with pytest.raises(StaleEpoch, match="'one"):
        read_epoch(tmp_path / "epoch")


def test_a_stale_epoch_can_neither_publish_nor_mark_nor_prune(tmp_path: Path) -> None:
    epoch_file, root = tmp_path / "epoch", tmp_path / "checkpoints"
    store = open_store(root, epoch=advance_epoch(epoch_file), epoch_file=epoch_file)
    manifest = store.save(1, state_of(1), {}).result()
    advance_epoch(epoch_file)
    with pytest.raises(StaleEpoch, match="another supervisor has taken over"):
        store.save(2, state_of(1), {}).result()
    with pytest.raises(StaleEpoch):
        store.mark_trusted(1, TrustMark(step=1, state_hash=manifest.state_hash, checks=()))
    with pytest.raises(StaleEpoch):
        store.prune()
    store.close()
    assert store.steps() == [1]
    assert partial_directories(root) == []


# Leftovers


def test_leftovers_of_dead_writers_are_removed_and_a_newer_writers_are_not(tmp_path: Path) -> None:
    for name in (".step-000001.1.tmp", ".step-000002.2.tmp", ".step-000003.3.tmp", ".step-000004.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank00000-part00000.safetensors").write_bytes(b"half")
    store = open_store(tmp_path, epoch=2)
    store.save(9, state_of(1), {}).result()
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-000003.3.tmp", "step-000009"]


def test_a_directory_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000007").mkdir()
    directory = CheckpointDirectory(tmp_path)
    assert directory.steps() == []
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
        directory.manifest(7)


def test_files_appear_with_content_flushed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every tensor file and the manifest is flushed before the directory gets its name.
    order: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        order.append(f"rename to {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    store = open_store(tmp_path)
    store.save(1, state_of(1), {}).result()
    store.close()
    published = order.index("rename to step-000001")
    manifest = next(index for index, name in enumerate(order) if name.startswith(".manifest.json."))
    assert order.index("rank00000-part00000.safetensors") < manifest < published
