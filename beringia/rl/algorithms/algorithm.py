"""What an algorithm of policy gradients is: advantages of a group's rewards, and a sum over tokens with what it is
divided by.

All are functions of plain tensors. Tokens that count are those that were sampled: not the prompt's, not padding.

G samples of a group (of one prompt), N samples of a batch, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of a batch, N T each; what stands where `sampled_NT` is false is not looked at."""

    logprobs_NT: torch.Tensor
    """Of the policy that learns, with its gradient."""
    old_logprobs_NT: torch.Tensor
    """Of the policy as it was before the update: numbers."""
    advantages_NT: torch.Tensor
    sampled_NT: torch.Tensor
    """bool"""
    corrections_NT: torch.Tensor
    """Weights that correct for the mismatch of sampling and learning (`rl/corrections.py`), 1 where none is due."""

    @property
    def ratios_NT(self) -> torch.Tensor:
        """pi / pi_old of each token, 1 where none was sampled."""
        return torch.exp(torch.where(self.sampled_NT, self.logprobs_NT - self.old_logprobs_NT, 0.0))


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over a batch."""

    loss: torch.Tensor
    """To be divided by the algorithm's count, with a gradient."""
    clipped: torch.Tensor
    """Tokens whose gradient clipping stopped."""


class Algorithm(ABC):
    """One algorithm; its options are fields."""

    name: ClassVar[str]

    @abstractmethod
    def advantages(self, rewards_G: torch.Tensor) -> torch.Tensor:
        """Of one group's samples, from their rewards; zero for a group whose rewards are all equal."""

    @abstractmethod
    def loss(self, tokens: Tokens) -> PolicyLoss:
        """Over the samples of a batch, which know nothing of each other."""

    @abstractmethod
    def weighted_sum(self, values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        """Of the values of tokens, each as much as its surrogate counts; over `count` it is the algorithm's mean."""

    @abstractmethod
    def count(self, sampled_NT: torch.Tensor) -> int:
        """What the sums are divided by, added up over micro-batches and ranks."""


def samples_with_tokens(sampled_NT: torch.Tensor) -> int:
    """Samples of which at least one token counts."""
    return int(sampled_NT.any(-1).sum())


def sum_over_tokens(values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
    """Every token counts alike."""
    return torch.where(sampled_NT, values_NT, 0.0).sum()


def sum_of_means(values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
    """Every sample counts alike, however many tokens it has."""
    return means_over_tokens(values_NT, sampled_NT).sum()


def means_over_tokens(values_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
    """Of each sample, 0 for one without tokens: shape N."""
    return torch.where(sampled_NT, values_NT, 0.0).sum(-1) / sampled_NT.sum(-1).clamp(min=1)


def clipped_surrogate(
    ratios: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic surrogate min(r A, clip(r, 1 - low, 1 + high) A), and where clipping stops the gradient.

    Schulman et al. 2017, arXiv 1707.06347, equation 7.
    """
    limited = ratios.clamp(1.0 - low, 1.0 + high)
    surrogate, bounded = ratios * advantages, limited * advantages
    return torch.minimum(surrogate, bounded), bounded < surrogate


@dataclass(frozen=True)
class ClippedTokens(Algorithm):
    """An algorithm that clips the ratio of each token; how much each counts is its own."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    def loss(self, tokens: Tokens) -> PolicyLoss:
        surrogate_NT, stopped_NT = clipped_surrogate(
            tokens.ratios_NT, tokens.advantages_NT, self.clip_low, self.clip_high
        )
        gain = self.weighted_sum(tokens.corrections_NT * surrogate_NT, tokens.sampled_NT)
        return PolicyLoss(-gain, (stopped_NT & tokens.sampled_NT).sum())
