"""GSPO: group sequence policy optimisation. Zheng et al. 2025, arXiv 2507.18071, equations 5 to 7.

    A_i = (r_i - mean(r)) / std(r)
    s_i = exp(1/|o_i| sum_t log(pi_it / pi_old_it))
    J   = 1/N sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)

One ratio a sample, the geometric mean of its tokens': clipped as a whole, as the reward is of the whole. Bounds are
much narrower than those of single tokens (section 5.1 has 3e-4 and 4e-4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from beringia.rl.algorithms.algorithm import (
    Algorithm,
    PolicyLoss,
    Tokens,
    clipped_surrogate,
    means_over_tokens,
    samples_with_tokens,
    sum_of_means,
)
from beringia.rl.algorithms.group_baseline import standardised


@dataclass(frozen=True)
class Gspo(Algorithm):
    """A mean over samples."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    name: ClassVar[str] = "gspo"

    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        return standardised(rewards_G)

    def loss(self, tokens: Tokens) -> PolicyLoss:
        sampled_NT = tokens.sampled_NT
        ratios_N = torch.exp(means_over_tokens(tokens.logprobs_NT - tokens.old_logprobs_NT, sampled_NT))
        advantages_N = means_over_tokens(tokens.advantages_NT, sampled_NT)
        surrogate_N, stopped_N = clipped_surrogate(ratios_N, advantages_N, self.clip_low, self.clip_high)
        gain = (surrogate_N * means_over_tokens(tokens.corrections_NT, sampled_NT)).sum()
        return PolicyLoss(-gain, (stopped_N.unsqueeze(-1) & sampled_NT).sum())

    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        return sum_of_means(values_NT, sampled_NT)

    def count(self, sampled_NT: torch.Tensor) -> int:
        return samples_with_tokens(sampled_NT)
