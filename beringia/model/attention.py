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
from beringia.model.layers import Linear, RMSNorm
from beringia.model.rope import Rope, rotate, softmax_scale

# transformers and DeepSeek's own code norm the latents with this, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def attend(q_BTNH: torch.Tensor, k_BSGH: torch.Tensor, v_BSGH: torch.Tensor, scale: float) -> torch.Tensor:
    """Each of the last T tokens attends to itself and all before it; returns B T (N times the width of v)."""
    num_new, num_all = q_BTNH.shape[1], k_BSGH.shape[1]
    mask = None
    if 1 < num_new < num_all:
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q_BTNH.device).tril(num_all - num_new)
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BSGH.transpose(1, 2),
        v_BSGH.transpose(1, 2),
        attn_mask=mask,
        is_causal=num_new == num_all,
        scale=scale,
        enable_gqa=q_BTNH.shape[2] != k_BSGH.shape[2],
    )
    return out_BNTH.transpose(1, 2).flatten(2)


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
        q_BTNH = self.q_proj(x_BTD).unflatten(-1, (-1, self.width))
        k_BTGH = self.k_proj(x_BTD).unflatten(-1, (-1, self.width))
        v_BTGH = self.v_proj(x_BTD).unflatten(-1, (-1, self.width))
        if self.norms_heads:
            q_BTNH, k_BTGH = self.q_norm(q_BTNH), self.k_norm(k_BTGH)
        q_BTNH, k_BSGH = rotate(q_BTNH, rope, interleaved=False), rotate(k_BTGH, rope, interleaved=False)
        v_BSGH = v_BTGH
        if cache is not None:
            k_BSGH, v_BSGH = cache.extend(k_BSGH, v_BSGH)
        return self.o_proj(attend(q_BTNH, k_BSGH, v_BSGH, self.scale))


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
        q_nope, q_rope = self._queries(x_BTD).split((self.nope, self.rope), dim=-1)
        latent_BSR, k_BSP = self.kv_a_proj_with_mqa(x_BTD).split((self.rank, self.rope), dim=-1)
        latent_BSR = self.kv_a_layernorm(latent_BSR)
        q_rope = rotate(q_rope, rope, interleaved=self.interleaved)
        k_BSP = rotate(k_BSP.unsqueeze(2), rope, interleaved=self.interleaved).squeeze(2)
        if cache is not None:
            latent_BSR, k_BSP = cache.extend(latent_BSR, k_BSP)
        keys_values = self.kv_b_proj(latent_BSR).unflatten(-1, (-1, self.nope + self.value))
        k_nope, v_BSNH = keys_values.split((self.nope, self.value), dim=-1)
        k_rope = k_BSP.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)
        q_BTNH, k_BSNH = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1)
        return self.o_proj(attend(q_BTNH, k_BSNH, v_BSNH, self.scale))

    def _queries(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.compresses_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        else:
            q = self.q_proj(x_BTD)
        return q.unflatten(-1, (-1, self.nope + self.rope))
