"""One safetensors file of a checkpoint: its layout, writing it and reading it, each in one pass with its SHA-256.

The format is that of the safetensors library, which reads these files (a test does): 8 bytes of header length, a JSON
header, the tensors' bytes without gaps. The library can neither hash while it writes nor check while it reads, and a
second pass over a checkpoint costs as much as the first; hence these few lines. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from beringia.checkpoint.directory import damaged, open_checked
from beringia.records.files import reporting_storage
from beringia.records.manifest import FileEntry

PIECE_BYTES = 1 << 20
"""Bytes hashed and written, or read and hashed, at a time: what fits in a core's own cache."""

LARGEST_HEADER_BYTES = 100_000_000

DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""torch's dtype names: safetensors' name, bytes per element."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor's bytes lie, counted from the end of the header."""

    key: str
    dtype: str
    sizes: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class TensorFile:
    """The layout of one file; the same for every checkpoint of a run."""

    name: str
    header: bytes
    """The 8 length bytes included."""
    slots: tuple[Slot, ...]

    @property
    def data_bytes(self) -> int:
        return self.slots[-1].start + self.slots[-1].bytes if self.slots else 0


def lay_out(name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> TensorFile:
    """A file for tensors given as (key, dtype name, sizes), widest elements first so that each is aligned."""
    slots: list[Slot] = []
    start = 0
    for key, dtype, sizes in sorted(tensors, key=lambda tensor: (-DTYPES[tensor[1]][1], tensor[0])):
        length = math.prod(sizes) * DTYPES[dtype][1]
        slots.append(Slot(key, dtype, tuple(sizes), start, length))
        start += length
    entries = {
        slot.key: {
            "dtype": DTYPES[slot.dtype][0],
            "shape": list(slot.sizes),
            "data_offsets": [slot.start, slot.start + slot.bytes],
        }
        for slot in slots
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return TensorFile(name, len(text).to_bytes(8, "little") + text, tuple(slots))


def write_hashed(directory: Path, layout: TensorFile, content: memoryview) -> FileEntry:
    """Write header and data, hashing in the same pass, and flush to the disk. Raises StorageFull."""
    path = directory / layout.name
    hashed = hashlib.sha256(layout.header)
    with reporting_storage(path), open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(layout.header))
        for start in range(0, layout.data_bytes, PIECE_BYTES):
            piece = content[start : min(start + PIECE_BYTES, layout.data_bytes)]
            hashed.update(piece)
            _write_all(file, piece)
        os.fsync(file.fileno())
    return FileEntry(name=layout.name, bytes=len(layout.header) + layout.data_bytes, sha256=hashed.hexdigest())


def write_streamed(directory: Path, layout: TensorFile, content: Iterable[memoryview]) -> None:
    """Write header and data, which comes in pieces in the order of the slots, and flush to the disk. Raises
    StorageFull."""
    path = directory / layout.name
    with reporting_storage(path), open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(layout.header))
        for piece in content:
            _write_all(file, piece)
        assert file.tell() == len(layout.header) + layout.data_bytes, "the pieces are those of the slots"
        os.fsync(file.fileno())


Sink = Callable[[Slot], memoryview]
"""Says where the bytes of a slot go: writable, as long as the slot."""


def read_verified(
    directory: Path, entry: FileEntry, expected: dict[str, tuple[str, tuple[int, ...]]], sink: Sink
) -> None:
    """Read a whole file, each slot to where `sink` says, and check every byte against the entry's SHA-256.

    `expected`: (dtype name, sizes) of each key that the manifest has in this file. The bytes are delivered before the
    last of them is checked: after CheckpointDamaged, what was delivered is worthless.
    """
    path = directory / entry.name
    with open_checked(path) as file:
        if (found := os.fstat(file.fileno()).st_size) != entry.bytes:
            raise damaged(path, f"it has {found} bytes instead of {entry.bytes}")
        hashed = hashlib.sha256()
        for slot in _read_layout(file, path, entry, expected, hashed):
            target = sink(slot)
            for start in range(0, slot.bytes, PIECE_BYTES):
                piece = target[start : start + PIECE_BYTES]
                _read_exactly(file, piece, path)
                hashed.update(piece)
        if hashed.hexdigest() != entry.sha256:
            raise damaged(path, "its SHA-256 is not the one in the manifest")


def _read_layout(
    file: FileIO,
    path: Path,
    entry: FileEntry,
    expected: dict[str, tuple[str, tuple[int, ...]]],
    hashed: hashlib._Hash,
) -> tuple[Slot, ...]:
    """The slots by the header, which must be the very header that we write for what the manifest expects."""
    length_bytes = bytearray(8)
    _read_exactly(file, memoryview(length_bytes), path)
    length = int.from_bytes(length_bytes, "little")
    if length > min(LARGEST_HEADER_BYTES, entry.bytes - 8):
        raise damaged(path, "its header is longer than the file")
    text = bytearray(length)
    _read_exactly(file, memoryview(text), path)
    layout = lay_out(entry.name, [(key, dtype, sizes) for key, (dtype, sizes) in expected.items()])
    if length_bytes + text != layout.header or len(layout.header) + layout.data_bytes != entry.bytes:
        raise damaged(path, "its header does not hold the tensors that the manifest lists")
    hashed.update(layout.header)
    return layout.slots


def _write_all(file: FileIO, piece: memoryview) -> None:
    # A raw write may be partial, as when the disk has room for a part of it.
    while piece:
        written = file.write(piece)
        piece = piece[written or 0 :]


def _read_exactly(file: FileIO, piece: memoryview, path: Path) -> None:
    while piece:
        count = file.readinto(piece)
        if not count:
            raise damaged(path, "it ended while it was being read")
        piece = piece[count:]
