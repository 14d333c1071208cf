"""Tensors as blocks of bytes, so that reading, converting or writing one never needs a second one of its size.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from beringia.checkpoint.tensor_file import PIECE_BYTES


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, writable."""
    # Not memoryview(array): before Python 3.12 type checkers do not know that arrays are buffers.
    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content


def blocks_of(tensor: torch.Tensor, bytes_each: int) -> Iterator[torch.Tensor]:
    """The tensor's elements in row-major order, as one-dimensional views of at most `PIECE_BYTES`, an element taking
    `bytes_each`."""
    for flat in _flat_parts(tensor.detach()):
        if flat.numel():
            yield from torch.split(flat, PIECE_BYTES // bytes_each)


def content_of(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The tensor's bytes as `dtype`, block by block, from whatever device it is on."""
    for block in blocks_of(tensor, max(dtype.itemsize, tensor.dtype.itemsize)):
        yield memory_of(block.to("cpu", dtype).contiguous())


def _flat_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.is_contiguous():
        yield tensor.view(-1)
    elif tensor.dim() == 1:
        yield tensor
    else:
        for row in tensor.unbind(0):
            yield from _flat_parts(row)
