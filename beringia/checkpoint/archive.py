"""A checkpoint as a stream of bytes, for a machine with another file system: `ssh node7 ... < archive`.

    BERINGIA-CHECKPOINT 1\\n   then frames, each   <name> <bytes> <sha256>\\n<bytes>   and at the end   END <frames>\\n

The manifest comes last of the files, `trusted.json` with it. The reader checks each frame and then the whole checkpoint
against its manifest, and only then renames it into place. Does not import torch: the supervisor uses this with the
standard input and output of a process behind a chip's launch prefix; so does `python -m beringia.checkpoint.archive`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
from itertools import takewhile
from pathlib import Path
from typing import IO

from beringia.checkpoint.directory import MANIFEST, MANIFEST_DIGEST, TRUST, damaged, open_checked, read_manifest
from beringia.errors import CheckpointDamaged, RunError
from beringia.records.files import publish_directory, reporting_full_disk
from beringia.records.manifest import CheckpointManifest, FileEntry

_MAGIC = b"BERINGIA-CHECKPOINT 1\n"
_FRAME = re.compile(rb"([A-Za-z0-9][A-Za-z0-9._-]{0,200}) (\d{1,18}) ([0-9a-f]{64})\n")
_END = re.compile(rb"END (\d{1,9})\n")
_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 300
_LONGEST_GREETING_LINES = 100


def write_archive(directory: Path, stream: IO[bytes]) -> CheckpointManifest:
    """Send the checkpoint in `directory`. A file that is not as the manifest says raises CheckpointDamaged midway."""
    manifest = read_manifest(directory)
    sizes = {entry.name: (entry.bytes, entry.sha256) for entry in manifest.files}
    names = [*sizes, *(name for name in (TRUST, MANIFEST_DIGEST, MANIFEST) if (directory / name).exists())]
    stream.write(_MAGIC)
    for name in names:
        _send(directory / name, sizes.get(name), stream)
    stream.write(f"END {len(names)}\n".encode())
    stream.flush()
    return manifest


def read_archive(stream: IO[bytes], destination: Path) -> CheckpointManifest:
    """Receive a checkpoint into `destination`, a directory that must not exist yet; it appears complete or not at all.

    Raises CheckpointDamaged for a stream that is cut short or altered, RunError if `destination` exists, StorageFull.
    """
    if destination.exists():
        raise RunError(f"{destination} exists already: a checkpoint is received into a new directory.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside = destination.with_name(f".{destination.name.removeprefix('.')}.received")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with reporting_full_disk(destination):
            aside.mkdir()
            received = _receive_all(stream, aside)
            manifest = read_manifest(aside)
            _compare(received, manifest, aside)
        publish_directory(aside, destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def _send(path: Path, expected: tuple[int, str] | None, stream: IO[bytes]) -> None:
    with open_checked(path) as file:
        size, digest = expected or (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
        file.seek(0)
        stream.write(f"{path.name} {size} {digest}\n".encode())
        sent, hashed = 0, hashlib.sha256()
        while piece := file.read(min(_PIECE_BYTES, size - sent)):
            hashed.update(piece)
            stream.write(piece)
            sent += len(piece)
    if sent != size or hashed.hexdigest() != digest:
        raise damaged(path, "its bytes are not those in the manifest")


def _receive_all(stream: IO[bytes], aside: Path) -> dict[str, FileEntry]:
    if not _find_beginning(stream):
        raise _cut(aside, "it does not begin as a checkpoint archive of version 1")
    received: dict[str, FileEntry] = {}
    while True:
        line = stream.readline(_LONGEST_LINE)
        if end := _END.fullmatch(line):
            if int(end[1]) != len(received):
                raise _cut(aside, f"it ends after {len(received)} files instead of {int(end[1])}")
            return received
        frame = _FRAME.fullmatch(line)
        if not frame or frame[1].decode() in received:
            raise _cut(aside, f"after {len(received)} files comes neither another nor the end")
        entry = FileEntry(name=frame[1].decode(), bytes=int(frame[2]), sha256=frame[3].decode())
        _receive(stream, aside / entry.name, entry)
        received[entry.name] = entry


def _find_beginning(stream: IO[bytes]) -> bool:
    # A login shell behind a launch prefix may greet on standard output first.
    lines = (stream.readline(_LONGEST_LINE) for _ in range(_LONGEST_GREETING_LINES))
    return any(line == _MAGIC for line in takewhile(bool, lines))


def _receive(stream: IO[bytes], path: Path, entry: FileEntry) -> None:
    hashed, left = hashlib.sha256(), entry.bytes
    with open(path, "xb") as file:
        while left:
            piece = stream.read(min(_PIECE_BYTES, left))
            if not piece:
                raise _cut(path, f"the stream ended {left} bytes early")
            hashed.update(piece)
            file.write(piece)
            left -= len(piece)
        file.flush()
        os.fsync(file.fileno())
    if hashed.hexdigest() != entry.sha256:
        raise _cut(path, "its SHA-256 is not the one announced")


def _compare(received: dict[str, FileEntry], manifest: CheckpointManifest, aside: Path) -> None:
    """Each file's bytes had the announced hash; here that is held against the manifest's."""
    for entry in manifest.files:
        if received.get(entry.name) != entry:
            raise _cut(aside / entry.name, "it is not the file that the manifest lists")
    strange = received.keys() - {entry.name for entry in manifest.files} - {MANIFEST, MANIFEST_DIGEST, TRUST}
    if strange:
        raise _cut(aside / min(strange), "the manifest does not list it")


def _cut(path: Path, what: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"The checkpoint archive is damaged at {path.name}: {what}. Send it again.", str(path))


def main(arguments: list[str] | None = None) -> int:
    """`send DIRECTORY` writes an archive to standard output, `receive DIRECTORY` reads one from standard input."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("verb", choices=("send", "receive"))
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.verb == "send":
            write_archive(options.directory, sys.stdout.buffer)
        else:
            read_archive(sys.stdin.buffer, options.directory)
    except (CheckpointDamaged, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
