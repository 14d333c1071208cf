"""What sender and receiver do, over any pair of streams.

sender -> receiver: one line of JSON, `{"files": [{"name", "bytes", "sha256"}, ...]}`
receiver -> sender: one line of JSON, `{"lacks": [index, ...]}`
sender -> receiver: the bytes of those files, one after another, nothing between them
receiver -> sender: one line of JSON, `{"damaged": null}`, or the name of a file that did not arrive as announced
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from beringia.errors import TransferFailed
from beringia.machine.aside import file_beside
from beringia.processes.files.index import INDEX, HashIndex
from beringia.records.files import publish_directory, reporting_storage, sha256_of_file
from beringia.records.record import Record

_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 1 << 26
"""Of a listing: some hundred thousand files."""


class SomethingElse(Exception):
    """The other side said something else than its part: why it cannot, where it is a far end. `line` is that."""

    def __init__(self, line: bytes) -> None:
        super().__init__(f"The other side said {line[:80]!r}.")
        self.line = line


class Readable(Protocol):
    """A stream of bytes that comes."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self, limit: int = -1, /) -> bytes: ...


class Writable(Protocol):
    """A stream of bytes that goes; returns when all is written."""

    def write(self, content: Any, /) -> int: ...


class Offered(Record):
    """A file that a sender has."""

    name: str
    """Relative to the root, or to the directory that is sent."""
    bytes: int
    sha256: str


def listing(root: Path, names: Sequence[str], *, memory: Path | None = None) -> list[Offered]:
    """What a sender offers: these files below `root`, hashed. `memory`: a file that remembers hashes, so that what has
    not changed is not read again."""
    if memory is None:
        digests = {name: sha256_of_file(root / name) for name in names}
    else:
        index = HashIndex(root, memory)
        digests = {name: index.sha256(name) for name in names}
        index.save()
    return [Offered(name=name, bytes=(root / name).stat().st_size, sha256=digests[name]) for name in names]


def offer_directory(directory: Path) -> list[Offered]:
    """Everything in a directory that is sent whole; nothing is added to it."""
    return listing(directory, files_below(directory))


def files_below(root: Path, directory: str = "") -> list[str]:
    """Names of all files below a directory of the root, in order, our own memory and half-written ones left out."""
    found = (path for path in (root / directory).rglob("*") if path.is_file())
    names = (str(path.relative_to(root)) for path in found if path.name != INDEX and not path.name.endswith(".tmp"))
    return sorted(names)


def send(root: Path, offered: Sequence[Offered], to: Writable, answers: Readable) -> int:
    """Send what the receiver lacks; returns how many bytes that was. Raises TransferFailed."""
    to.write(json.dumps({"files": [one.model_dump() for one in offered]}).encode() + b"\n")
    lacks = [offered[number] for number in _answer(answers, "lacks")]
    for one in lacks:
        _send_one(root / one.name, one, to)
    damaged = _answer(answers, "damaged")
    if damaged is not None:
        raise TransferFailed(f"{damaged} did not arrive as it was announced. Send it again.")
    return sum(one.bytes for one in lacks)


def receive(root: Path, came: Readable, answers: Writable) -> list[Offered]:
    """Receive into `root`, each file complete or not at all; returns everything that was offered. Raises TransferFailed
    and StorageFull."""
    offered = _offered(came)
    index = HashIndex(root, root / INDEX)
    lacks = [number for number, one in enumerate(offered) if not _has(root, one, index)]
    index.save()
    answers.write(json.dumps({"lacks": lacks}).encode() + b"\n")
    for number in lacks:
        _receive_one(root / offered[number].name, offered[number], came, answers)
    answers.write(b'{"damaged": null}\n')
    return offered


def receive_directory(final: Path, came: Readable, answers: Writable) -> list[Offered]:
    """Receive a directory that appears complete or not at all, in the place of one that is there already. Where that
    has the same files nothing travels. Raises TransferFailed and StorageFull."""
    offered = _offered(came)
    if final.is_dir() and _same(final, offered):
        answers.write(b'{"lacks": []}\n{"damaged": null}\n')
        return offered
    aside = final.with_name(f".{final.name.removeprefix('.')}.received")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with reporting_storage(final):
            aside.mkdir(parents=True)
        answers.write(json.dumps({"lacks": list(range(len(offered)))}).encode() + b"\n")
        for one in offered:
            _receive_one(aside / one.name, one, came, answers)
        shutil.rmtree(final, ignore_errors=True)
        publish_directory(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    answers.write(b'{"damaged": null}\n')
    return offered


def _send_one(path: Path, one: Offered, to: Writable) -> None:
    left = one.bytes
    with open(path, "rb") as file:
        while left:
            piece = file.read(min(_PIECE_BYTES, left))
            if not piece:
                raise TransferFailed(f"{path} became shorter while it was sent. Send it again.")
            to.write(piece)
            left -= len(piece)


def _receive_one(path: Path, one: Offered, came: Readable, answers: Writable) -> None:
    hashed, left = hashlib.sha256(), one.bytes
    with reporting_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as (aside, file):
            while left:
                piece = came.read(min(_PIECE_BYTES, left))
                if not piece:
                    raise TransferFailed(f"The stream ended {left} bytes before the end of {one.name}.")
                hashed.update(piece)
                file.write(piece)
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
            if hashed.hexdigest() != one.sha256:
                answers.write(json.dumps({"damaged": one.name}).encode() + b"\n")
                raise TransferFailed(f"{one.name} did not arrive as it was announced. Send it again.")
            os.replace(aside, path)


def _offered(came: Readable) -> list[Offered]:
    listed = _answer(came, "files")
    try:
        offered = [Offered.model_validate(one) for one in listed]
    except (ValidationError, TypeError):
        raise TransferFailed(f"The other side sent a listing that is none: {str(listed)[:80]}.") from None
    for one in offered:
        if Path(one.name).is_absolute() or ".." in Path(one.name).parts:
            raise TransferFailed(f"The stream names {one.name!r}, which is outside the directory that is sent.")
    return offered


def _answer(stream: Readable, key: str) -> Any:
    """What the other side says under this key, in its next line."""
    line = stream.readline(_LONGEST_LINE)
    try:
        answer = json.loads(line)
    except ValueError:
        raise TransferFailed("The other side ended early." if not line else "The other side did not answer.") from None
    if not isinstance(answer, dict) or key not in answer:
        raise SomethingElse(line)
    return answer[key]


def _has(root: Path, one: Offered, index: HashIndex) -> bool:
    path = root / one.name
    return path.is_file() and path.stat().st_size == one.bytes and index.sha256(one.name) == one.sha256


def _same(directory: Path, offered: Sequence[Offered]) -> bool:
    if set(files_below(directory)) != {one.name for one in offered}:
        return False
    sizes = all((directory / one.name).stat().st_size == one.bytes for one in offered)
    # Not remembered inside the directory: nothing is added to what somebody else wrote.
    return sizes and all(sha256_of_file(directory / one.name) == one.sha256 for one in offered)
