"""The paged cache's tensors, and the places in them that a step writes and reads.

A layer keeps one row a token: for latent attention the normed latent and the rotated shared key, side by side (R + P
numbers; DeepSeek-V2, arXiv 2405.04434 section 2.1), else keys and values of all groups (2 G H numbers). Block b holds
rows b * block_tokens and on.

M rows of the step, S tokens of a sequence, C sequences that decode, W width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from beringia.engine.scheduler import Chunk
from beringia.model import DecoderConfig


def row_width(config: DecoderConfig) -> int:
    """Numbers that a layer keeps of a token."""
    if config.latent:
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


class PagedCache:
    """One tensor a layer: blocks, tokens in a block, W."""

    def __init__(
        self, config: DecoderConfig, num_blocks: int, block_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_tokens = block_tokens
        shape = (num_blocks, block_tokens, row_width(config))
        # Zeros: rows past a sequence's end are masked, but 0 times what was in memory before could be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        return sum(layer.shape[-1] * layer.element_size() for layer in self.layers)

    def write(self, layer: int, slot_M: torch.Tensor, row_MW: torch.Tensor) -> None:
        """Keep the step's rows at their slots."""
        self.layers[layer].flatten(0, 1).index_copy_(0, slot_M, row_MW)

    def rows(self, layer: int, table: torch.Tensor) -> torch.Tensor:
        """The rows of the blocks in a table (any shape; blocks along the last dimension): tokens, W."""
        blocks = self.layers[layer].index_select(0, table.flatten())
        return blocks.view(*table.shape[:-1], -1, blocks.shape[-1])


@dataclass(frozen=True)
class Prompt:
    """A chunk with several tokens: it attends by itself."""

    rows: slice
    start: int
    end: int
    table: torch.Tensor
    """Its blocks up to `end`."""


@dataclass(frozen=True)
class Places:
    """A step's rows: first one for each of C sequences that decode, then those of prompts, chunk by chunk."""

    token_M: torch.Tensor
    position_M: torch.Tensor
    slot_M: torch.Tensor
    num_decoding: int
    table_CB: torch.Tensor
    """Blocks of the sequences that decode; filled up with the first block."""
    beyond_CS: torch.Tensor
    """Where such a sequence has no token."""
    prompts: tuple[Prompt, ...]

    @staticmethod
    def of(chunks: Sequence[Chunk], block_tokens: int, device: torch.device) -> Places:
        """Where the chunks' tokens go; chunks with one token first, as the scheduler gives them."""
        single = [chunk for chunk in chunks if chunk.end - chunk.start == 1]
        several = [chunk for chunk in chunks if chunk.end - chunk.start > 1]
        ordered = [*single, *several]
        positions = [position for chunk in ordered for position in range(chunk.start, chunk.end)]
        slots = [
            chunk.sequence.table[position // block_tokens] * block_tokens + position % block_tokens
            for chunk in ordered
            for position in range(chunk.start, chunk.end)
        ]
        tokens = [token for chunk in ordered for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        table_CB, beyond_CS = _tables(single, block_tokens)
        return Places(
            token_M=torch.tensor(tokens).to(device),
            position_M=torch.tensor(positions).to(device),
            slot_M=torch.tensor(slots).to(device),
            num_decoding=len(single),
            table_CB=table_CB.to(device),
            beyond_CS=beyond_CS.to(device),
            prompts=_prompts(several, len(single), block_tokens, device),
        )


def _tables(chunks: Sequence[Chunk], block_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ends = [chunk.end for chunk in chunks]
    num_blocks = -(-max(ends, default=0) // block_tokens)
    tables = [chunk.sequence.table[:num_blocks] for chunk in chunks]
    table_CB = torch.tensor([table + [0] * (num_blocks - len(table)) for table in tables], dtype=torch.int64)
    position_S = torch.arange(num_blocks * block_tokens)
    return table_CB.view(len(chunks), num_blocks), position_S >= torch.tensor(ends, dtype=torch.int64).unsqueeze(1)


def _prompts(chunks: Sequence[Chunk], row: int, block_tokens: int, device: torch.device) -> tuple[Prompt, ...]:
    prompts = []
    for chunk in chunks:
        num_rows = chunk.end - chunk.start
        table = chunk.sequence.table[: -(-chunk.end // block_tokens)]
        prompts.append(Prompt(slice(row, row + num_rows), chunk.start, chunk.end, torch.tensor(table).to(device)))
        row += num_rows
    return tuple(prompts)
