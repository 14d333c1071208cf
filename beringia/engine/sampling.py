"""How a request's next token is chosen, and how likely it was.

Noise comes from the CPU, from a generator that each request has for itself: what a request draws depends on its seed
and on how many tokens it has, not on what else is in the batch or on the chip. Choosing adds Gumbel noise to the
logits over the temperature and takes the largest (arXiv 1611.01144), which is a draw from the softmax; so near-equal
logits on two chips give the same token but where two noised logits are nearly tied.

R rows (requests), V vocabulary, L top log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from beringia.errors import InputError

_DRAWN_AT_ONCE = 1 << 14
"""Numbers that a request draws at a time, so that most steps draw none."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. Raises InputError where a value makes no sense."""

    max_tokens: int = 256
    """New tokens at most."""
    temperature: float = 1.0
    """0: always the most likely token."""
    top_k: int = 0
    """Only the so many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the most likely one."""
    seed: int | None = None
    """None: drawn from the engine's own."""
    stop_tokens: tuple[int, ...] = ()
    """Beside the model's own end tokens."""
    stops: tuple[str, ...] = ()
    """Strings that end it too, as soon as the new tokens' text has one."""
    ignore_end: bool = False
    """Whether the model's end tokens are tokens like others."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """Log-probabilities of the tokens chosen, and of so many most likely ones beside; None: none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _require("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "0 or a finite number above")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        _require("a stop string", "empty", all(self.stops), "one character or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(name, value, value is None or value >= 0, "0 or more")
        for token, bias in self.logit_bias.items():
            _require(f"logit_bias of token {token}", bias, math.isfinite(bias), "a finite number")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def _require(name: str, value: object, holds: bool, what: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {what}, but is {value}.")


class GumbelNoise:
    """A request's Gumbel noise: V float64 numbers for each of its tokens, always the same for a seed."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = max(1, _DRAWN_AT_ONCE // vocab_size), vocab_size
        self._drawn: list[torch.Tensor] = []
        self._next = 0

    def row(self, ahead: int = 0) -> torch.Tensor:
        """The noise of the next token, or of one after it: shape V."""
        block, row = divmod(self._next + ahead, self._shape[0])
        while len(self._drawn) <= block:
            drawn = torch.empty(self._shape, dtype=torch.float64)
            # -log of an exponential number is a Gumbel number.
            self._drawn.append(drawn.exponential_(generator=self._generator).log_().neg_())
        return self._drawn[block][row]

    def advance(self) -> None:
        """The next token is there."""
        self._next += 1
        if self._next == self._shape[0] and self._drawn:
            self._drawn.pop(0)
            self._next = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities: before temperature, bias and filters."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, most likely first."""
    rank: int = 0
    """Of the chosen token; 0: the most likely."""


def choose(
    logits_RV: torch.Tensor, asked: Sequence[Sampling], noises: Sequence[GumbelNoise], ahead: Sequence[int]
) -> list[int]:
    """A token for each row of float32 logits on the CPU; `ahead`: after how many more tokens it would come."""
    if all(sampling.greedy and not sampling.logit_bias for sampling in asked):
        return _tokens(logits_RV.argmax(-1))
    biased_RV = _with_biases(logits_RV, asked)
    if all(sampling.greedy for sampling in asked):
        return _tokens(biased_RV.argmax(-1))
    temperature_R1 = torch.tensor([sampling.temperature or 1.0 for sampling in asked], dtype=torch.float64).unsqueeze(1)
    scaled_RV = biased_RV.double() / temperature_R1
    if any(sampling.filters for sampling in asked):
        scaled_RV = _filtered(scaled_RV, asked)
    for row, (sampling, noise, later) in enumerate(zip(asked, noises, ahead, strict=True)):
        if not sampling.greedy:
            scaled_RV[row] += noise.row(later)
    return _tokens(scaled_RV.argmax(-1))


def with_choice(logits_RV: torch.Tensor, tokens: Sequence[int]) -> list[bool]:
    """Whether each row's logits left something to choose: a NaN, plus infinity and a row of minus infinity alone are
    what `choose` takes first, so the token that it took shows them."""
    rows_RV = logits_RV.numpy()  # in every step: of a tensor, one number takes ten times as long
    return [math.isfinite(rows_RV.item(row, token)) for row, token in enumerate(tokens)]


def _tokens(chosen_R: torch.Tensor) -> list[int]:
    tokens: list[int] = chosen_R.tolist()
    return tokens


def _with_biases(logits_RV: torch.Tensor, asked: Sequence[Sampling]) -> torch.Tensor:
    if not any(sampling.logit_bias for sampling in asked):
        return logits_RV
    biased_RV = logits_RV.clone()
    for row, sampling in enumerate(asked):
        for token, bias in sampling.logit_bias.items():
            biased_RV[row, token] += bias
    return biased_RV


def _filtered(scaled_RV: torch.Tensor, asked: Sequence[Sampling]) -> torch.Tensor:
    """Minus infinity for what a request leaves out; its most likely token always stays.

    As elsewhere, top-k comes first, and top-p counts in what is left.
    """
    vocab_size = scaled_RV.shape[1]
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    top_k_R1 = _column([sampling.top_k or vocab_size for sampling in asked])
    sorted_RV = sorted_RV.masked_fill(torch.arange(vocab_size) >= top_k_R1, -math.inf)
    probabilities_RV = sorted_RV.softmax(-1)
    before_RV = probabilities_RV.cumsum(-1) - probabilities_RV
    left_out_RV = before_RV >= _column([sampling.top_p for sampling in asked])
    left_out_RV |= probabilities_RV < probabilities_RV[:, :1] * _column([sampling.min_p for sampling in asked])
    left_out_RV[:, 0] = False
    return torch.empty_like(scaled_RV).scatter_(1, order_RV, sorted_RV.masked_fill(left_out_RV, -math.inf))


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def logprobs_of(logits_RV: torch.Tensor, tokens: Sequence[int], wanted: Sequence[int]) -> list[TokenLogprobs]:
    """Of one token in each row of float32 logits, with `wanted` most likely ones beside. A row's are the same bits
    whatever rows are beside it: numpy adds up each row by itself, torch's log_softmax does not."""
    normaliser_R1 = _normaliser(logits_RV)
    chosen_R1 = logits_RV.gather(1, torch.tensor(tokens).unsqueeze(1))
    ranks = (logits_RV > chosen_R1).sum(-1).tolist()
    top_RL = logits_RV.topk(min(max(wanted, default=0), logits_RV.shape[1]), dim=-1)
    chosen = (chosen_R1.double() - normaliser_R1).flatten().tolist()
    top = (top_RL.values.double() - normaliser_R1).tolist()
    rows = zip(chosen, ranks, top_RL.indices.tolist(), top, wanted, strict=True)
    return [
        TokenLogprobs(own, tuple(zip(best[:count], values[:count], strict=True)), rank)
        for own, rank, best, values, count in rows
    ]


def _normaliser(logits_RV: torch.Tensor) -> torch.Tensor:
    """The logarithm of the sum of exponentials: float64, R 1."""
    wide_RV = logits_RV.numpy().astype(np.float64)
    largest_R1 = wide_RV.max(axis=1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore"):  # of infinite logits it is NaN
        return torch.from_numpy(largest_R1 + np.log(np.exp(wide_RV - largest_R1).sum(axis=1, keepdims=True)))
