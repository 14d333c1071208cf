"""TOML files that people write."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """What a file says; a byte order mark, which some editors write, is none of it.

    Raises OSError where it cannot be read, and ValueError (TOMLDecodeError, UnicodeDecodeError) where it is no TOML.
    """
    return tomllib.loads(path.read_text(encoding="utf-8-sig"))
