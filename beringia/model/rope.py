"""Rotary position embedding, with the context stretchings of llama3 and yarn.

Angles are computed in float32 on the CPU and then moved, so that every chip rotates by the same table; only the
rotation itself runs on the chip. Formulas: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), the Llama 3.1 release.

B batch, T tokens, N heads, P rotary width, Q = P / 2 pairs.
"""

from __future__ import annotations

import math

import torch

from beringia.model.config import DecoderConfig, RopeConfig

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos_TQ and sin_TQ, float32, scaled by yarn's attention factor."""


def frequencies(config: DecoderConfig) -> torch.Tensor:
    """Angle of each rotary pair per position, float32 on the CPU, shape Q."""
    rope, width = config.rope, config.head_dim
    exponent_Q = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    plain_Q = 1.0 / (rope.theta**exponent_Q)
    if rope.kind == "linear":
        return plain_Q / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain_Q, rope)
    if rope.kind == "yarn":
        return _yarn(rope.theta**exponent_Q, rope, width)
    return plain_Q


def _llama3(plain_Q: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    context = rope.original_max_position_embeddings
    turns_Q = context / (2 * math.pi / plain_Q)
    blend_Q = (turns_Q - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended_Q = (1 - blend_Q) * plain_Q / rope.factor + blend_Q * plain_Q
    slow_Q, fast_Q = turns_Q < rope.low_freq_factor, turns_Q > rope.high_freq_factor
    return torch.where(fast_Q, plain_Q, torch.where(slow_Q, plain_Q / rope.factor, blended_Q))


def _yarn(wavelength_Q: torch.Tensor, rope: RopeConfig, width: int) -> torch.Tensor:
    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        context = rope.original_max_position_embeddings
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pair_Q = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    ramp_Q = ((pair_Q - low) / ((high - low) or 0.001)).clamp(0, 1)
    kept_Q = 1 - ramp_Q
    return 1.0 / (rope.factor * wavelength_Q) * (1 - kept_Q) + 1.0 / wavelength_Q * kept_Q


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def table_scale(rope: RopeConfig) -> float:
    """What yarn multiplies cos and sin by."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return _magnitude(rope.factor, 1.0)


def softmax_scale(config: DecoderConfig) -> float:
    """What the scores are multiplied by before the softmax; latent attention has yarn's magnitude here, squared."""
    scale = float(config.key_width**-0.5)
    if config.latent and config.rope.kind != "default" and config.rope.mscale_all_dim:
        scale *= _magnitude(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def table(config: DecoderConfig, positions: torch.Tensor) -> Rope:
    """cos and sin for `positions` (any shape), float32, on the device of `positions`."""
    angles = positions.to("cpu", torch.float32).unsqueeze(-1) * frequencies(config)
    scale = table_scale(config.rope)
    return (angles.cos() * scale).to(positions.device), (angles.sin() * scale).to(positions.device)


def rotate(x_BNTP: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate every pair of `x`, whose halves hold the first and the second of each pair; the dtype stays that of `x`.

    Computed in float32 (float64 for float64): bfloat16 times float32 is float32 by promotion.
    """
    cos_TQ, sin_TQ = rope
    first, second = x_BNTP.chunk(2, dim=-1)
    turned = torch.cat((first * cos_TQ - second * sin_TQ, second * cos_TQ + first * sin_TQ), dim=-1)
    return turned.to(x_BNTP.dtype)
