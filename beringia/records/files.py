"""Files that appear complete or not at all: written beside, flushed to the disk, renamed; directories likewise.

A full disk becomes `StorageFull`, which names the path. Hashing is here too, since what is published is checked later.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from beringia.errors import StorageFull

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into `StorageFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise StorageFull(
                f"The disk is full: could not write {path}. Free some space and run the same again."
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
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with reporting_full_disk(path):
        try:
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for text, UTF-8."""
    write_bytes(path, content.encode())


def publish_directory(aside: Path, final: Path) -> None:
    """Rename a completely written directory into place; its files must have been flushed already."""
    with reporting_full_disk(final):
        sync_directory(aside)
        os.rename(aside, final)
        sync_directory(final.parent)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
