"""The small parts: linear, norm and the gated feed-forward block, with explicit casts.

Weights are float32 masters. A product runs in the dtype of its activations; a norm computes in float32 and returns the
dtype it was given. Everything computes in float64 when the activations are float64, which the guard's replay relies on.
There is no autocast: what runs in which dtype can be read here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def precise(dtype: torch.dtype) -> torch.dtype:
    """Where sums that must not lose digits are made: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Linear(nn.Linear):
    """`nn.Linear` that casts its weight to the activations' dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(precise(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))` (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, hidden: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
