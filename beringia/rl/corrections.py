"""Weights for tokens that another arithmetic, or an older policy, has sampled than learns from them.

With rho = pi_old / pi_sampled, the learner's probability before the update over the sampler's as it sampled:

| name                 | weight of a token                                                                    |
|----------------------|--------------------------------------------------------------------------------------|
| `none`               | 1                                                                                    |
| `token-truncated`    | min(rho_t, high); verl's `rollout_is=token`, high 2                                  |
| `sequence-truncated` | min(prod_t rho_t, high) for all tokens of a sample; verl's `rollout_is=sequence`     |
| `sequence-mask`      | prod_t rho_t where that is at most high, else 0; TRL's default, high 3               |
| `icepop`             | rho_t where low <= rho_t <= high, else 0; IcePop, 0.5 and 5                          |
| `geometric`          | 1 where low <= (prod_t rho_t)^(1/T) <= high, else 0; verl's `seq_mean_k1` rejection  |

Logarithms of ratios are limited to +-20, as verl limits them: e^20 is beyond any bound.

N samples, T tokens; what stands where `sampled_NT` is false is not looked at, and has the weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MOST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Correction:
    """One of the table's rows, with its bounds."""

    name: str = "none"
    low: float | None = None
    high: float | None = None
    """None: the row's own."""

    def __post_init__(self) -> None:
        if self.name not in _ROWS:
            raise KeyError(self.name)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio."""
        low, high = _BOUNDS.get(self.name, (0.0, float("inf")))
        return low if self.low is None else self.low, high if self.high is None else self.high

    def weights(self, log_ratios_NT: torch.Tensor, sampled_NT: torch.Tensor) -> torch.Tensor:
        """Of every token, N T, from log(pi_old / pi_sampled)."""
        limited_NT = torch.where(sampled_NT, log_ratios_NT, 0.0).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        return _ROWS[self.name](limited_NT, sampled_NT, *self.bounds) * sampled_NT


def _none(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.ones_like(log_NT)


def _token_truncated(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return log_NT.exp().clamp(max=high)


def _sequence_truncated(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return _of_samples(log_NT).clamp(max=high).expand_as(log_NT)


def _sequence_mask(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    ratios_N1 = _of_samples(log_NT)
    return torch.where(ratios_N1 <= high, ratios_N1, 0.0).expand_as(log_NT)


def _icepop(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    ratios_NT = log_NT.exp()
    return torch.where((ratios_NT >= low) & (ratios_NT <= high), ratios_NT, 0.0)


def _geometric(log_NT: torch.Tensor, sampled_NT: torch.Tensor, low: float, high: float) -> torch.Tensor:
    means_N1 = log_NT.sum(-1, keepdim=True) / sampled_NT.sum(-1, keepdim=True).clamp(min=1)
    ratios_N1 = means_N1.exp()
    return ((ratios_N1 >= low) & (ratios_N1 <= high)).to(log_NT.dtype).expand_as(log_NT)


def _of_samples(log_NT: torch.Tensor) -> torch.Tensor:
    """The product of a sample's ratios, N 1."""
    return log_NT.sum(-1, keepdim=True).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()


_ROWS: dict[str, Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]] = {
    "none": _none,
    "token-truncated": _token_truncated,
    "sequence-truncated": _sequence_truncated,
    "sequence-mask": _sequence_mask,
    "icepop": _icepop,
    "geometric": _geometric,
}
_BOUNDS = {
    "token-truncated": (0.0, 2.0),
    "sequence-truncated": (0.0, 2.0),
    "sequence-mask": (0.0, 3.0),
    "icepop": (0.5, 5.0),
    "geometric": (0.99, 1.001),
}
NAMES = tuple(_ROWS)
