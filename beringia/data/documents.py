"""Documents from folders: text files in passages, JSONL files line by line, read as streams, never whole.

A file named `*.jsonl` holds one JSON object a line, with `text` (texts) or `messages` (chats). Any other file is text
in UTF-8 and is cut at line ends into passages, so that one large file too can be split into what is learned and what
is held out. Writes nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from beringia.data.chat import Message
from beringia.errors import DataError
from beringia.records.record import canonical_json

DataKind = Literal["text", "chat"]
PASSAGE_CHARACTERS = 16_384
"""Longest piece of a text file that is kept together: some thousands of tokens."""
_CHUNK_BYTES = 1 << 20


class UnreadableFile(Exception):
    """A file that holds no text; `str(error)` says why."""


@dataclass(frozen=True)
class Document:
    """One text or one chat; exactly one of the two is given."""

    text: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def place(self) -> int:
        """A 64-bit hash of the content, which decides between train and held-out: equal documents stay together."""
        content = canonical_json(list(self.messages)) if self.messages else self.text.encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def list_files(folder: Path) -> tuple[list[Path], int]:
    """Files under a folder (or the one file), sorted by path, and how many hidden ones were passed over."""
    if folder.is_file():
        return [folder], 0
    if not folder.is_dir():
        raise DataError(f"There is no file or directory {folder}: name a directory of text, .md or .jsonl files.")
    files, hidden = [], 0
    for parent, directories, names in os.walk(folder):
        hidden += sum(name.startswith(".") for name in (*names, *directories))
        directories[:] = [name for name in directories if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix()), hidden


def read_documents(path: Path, kind: DataKind) -> Iterator[Document]:
    """Documents of one file, empty ones left out. Raises UnreadableFile, or DataError for an unusable line."""
    if kind == "chat":
        for number, entry in _json_lines(path):
            yield _chat(path, number, entry)
    elif path.suffix == ".jsonl":
        for number, entry in _json_lines(path):
            if not isinstance(entry.get("text"), str):
                raise DataError(f'{path}, line {number}: needs "text" with a string.')
            if entry["text"].strip():
                yield Document(text=entry["text"])
    else:
        yield from (Document(text=passage) for passage in _passages(path) if passage.strip())


def _passages(path: Path) -> Iterator[str]:
    kept = ""
    for piece in _text(path):
        kept += piece
        while len(kept) > PASSAGE_CHARACTERS:
            cut = kept.rfind("\n", 0, PASSAGE_CHARACTERS) + 1 or PASSAGE_CHARACTERS
            yield kept[:cut]
            kept = kept[cut:]
    yield kept


def _text(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if b"\0" in chunk:
                    raise UnreadableFile("holds NUL bytes")
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise UnreadableFile("is not UTF-8") from None
    except OSError as error:
        raise UnreadableFile(error.strerror or "cannot be read") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number, kept = 0, ""
    for piece in _text(path):
        *lines, kept = (kept + piece).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, _json_object(path, number, line)
    if kept.strip():
        yield number + 1, _json_object(path, number + 1, kept)


def _json_object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: is not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise DataError(f"{path}, line {number}: is not a JSON object.")
    return entry


def _chat(path: Path, number: int, entry: dict[str, Any]) -> Document:
    messages = entry.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f'{path}, line {number}: needs "messages" with a list of objects.')
    if not any(message.get("role") == "assistant" for message in messages):
        raise DataError(f"{path}, line {number}: no turn of the assistant, so there is nothing to learn.")
    return Document(messages=tuple(messages))
