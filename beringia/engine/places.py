"""Where a step's rows go in the cache, and what each may read there.

M rows of the step, C sequences in it, B blocks of a sequence, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from beringia.engine.scheduler import Chunk


@dataclass(frozen=True)
class Prompt:
    """A chunk with several tokens."""

    rows: slice
    start: int
    end: int
    table_B: torch.Tensor
    """Its blocks up to `end`."""


@dataclass(frozen=True)
class Places:
    """A step's rows, chunk by chunk: those with one token first. Integers are int64."""

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
        """Where the chunks' tokens go; chunks with one token come first."""
        starts = np.array([chunk.start for chunk in chunks])
        ends = np.array([chunk.end for chunk in chunks])
        lengths = ends - starts
        tokens = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.end]]
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
    def num_decoding(self) -> int:
        """Chunks with one token."""
        return sum(end - start == 1 for start, end in self.chunks)

    @cached_property
    def decoding(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of those, and where they have no token (C S, true there)."""
        ends = [end for _, end in self.chunks[: self.num_decoding]]
        table_CB = self.table_CB[: len(ends), : -(-max(ends, default=0) // self.block_tokens)]
        position_S = torch.arange(table_CB.shape[1] * self.block_tokens)
        beyond_CS = position_S >= torch.tensor(ends, dtype=torch.int64).unsqueeze(1)
        return table_CB, beyond_CS.to(table_CB.device)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The others."""
        prompts = []
        row = self.num_decoding
        for number, (start, end) in enumerate(self.chunks[row:], start=row):
            table_B = self.table_CB[number, : -(-end // self.block_tokens)]
            prompts.append(Prompt(slice(row, row + end - start), start, end, table_B))
            row += end - start
        return tuple(prompts)
