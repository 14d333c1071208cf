"""The small parts: linear, norm and the gated feed-forward block, with explicit casts.

Weights are float32 masters. A product runs in the dtype of its activations; a norm computes in float32 and returns the
dtype it was given. Everything computes in float64 when the activations are float64, which the guard's replay relies on.
There is no autocast: what runs in which dtype can be read here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def precise(dtype: torch.dtype) -> torch.dtype:
    """Where sums that must not lose digits are made: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Affine = tuple[torch.Tensor, torch.Tensor | None]
"""Weight (out, in) and bias (out) of an affine map."""


class Linear(nn.Linear):
    """`nn.Linear` that casts its weight to the activations' dtype, and leaves it to others to fill it."""

    __call__: Callable[..., torch.Tensor]

    def reset_parameters(self) -> None:
        """Nothing: `initialise` or a checkpoint fills it, and the process-wide random state stays untouched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear_jointly(x, self.affine)[0]

    @property
    def affine(self) -> Affine:
        """Weight and bias."""
        return self.weight, self.bias


def linear_jointly(x: torch.Tensor, *parts: Affine) -> tuple[torch.Tensor, ...]:
    """Several affine maps of the same input as one product: fewer, larger products, and one gradient of `x`."""
    weights, biases = zip(*parts, strict=True)
    bias = None if biases[0] is None else torch.cat(biases).to(x.dtype)
    joined = F.linear(x, torch.cat(weights).to(x.dtype), bias)
    return torch.split(joined, [len(weight) for weight in weights], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    __call__: Callable[..., torch.Tensor]

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

    __call__: Callable[..., torch.Tensor]

    def __init__(self, hidden: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear_jointly(x, self.gate_proj.affine, self.up_proj.affine)
        return self.down_proj(F.silu(gate) * up)
