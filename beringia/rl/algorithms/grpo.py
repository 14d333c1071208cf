"""GRPO: group relative policy optimisation. Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300, section 4.1.1.

    A_i = (r_i - mean(r)) / std(r)
    J   = 1/N sum_i 1/|o_i| sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i),   rho = pi / pi_old

Each sample counts alike, however long it is; so of two wrong samples the longer one is punished less per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beringia.rl.algorithms.algorithm import ClippedTokens, samples_with_tokens, sum_of_means
from beringia.rl.algorithms.group_baseline import standardised


@dataclass(frozen=True)
class Grpo(ClippedTokens):
    """A mean over samples of the mean over their tokens."""

    name: ClassVar[str] = "grpo"

    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        return standardised(rewards_G)

    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        return sum_of_means(values_NT, sampled_NT)

    def count(self, sampled_NT: torch.Tensor) -> int:
        return samples_with_tokens(sampled_NT)
