"""Append-only JSON lines: one writer appends whole lines, any number of readers follow.

A reader never sees half a record: a last line without its newline (a writer killed in the middle) is left for later,
and the next writer cuts it off before it appends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beringia.records.files import reporting_storage


class JsonLinesWriter:
    """Appends records to a file, each flushed as a whole line. One writer per file, guarded by the caller's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reporting_storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 - lives as long as the writer
            self._cut_torn_line()

    def append(self, record: dict[str, Any], *, durable: bool = False) -> None:
        """Append one record; `durable` waits until it is on the disk."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with reporting_storage(self.path):
            self._file.write(line.encode())
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; further appends fail."""
        self._file.close()

    def _cut_torn_line(self) -> None:
        with open(self.path, "rb") as written:
            if written.seek(0, os.SEEK_END) == 0:
                return
            written.seek(-1, os.SEEK_END)
            if written.read() == b"\n":
                return
        self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)


def whole_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield (offset after the line, its bytes) for each complete line from byte `offset` on; none without a file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, line


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the line, record) for each complete line from byte `offset` on."""
    for end, line in whole_lines(path, offset):
        yield end, json.loads(line)
