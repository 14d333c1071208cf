"""A safetensors file open for reading, whoever wrote it: where each tensor lies, and its bytes a piece at a time.

The library maps a file into memory, where what was read stays until the whole file is closed: a model would be held
twice. Here bytes go where they belong by ordinary reads. What the library refuses is refused here too (a test compares
them). Knows no hashes and does not import torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from beringia.checkpoint.tensor_file import DTYPES, LARGEST_HEADER_BYTES, Slot
from beringia.errors import BeringiaError

Complaint = Callable[[Path, str], BeringiaError]
"""Makes the error for a file, of what is wrong with it."""

_TORCH_NAMES = {name: (torch_name, bytes_each) for torch_name, (name, bytes_each) in DTYPES.items()}


@dataclass(frozen=True)
class OpenedFile:
    """The layout of an open file, and reading from it."""

    path: Path
    slots: Mapping[str, Slot]
    """In the order in which they lie in the file."""
    _file: FileIO
    _data_start: int
    _complaint: Complaint

    def read(self, start: int, piece: memoryview) -> None:
        """Fill `piece` with the bytes from `start` on, counted as slots count. Raises what the complaint makes."""
        place = self._data_start + start
        while piece:
            count = os.preadv(self._file.fileno(), [piece], place)
            if not count:
                raise self._complaint(self.path, "it ended while it was being read")
            piece, place = piece[count:], place + count


def opened(file: FileIO, path: Path, complaint: Complaint) -> OpenedFile:
    """Read the header of an open file. Raises what `complaint` makes where the file is no whole safetensors file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if size < 8 or length > min(LARGEST_HEADER_BYTES, size - 8):
        raise complaint(path, "its header is longer than the file, or longer than any")
    try:
        slots = _slots(os.pread(file.fileno(), length, 8), size - 8 - length)
    except ValueError as error:
        raise complaint(path, str(error)) from None
    return OpenedFile(path, slots, file, 8 + length, complaint)


def _slots(header: bytes, data_bytes: int) -> dict[str, Slot]:
    """The tensors by the header, which must fill the data without a gap. Raises ValueError saying what is wrong."""
    document = _parsed(header)
    notes = document.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is not a table of text")
    found = [_slot(key, entry) for key, entry in document.items()]
    slots = {slot.key: slot for slot in sorted(found, key=lambda slot: (slot.start, slot.bytes))}
    end = 0
    for slot in slots.values():
        if slot.start != end:
            raise ValueError(f"{slot.key} begins at byte {slot.start} of the data and not at {end}")
        end += slot.bytes
    if end != data_bytes:
        raise ValueError(f"its header speaks of {end} bytes of tensors, and it has {data_bytes}")
    return slots


def _parsed(header: bytes) -> dict[str, Any]:
    try:
        document = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is no JSON ({error})") from None
    if not isinstance(document, dict):
        raise ValueError("its header is no JSON object")
    return document


def _slot(key: str, entry: Any) -> Slot:
    match entry:
        case {"dtype": str(name), "shape": [*sizes], "data_offsets": [start, end]} if _are_sizes(*sizes, start, end):
            dtype, bytes_each = _TORCH_NAMES.get(name, (name, None))
            expected = end - start if bytes_each is None else math.prod(sizes) * bytes_each
            if end - start != expected:
                raise ValueError(f"{key}, {name} {sizes}, has {end - start} bytes instead of {expected}")
            return Slot(key, dtype, tuple(sizes), start, expected)
    raise ValueError(f"its header says of {key} what cannot be: {entry!r:.200}")


def _are_sizes(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
