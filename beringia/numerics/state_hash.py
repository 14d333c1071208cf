"""The hash of a training state, taken from the live tensors: a keyed sum over global index and bits.

Each tensor is a sequence of words, in row-major order of the *whole* tensor: an element of up to 4 bytes is one word
(its bits as an unsigned integer), an element of 8 bytes is two (low half first). Word number g has the value

    word * key(name, g // 4096) * table(g % 4096)    mod 2^64,

both factors odd, and a tensor's value is the sum. So the values of the pieces of any sharding add up to the value of
the whole, one changed bit always changes it (2^b times an odd number), and the values do not depend on where they
were computed: in C or numpy on the host (`keyed_sum.py`), or with torch's integers on a device that multiplies them
exactly. `combine` binds values, names, dtypes, shapes and the progress together with SHA-256.

It finds faults, not forgers: whoever knows the keys can construct a collision. Files are protected by SHA-256.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from beringia.numerics.keyed_sum import BLOCK_WORDS, JOB, Jobs, multipliers, open_kernel, table
from beringia.records.record import canonical_hash

_MASK = 2**64 - 1
_DEVICE_WORD_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_DEVICE_CHUNK_WORDS = 1024 * BLOCK_WORDS
"""Words taken at once on a device: 4M words make 32 MiB of 64-bit products."""


def hash_tensor(
    tensor: torch.Tensor,
    name: str,
    *,
    offsets: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    on_device: bool = False,
) -> int:
    """The 64-bit value of a tensor, or of the piece of it that begins at `offsets` in a whole of `shape`.

    `tensor`: any shape, float32, bfloat16, int64, uint8 and every other dtype of 1, 2, 4 or 8 bytes; not a DTensor
    (give its local tensor). `on_device`: compute where the tensor lies, for chips whose 64-bit integer products are
    exact; otherwise a copy on the host is hashed. Raises ValueError where the piece does not lie inside the whole.
    """
    sizes = tuple(tensor.shape)
    offsets = tuple(offsets) if offsets is not None else (0,) * len(sizes)
    shape = tuple(shape) if shape is not None else sizes
    if on_device and tensor.device.type != "cpu":
        runs = list(runs_in_whole(offsets, sizes, shape))
        if len(runs) <= 1:
            return _hash_on_device(tensor, name, runs)
    host = tensor.detach().cpu().contiguous()
    jobs = jobs_of(host, name, runs_in_whole(offsets, sizes, shape))
    open_kernel().run(jobs)
    return total_value(jobs)


def jobs_of(
    tensor: torch.Tensor,
    name: str,
    runs: Iterable[tuple[int, int, int]],
    *,
    longest: int = 1 << 62,
) -> Jobs:
    """Jobs for the stretches of a contiguous tensor in host memory, none longer than `longest` words."""
    per_element, width, address = words_per_element(tensor.dtype), min(tensor.dtype.itemsize, 4), tensor.data_ptr()
    rows = []
    for start, length, first in runs:
        start, length, first = start * per_element, length * per_element, first * per_element
        for done in range(0, length, longest):
            count = min(longest, length - done)
            rows.append((address + (start + done) * width, 0, key_of(name), first + done, count, width, 0))
    return np.array(rows, JOB)


def total_value(jobs: Jobs) -> int:
    """The sum mod 2^64 of what jobs of one tensor gave."""
    return int(np.sum(jobs["value"], dtype=np.uint64))


def combine(
    values: Mapping[str, int], layout: Mapping[str, tuple[str, Sequence[int]]], progress: Mapping[str, Any]
) -> str:
    """The hash of a state in hexadecimal: each tensor's value, its (dtype name, shape), and the progress (JSON)."""
    if values.keys() != layout.keys():
        raise ValueError(f"values and layout name different tensors: {sorted(values.keys() ^ layout.keys())[:3]}")
    tensors = {name: [layout[name][0], list(layout[name][1]), f"{values[name] & _MASK:016x}"] for name in values}
    return canonical_hash({"progress": dict(progress), "tensors": tensors})


def hash_state(state: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> str:
    """`combine` over whole tensors in one process. A sharded state is hashed by `CheckpointStore.state_hash`."""
    values = {name: hash_tensor(tensor, name) for name, tensor in state.items()}
    layout = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()}
    return combine(values, layout, progress)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the prefix: `float32`."""
    return str(dtype).removeprefix("torch.")


def words_per_element(dtype: torch.dtype) -> int:
    """1, or 2 for elements of 8 bytes: with 64-bit words the top bits would hardly meet the multiplier."""
    return 2 if dtype.itemsize == 8 else 1


def runs_in_whole(offsets: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The stretches of a piece that are consecutive in the whole too, as (start in piece, length, start in whole).

    Counted in elements, row-major. One stretch where the piece is a range of rows (as FSDP cuts), more for columns.
    """
    if not len(offsets) == len(sizes) == len(shape):
        raise ValueError(f"offsets {tuple(offsets)}, sizes {tuple(sizes)} and shape {tuple(shape)} differ in length")
    if any(o < 0 or o + s > w for o, s, w in zip(offsets, sizes, shape, strict=True)):
        raise ValueError(f"a piece of sizes {tuple(sizes)} at {tuple(offsets)} does not lie inside {tuple(shape)}")
    if math.prod(sizes) == 0:
        return
    inner = len(shape)
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    # Dimensions before `split` are walked one index at a time; from there on the piece is one stretch.
    split = max(inner - 1, 0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    length = math.prod(sizes[split:])
    tail = sum(o * s for o, s in zip(offsets[split:], strides[split:], strict=True))
    outer = (range(o, o + s) for o, s in zip(offsets[:split], sizes[:split], strict=True))
    for number, index in enumerate(itertools.product(*outer)):
        yield number * length, length, tail + sum(i * s for i, s in zip(index, strides[:split], strict=True))


@functools.lru_cache(maxsize=1 << 16)
def key_of(name: str) -> int:
    """The key of a tensor: the first 64 bits of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _hash_on_device(tensor: torch.Tensor, name: str, runs: list[tuple[int, int, int]]) -> int:
    """The same integers by plain integer operators on the tensor's own device; only the block sums come to the host."""
    if not runs:
        return 0
    words = tensor.detach().contiguous().reshape(-1).view(_DEVICE_WORD_TYPES[tensor.dtype.itemsize])
    first = runs[0][2] * words_per_element(tensor.dtype)
    unsigned = (1 << (8 * min(tensor.dtype.itemsize, 4))) - 1
    factors = _table_on(tensor.device)
    total = done = 0
    while done < words.numel():
        place = (first + done) % BLOCK_WORDS
        left = words.numel() - done
        length = min(BLOCK_WORDS - place, left)
        rows = 1
        if place == 0 and left >= BLOCK_WORDS:
            rows = min(left, _DEVICE_CHUNK_WORDS) // BLOCK_WORDS
            length = BLOCK_WORDS
        block = words[done : done + rows * length].to(torch.int64) & unsigned
        sums = (block.view(rows, length) * factors[place : place + length]).sum(1)
        weights = multipliers(key_of(name), (first + done) // BLOCK_WORDS, rows)
        total += int(np.sum(sums.cpu().numpy().view(np.uint64) * weights, dtype=np.uint64))
        done += rows * length
    return total & _MASK


@functools.lru_cache(maxsize=8)
def _table_on(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(table().view(np.int64).copy()).to(device)
