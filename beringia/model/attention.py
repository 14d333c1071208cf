"""Causal self-attention: grouped-query (llama, qwen) and latent (DeepSeek-V2, arXiv 2405.04434 section 2.1).

B batch, T new tokens, S all tokens, D hidden, N heads, G key-value heads, H head width, P its rotary part, R latent
rank.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from beringia.model.cache import LayerCache
from beringia.model.config import DecoderConfig
from beringia.model.layers import Affine, Linear, RMSNorm, linear_jointly
from beringia.model.rope import Rope, rotate, softmax_scale

# transformers and DeepSeek's own code norm the latents with this, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def attend(q_BNTH: torch.Tensor, k_BGSH: torch.Tensor, v_BGSH: torch.Tensor, scale: float) -> torch.Tensor:
    """Each of the last T tokens attends to itself and all before it; returns B T (N times the width of v)."""
    num_new, num_all = q_BNTH.shape[2], k_BGSH.shape[2]
    mask = None
    if 1 < num_new < num_all:
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q_BNTH.device).tril(num_all - num_new)
    out_BNTH = F.scaled_dot_product_attention(
        q_BNTH,
        k_BGSH,
        v_BGSH,
        attn_mask=mask,
        is_causal=num_new == num_all,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BGSH.shape[1],
    )
    return out_BNTH.transpose(1, 2).flatten(2)


def by_head(x_BTX: torch.Tensor, width: int) -> torch.Tensor:
    """Split the last dimension into heads and bring them before the tokens: B N T width."""
    batch, tokens, _ = x_BTX.shape
    return x_BTX.view(batch, tokens, -1, width).transpose(1, 2)


def halved(x: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """In every group of `width` rows, put rows `start`, `start + 2`, ... before rows `start + 1`, `start + 3`, ..."""
    groups = x.view(-1, width, *x.shape[1:])
    return torch.cat((groups[:, :start], groups[:, start::2], groups[:, start + 1 :: 2]), dim=1).flatten(0, 1)


class GroupedQueryAttention(nn.Module):
    """Heads share keys and values in groups (arXiv 2305.13245); `qwen3` norms queries and keys per head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        qkv_bias = config.attention_bias or config.family == "qwen2"
        self.width, self.scale = width, softmax_scale(config)
        self.q_proj = Linear(hidden, heads * width, bias=qkv_bias)
        self.k_proj = Linear(hidden, groups * width, bias=qkv_bias)
        self.v_proj = Linear(hidden, groups * width, bias=qkv_bias)
        self.o_proj = Linear(heads * width, hidden, bias=config.attention_bias and config.family != "qwen2")
        if config.family == "qwen3":
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)
        self.norms_heads = config.family == "qwen3"

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        q, k, v = linear_jointly(x_BTD, self.q_proj.affine, self.k_proj.affine, self.v_proj.affine)
        q_BNTH, k_BGSH, v_BGSH = (by_head(x, self.width) for x in (q, k, v))
        if self.norms_heads:
            q_BNTH, k_BGSH = self.q_norm(q_BNTH), self.k_norm(k_BGSH)
        q_BNTH, k_BGSH = rotate(q_BNTH, rope), rotate(k_BGSH, rope)
        if cache is not None:
            k_BGSH, v_BGSH = cache.extend(k_BGSH, v_BGSH)
        return self.o_proj(attend(q_BNTH, k_BGSH, v_BGSH, self.scale))


class LatentAttention(nn.Module):
    """Keys and values are read from a low-rank latent, and one rotary key is shared by all heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.interleaved = config.kv_lora_rank, config.rope_interleave
        self.scale = softmax_scale(config)
        q_width = heads * (self.nope + self.rope)
        self.compresses_queries = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, q_width, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.rank, heads * (self.nope + self.value), bias=False)
        self.o_proj = Linear(heads * self.value, hidden, bias=bias)

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        q_BNTH, latent_BSR, k_B1SP = self._down(x_BTD)
        q_nope, q_rope = torch.split(q_BNTH, [self.nope, self.rope], dim=-1)
        q_BNTH = torch.cat((q_nope, rotate(q_rope, rope)), dim=-1)
        k_B1SP = rotate(k_B1SP, rope)
        if cache is not None:
            latent_B1SR, k_B1SP = cache.extend(latent_BSR.unsqueeze(1), k_B1SP)
            latent_BSR = latent_B1SR.squeeze(1)
        kv_BNSH = by_head(self.kv_b_proj(latent_BSR), self.nope + self.value)
        k_nope, v_BNSH = torch.split(kv_BNSH, [self.nope, self.value], dim=-1)
        k_BNSH = torch.cat((k_nope, k_B1SP.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        return self.o_proj(attend(q_BNTH, k_BNSH, v_BNSH, self.scale))

    def _down(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries B N T H, normed latent B T R and shared rotary key B 1 T P, neither rotated."""
        kv_down = self._by_halves(self.kv_a_proj_with_mqa.affine, self.rank)
        if self.compresses_queries:
            q_low, kv_low = linear_jointly(x_BTD, self.q_a_proj.affine, kv_down)
            (q,) = linear_jointly(self.q_a_layernorm(q_low), self._by_halves(self.q_b_proj.affine, self.nope))
        else:
            q, kv_low = linear_jointly(x_BTD, self._by_halves(self.q_proj.affine, self.nope), kv_down)
        latent_BTR, k_BTP = torch.split(kv_low, [self.rank, self.rope], dim=-1)
        return by_head(q, self.nope + self.rope), self.kv_a_layernorm(latent_BTR), k_BTP.unsqueeze(1)

    def _by_halves(self, affine: Affine, start: int) -> Affine:
        """Reorder output rows `start` and on of every head, where rotary pairs are neighbours, half by half.

        Moving rows of a weight is cheap; taking every second element of activations is not.
        """
        if not self.interleaved:
            return affine
        weight, bias = (None if part is None else halved(part, start, start + self.rope) for part in affine)
        assert weight is not None
        return weight, bias
