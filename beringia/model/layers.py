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
    """`nn.Linear` that casts its weight to the activations' dtype, and leaves it to others to fill it."""

    def reset_parameters(self) -> None:
        """Nothing: `initialise` or a checkpoint fills it, and the process-wide random state stays untouched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def linear_jointly(x: torch.Tensor, *parts: Linear) -> tuple[torch.Tensor, ...]:
    """Several linear maps of the same input as one product: fewer, larger products, and one gradient of `x`."""
    weight = torch.cat([part.weight.to(x.dtype) for part in parts])
    biases = [part.bias.to(x.dtype) for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "either all parts have a bias or none"
    joined = F.linear(x, weight, torch.cat(biases) if biases else None)
    return torch.split(joined, [part.out_features for part in parts], dim=-1)


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
        gate, up = linear_jointly(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)
