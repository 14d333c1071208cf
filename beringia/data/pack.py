"""Packing a folder of texts or chats into token shards, once: later calls find what was packed, or pack what changed.

Two passes over the sources, both streaming. The first takes each file's SHA-256, finds out whether it is text, and
hashes every document; the second turns documents into tokens. A document is held out if its hash lies in the lowest
`held_out_fraction` of all hashes, so the two sides are disjoint by content and a document keeps its side when others
come and go. At least one document is on each side.

Writes `<directory>/<name>/` with shards and a manifest, the manifest last and the directory renamed into place; the
name is a hash of the content, so data of an earlier version is never overwritten under a run that reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from beringia.data.chat import encode_chat
from beringia.data.documents import PASSAGE_CHARACTERS, DataKind, Document, list_files, read_documents
from beringia.data.shards import SHARD_TOKENS, PackManifest, PackSettings, ShardWriter, Source
from beringia.data.sources import UnreadableFile
from beringia.data.template_gaps import TemplateGaps
from beringia.data.tokenizer import Tokenizer
from beringia.errors import DataError
from beringia.machine.aside import directory_beside
from beringia.records.files import Beat, at_rest, publish_directory, sha256_of_file, write_text
from beringia.records.record import canonical_hash

MANIFEST = "manifest.json"
_NO_HASH = ""
_BATCH_CHARACTERS = 1 << 20  # texts handed to the tokenizer at once, which spreads them over its threads


@dataclass(frozen=True)
class Packed:
    """A packed directory."""

    directory: Path
    manifest: PackManifest
    notes: tuple[str, ...]
    """What was left out or could not be checked, one sentence each."""


def pack(
    folder: Path,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    kind: DataKind = "text",
    held_out_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    beat: Beat = at_rest,
) -> Packed:
    """Pack a folder (or one file) under `directory`, or find it packed there. Safe to call from many processes.
    `beat` is called again and again while that takes.

    Raises DataError for a folder that is missing or empty, a line that cannot be used, or too few documents to split.
    """
    settings = PackSettings(kind=kind, tokenizer=tokenizer.hash, held_out_fraction=held_out_fraction)
    with _lock(directory):
        found = _find(folder, settings, directory, beat)
        if found is not None:
            return found
        survey = _survey(folder, settings, beat)
        with directory_beside(directory / "packing") as aside:
            manifest = _write(folder, tokenizer, survey, settings, aside, shard_tokens, beat)
            return _publish(manifest, aside, directory)


@dataclass(frozen=True)
class _Survey:
    """What the first pass found out."""

    sources: tuple[Source, ...]
    hidden: int
    threshold: int
    """Documents whose hash is at most this are held out."""


def _find(folder: Path, settings: PackSettings, directory: Path, beat: Beat) -> Packed | None:
    """What is packed already and still true to its sources, wherever they lie now; without sources (another machine) it
    is taken as it is."""
    for path in sorted(directory.glob(f"[!.]*/{MANIFEST}")):  # not what is being packed, or was when it was killed
        try:
            manifest = PackManifest.model_validate_json(path.read_text())
        except ValidationError:  # damaged, or of another version: packed again
            continue
        if manifest.settings != settings:
            continue
        if not folder.exists():
            note = f"{folder} is not here: its packed tokens are used, as they were packed."
            return Packed(path.parent, manifest, (*manifest.notes, note))
        if _unchanged(folder, manifest, beat):
            return Packed(path.parent, manifest, manifest.notes)
    return None


def _unchanged(folder: Path, manifest: PackManifest, beat: Beat) -> bool:
    files, _ = list_files(folder)
    known = {source.path: source for source in manifest.sources}
    return {_relative(folder, path) for path in files} == set(known) and all(
        _same(path, known[_relative(folder, path)], beat) for path in files
    )


def _same(path: Path, source: Source, beat: Beat) -> bool:
    """Size and time of change say "unchanged" for sure; a copy has another time and is compared by hash."""
    if source.sha256 == _NO_HASH or not os.path.isfile(path):
        return source.sha256 == _NO_HASH and _why_unreadable(path) is not None
    status = path.stat()
    if status.st_size != source.bytes:
        return False
    return status.st_mtime_ns == source.modified_ns or sha256_of_file(path, beat) == source.sha256


class _Places:
    """Smallest and largest hash among documents: enough to put at least one on each side."""

    def __init__(self) -> None:
        self.smallest, self.largest = 1 << 64, -1

    def add(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)

    def threshold(self, folder: Path, fraction: float) -> int:
        """The largest hash that is held out. Raises DataError where there are not two different documents."""
        if self.largest < 0:
            raise DataError(f"{folder} holds no text: name a directory with texts (in UTF-8), JSONL or Parquet files.")
        if self.smallest == self.largest:
            raise DataError(
                f"{folder} holds only one document of at most {PASSAGE_CHARACTERS} characters, "
                "so none can be held out: add some text."
            )
        return min(max(int(fraction * 2.0**64), self.smallest), self.largest - 1)


def _survey(folder: Path, settings: PackSettings, beat: Beat) -> _Survey:
    files, hidden = list_files(folder)
    places = _Places()
    sources = tuple(_survey_file(folder, path, settings.kind, places, beat) for path in files)
    return _Survey(sources, hidden, places.threshold(folder, settings.held_out_fraction))


def _survey_file(folder: Path, path: Path, kind: DataKind, places: _Places, beat: Beat) -> Source:
    found = _Places()
    size, modified, digest = 0, 0, _NO_HASH
    skipped = _why_unreadable(path)
    if skipped is None:
        try:
            size, modified, digest = path.stat().st_size, path.stat().st_mtime_ns, sha256_of_file(path, beat)
            for document in read_documents(path, kind):
                beat()
                found.add(document.place, document.place)
        except OSError as error:
            raise DataError(f"{path} cannot be read to its end ({error.strerror}): mend it or take it away.") from None
        except UnreadableFile as error:
            skipped = str(error)
    if skipped is None:
        places.add(found.smallest, found.largest)
    return Source(path=_relative(folder, path), bytes=size, modified_ns=modified, sha256=digest, skipped=skipped)


def _why_unreadable(path: Path) -> str | None:
    """Why there is nothing to read at a path that was listed as a file; None where there is."""
    if os.path.isdir(path):
        link = os.path.islink(path) and os.access(path, os.R_OK | os.X_OK)
        return "is a link to a folder that is read already or lies above" if link else "is a folder that cannot be read"
    if not os.path.isfile(path):
        return "is not a regular file"
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    survey: _Survey,
    settings: PackSettings,
    aside: Path,
    shard_tokens: int,
    beat: Beat,
) -> PackManifest:
    """Second pass: documents to tokens, into `aside`."""
    gaps = TemplateGaps(tokenizer)
    dtype = "uint16" if tokenizer.vocabulary_size <= 1 << 16 else "uint32"
    with (
        ShardWriter(aside, "train", dtype, shard_tokens) as train,
        ShardWriter(aside, "held-out", dtype, shard_tokens) as held_out,
    ):
        for document, tokens, said in _encoded(_documents(folder, survey, settings.kind), tokenizer, gaps):
            beat()
            (held_out if document.place <= survey.threshold else train).append(tokens, said)
    if any(not _same(_path(folder, source), source, beat) for source in survey.sources):
        raise DataError(f"Files under {folder} changed while they were being packed: run the same again.")
    return PackManifest(
        settings=settings,
        folder=str(folder),
        dtype=dtype,
        sources=survey.sources,
        hidden=survey.hidden,
        documents={"train": train.documents, "held-out": held_out.documents},
        shards={"train": tuple(train.shards), "held-out": tuple(held_out.shards)},
        template_notes=gaps.notes,
    )


def _documents(folder: Path, survey: _Survey, kind: DataKind) -> Iterator[Document]:
    for source in survey.sources:
        if source.skipped is None:
            yield from read_documents(_path(folder, source), kind)


def _encoded(
    documents: Iterator[Document], tokenizer: Tokenizer, gaps: TemplateGaps
) -> Iterator[tuple[Document, list[int], list[bool] | None]]:
    """Each document with its tokens; a text is followed by the end token, a chat has its own end."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if document.messages:
            yield document, *_encoded_chat(document, tokenizer)
            gaps.add(document)
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from _encoded_texts(batch, tokenizer)
            batch, characters = [], 0
    yield from _encoded_texts(batch, tokenizer)


def _encoded_chat(chat: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    try:
        return encode_chat(tokenizer, chat.messages, **chat.given)
    except DataError as error:
        raise DataError(f"{chat.place_in_file}: {error}") from None


def _encoded_texts(batch: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, list[int], None]]:
    tokens = tokenizer.encode_documents([document.text for document in batch])
    for document, ids in zip(batch, tokens, strict=True):
        yield document, [*ids, tokenizer.end], None


def _publish(manifest: PackManifest, aside: Path, directory: Path) -> Packed:
    write_text(aside / MANIFEST, manifest.model_dump_json(indent=1))
    final = directory / f"{manifest.settings.kind}-{canonical_hash(manifest)[:16]}"
    if final.exists():  # its manifest was found damaged
        shutil.rmtree(final)
    publish_directory(aside, final)
    return Packed(final, manifest, manifest.notes)


def _relative(folder: Path, path: Path) -> str:
    return path.name if folder.is_file() else path.relative_to(folder).as_posix()


def _path(folder: Path, source: Source) -> Path:
    return folder if folder.is_file() else folder / source.path


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One process packs, the others wait for it and then find what it packed."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
