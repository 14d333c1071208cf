"""Where a step's rows go in the cache, and what each may read there.

M rows of the step, C sequences in it, B blocks of a sequence, S tokens of a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional as F

from beringia.engine.scheduler import Chunk


@dataclass(frozen=True)
class PromptChunk:
    """A chunk with several tokens."""

    rows: slice
    start: int
    end: int
    table_B: torch.Tensor
    """Its blocks up to `end`."""


@dataclass(frozen=True)
class Decoding:
    """Chunks with one token, together."""

    rows_C: torch.Tensor
    table_CB: torch.Tensor
    """Their blocks, up to the longest one's."""
    beyond_CS: torch.Tensor
    """True where a sequence has no token."""


@dataclass(frozen=True)
class Tile:
    """Rows of one sequence within an aligned range of positions."""

    rows: slice
    within: slice
    """Which of the range's positions they have."""
    start: int
    """Of the range."""
    table_B: torch.Tensor
    """Blocks up to the range's end."""


@dataclass(frozen=True)
class Places:
    """A step's rows, chunk by chunk. Integers are int64."""

    chunks: tuple[tuple[int, int], ...]
    """Start and end of each."""
    block_tokens: int
    token_M: torch.Tensor
    position_M: torch.Tensor
    slot_M: torch.Tensor
    """Rows of the cache, blocks laid end to end."""
    sequence_M: torch.Tensor
    """Which chunk a row belongs to."""
    table_CB: torch.Tensor
    """Blocks of each chunk's sequence; filled up with the first block."""

    @staticmethod
    def of(chunks: Sequence[Chunk], block_tokens: int, device: torch.device) -> Places:
        """Where the chunks' tokens go."""
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.array([chunk.end for chunk in chunks])
        lengths = ends - starts
        tokens = [token for chunk in chunks for token in chunk.tokens]
        sequence_M = np.repeat(np.arange(len(chunks)), lengths)
        position_M = np.arange(len(tokens)) + np.repeat(ends - lengths.cumsum(), lengths)
        table_CB = np.zeros((len(chunks), -(-int(ends.max()) // block_tokens)), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            blocks = chunk.sequence.table[: table_CB.shape[1]]
            table_CB[row, : len(blocks)] = blocks
        block_M, within_M = np.divmod(position_M, block_tokens)
        slot_M = table_CB[sequence_M, block_M] * block_tokens + within_M
        rows = torch.from_numpy(np.stack((tokens, position_M, slot_M, sequence_M))).to(device)
        return Places(
            tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
            block_tokens,
            token_M=rows[0],
            position_M=rows[1],
            slot_M=rows[2],
            sequence_M=rows[3],
            table_CB=torch.from_numpy(table_CB).to(device),
        )

    # For operators that compute whole tensors: sequences with one row together, each longer chunk by itself.

    @cached_property
    def decoding(self) -> Decoding | None:
        """Chunks with one token; None where there is none."""
        single = [number for number, (start, end) in enumerate(self.chunks) if end - start == 1]
        if not single:
            return None
        rows_C, single_C = torch.tensor(self._first_rows)[single], torch.tensor(single)
        end_C = torch.tensor([self.chunks[number][1] for number in single])
        num_blocks = -(-int(end_C.max()) // self.block_tokens)
        table_CB = self.table_CB.index_select(0, single_C.to(self.table_CB.device))[:, :num_blocks]
        beyond_CS = torch.arange(num_blocks * self.block_tokens) >= end_C.unsqueeze(1)
        return Decoding(rows_C.to(table_CB.device), table_CB, beyond_CS.to(table_CB.device))

    @cached_property
    def prompts(self) -> tuple[PromptChunk, ...]:
        """The others."""
        prompts = []
        for number, (row, (start, end)) in enumerate(zip(self._first_rows, self.chunks, strict=True)):
            if end - start > 1:
                table_B = self.table_CB[number, : -(-end // self.block_tokens)]
                prompts.append(PromptChunk(slice(row, row + end - start), start, end, table_B))
        return tuple(prompts)

    def tiles(self, size: int) -> Iterator[Tile]:
        """Rows of each chunk by aligned ranges of `size` positions, so that what is beside a row is its position's."""
        for number, (row, (start, end)) in enumerate(zip(self._first_rows, self.chunks, strict=True)):
            for first in range(start // size * size, end, size):
                begin, stop = max(start, first), min(end, first + size)
                lacking = -(-(first + size) // self.block_tokens) - self.table_CB.shape[1]
                table_B = self.table_CB[number, : -(-(first + size) // self.block_tokens)]
                table_B = F.pad(table_B, (0, max(0, lacking)))  # with the first block, which nobody reads there
                rows = slice(row + begin - start, row + stop - start)
                yield Tile(rows, slice(begin - first, stop - first), first, table_B)

    @property
    def _first_rows(self) -> list[int]:
        """Of each chunk."""
        return list(itertools.accumulate((end - start for start, end in self.chunks), initial=0))[:-1]
