"""Dr. GRPO: GRPO "done right". Liu et al. 2025, arXiv 2503.20783, section 3.

    A_i = r_i - mean(r)
    J   = 1/(N L) sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)

L is a constant, the most tokens that a sample may have. Neither a sample's own length nor its group's deviation divides
anything: long wrong samples are not punished less, groups that are nearly all right or wrong not counted more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from beringia.rl.algorithms.algorithm import ClippedTokens, samples_with_tokens, sum_over_tokens
from beringia.rl.algorithms.group_baseline import centred


@dataclass(frozen=True)
class DrGrpo(ClippedTokens):
    """A sum over tokens, over a constant."""

    max_tokens: int = field(kw_only=True)
    """New tokens that a sample has at most."""
    name: ClassVar[str] = "dr-grpo"

    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        return centred(rewards_G)

    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        return sum_over_tokens(values_NT, sampled_NT)

    def count(self, sampled_NT: torch.Tensor) -> int:
        return samples_with_tokens(sampled_NT) * self.max_tokens
