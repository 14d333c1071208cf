"""The far end of moving files: a short-lived process behind a launch prefix that reads or writes one stream.

Small files (recipe, epoch, packed data) travel as frames, each with its SHA-256; checkpoints as `checkpoint.archive`
does. A file that is already there with the right hash is replaced all the same: the stream is the only truth.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from beringia.checkpoint.archive import read_archive, write_archive
from beringia.errors import BeringiaError, CheckpointDamaged
from beringia.records.files import sha256_of_file, write_bytes

_LONGEST_HEADER = 4096


def write_files(root: Path, files: Iterable[Path], stream: IO[bytes]) -> None:
    """Send files below `root`, each as one header line (name, bytes, SHA-256) and its content, then an empty header."""
    for path in files:
        header = {"name": str(path.relative_to(root)), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        stream.write(json.dumps(header).encode() + b"\n")
        with open(path, "rb") as file:
            shutil.copyfileobj(file, stream)
    stream.write(b"\n")
    stream.flush()


def read_files(stream: IO[bytes], root: Path) -> None:
    """Receive what `write_files` sent. Raises CheckpointDamaged naming a file that did not arrive as it was sent."""
    while (line := stream.readline(_LONGEST_HEADER)).strip():
        header = json.loads(line)
        name = header["name"]
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointDamaged(f"The stream names {name!r}, which is outside the run directory.", name)
        content = stream.read(header["bytes"])
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise CheckpointDamaged(f"{name} did not arrive as it was sent. Send it again.", name)
        write_bytes(root / name, content)
    if not line:
        raise CheckpointDamaged("The stream of files ended early. Send it again.", str(root))


def main(arguments: list[str]) -> int:
    """`receive-files ROOT`, `receive-checkpoint DIRECTORY` or `send-checkpoint DIRECTORY`."""
    verb, place = arguments
    try:
        if verb == "receive-files":
            read_files(sys.stdin.buffer, Path(place))
        elif verb == "receive-checkpoint":
            shutil.rmtree(place, ignore_errors=True)
            read_archive(sys.stdin.buffer, Path(place))
        else:
            write_archive(Path(place), sys.stdout.buffer)
    except BeringiaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
