"""The copy of the live tensors in host memory that the writing thread works from, laid out as the files will be.

`take` is what training waits for: it copies each piece that this rank writes into its place in a file's buffer, and
hashes the live bytes on the way, piece by piece in cache, so that memory is read once (`numerics/keyed_sum.py`). From
a device the copies run on a side stream into pinned memory while the hash runs on the device, where the chip can do
both. The buffers are allocated once and reused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from beringia.checkpoint.blocks import memory_of
from beringia.checkpoint.tensor_file import Slot, TensorFile, lay_out
from beringia.chips.chip import Chip
from beringia.machine.threads import usable_cores
from beringia.numerics.keyed_sum import BLOCK_WORDS, JOB, Jobs, open_kernel
from beringia.numerics.state_hash import hash_tensor, jobs_of, runs_in_whole

PART_BYTES = 256 << 20
"""Tensors go into files of about this size, so that a checkpoint is hashed by several cores when it is read."""

_JOB_WORDS = 256 * BLOCK_WORDS
"""Words that one thread copies and hashes at a time: 4 MiB of float32."""


@dataclass(frozen=True)
class Piece:
    """One piece of one tensor that this rank writes."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: int
    slot: Slot
    item: WriteItem


class Staging:
    """Buffers for one layout of the state on one rank."""

    def __init__(self, plan: SavePlan, rank: int, chip: Chip | None) -> None:
        self.chip = chip
        self.files, self.pieces = _lay_out_files(plan, rank)
        pinned = chip is not None and chip.capabilities.pinned_memory
        # Zeroed, which touches every page: the first checkpoint would otherwise wait for the operating system.
        self.buffers = [torch.zeros(file.data_bytes, dtype=torch.uint8, pin_memory=pinned) for file in self.files]
        self._views = [self._view(piece) for piece in self.pieces]
        self._jobs, self._job_counts = self._all_jobs()

    @property
    def bytes(self) -> int:
        return sum(len(file.header) + file.data_bytes for file in self.files)

    def content(self, file: int) -> memoryview:
        """The staged data of one file."""
        return memory_of(self.buffers[file])

    def take(self, live: Iterable[torch.Tensor], pool: ThreadPoolExecutor) -> dict[str, int]:
        """Copy the live tensors, in the order of `pieces`; returns this rank's share of each tensor's value."""
        tensors = [tensor.detach() for tensor in live]
        values = dict.fromkeys((piece.name for piece in self.pieces), 0)
        elsewhere = [number for number, tensor in enumerate(tensors) if tensor.device.type != "cpu"]
        if elsewhere:
            self._take_from_device(elsewhere, tensors, values)
        self._take_from_host(tensors, values, pool)
        return values

    def _take_from_host(self, tensors: list[torch.Tensor], values: dict[str, int], pool: ThreadPoolExecutor) -> None:
        contiguous = [tensor.contiguous() if tensor.device.type == "cpu" else None for tensor in tensors]
        addresses = np.array([0 if tensor is None else tensor.data_ptr() for tensor in contiguous], np.uint64)
        jobs = self._jobs.copy()
        jobs["words"] += np.repeat(addresses, self._job_counts)
        here = np.repeat(addresses != 0, self._job_counts)
        jobs = jobs[here]
        open_kernel().run(jobs, pool, usable_cores())
        owners = np.repeat(np.arange(len(tensors)), self._job_counts)[here]
        for number, value in zip(owners.tolist(), jobs["value"].tolist(), strict=True):
            name = self.pieces[number].name
            values[name] = (values[name] + value) % 2**64

    def _take_from_device(self, numbers: list[int], tensors: list[torch.Tensor], values: dict[str, int]) -> None:
        assert self.chip is not None, "tensors on a device need the chip that they are on"
        on_device = self.chip.capabilities.exact_int64
        self.chip.synchronize()
        with self.chip.stream():
            for number in numbers:
                self._views[number].copy_(tensors[number], non_blocking=True)
        for number in numbers:
            piece = self.pieces[number]
            value = hash_tensor(
                tensors[number], piece.name, offsets=piece.offsets, shape=piece.shape, on_device=on_device
            )
            values[piece.name] = (values[piece.name] + value) % 2**64
        self.chip.synchronize()

    def _all_jobs(self) -> tuple[Jobs, list[int]]:
        """Jobs from address 0 to the staged copies (a save adds where the live tensors are), and how many per piece."""
        parts = []
        for piece, view in zip(self.pieces, self._views, strict=True):
            runs = runs_in_whole(piece.offsets, piece.slot.sizes, piece.shape)
            jobs = jobs_of(view, piece.name, runs, longest=_JOB_WORDS)
            jobs["copy"] = jobs["words"]
            jobs["words"] -= np.uint64(view.data_ptr())
            parts.append(jobs)
        return np.concatenate([np.zeros(0, JOB), *parts]), [jobs.size for jobs in parts]

    def _view(self, piece: Piece) -> torch.Tensor:
        data = self.buffers[piece.file][piece.slot.start : piece.slot.start + piece.slot.bytes]
        return data.view(getattr(torch, piece.slot.dtype)).view(piece.slot.sizes)


def copying_pool() -> ThreadPoolExecutor:
    """Threads for `Staging.take`: one per core, since one core alone does not saturate the memory."""
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="beringia-staging")


def _lay_out_files(plan: SavePlan, rank: int) -> tuple[list[TensorFile], list[Piece]]:
    groups: list[list[tuple[str, WriteItem]]] = []
    room = 0
    for key, item in _keyed(plan.items):
        size = item.tensor_storage_size() or 0
        if not groups or size > room:
            groups.append([])
            room = PART_BYTES
        groups[-1].append((key, item))
        room -= size
    files, pieces = [], []
    for number, group in enumerate(groups):
        described = [(key, *_dtype_and_sizes(item)) for key, item in group]
        file = lay_out(f"rank{rank:05d}-part{number:05d}.safetensors", described)
        slots = {slot.key: slot for slot in file.slots}
        files.append(file)
        pieces += [_piece(item, number, slots[key]) for key, item in group]
    return files, pieces


def _keyed(items: Iterable[WriteItem]) -> Iterator[tuple[str, WriteItem]]:
    """Items with their key in the file: the tensor's name, plus offsets where a rank has several pieces of it."""
    seen: set[str] = set()
    for item in items:
        name = item.index.fqn
        key = name if name not in seen else f"{name}@{','.join(map(str, item.index.offset or ()))}"
        seen.add(name)
        yield key, item


def _dtype_and_sizes(item: WriteItem) -> tuple[str, tuple[int, ...]]:
    data = item.tensor_data
    assert data is not None and data.chunk is not None, "the state holds tensors only"
    return str(data.properties.dtype).removeprefix("torch."), tuple(data.chunk.sizes)


def _piece(item: WriteItem, file: int, slot: Slot) -> Piece:
    data = item.tensor_data
    assert data is not None and data.chunk is not None, "the state holds tensors only"
    return Piece(item.index.fqn, tuple(data.chunk.offsets), tuple(data.size), file, slot, item)
