"""Named tensors in files, read one at a time: a run's checkpoint, or a directory in Hugging Face form.

    with open_checkpoint(run.checkpoints / "step-000400") as reader:
        reader.tensors["model.norm.weight"].shape
        reader.read("model.norm.weight", target)      # into memory that is there already, in the target's dtype

Beside the target no more than a block is held. A run's files are checked against the SHA-256 in the manifest before
anything is read from them, each once and only those that are asked for. A Hugging Face directory has no hashes. Files
are opened once: what is deleted meanwhile can still be read. Opens no writer, knows no ranks and no models.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import TypeAdapter, ValidationError

from beringia.checkpoint.blocks import blocks_of, memory_of
from beringia.checkpoint.directory import MANIFEST, check_content, contents_of, damaged, open_checked, read_manifest
from beringia.checkpoint.opened_file import OpenedFile, opened
from beringia.checkpoint.tensor_file import PIECE_BYTES, Slot
from beringia.errors import ModelError
from beringia.records.given_files import is_there, json_object, why_unreadable
from beringia.records.manifest import CheckpointManifest, Chunk

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_WEIGHT_MAP = TypeAdapter(dict[str, str])
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored."""

    dtype: str
    """torch's name without the prefix; the file's own word where torch has no such dtype."""
    shape: tuple[int, ...]
    file: Path
    """The file that it lies in, or the first of them."""


@dataclass(frozen=True)
class Piece:
    """What one file holds of a tensor."""

    file: OpenedFile
    slot: Slot
    region: tuple[slice, ...]
    """Where it lies in the whole."""


class TensorReader(ABC):
    """Tensors by name. A context manager, since it holds files open."""

    place: Path
    """The directory."""
    tensors: Mapping[str, Stored]
    """In the order in which reading them goes through the files."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @abstractmethod
    def pieces(self, name: str) -> Iterator[Piece]:
        """The pieces of a tensor, which together are the whole; their files are open and checked."""

    @torch.no_grad()
    def read(self, name: str, target: torch.Tensor) -> None:
        """Fill `target`, of the tensor's shape, on any device; values are converted to its dtype as `copy_` does."""
        for part, block in self._blocks(name, target):
            part.copy_(block)

    def holds(self, name: str, expected: torch.Tensor) -> bool:
        """Whether the tensor, converted to the dtype of `expected`, has the same values."""
        return all(torch.equal(part, block.to(part)) for part, block in self._blocks(name, expected))

    def _blocks(self, name: str, whole: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Flat parts of `whole`, each with what is stored of it; the latter is valid until the next."""
        stored = self.tensors[name]
        assert tuple(whole.shape) == stored.shape, f"{name} is {stored.shape}"
        dtype = _dtype_of(name, stored)
        buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        memory = memory_of(buffer)
        for piece in self.pieces(name):
            start = piece.slot.start
            for part in blocks_of(whole.detach()[piece.region], dtype.itemsize):
                length = part.numel() * dtype.itemsize
                piece.file.read(start, memory[:length])
                yield part, buffer[:length].view(dtype)
                start += length


class HuggingFaceReader(TensorReader):
    """A directory in Hugging Face form. Raises ModelError."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self._stack:
            self._files: dict[Path, OpenedFile] = {}
            self.tensors = self._list(_weight_map(directory))
            self._stack = self._stack.pop_all()  # nothing went wrong: the files stay open

    def pieces(self, name: str) -> Iterator[Piece]:
        stored = self.tensors[name]
        file = self._files[stored.file]
        yield Piece(file, file.slots[name], (slice(None),) * len(stored.shape))

    def _list(self, weight_map: Mapping[str, str] | None) -> dict[str, Stored]:
        names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
        tensors: dict[str, Stored] = {}
        for name in names:
            path = self.place / name
            file = self._files[path] = self._open(path)
            listed = [key for key in file.slots if weight_map is None or weight_map.get(key) == name]
            tensors |= {key: Stored(file.slots[key].dtype, file.slots[key].sizes, path) for key in listed}
        for key, name in (weight_map or {}).items():
            if key not in tensors:
                raise ModelError(f"{self.place / name} lacks {key}, though the index places it there.")
        return tensors

    def _open(self, path: Path) -> OpenedFile:
        if not is_there(path):
            raise ModelError(f"{path} is missing, though the index names it.")
        wrong = why_unreadable(path)
        if wrong is not None:
            raise ModelError(wrong)
        file = self._stack.enter_context(FileIO(path))
        return opened(file, path, _damaged_model)


class CheckpointReader(TensorReader):
    """A complete checkpoint of a run. Raises RunError where there is none, CheckpointDamaged."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.manifest: CheckpointManifest = read_manifest(checkpoint)
        self._entries = {entry.name: entry for entry in self.manifest.files}
        self._contents = contents_of(self.manifest)
        self._files: dict[str, OpenedFile] = {}
        self.tensors = self._list()

    def pieces(self, name: str) -> Iterator[Piece]:
        for chunk in self.manifest.tensors[name].chunks:
            file = self._file(chunk.file)
            yield Piece(file, file.slots[chunk.key], _region(chunk))

    def _list(self) -> dict[str, Stored]:
        for name, entry in self.manifest.tensors.items():
            if not entry.chunks or sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.shape):
                raise damaged(self.place / MANIFEST, f"its pieces of {name} are not the whole")
        order = sorted(self.manifest.tensors.items(), key=lambda item: (item[1].chunks[0].file, item[0]))
        return {name: Stored(entry.dtype, entry.shape, self.place / entry.chunks[0].file) for name, entry in order}

    def _file(self, name: str) -> OpenedFile:
        if name not in self._files:
            self._files[name] = self._open(name)
        return self._files[name]

    def _open(self, name: str) -> OpenedFile:
        path = self.place / name
        if name not in self._entries:
            raise damaged(path, "the manifest does not list it")
        file = self._stack.enter_context(open_checked(path))
        check_content(file, path, self._entries[name])
        found = opened(file, path, damaged)
        if {key: (slot.dtype, slot.sizes) for key, slot in found.slots.items()} != self._contents[name]:
            raise damaged(path, "its header does not hold the tensors that the manifest lists")
        return found


def open_checkpoint(checkpoint: Path) -> TensorReader:
    """The tensors of a run's checkpoint, the directory `step-…`. Raises RunError or CheckpointDamaged."""
    return CheckpointReader(checkpoint)


def open_hugging_face(directory: Path) -> TensorReader:
    """The tensors of a directory in Hugging Face form. Raises ModelError."""
    return HuggingFaceReader(directory)


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Which file holds each tensor, by the index; None where there is one file."""
    path = directory / INDEX
    shards = sorted(each.name for each in directory.glob("model-*.safetensors") if _SHARD.fullmatch(each.name))
    single = is_there(directory / SINGLE)
    if is_there(path):
        found = _read_index(path)
        named = set(found.values())
        _refuse_two_sets(directory, INDEX, [name for name in (*shards, *([SINGLE] * single)) if name not in named])
        return found
    if single:
        _refuse_two_sets(directory, SINGLE, shards)
        return None
    if shards:
        raise ModelError(f"{directory} holds {shards[0]} and lacks {INDEX}, which says what is in the shards.")
    if is_there(directory / _ADAPTER):
        raise ModelError(f"{directory} holds an adapter ({_ADAPTER}) and no model: merge it into its model first.")
    raise ModelError(f"{directory} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        found = _WEIGHT_MAP.validate_python(json_object(path, ModelError).get("weight_map"))
    except ValidationError:
        raise ModelError(f"{path} is not an index of safetensors shards: it has no weight_map.") from None
    outside = next((name for name in found.values() if Path(name).name != name), None)
    if outside is not None:
        raise ModelError(f"{path} names {outside!r:.80}, which is no file beside it.")
    return found


def _refuse_two_sets(directory: Path, read: str, others: list[str]) -> None:
    """Nobody knows which of two sets of weights is meant: readers differ."""
    if others:
        raise ModelError(
            f"{directory} holds two sets of weights, {read} and {others[0]}, which does not belong to the former: keep "
            "the one that is meant."
        )


def _dtype_of(name: str, stored: Stored) -> torch.dtype:
    dtype = getattr(torch, stored.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(
            f"{stored.file}: {name} is stored as {stored.dtype}, which torch does not have; convert it first."
        )
    return dtype


def _region(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def _damaged_model(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is damaged: {what}. Get it again.")
