"""What a checkpoint directory holds, and the marks of trust beside it.

`manifest.json` is written last, so a directory without one is not a checkpoint. `trusted.json` appears later, once
every layer on every replica was found clean at a step after the checkpoint's.
"""

from __future__ import annotations

from typing import Any

from beringia.records.record import Record

MANIFEST_SCHEMA = 1


class FileEntry(Record):
    """One file of the checkpoint."""

    name: str
    bytes: int
    sha256: str


class Chunk(Record):
    """One rectangular piece of one tensor: where it lies in the whole, and in which file under which key."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


class TensorEntry(Record):
    """One tensor of the state, whole."""

    dtype: str
    """torch's name without the prefix: `float32`, `int64`, ..."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class CheckpointManifest(Record):
    """Everything a reader needs to load the state on any number of ranks, and to check every byte."""

    schema_version: int
    beringia: str
    step: int
    recipe_hash: str
    run_identity: str | None = None
    """Hash of what makes the run this run (`records/recipe_identity.py`); null in older ones, and outside a run."""
    epoch: int
    """The epoch under which it was written."""
    chip_identity: str
    """Hash of the identity of the chip whose live tensors were saved."""
    state_hash: str
    """The keyed hash of the live tensors and the progress, which any sharding of the same state reproduces."""
    progress: dict[str, Any]
    """Step, data cursor, random state: what is not a tensor."""
    tensors: dict[str, TensorEntry]
    files: tuple[FileEntry, ...]


class CleanCheck(Record):
    """One site found clean by the guard, at a step after the checkpoint's."""

    site: str
    replica: int
    step: int


class TrustMark(Record):
    """Why a checkpoint is trusted."""

    step: int
    state_hash: str
    checks: tuple[CleanCheck, ...]
