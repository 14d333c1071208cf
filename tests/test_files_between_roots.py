"""Files from one root to another: only what the receiver lacks travels, and each appears complete or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beringia.errors import RunError, TransferFailed
from beringia.processes.child import start
from beringia.processes.command import Command
from beringia.processes.files import far, index
from beringia.processes.files.exchange import (
    Offered,
    SomethingElse,
    files_below,
    listing,
    offer_directory,
    receive,
    receive_directory,
    send,
)
from beringia.processes.files.far import FilesWork
from beringia.processes.files.index import INDEX, HashIndex
from beringia.processes.files.remote import FarFiles
from beringia.processes.patience import Patience

Tree = dict[str, bytes]

NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "f g/ü"])
TREES = st.dictionaries(NAMES, st.binary(max_size=300), max_size=5)


def write(root: Path, tree: Tree) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def read(root: Path) -> Tree:
    return {name: (root / name).read_bytes() for name in files_below(root)}


class Cut(io.RawIOBase):
    """A pipe's end that closes after so many bytes."""

    def __init__(self, descriptor: int, left: int) -> None:
        self._descriptor, self._left = descriptor, left

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        os.write(self._descriptor, view[: self._left])
        if len(view) > self._left:
            os.close(self._descriptor)
            raise BrokenPipeError
        self._left -= len(view)
        return len(view)


def exchange(
    sending: Callable[[Any, Any], Any], receiving: Callable[[Any, Any], Any], cut_after: int = 2**40
) -> tuple[Any, Any]:
    """Both sides over two pipes; what each returned or raised."""
    out_read, out_write = os.pipe()
    back_read, back_write = os.pipe()
    results: dict[str, Any] = {}

    def receiver() -> None:
        with os.fdopen(out_read, "rb") as came, os.fdopen(back_write, "wb", buffering=0) as answers:
            try:
                results["received"] = receiving(came, answers)
            except (TransferFailed, BrokenPipeError) as problem:
                results["received"] = problem

    thread = threading.Thread(target=receiver)
    thread.start()
    goes = Cut(out_write, cut_after)
    with os.fdopen(back_read, "rb") as answers:
        try:
            results["sent"] = sending(goes, answers)
            os.close(out_write)
        except (TransferFailed, BrokenPipeError) as problem:
            results["sent"] = problem
            if not isinstance(problem, BrokenPipeError):
                os.close(out_write)
        thread.join()
    return results["sent"], results["received"]


def move(here: Path, there: Path, cut_after: int = 2**40) -> tuple[Any, Any]:
    offered = listing(here, files_below(here))
    return exchange(
        lambda goes, answers: send(here, offered, goes, answers),
        lambda came, answers: receive(there, came, answers),
        cut_after,
    )


@settings(deadline=None, max_examples=40)
@given(here=TREES, there=TREES)
def test_only_what_the_receiver_lacks_travels_and_the_rest_of_its_files_stays(here: Tree, there: Tree) -> None:
    with TemporaryDirectory() as directory:
        root, far = Path(directory, "here"), Path(directory, "there")
        write(root, here)
        write(far, there)
        sent, received = move(root, far)
        assert sent == sum(len(content) for name, content in here.items() if there.get(name) != content)
        assert read(far) == there | here
        assert {one.name: one.sha256 for one in received} == {
            name: hashlib.sha256(content).hexdigest() for name, content in here.items()
        }
        assert move(root, far)[0] == 0


@settings(deadline=None, max_examples=60)
@given(here=TREES, there=TREES, cut_after=st.integers(0, 1200), whole=st.booleans())
def test_a_stream_cut_at_any_byte_leaves_each_file_or_directory_as_it_was_or_complete(
    here: Tree, there: Tree, cut_after: int, whole: bool
) -> None:
    with TemporaryDirectory() as directory:
        root, far = Path(directory, "here"), Path(directory, "there")
        write(root, here)
        write(far, there)
        offered = offer_directory(root)
        into = receive_directory if whole else receive
        exchange(
            lambda goes, answers: send(root, offered, goes, answers),
            lambda came, answers: into(far, came, answers),
            cut_after,
        )
        found = read(far)
        if whole:
            assert found in (there, here)
        for name, content in found.items():
            assert content in (there.get(name), here.get(name))
        assert not [path for path in Path(directory).rglob("*") if path.name.endswith((".tmp", ".received"))]


def test_bytes_that_are_not_as_announced_are_refused_on_both_sides(tmp_path: Path) -> None:
    write(tmp_path / "here", {"a": b"right"})
    wrong = [Offered(name="a", bytes=5, sha256=hashlib.sha256(b"other").hexdigest())]
    sent, received = exchange(
        lambda goes, answers: send(tmp_path / "here", wrong, goes, answers),
        lambda came, answers: receive(tmp_path / "there", came, answers),
    )
    for problem in (sent, received):
        assert isinstance(problem, TransferFailed) and "a did not arrive as it was announced" in str(problem)
    assert not (tmp_path / "there" / "a").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_name_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    stream = io.BytesIO(Offered(name=name, bytes=0, sha256="").model_dump_json().join(['{"files": [', "]}\n"]).encode())
    with pytest.raises(TransferFailed, match="outside the directory"):
        receive(tmp_path, stream, io.BytesIO())


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    size = 64 * 2**20
    (tmp_path / "here").mkdir()
    with open(tmp_path / "here" / "large", "wb") as file:
        file.truncate(size)
    tracemalloc.start()
    sent, _ = move(tmp_path / "here", tmp_path / "there")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent == size and (tmp_path / "there" / "large").stat().st_size == size
    assert peak < size / 8  # pieces of 1 MiB on both sides


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    plain = index.sha256_of_file
    monkeypatch.setattr(index, "sha256_of_file", lambda path: reads.append(path.name) or plain(path))
    monkeypatch.setattr(index, "_RESTED_SECONDS", 0.0)
    write(tmp_path, {"a": b"one", "b": b"two"})
    time.sleep(0.05)  # until the file system's clock has moved on
    listing(tmp_path, ["a", "b"], memory=tmp_path / INDEX)
    listing(tmp_path, ["a", "b"], memory=tmp_path / INDEX)
    assert reads == ["a", "b"]
    write(tmp_path, {"b": b"owt"})
    found = listing(tmp_path, ["a", "b"], memory=tmp_path / INDEX)
    assert reads == ["a", "b", "b"] and found[1].sha256 == hashlib.sha256(b"owt").hexdigest()


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path: Path) -> None:
    """It could be written again within the file system's clock tick, and keep its times."""
    write(tmp_path, {"a": b"one"})
    listing(tmp_path, ["a"], memory=tmp_path / INDEX)
    assert not (tmp_path / INDEX).exists()


def test_a_damaged_memory_is_no_memory(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"one", INDEX: b"[not json"})
    assert HashIndex(tmp_path, tmp_path / INDEX).sha256("a") == hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize(
    "line", [b'{"kind": "ended"}\n', b'{"files": 3}\n', b'{"files": [{"name": 1}]}\n', b"[]\n", b"x\n", b""]
)
def test_whatever_comes_in_the_place_of_a_listing_is_a_transfer_that_failed(tmp_path: Path, line: bytes) -> None:
    for receiving in (receive, receive_directory):
        with pytest.raises((TransferFailed, SomethingElse)):
            receiving(tmp_path / "there", io.BytesIO(line), io.BytesIO())


def test_a_listing_that_comes_in_one_read_with_the_far_ends_ready_is_heard(tmp_path: Path) -> None:
    """As a far end that is quicker than its starter sends them: everything is there before anything is read."""
    write(tmp_path / "there" / "a", {"file": b"content"})
    prefix, filter_ = tmp_path / "prefix", tmp_path / "filter.py"
    filter_.write_text(
        "import os\n"
        "def line():\n"
        "    got = b''\n"
        "    while not got.endswith(b'\\n'):\n"
        "        got += os.read(0, 1)\n"
        "    return got\n"
        "os.write(1, line())\n"  # hello
        "os.write(1, line() + line())\n"  # ready and the listing
        "while block := os.read(0, 65536):\n"
        "    os.write(1, block)\n"
    )
    prefix.write_text(f'#!/bin/sh\n"$@" | "{sys.executable}" "{filter_}"\n')
    prefix.chmod(0o755)
    command = Command("chips.first", launch=(str(prefix),), root=str(tmp_path / "there"))
    child = start(
        replace(command, module=far.__name__), FilesWork(task="send-directory", directory="a"), tmp_path / "l"
    )
    try:
        while child.ready is None and not child.over:
            child.poll(1.0)
        goes, came = child.streams()
        assert receive_directory(tmp_path / "here", came, goes)[0].name == "file"
        child.hear_out(came)
    finally:
        child.end()
    assert read(tmp_path / "here") == {"file": b"content"} and child.ended is not None


def test_the_far_sides_own_reason_is_told(tmp_path: Path) -> None:
    files = FarFiles(Command("chips.first", root=str(tmp_path)), tmp_path / "log", Patience())
    with pytest.raises(RunError, match=r"There is no directory .*checkpoints/step-000005 on this machine"):
        files.fetch_directory("checkpoints/step-000005", tmp_path / "home")
    assert not (tmp_path / "home").exists()
