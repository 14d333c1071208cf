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
from typing import Any, Literal, TypeGuard

from beringia.data.chat import Extras, Given, Message, is_text_part
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
    tools: Extras = None
    documents: Extras = None
    place_in_file: str = ""
    """File and line of a chat, for messages to the user."""

    @property
    def given(self) -> Given:
        """What the chat template is given beside the messages."""
        return {"tools": self.tools, "documents": self.documents}

    @property
    def place(self) -> int:
        """A 64-bit hash of the content, which decides between train and held-out: equal documents stay together."""
        content = canonical_json(list(self.messages)) if self.messages else self.text.encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def list_files(folder: Path) -> tuple[list[Path], int]:
    """Files under a folder (or the one file), sorted by path, and how many hidden ones were passed over.

    Linked folders are read as if they were there. Those that cannot be listed, and links to what is read already (or to
    what the folder lies in), are among the files themselves, so that they are told of like any file that is left out.
    """
    if folder.is_file():
        return [folder], 0
    if not folder.is_dir():
        raise DataError(f"There is no file or directory {folder}: name a directory of text, .md or .jsonl files.")
    files: list[Path] = []
    unlisted: list[OSError] = []
    hidden, seen, links = 0, set(folder.resolve().parents), [folder]
    for link in links:  # grows: what lies in the folder itself is read first, under its own name
        if link.resolve() in seen:
            files.append(link)
            continue
        for parent, directories, names in os.walk(link, onerror=unlisted.append):
            if (place := Path(parent).resolve()) in seen:
                directories.clear()
                continue
            seen.add(place)
            hidden += sum(name.startswith(".") for name in (*names, *directories))
            directories[:] = sorted(name for name in directories if not name.startswith("."))
            files += [Path(parent, name) for name in names if not name.startswith(".")]
            links += [Path(parent, name) for name in directories if os.path.islink(Path(parent, name))]
    files += [Path(error.filename) for error in unlisted]
    _check_names(files)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix()), hidden


def _check_names(files: list[Path]) -> None:
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(path).decode(errors="backslashreplace")
            raise DataError(f"{shown} has a name that is not UTF-8: rename it.") from None


def read_documents(path: Path, kind: DataKind) -> Iterator[Document]:
    """Documents of one file, empty ones left out. Raises UnreadableFile, or DataError for an unusable line."""
    if kind == "chat":
        for number, entry in _json_lines(path):
            yield _chat(path, number, entry)
    elif path.suffix == ".jsonl":
        for number, entry in _json_lines(path):
            if not isinstance(entry.get("text"), str):
                raise DataError(f'{path}, line {number}: needs "text" with a string.')
            _check_encodable(path, number, entry["text"])
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


def _check_encodable(path: Path, number: int, content: object) -> None:
    try:
        canonical_json(content)
    except UnicodeEncodeError:
        raise DataError(
            f"{path}, line {number}: holds half of a surrogate pair (as \\ud800 alone), which is no character."
        ) from None
    except ValueError:
        raise DataError(f"{path}, line {number}: holds NaN or Infinity, which JSON does not have.") from None


def _chat(path: Path, number: int, entry: dict[str, Any]) -> Document:
    place = f"{path}, line {number}"
    if "messages" not in entry and "conversations" in entry:
        raise DataError(
            f'{place}: is in the form of ShareGPT: write "messages" for "conversations", "role" for "from" (user for '
            'human, assistant for gpt) and "content" for "value".'
        )
    messages = entry.get("messages")
    if not _are_objects(messages):
        raise DataError(f'{place}: needs "messages" with a list of objects.')
    tools, documents = _extras(place, entry, "tools"), _extras(place, entry, "documents")
    _check_encodable(path, number, [messages, tools, documents])
    for turn, message in enumerate(messages, 1):
        _check_message(f"{place}: message {turn}", message)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place}: no turn of the assistant, so there is nothing to learn.")
    return Document(messages=tuple(messages), tools=tools, documents=documents, place_in_file=place)


def _extras(place: str, entry: dict[str, Any], name: str) -> Extras:
    value = entry.get(name)
    if value is not None and not _are_objects(value):
        raise DataError(f'{place}: "{name}" is not a list of objects.')
    return value


def _are_objects(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _check_message(place: str, message: Message) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f'{place} has no "role".')
    # What a tool returned may be any list: its template shows it as JSON.
    if isinstance(content, list) and role != "tool" and not all(map(is_text_part, content)):
        raise DataError(
            f'{place} has content other than text: only parts as {{"type": "text", "text": "..."}} can be learned from.'
        )
