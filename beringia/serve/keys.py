"""Keys that clients may use, from a file that only the server's user should be able to read."""

from __future__ import annotations

from pathlib import Path

from beringia.errors import InputError


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Keys from a file, one a line. Raises InputError."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"The keys in {path} cannot be read: {problem}.") from None
    if not keys:
        raise InputError(f"{path} has no key: write one a line.")
    return keys
