"""Files that appear complete or not at all: written beside, flushed to the disk, renamed; directories likewise.

A full disk becomes `StorageFull`, a place that cannot be written to `NotWritable`; both name the path. Hashing is here
too, since what is published is checked later.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from beringia.errors import NotWritable, StorageFull
from beringia.machine.aside import file_beside

Beat = Callable[[], None]
"""What long work calls again and again, to say that it gets on."""

_CHUNK_BYTES = 1 << 20
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
}


def at_rest() -> None:
    """A beat that nobody listens to."""


@contextmanager
def reporting_storage(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into `StorageFull`, and its refusals into `NotWritable`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise StorageFull(
                f"The disk is full: could not write {path}. Free some space and run the same again."
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise NotWritable(
                f"{path} cannot be written: {error.strerror}. Make it writable, or choose another."
            ) from error
        raise


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the whole new one."""
    with reporting_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_beside(path) as (aside, file):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(aside, path)
        sync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for text, UTF-8."""
    write_bytes(path, content.encode())


def publish_directory(aside: Path, final: Path) -> None:
    """Rename a completely written directory into place; its files must have been flushed already."""
    with reporting_storage(final):
        sync_directory(aside)
        os.rename(aside, final)
        sync_directory(final.parent)


def sha256_of_file(path: Path, beat: Beat = at_rest) -> str:
    """SHA-256 of a file's content, in hexadecimal. `beat` is called again and again while that takes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            beat()
    return digest.hexdigest()
