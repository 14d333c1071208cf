"""The paged cache's tensors.

A layer keeps one row a token: for latent attention the normed latent and the rotated shared key, side by side (R + P
numbers; DeepSeek-V2, arXiv 2405.04434 section 2.1), else keys and values of all groups (2 G H numbers). Block b holds
rows b * block_tokens and on.

W width of a row.
"""

from __future__ import annotations

import torch

from beringia.engine.operators import CacheLayout
from beringia.model import DecoderConfig


def layout_of(config: DecoderConfig) -> CacheLayout:
    """What a row holds."""
    if config.latent:
        # All heads read the same key, and its first part is the value.
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return CacheLayout(1, key_width=width, value_width=config.kv_lora_rank, group_step=0, value_start=0)
    groups, width = config.num_key_value_heads, config.head_dim
    return CacheLayout(groups, key_width=width, value_width=width, group_step=width, value_start=groups * width)


def row_width(config: DecoderConfig) -> int:
    """Numbers that a layer keeps of a token."""
    if config.latent:
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


class PagedCache:
    """One tensor a layer: blocks, tokens in a block, W."""

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        drafts: bool = False,
    ) -> None:
        """`drafts`: with a layer more, for multi-token prediction."""
        self.layout = layout_of(config)
        shape = (num_blocks, block_tokens, row_width(config))
        # Zeros: rows past a sequence's end are masked, but 0 times what was in memory before could be NaN.
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers + drafts)]

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        return sum(layer.shape[-1] * layer.element_size() for layer in self.layers)
