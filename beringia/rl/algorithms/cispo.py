"""CISPO: clipped importance-sampling weights. MiniMax-M1, 2025, arXiv 2506.13585, equations 4 and 5.

    A_i = (r_i - mean(r)) / std(r)
    J   = 1/(sum_i |o_i|) sum_i sum_t sg(clip(rho_it, 1 - eps_low, 1 + eps_high)) A_i log pi_it

sg: without a gradient. It is the weight that is clipped, not the gradient: every token goes on learning, also the rare
ones ("however", "wait") whose ratio moves most. The paper sets no lower bound (eps_low = 1) and tunes the upper one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beringia.rl.algorithms.algorithm import Algorithm, PolicyLoss, Tokens, sum_over_tokens
from beringia.rl.algorithms.group_baseline import standardised


@dataclass(frozen=True)
class Cispo(Algorithm):
    """A mean over tokens."""

    clip_low: float = 1.0
    clip_high: float = 0.28

    name: ClassVar[str] = "cispo"

    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        return standardised(rewards_G)

    def loss(self, tokens: Tokens) -> PolicyLoss:
        ratios_NT = tokens.ratios_NT.detach()
        limited_NT = ratios_NT.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        weights_NT = torch.where(tokens.sampled_NT, limited_NT * tokens.corrections_NT * tokens.advantages_NT, 0.0)
        gain = self.weighted_sum(weights_NT * tokens.logprobs_NT, tokens.sampled_NT)
        return PolicyLoss(-gain, ((limited_NT != ratios_NT) & tokens.sampled_NT).sum())

    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        return sum_over_tokens(values_NT, sampled_NT)

    def count(self, sampled_NT: torch.Tensor) -> int:
        return int(sampled_NT.sum())
