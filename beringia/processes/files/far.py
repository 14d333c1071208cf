"""The far side of moving files: sends from its root, or receives into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from beringia.errors import RunError, TransferFailed
from beringia.processes.far_end import FarEnd
from beringia.processes.files.exchange import (
    Readable,
    SomethingElse,
    offer_directory,
    receive,
    receive_directory,
    send,
)
from beringia.processes.protocol import Ended
from beringia.records.record import Record

READS_BYTES = True


class FilesWork(Record):
    """What is moved."""

    task: Literal["receive", "receive-directory", "send-directory"]
    directory: str = ""
    """Relative to the root; empty: the root itself."""


def work(document: dict[str, Any], far_end: FarEnd) -> Ended:
    """Move what the document says."""
    task = FilesWork.model_validate(document)
    assert far_end.root is not None, "files have a root"
    place = far_end.root / task.directory
    came, goes = far_end.channel.input, _Descriptor(far_end.channel.output)
    try:
        _move(task, place, came, goes)
    except SomethingElse as other:
        raise TransferFailed(str(other)) from None
    return Ended(why="done")


def _move(task: FilesWork, place: Path, came: Readable, goes: _Descriptor) -> None:
    if task.task == "receive":
        receive(place, came, goes)
    elif task.task == "receive-directory":
        receive_directory(place, came, goes)
    else:
        _send(place, goes, came)


def _send(place: Path, goes: _Descriptor, came: Readable) -> None:
    if not place.is_dir():
        raise RunError(f"There is no directory {place} on this machine.")
    try:
        send(place, offer_directory(place), goes, came)
    except FileNotFoundError as error:
        raise TransferFailed(f"{error.filename} went away while it was sent.") from None


class _Descriptor:
    """Standard output as it was, for bytes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        while left:
            left = left[os.write(self._descriptor, left) :]
        return size
