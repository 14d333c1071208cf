"""Documents from folders: text files in passages, JSONL and Parquet files object by object, as streams, never whole.

Objects hold `text` (texts) or `messages` (chats). A file of text is cut at line ends into passages, so that one large
file too can be split into what is learned and what is held out. What kind of file it is: `sources.py`. Writes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from beringia.data.chat import Extras, Given, Message, is_text_part
from beringia.data.sources import holds_objects, read_objects, read_text
from beringia.errors import DataError
from beringia.records.record import canonical_json

DataKind = Literal["text", "chat"]
_CHAT_FIELDS = ("messages", "tools", "documents", "conversations")
_TEXT_FIELDS = ("text",)
PASSAGE_CHARACTERS = 16_384
"""Longest piece of a text file that is kept together: some thousands of tokens."""


@dataclass(frozen=True)
class Document:
    """One text or one chat; exactly one of the two is given."""

    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: Extras = None
    documents: Extras = None
    place_in_file: str = ""
    """File and line (or row) of a chat, for messages to the user."""

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
        raise DataError(f"There is no file or directory {folder}: name a directory of texts, JSONL or Parquet files.")
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
        for place, entry in read_objects(path, _CHAT_FIELDS):
            yield _chat(place, entry)
    elif holds_objects(path):
        for place, entry in read_objects(path, _TEXT_FIELDS):
            if not isinstance(entry.get("text"), str):
                raise DataError(f'{place}: needs "text" with a string.')
            _check_encodable(place, entry["text"])
            if entry["text"].strip():
                yield Document(text=entry["text"])
    else:
        yield from (Document(text=passage) for passage in _passages(path) if passage.strip())


def _passages(path: Path) -> Iterator[str]:
    kept = ""
    for piece in read_text(path):
        kept += piece
        while len(kept) > PASSAGE_CHARACTERS:
            cut = kept.rfind("\n", 0, PASSAGE_CHARACTERS) + 1 or PASSAGE_CHARACTERS
            yield kept[:cut]
            kept = kept[cut:]
    yield kept


def _check_encodable(place: str, content: object) -> None:
    try:
        canonical_json(content)
    except UnicodeEncodeError:
        raise DataError(f"{place}: holds half of a surrogate pair (as \\ud800 alone), which is no character.") from None
    except ValueError:
        raise DataError(f"{place}: holds NaN or Infinity, which JSON does not have.") from None
    except TypeError as error:  # a date or bytes, in a Parquet file
        raise DataError(f"{place}: holds what JSON does not have ({error}).") from None


def _chat(place: str, entry: dict[str, Any]) -> Document:
    if "messages" not in entry and "conversations" in entry:
        raise DataError(
            f'{place}: is in the form of ShareGPT: write "messages" for "conversations", "role" for "from" (user for '
            'human, assistant for gpt) and "content" for "value".'
        )
    messages = entry.get("messages")
    if not _are_objects(messages):
        raise DataError(f'{place}: needs "messages" with a list of objects.')
    tools, documents = _extras(place, entry, "tools"), _extras(place, entry, "documents")
    _check_encodable(place, [messages, tools, documents])
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
