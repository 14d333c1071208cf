"""What is written lies beside its place until it is whole, and nothing of it stays, however its writer ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from beringia.errors import NotWritable
from beringia.machine.aside import directory_beside, file_beside, remove_abandoned, scratch_directory
from beringia.records.files import publish_directory, write_bytes

WRITER = """
import sys, time
from pathlib import Path
from beringia.errors import NotWritable
from beringia.machine.aside import directory_beside, file_beside
beside = {"file": file_beside, "directory": directory_beside}[sys.argv[1]]
with beside(Path(sys.argv[2])):
    print("writes", flush=True)
    time.sleep(600)
"""


@contextmanager
def writer(kind: str, final: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, in the middle of writing `final`."""
    command = [sys.executable, "-c", WRITER, kind, str(final)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writes\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_writer_left_goes_with_the_next_and_what_one_is_writing_stays(kind: str, tmp_path: Path) -> None:
    final = tmp_path / "the place"
    with writer(kind, final) as living, writer(kind, final) as killed:
        assert len(list(tmp_path.iterdir())) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 2  # it could not remove anything
        write_bytes(final, b"whole")
        assert len(list(tmp_path.iterdir())) == 2  # the living one's, and what was written
        living.send_signal(signal.SIGKILL)
        living.wait()
    with directory_beside(final):
        pass
    assert list(tmp_path.iterdir()) == [final]


def test_files_that_only_look_like_ours_stay(tmp_path: Path) -> None:
    """Another place's, another program's, a link: none is what a killed writer of `page.html` left."""
    names = [
        ".page.html.tmp",
        ".page.html.0123abcd",
        "page.html.0123abcd.tmp",
        ".page.html.0123ABCD.tmp",
        ".q.01234567.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".page.html.01234567.tmp").symlink_to(tmp_path / names[0])
    write_bytes(tmp_path / "page.html", b"<p>")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".page.html.01234567.tmp", "page.html"])
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize("beside", [file_beside, directory_beside])
def test_a_writer_whose_beginning_was_taken_for_abandoned_begins_again(
    beside: Callable[[Path], AbstractContextManager[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking another process may look."""
    import beringia.machine.aside as aside

    looked = []
    held = aside._held

    def hold_after_another_looked(path: Path, descriptor: int) -> bool:
        if not looked:
            looked.append(path)
            remove_abandoned(tmp_path / "final")
            assert not path.exists()
        return held(path, descriptor)

    monkeypatch.setattr(aside, "_held", hold_after_another_looked)
    with beside(tmp_path / "final"):
        assert [path != looked[0] for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []


def test_scratch_files_are_for_their_owner_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_directory() as directory:
        assert directory.parent == tmp_path
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "log").write_text("words")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_publish_the_same_directory_one_is_told_in_a_sentence(tmp_path: Path) -> None:
    """As two exports to one place: the first stays as it is."""
    final = tmp_path / "export"
    with directory_beside(final) as first, directory_beside(final) as second:
        for number, aside in enumerate((first, second)):
            (aside / "file").write_text(str(number))
        publish_directory(first, final)
        with pytest.raises(NotWritable, match="export cannot be written: Directory not empty"):
            publish_directory(second, final)
    assert (final / "file").read_text() == "0"
    assert list(tmp_path.iterdir()) == [final]
