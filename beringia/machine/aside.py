"""What is being written lies beside its place until it is whole, and is gone however its writer ends.

A writer that is killed removes nothing. So each holds a lock (flock) on what it writes, which the kernel takes back,
and the next writer of the same place removes what nobody holds. Where a file system knows no such lock (directories on
NFS, Lustre without `flock`) nothing can be told of what lies there, and it stays.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def file_beside(final: Path, *, mode: int = 0o666) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `final`, open for writing; it is removed at the end unless it was renamed. Raises OSError."""
    remove_abandoned(final)
    aside, descriptor = _new_file(final, mode)
    try:
        with open(descriptor, "wb") as file:
            yield aside, file
    finally:
        remove(aside)


@contextmanager
def directory_beside(final: Path, *, mode: int = 0o777) -> Iterator[Path]:
    """A new directory beside `final`; it is removed at the end unless it was renamed. Raises OSError."""
    remove_abandoned(final)
    aside, descriptor = _new_directory(final, mode)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def scratch_directory() -> AbstractContextManager[Path]:
    """A directory for what nobody needs afterwards, where the machine keeps such, for its owner alone. Raises
    OSError."""
    return directory_beside(Path(tempfile.gettempdir(), "beringia"), mode=0o700)


def remove(aside: Path) -> None:
    """Remove a file of ours, if it is there and can be: what went wrong before is what the user has to know."""
    with suppress(OSError):
        aside.unlink()


def remove_abandoned(final: Path) -> None:
    """Remove what writers of `final` left beside it when they were killed."""
    name = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.tmp")
    with suppress(OSError):  # there is no such directory, or it cannot be listed
        for path in [Path(entry.path) for entry in os.scandir(final.parent) if name.fullmatch(entry.name)]:
            _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    directory = path.is_dir()
    with suppress(OSError):  # gone meanwhile, another user's, held by its writer, or no lock is known here
        access = os.O_RDONLY if directory else os.O_RDWR | os.O_NONBLOCK
        descriptor = os.open(path, access | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if directory:
                shutil.rmtree(path)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def _new_file(final: Path, mode: int) -> tuple[Path, int]:
    while True:
        aside = _name(final)
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        if _held(aside, descriptor):
            return aside, descriptor


def _new_directory(final: Path, mode: int) -> tuple[Path, int]:
    while True:
        aside = _name(final)
        aside.mkdir(mode)
        with suppress(FileNotFoundError):
            descriptor = os.open(aside, os.O_RDONLY)
            if _held(aside, descriptor):
                return aside, descriptor


def _held(aside: Path, descriptor: int) -> bool:
    """Lock what was made; not where another took it for abandoned before that."""
    with suppress(OSError):  # no lock is known here
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if os.path.exists(aside):
        return True
    os.close(descriptor)
    return False


def _name(final: Path) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
