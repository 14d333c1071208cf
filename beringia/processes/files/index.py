"""SHA-256 of files, remembered: a file is read again only where its size or one of its times changed.

The memory is a file of ours, never in a place of the user's. An entry counts only for a file that had rested when it
was hashed: one written within the clock's coarseness of being read could change again and keep its times.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from beringia.machine.aside import file_beside
from beringia.records.files import sha256_of_file, write_bytes
from beringia.records.record import canonical_json

INDEX = ".hashes.json"
_RESTED_SECONDS = 2.0
"""FAT counts modification times in two seconds, the coarsest of file systems in use."""
_DAY = 86_400.0
"""Seconds. On a file system where nothing of ours is written its clock is not known: no clock is a day off."""


class HashIndex:
    """What is known of the files below `root`; `memory` is the file that it is kept in."""

    def __init__(self, root: Path, memory: Path) -> None:
        self._root = root
        self._memory = memory
        self._known: dict[str, list[int | str]] = _read(memory)
        self._changed = False

    def sha256(self, name: str) -> str:
        """Of the file `name`, relative to the root."""
        path = self._root / name
        found = path.stat()
        state: list[int | str] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._known.get(name)
        if known is not None and known[:-1] == state:
            return str(known[-1])
        digest = sha256_of_file(path)
        if self._rested(found):
            self._known[name] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt; what cannot be written is learnt again."""
        if self._changed:
            write_bytes(self._memory, canonical_json(self._known))

    def _rested(self, found: os.stat_result) -> bool:
        """Whether a file changed long enough ago, by the clock that its file system uses: this machine's may differ
        from that by an hour."""
        try:
            with file_beside(self._memory) as (_, probe):
                now = os.fstat(probe.fileno())
        except OSError:
            return False
        if now.st_dev != found.st_dev:
            return time.time() - found.st_ctime > _DAY
        return now.st_ctime_ns - found.st_ctime_ns > _RESTED_SECONDS * 1e9


def _read(path: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: hashed anew
        return {}
    return known if isinstance(known, dict) else {}
