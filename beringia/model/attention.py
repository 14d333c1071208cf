"""Causal self-attention: grouped-query (arXiv 2305.13245) and latent (DeepSeek-V2, arXiv 2405.04434 section 2.1).

B batch, T new tokens, S all tokens, D hidden, N heads, G key-value heads, H head width, P its rotary part, V width of
values, R latent rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from beringia.model.cache import LayerCache
from beringia.model.config import DecoderConfig
from beringia.model.layers import Affine, Linear, RMSNorm, linear_jointly, precise
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


def attend_in_parts(
    q_BTNH: torch.Tensor,
    q_BTNP: torch.Tensor,
    k_BSNH: torch.Tensor,
    k_BSP: torch.Tensor,
    v_BSNV: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`attend` for keys of two parts, the second of which all heads share; H is the width of the first part alone.

    For the CPU, where torch has no fused kernel for values narrower than keys: it would write queries and keys down
    again several times. Here the shared part is one product with N T rows, and nothing is joined or repeated.
    """
    dtype, wide = q_BTNH.dtype, precise(q_BTNH.dtype)
    q_BTNH, q_BTNP, k_BSNH, k_BSP, v_BSNV = (x.to(wide) for x in (q_BTNH, q_BTNP, k_BSNH, k_BSP, v_BSNV))
    q_BTNH, q_BTNP = q_BTNH * scale, q_BTNP * scale
    num_new, num_all = q_BTNH.shape[1], k_BSNH.shape[1]
    shared_BTNS = (q_BTNP.flatten(1, 2) @ k_BSP.mT).view(*q_BTNP.shape[:3], num_all)
    future_TS = torch.full((num_new, num_all), -torch.inf, dtype=wide, device=k_BSP.device).triu(num_all - num_new + 1)
    scores_BNTS = q_BTNH.transpose(1, 2) @ k_BSNH.permute(0, 2, 3, 1) + shared_BTNS.transpose(1, 2) + future_TS
    out_BNTV = scores_BNTS.softmax(-1) @ v_BSNV.transpose(1, 2)
    return out_BNTV.transpose(1, 2).flatten(2).to(dtype)


def split_heads(x_BTX: torch.Tensor, width: int) -> torch.Tensor:
    """Split the last dimension into heads: B T N width."""
    batch, tokens, _ = x_BTX.shape
    return x_BTX.view(batch, tokens, -1, width)


def halved(x: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """In every group of `width` rows, put rows `start`, `start + 2`, ... before rows `start + 1`, `start + 3`, ..."""
    groups = x.view(-1, width, *x.shape[1:])
    return torch.cat((groups[:, :start], groups[:, start::2], groups[:, start + 1 :: 2]), dim=1).flatten(0, 1)


class GroupedQueryAttention(nn.Module):
    """Heads share keys and values in groups."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.width, self.scale = width, softmax_scale(config)
        self.q_proj = Linear(hidden, heads * width, bias=bias)
        self.k_proj = Linear(hidden, groups * width, bias=bias)
        self.v_proj = Linear(hidden, groups * width, bias=bias)
        self.o_proj = Linear(heads * width, hidden, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)
        self.norms_heads = config.qk_norm

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        q, k, v = linear_jointly(x_BTD, self.q_proj.affine, self.k_proj.affine, self.v_proj.affine)
        q_BNTH, k_BGSH, v_BGSH = (split_heads(x, self.width).transpose(1, 2) for x in (q, k, v))
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
        self.fused = False
        """On the CPU: attention as one kernel, as accelerators have it, whatever it costs."""
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
        self.o_proj = Linear(heads * self.value, hidden, bias=config.output_bias)

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: LayerCache | None = None) -> torch.Tensor:
        q_BTNX, latent_BSR, k_BSP = self._down(x_BTD)
        q_BTNH, q_BTNP = torch.split(q_BTNX, [self.nope, self.rope], dim=-1)
        cos_TQ, sin_TQ = rope
        q_BTNP = rotate(q_BTNP, (cos_TQ.unsqueeze(-2), sin_TQ.unsqueeze(-2)))
        k_BSP = rotate(k_BSP, rope)
        if cache is not None:
            latent_BSR, k_BSP = (x.squeeze(1) for x in cache.extend(latent_BSR.unsqueeze(1), k_BSP.unsqueeze(1)))
        kv_BSNX = split_heads(self.kv_b_proj(latent_BSR), self.nope + self.value)
        k_BSNH, v_BSNV = torch.split(kv_BSNX, [self.nope, self.value], dim=-1)
        if x_BTD.device.type == "cpu" and not self.fused:
            return self.o_proj(attend_in_parts(q_BTNH, q_BTNP, k_BSNH, k_BSP, v_BSNV, self.scale))
        q_BTNX = torch.cat((q_BTNH, q_BTNP), dim=-1)
        k_BSNX = torch.cat((k_BSNH, k_BSP.unsqueeze(2).expand(-1, -1, k_BSNH.shape[2], -1)), dim=-1)
        q_BNTX, k_BNSX, v_BNSV = (x.transpose(1, 2) for x in (q_BTNX, k_BSNX, v_BSNV))
        if self.fused:
            return self.o_proj(self._attend_at_one_width(q_BNTX, k_BNSX, v_BNSV))
        return self.o_proj(attend(q_BNTX, k_BNSX, v_BNSV, self.scale))

    def _attend_at_one_width(self, q_BNTX: torch.Tensor, k_BNSX: torch.Tensor, v_BNSV: torch.Tensor) -> torch.Tensor:
        """The CPU's fused kernel wants all of one width: the narrower get zeros, and what comes of these is cut off."""
        width = max(k_BNSX.shape[-1], self.value)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q_BNTX, k_BNSX, v_BNSV))
        return split_heads(attend(q, k, v, self.scale), width)[..., : self.value].flatten(2)

    def _down(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries B T N (H + P), normed latent B T R and shared rotary key B T P, neither rotated."""
        kv_down = self.by_halves(self.kv_a_proj_with_mqa.affine, self.rank)
        if self.compresses_queries:
            q_low, kv_low = linear_jointly(x_BTD, self.q_a_proj.affine, kv_down)
            (q,) = linear_jointly(self.q_a_layernorm(q_low), self.by_halves(self.q_b_proj.affine, self.nope))
        else:
            q, kv_low = linear_jointly(x_BTD, self.by_halves(self.q_proj.affine, self.nope), kv_down)
        latent_BTR, k_BTP = torch.split(kv_low, [self.rank, self.rope], dim=-1)
        return split_heads(q, self.nope + self.rope), self.kv_a_layernorm(latent_BTR), k_BTP

    def by_halves(self, affine: Affine, start: int) -> Affine:
        """Reorder output rows `start` and on of every head, where rotary pairs are neighbours, half by half.

        Moving rows of a weight is cheap; taking every second element of activations is not.
        """
        if not self.interleaved:
            return affine
        weight, bias = (None if part is None else halved(part, start, start + self.rope) for part in affine)
        assert weight is not None
        return weight, bias


Attention = GroupedQueryAttention | LatentAttention


@contextmanager
def fusing_attention(module: nn.Module) -> Iterator[None]:
    """Inside, latent attention in a module on the CPU is one kernel, as accelerators have it: it stores the output
    rounded before the backward pass reads it (arXiv 2307.08691, algorithm 2), which `attend_in_parts` does not."""
    parts = [part for part in module.modules() if isinstance(part, LatentAttention)]
    for part in parts:
        part.fused = True
    try:
        yield
    finally:
        for part in parts:
            part.fused = False


def attention_of(config: DecoderConfig) -> Attention:
    """Attention of the kind that a config asks for."""
    return LatentAttention(config) if config.latent else GroupedQueryAttention(config)
