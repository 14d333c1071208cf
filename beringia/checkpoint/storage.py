"""Our storage behind torch.distributed.checkpoint's planners: files hashed while written, checked while read.

`StagedWriter` writes what `Staging` holds; `VerifiedReader` reads into the tensors that the load planner names, each
file whole and in one pass with its SHA-256, several files at a time. Both keep the planner's protocol, so
`torch.distributed.checkpoint.load(state, storage_reader=VerifiedReader(directory))` reads our checkpoints too.
torch's own Hugging Face storage neither hashes nor stages into fixed buffers: docs/checkpoints.md has the
measurements.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from beringia.checkpoint.blocks import memory_of
from beringia.checkpoint.directory import contents_of, damaged, read_manifest, write_manifest
from beringia.checkpoint.plan import described, metadata_of
from beringia.checkpoint.staging import Staging
from beringia.checkpoint.tensor_file import Slot, read_verified, write_hashed
from beringia.machine.threads import usable_cores
from beringia.records.manifest import CheckpointManifest, Chunk, FileEntry, TensorEntry


class StagedWriter(StorageWriter):
    """Writes one rank's staged pieces into `directory`, which exists; `finish` writes the manifest."""

    def __init__(self, directory: Path, staging: Staging) -> None:
        self.directory = directory
        self.staging = staging
        self.entries: list[FileEntry] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.entries = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all files; the data is what was staged, not what the planner would resolve now. Raises StorageFull."""
        for number, file in enumerate(self.staging.files):
            self.entries.append(write_hashed(self.directory, file, self.staging.content(number)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(piece.item.index, piece.slot.bytes, chunk)
                for piece, chunk in zip(self.staging.pieces, self.chunks(), strict=True)
            ]
        )
        return done

    def chunks(self) -> list[Chunk]:
        """What this rank writes, for the manifest, in the order of the staging's pieces."""
        return [
            Chunk(
                offsets=piece.offsets,
                sizes=piece.slot.sizes,
                file=self.staging.files[piece.file].name,
                key=piece.slot.key,
            )
            for piece in self.staging.pieces
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest, which `metadata.storage_data` holds complete."""
        assert isinstance(metadata.storage_data, CheckpointManifest), "the store puts the manifest there"
        write_manifest(self.directory, metadata.storage_data)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def tensor_entries(metadata: Metadata, chunks: Iterable[tuple[str, Chunk]]) -> dict[str, TensorEntry]:
    """The manifest's tensors: the planner's shapes and dtypes with the (name, chunk) of all ranks."""
    by_name: dict[str, list[Chunk]] = defaultdict(list)
    for name, chunk in chunks:
        by_name[name].append(chunk)
    entries = {}
    for name, (dtype, shape) in described(metadata).items():
        pieces = sorted(by_name[name], key=lambda chunk: chunk.offsets)
        entries[name] = TensorEntry(dtype=dtype, shape=shape, chunks=tuple(pieces))
    return entries


class VerifiedReader(StorageReader):
    """Reads a checkpoint's directory. Raises CheckpointDamaged for every file that is not as it was written."""

    def __init__(self, directory: Path, manifest: CheckpointManifest | None = None) -> None:
        self.directory = directory
        self.manifest = manifest if manifest is not None else read_manifest(directory)
        self.bytes_read = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return metadata_of(self.manifest)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._chunks = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every file that the plan touches, whole, and put the wanted parts where they belong."""
        wanted: dict[str, dict[str, list[tuple[ReadItem, torch.Tensor]]]] = defaultdict(lambda: defaultdict(list))
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            wanted[chunk.file][chunk.key].append((item, planner.resolve_tensor(item).detach()))
        entries = {entry.name: entry for entry in self.manifest.files}
        for name in wanted.keys() - entries.keys():
            raise damaged(self.directory / name, "the manifest does not list it")
        contents = contents_of(self.manifest)
        with ThreadPoolExecutor(usable_cores(), thread_name_prefix="beringia-reading") as pool:
            jobs = [
                pool.submit(_read_file, self.directory, entries[name], contents[name], parts)
                for name, parts in wanted.items()
            ]
            for job in jobs:
                job.result()
        self.bytes_read = sum(entries[name].bytes for name in wanted)
        for item in plan.items:
            planner.commit_tensor(item, planner.resolve_tensor(item))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


def _read_file(
    directory: Path,
    entry: FileEntry,
    contents: dict[str, tuple[str, tuple[int, ...]]],
    parts: dict[str, list[tuple[ReadItem, torch.Tensor]]],
) -> None:
    """Read one file: straight into a tensor that wants exactly a slot, else through memory that is then cut up."""
    aside: dict[str, torch.Tensor] = {}

    def sink(slot: Slot) -> memoryview:
        takers = parts.get(slot.key, [])
        if len(takers) == 1 and _takes_whole(takers[0][1], slot):
            return memory_of(takers[0][1])
        buffer = torch.empty(slot.bytes, dtype=torch.uint8)
        if takers:
            aside[slot.key] = buffer.view(getattr(torch, slot.dtype)).view(slot.sizes)
        return memory_of(buffer)

    read_verified(directory, entry, contents, sink)
    for key, tensor in aside.items():
        for item, target in parts[key]:
            region = tuple(
                slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
            )
            target.copy_(tensor[region])


def _takes_whole(target: torch.Tensor, slot: Slot) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and tuple(target.shape) == slot.sizes
