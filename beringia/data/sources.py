"""Files as text or as objects, read as streams: plain, compressed with gzip (`*.gz`), JSON Lines, Parquet.

A file is what its name says: `*.gz` is decompressed and then read as what its name says without that; `*.jsonl` holds
a JSON object a line, `*.parquet` (with pyarrow, the extra `parquet`) one a row; any other is text in UTF-8. What is
damaged or cut off is an error that names the file: half a data set is never taken for the whole. Knows nothing of what
the objects mean. Writes nothing.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beringia.errors import DataError

_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 256


class UnreadableFile(Exception):
    """A file that holds no text; `str(error)` says why."""


def holds_objects(path: Path) -> bool:
    """Whether the name says that it holds objects, not text."""
    return path.suffix == ".parquet" or path.name.removesuffix(".gz").endswith(".jsonl")


def read_objects(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object stands, in words, and what it holds. Of a Parquet file only these fields (columns) are read.
    Raises DataError, UnreadableFile."""
    return _rows(path, fields) if path.suffix == ".parquet" else _lines(path)


def read_text(path: Path) -> Iterator[str]:
    """The text, in pieces. Raises DataError for a damaged file, UnreadableFile for one that is no text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        for chunk in _unpacked(path) if path.suffix == ".gz" else _chunks(path):
            if b"\0" in chunk:
                raise UnreadableFile("holds NUL bytes")
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise UnreadableFile("is not UTF-8") from None
    except OSError as error:
        raise UnreadableFile(error.strerror or "cannot be read") from None


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _unpacked(path: Path) -> Iterator[bytes]:
    try:
        if path.stat().st_size == 0:  # which gzip's reader takes for an empty text
            raise EOFError
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except EOFError:
        raise DataError(f"{path} ends in the middle of its compressed data: get it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a sound gzip file ({error}): get it again.") from None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number, kept = 0, ""
    for piece in read_text(path):
        *lines, kept = (kept + piece).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _line(path, number, line)
    if kept.strip():
        yield _line(path, number + 1, kept)


def _line(path: Path, number: int, line: str) -> tuple[str, dict[str, Any]]:
    place = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise DataError(f"{place}: is not a JSON object.")
    return place, entry


def _rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a Parquet file, numbered from 1. It does not tell a key without a value from one that is not there, so
    neither is."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} is a Parquet file: install pyarrow to read it (pip install 'beringia[parquet]'), or take it away."
        ) from None
    try:
        number = 0
        # A buffer: without one a whole column of a row group is read at once.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_CHUNK_BYTES, page_checksum_verification=True) as file:
            columns = [field for field in fields if field in file.schema_arrow.names]
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for number, entry in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 - goes on counting
                    yield f"{path}, row {number}", _without_nulls(entry)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a sound Parquet file ({reason}): get it again.") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value
