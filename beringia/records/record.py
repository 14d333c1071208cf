"""The base of every record on disk, its canonical JSON and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Strict and frozen: an unknown key or a value of another type is refused, never dropped or converted."""

    # Built when first used: most processes use few of the records that they import.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", defer_build=True)


def canonical_json(value: Any) -> bytes:
    """Bytes that are equal exactly when the values are: sorted keys, no spaces, UTF-8, no NaN."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def canonical_hash(value: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
