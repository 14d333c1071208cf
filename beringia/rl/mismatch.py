"""How far the policy that sampled is from the one that learns, in the measures that the field reports.

With d = log pi_learner - log pi_sampler of a sampled token, over all tokens of a step unless said otherwise:

| measure               | is                                                                                  |
|-----------------------|-------------------------------------------------------------------------------------|
| `log_ppl_diff`        | mean over samples of the mean of -d: log-perplexity of the learner less the sampler's |
| `mean_abs`, `max_abs` | of |d| (TRL's `sampling_logp_difference`)                                           |
| `k1`, `k3`            | mean of -d, and of exp(d) - d - 1: both estimate KL(sampler, learner) (Schulman 2020) |
| `chi_square`          | mean of exp(2 d), less 1 (verl's `chi2_token`)                                      |
| `sample_size`         | (sum w)^2 / (n sum w^2), w = exp(d): the effective share of the tokens              |
| `mult_prob_error`     | mean of exp(|d|) (NeMo-RL's `token_mult_prob_error`)                                |

d is limited to +-20 as verl limits it. In float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from beringia.rl.corrections import MOST_LOG_RATIO


@dataclass(frozen=True)
class Mismatch:
    """The measures of one step."""

    log_ppl_diff: float
    mean_abs: float
    max_abs: float
    k1: float
    k3: float
    chi_square: float
    sample_size: float
    mult_prob_error: float
    tokens: int


_NOTHING = Mismatch(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True)
class Part:
    """What is measured of some tokens of a step."""

    words: str
    mean_abs: float
    k3: float
    tokens: int


def measure(learner_NT: torch.Tensor, sampler_NT: torch.Tensor, sampled_NT: torch.Tensor) -> Mismatch:
    """Of log-probabilities of the same tokens, N T each. NaN throughout where no token was sampled."""
    apart_NT = _apart(learner_NT, sampler_NT, sampled_NT)
    d = apart_NT[sampled_NT]
    if not d.numel():
        return _NOTHING
    lengths_N = sampled_NT.sum(-1)
    of_samples = -apart_NT.sum(-1)[lengths_N > 0] / lengths_N[lengths_N > 0]
    weights = d.exp()
    return Mismatch(
        log_ppl_diff=float(of_samples.mean()),
        mean_abs=float(d.abs().mean()),
        max_abs=float(d.abs().max()),
        k1=float(-d.mean()),
        k3=float((weights - d - 1.0).mean()),
        chi_square=float((2.0 * d).exp().mean()) - 1.0,
        sample_size=float(weights.sum() ** 2 / (d.numel() * weights.square().sum())),
        mult_prob_error=float(d.abs().exp().mean()),
        tokens=d.numel(),
    )


PROBABILITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
"""Edges of the classes by the sampler's probability: the unlikely tokens are the weak link (ByteDance 2025)."""


def by_probability(learner_NT: torch.Tensor, sampler_NT: torch.Tensor, sampled_NT: torch.Tensor) -> list[Part]:
    """The same tokens in classes of the sampler's probability; empty classes are left out."""
    probabilities_NT = sampler_NT.double().exp()
    apart_NT = _apart(learner_NT, sampler_NT, sampled_NT)
    parts = []
    for low, high in zip(PROBABILITIES, PROBABILITIES[1:], strict=False):
        last = high == PROBABILITIES[-1]
        within_NT = (probabilities_NT >= low) & ((probabilities_NT < high) | last) & sampled_NT
        parts += [*_part(f"probability {low:g} to {high:g}", apart_NT[within_NT])]
    return parts


def by_position(
    learner_NT: torch.Tensor, sampler_NT: torch.Tensor, sampled_NT: torch.Tensor, classes: int = 4
) -> list[Part]:
    """The same tokens in equal classes of their place among the new tokens of their sample."""
    places_NT = sampled_NT.cumsum(-1) - 1
    apart_NT = _apart(learner_NT, sampler_NT, sampled_NT)
    longest = int(sampled_NT.sum(-1).max()) if sampled_NT.numel() else 0
    width = max(1, math.ceil(longest / classes))
    parts = []
    for first in range(0, longest, width):
        within_NT = (places_NT >= first) & (places_NT < first + width) & sampled_NT
        parts += [*_part(f"new token {first} to {min(longest, first + width) - 1}", apart_NT[within_NT])]
    return parts


def _apart(learner_NT: torch.Tensor, sampler_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
    apart_NT = torch.where(sampled_NT, learner_NT.double() - sampler_NT.double(), 0.0)
    return apart_NT.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)


def _part(words: str, d: torch.Tensor) -> Iterator[Part]:
    if d.numel():
        yield Part(words, float(d.abs().mean()), float((d.exp() - d - 1.0).mean()), d.numel())
