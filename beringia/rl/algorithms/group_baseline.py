"""Advantages from a group: how much better a sample of a prompt is than the others of the same prompt."""

from __future__ import annotations

import torch

SMALLEST_DEVIATION = 1e-6
"""Added to a group's standard deviation: of rewards that differ it is a millionth of what rewards of size 1 have."""


def centred(rewards_G: torch.Tensor) -> torch.Tensor:
    """r - mean(r), in a floating dtype."""
    rewards_G = rewards_G if rewards_G.is_floating_point() else rewards_G.float()
    if bool((rewards_G == rewards_G[:1]).all()):  # the mean of equal numbers may be rounded
        return torch.zeros_like(rewards_G)
    return rewards_G - rewards_G.mean()


def standardised(rewards_G: torch.Tensor) -> torch.Tensor:
    """(r - mean(r)) / std(r), the standard deviation with G - 1."""
    apart_G = centred(rewards_G)
    if not apart_G.any():  # of one sample alone there is no deviation
        return apart_G
    return apart_G / (apart_G.std() + SMALLEST_DEVIATION)
