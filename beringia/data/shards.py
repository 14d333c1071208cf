"""Token shards: flat files of tokens in little-endian uint16 or uint32, mapped into memory, never loaded whole.

A packed directory holds `manifest.json` (written last, so a directory without it is not packed data) and, for each
split, shards `train-00000.tokens`. Chats have two files more a shard: `.said` (one byte a token, 1 where the assistant
said it) and `.ends` (int64, the token at which each chat ends). Nothing here knows where tokens come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from beringia.data.counter import Booleans, Integers
from beringia.data.documents import DataKind
from beringia.data.tasks import Split
from beringia.errors import DataError
from beringia.records.files import Beat, at_rest, reporting_storage, sha256_of_file
from beringia.records.manifest import FileEntry
from beringia.records.record import Record, canonical_hash

PACK_SCHEMA = 1
SHARD_TOKENS = 1 << 28
"""A shard is closed at the end of the document that reaches this size: one gigabyte at most, and one document."""


class Source(Record):
    """One file that was packed, or why it was not."""

    path: str
    """Relative to the folder."""
    bytes: int
    modified_ns: int
    sha256: str
    skipped: str | None
    """Why it was left out; None where it was packed."""


class Shard(Record):
    """One stretch of tokens."""

    tokens: int
    files: tuple[FileEntry, ...]


class PackSettings(Record):
    """What, besides the sources, determines the tokens."""

    schema_version: int = PACK_SCHEMA
    kind: DataKind
    tokenizer: str
    """Hash of the tokenizer."""
    held_out_fraction: float


class PackManifest(Record):
    """What a packed directory holds and what it was made from."""

    settings: PackSettings
    folder: str
    dtype: str
    """`uint16` or `uint32`."""
    sources: tuple[Source, ...]
    hidden: int
    """Files and directories passed over because their names begin with a dot."""
    documents: dict[Split, int]
    shards: dict[Split, tuple[Shard, ...]]
    template_notes: tuple[str, ...] = ()
    """What the chat template does not show of the chats, one sentence each."""

    @property
    def identity(self) -> str:
        """SHA-256 of the settings and of every byte of the shards; not of where or when they were made."""
        hashes = {
            split: [file.sha256 for shard in shards for file in shard.files] for split, shards in self.shards.items()
        }
        return canonical_hash([self.settings.model_dump(mode="json"), hashes])

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, one sentence each."""
        skipped = [source for source in self.sources if source.skipped]
        notes = []
        if skipped:
            shown = "; ".join(f"{source.path} {source.skipped}" for source in skipped[:3])
            notes.append(f"{len(skipped)} of {len(self.sources)} files were left out: {shown}.")
        if self.hidden:
            notes.append(f"{self.hidden} hidden files or directories were left out.")
        return (*notes, *self.template_notes)


class ShardWriter:
    """Writes the shards of one split, a document at a time."""

    def __init__(self, directory: Path, split: Split, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._directory, self._split, self._dtype, self._limit = directory, split, np.dtype(dtype), shard_tokens
        self._open: dict[str, tuple[BinaryIO, Any]] = {}
        self._tokens = 0
        self.documents = 0
        self.shards: list[Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def append(self, tokens: list[int], said: list[bool] | None = None) -> None:
        """Add one document; `said` for chats."""
        self._write("tokens", np.asarray(tokens, dtype=self._dtype.newbyteorder("<")))
        self._tokens += len(tokens)
        self.documents += 1
        if said is not None:
            self._write("said", np.asarray(said, dtype=np.uint8))
            self._write("ends", np.asarray([self._tokens], dtype="<i8"))
        if self._tokens >= self._limit:
            self.close()

    def close(self) -> None:
        """Finish the shard that is being written."""
        try:
            if self._open:
                self.shards.append(Shard(tokens=self._tokens, files=tuple(map(self._finish, sorted(self._open)))))
        finally:
            self._abandon()

    def _abandon(self) -> None:
        for file, _ in self._open.values():
            with contextlib.suppress(OSError):  # what could not be written is reported already
                file.close()
        self._open, self._tokens = {}, 0

    def _write(self, part: str, values: NDArray[Any]) -> None:
        with reporting_storage(self._path(part)):
            if part not in self._open:
                self._open[part] = (open(self._path(part), "wb"), hashlib.sha256())  # noqa: SIM115 - until close
            file, digest = self._open[part]
            file.write(values.tobytes())
            digest.update(values.tobytes())

    def _finish(self, part: str) -> FileEntry:
        file, digest = self._open[part]
        with reporting_storage(self._path(part)):
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            file.close()
        return FileEntry(name=self._path(part).name, bytes=size, sha256=digest.hexdigest())

    def _path(self, part: str) -> Path:
        return self._directory / f"{self._split}-{len(self.shards):05d}.{part}"


@dataclass(frozen=True)
class OpenShard:
    """A shard mapped into memory."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    said: NDArray[np.uint8] | None
    ends: Integers | None


@dataclass(frozen=True)
class Spans:
    """Stretches of tokens, one for each row: which shard, from where, how many."""

    shards_B: Integers
    starts_B: Integers
    lengths_B: Integers


def open_shards(directory: Path, manifest: PackManifest, split: Split, beat: Beat = at_rest) -> list[OpenShard]:
    """Map the shards of one split, each file checked by its hash. Raises DataError for a damaged one."""
    opened = []
    for shard in manifest.shards[split]:
        for entry in shard.files:
            path = directory / entry.name
            if not path.is_file() or sha256_of_file(path, beat) != entry.sha256:
                raise DataError(f"Packed data {path} is missing or damaged: delete {directory} and it is packed again.")
        parts = {Path(entry.name).suffix: directory / entry.name for entry in shard.files}
        tokens = np.memmap(parts[".tokens"], dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
        said = np.memmap(parts[".said"], dtype=np.uint8, mode="r") if ".said" in parts else None
        ends = np.fromfile(parts[".ends"], dtype="<i8").astype(np.int64) if ".ends" in parts else None
        opened.append(OpenShard(tokens, said, ends))
    return opened


def gather(shards: list[OpenShard], spans: Spans, width: int, fill: int) -> tuple[Integers, Booleans]:
    """Tokens int64 (B, width), filled up with `fill`, and which may be learned (neither filling nor prompts)."""
    places = np.arange(width)
    tokens = np.full((len(spans.starts_B), width), fill, dtype=np.int64)
    learned = places < spans.lengths_B[:, None]
    for number in np.unique(spans.shards_B):
        shard, rows = shards[number], np.flatnonzero(spans.shards_B == number)
        where = np.minimum(spans.starts_B[rows, None] + places, len(shard.tokens) - 1)
        tokens[rows] = np.where(learned[rows], shard.tokens[where], fill)
        if shard.said is not None:
            learned[rows] &= shard.said[where] != 0
    return tokens, learned
