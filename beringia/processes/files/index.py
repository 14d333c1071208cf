"""SHA-256 of files, remembered: a file is read again only where its size or one of its times changed.

The memory is a file of its own in the root. An entry counts only for a file that had rested when it was hashed: one
written within the clock's coarseness of being read could change again and keep its times.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from beringia.records.files import sha256_of_file, write_bytes
from beringia.records.record import canonical_json

INDEX = ".hashes.json"
_RESTED_SECONDS = 2.0
"""FAT counts modification times in two seconds, the coarsest of file systems in use."""


class HashIndex:
    """What is known of the files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, list[int | str]] = _read(root / INDEX)
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
        # Both times are the file system's: this machine's clock may differ from its by an hour.
        if _rested(self._root, found.st_ctime_ns):
            self._known[name] = [*state, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt; what cannot be written is learnt again."""
        if self._changed:
            write_bytes(self._root / INDEX, canonical_json(self._known))


def _rested(root: Path, changed_ns: int) -> bool:
    """Whether a file changed long enough ago, by the clock that its file system uses."""
    probe = root / f"{INDEX}.{time.monotonic_ns()}.tmp"
    try:
        probe.write_bytes(b"")
        now_ns = probe.stat().st_ctime_ns
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return now_ns - changed_ns > _RESTED_SECONDS * 1e9


def _read(path: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: hashed anew
        return {}
    return known if isinstance(known, dict) else {}
