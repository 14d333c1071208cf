"""DAPO: decoupled clip and dynamic sampling. Yu et al. 2025, arXiv 2503.14476, section 3.

    A_i = (r_i - mean(r)) / std(r)
    J   = 1/(sum_i |o_i|) sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i)

Its four parts: the upper bound is wider than the lower ("clip-higher", 3.1), so that unlikely tokens may become likely;
groups whose rewards are all equal are sampled anew ("dynamic sampling", 3.2: whoever samples does that); every token
counts alike (3.3); and samples that come near the most tokens lose reward before they are cut off (3.4, `too_long`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beringia.rl.algorithms.algorithm import ClippedTokens, sum_over_tokens
from beringia.rl.algorithms.group_baseline import standardised


@dataclass(frozen=True)
class Dapo(ClippedTokens):
    """A mean over tokens."""

    clip_high: float = 0.28

    name: ClassVar[str] = "dapo"

    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        return standardised(rewards_G)

    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        return sum_over_tokens(values_NT, sampled_NT)

    def count(self, sampled_NT: torch.Tensor) -> int:
        return int(sampled_NT.sum())


def too_long(tokens: int, max_tokens: int, buffer: int) -> float:
    """What a sample of so many new tokens loses of its reward (equation 13): nothing up to `max_tokens - buffer`, then
    linearly up to 1 at `max_tokens`."""
    beyond = tokens - (max_tokens - buffer)
    return -min(1.0, beyond / buffer) if buffer > 0 and beyond > 0 else 0.0
