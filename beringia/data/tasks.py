"""Checkable tasks on digits: questions without end, answers known, and a checker that reads only the answer.

| task            | question (10 digits) | thought                           | answer                           |
|-----------------|----------------------|-----------------------------------|----------------------------------|
| `digit-sum`     | `+3141592653`        | running sums modulo 10            | the last of them                 |
| `digit-product` | `*3247592653`        | running products modulo 11        | the last of them (10 is an `a`)  |
| `digit-sort`    | `<3141592653`        | how many of each digit, 0 to 9    | the digits in ascending order    |

A short completion is `=answer` and the end token, a long one `:thought=answer` and the end token. Questions of the
`train` split and of the `held-out` split never meet: the last two digits, shifted by a hash of those before them,
decide the split, so a question of either split is drawn directly and uniformly, without trial and error.

Axes: B rows, ... any leading axes, N digits of a question, Q tokens of a question (N + 1), C thought, A answer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from beringia.data.alphabet import ANSWER_MARK, END_TOKEN, THOUGHT_MARK, TOKENS, ZERO
from beringia.data.counter import Booleans, Integers, Words, below, derive_key, random_words
from beringia.errors import DataError

Split = Literal["train", "held-out"]
MOST_DIGITS = 35  # counts are written as one symbol, base 36


@dataclass(frozen=True)
class Task(ABC):
    """Questions, their gold completions, and a checker.

    Worked example: `task.questions(0, 2, "held-out")` gives two rows such as `+3141592653`; for the first,
    `task.check(row, completion)` is True for the tokens of `=9<end>` and of `:3489435169=9<end>`, False for `=8<end>`.
    """

    digits: int
    """Digits in a question, from 2 to 35."""
    seed: int
    """Which questions come in which order; the split does not depend on it."""
    held_out_fraction: float = 0.05
    """Share of all possible questions that training never sees, rounded to the nearest 1 / len(values)^2."""

    name: ClassVar[str]
    operator: ClassVar[str]
    """The symbol that opens a question."""
    values: ClassVar[tuple[int, ...]] = tuple(range(10))
    """The digits that questions are made of."""

    def __post_init__(self) -> None:
        if not 2 <= self.digits <= MOST_DIGITS:
            raise DataError(f"{self.name} takes 2 to {MOST_DIGITS} digits; data.digits is {self.digits}.")

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of the best constant answer, over all questions."""

    @abstractmethod
    def thought(self, digits_N: Integers) -> Integers:
        """Values (below 36) of the chain of thought; int64 (..., N) -> (..., C)."""

    @abstractmethod
    def answer(self, digits_N: Integers) -> Integers:
        """Values (below 36) of the answer; int64 (..., N) -> (..., A)."""

    def questions(self, start: int, count: int, split: Split) -> torch.Tensor:
        """Question tokens, int64 (count, Q), a pure function of (seed, split, index)."""
        indices_B = np.arange(start, start + count)
        words_BN = random_words(
            derive_key(self.seed, self.name, split, "questions"),
            indices_B[:, None] * self.digits + np.arange(self.digits),
        )
        return torch.from_numpy(self.question_tokens(self.draw(words_BN, split)))

    def check(self, question: Sequence[int] | torch.Tensor, completion: Sequence[int] | torch.Tensor) -> bool:
        """Whether what stands between the last answer mark and the first end token is the answer to the question."""
        said = [int(token) for token in completion]
        if END_TOKEN not in said:
            return False
        said = said[: said.index(END_TOKEN)]
        if ANSWER_MARK not in said:
            return False
        said = said[len(said) - said[::-1].index(ANSWER_MARK) :]
        return said == [int(value) + ZERO for value in self.answer(_digits(question))]

    def gold(self, question: Sequence[int] | torch.Tensor, *, long: bool) -> list[int]:
        """A completion that `check` accepts: the short one, or the one with the chain of thought."""
        digits_N = _digits(question)
        tokens_L = self.long_tokens(digits_N) if long else self.short_tokens(digits_N)
        return [int(token) for token in tokens_L]

    def text_tokens(self, *, long: bool) -> int:
        """Tokens of a question together with its completion."""
        digits_N = np.full(self.digits, self.values[0], dtype=np.int64)
        return 1 + self.digits + len(self.long_tokens(digits_N) if long else self.short_tokens(digits_N))

    def question_tokens(self, digits_N: Integers) -> Integers:
        """Digits (..., N) as question tokens (..., Q)."""
        return _join(_mark(digits_N, TOKENS[self.operator]), digits_N + ZERO)

    def short_tokens(self, digits_N: Integers) -> Integers:
        """The completion without a thought: answer mark, answer, end."""
        answer_A = self.answer(digits_N) + ZERO
        return _join(_mark(digits_N, ANSWER_MARK), answer_A, _mark(digits_N, END_TOKEN))

    def long_tokens(self, digits_N: Integers) -> Integers:
        """The completion with its thought: thought mark, thought, answer mark, answer, end."""
        thought_C = self.thought(digits_N) + ZERO
        return _join(_mark(digits_N, THOUGHT_MARK), thought_C, self.short_tokens(digits_N))

    def draw(self, words_N: Words, split: Split) -> Integers:
        """Digits (..., N) of questions of one split, uniform over it, from as many random words."""
        pairs, held_out = len(self.values) ** 2, self._held_out_pairs()
        prefix = below(words_N[..., :-2], len(self.values))
        if split == "held-out":
            place = below(words_N[..., -1], held_out)
        else:
            place = held_out + below(words_N[..., -1], pairs - held_out)
        last_two = (place - self._shift(prefix)) % pairs
        order = np.concatenate([prefix, np.stack(np.divmod(last_two, len(self.values)), axis=-1)], axis=-1)
        digits_N: Integers = np.array(self.values, dtype=np.int64)[order]
        return digits_N

    def is_held_out(self, digits_N: Integers) -> Booleans:
        """Whether questions (..., N) belong to the held-out split."""
        order = np.searchsorted(np.array(self.values), digits_N)
        last_two = order[..., -2] * len(self.values) + order[..., -1]
        place = (last_two + self._shift(order[..., :-2])) % len(self.values) ** 2
        return np.asarray(place < self._held_out_pairs())

    def _held_out_pairs(self) -> int:
        pairs = len(self.values) ** 2
        return min(pairs - 1, max(1, round(self.held_out_fraction * pairs)))

    def _shift(self, prefix: Integers) -> Integers:
        powers = np.array([pow(len(self.values), place, 2**64) for place in range(prefix.shape[-1])], dtype=np.uint64)
        code = (prefix.astype(np.uint64) * powers).sum(axis=-1, dtype=np.uint64)
        return below(random_words(derive_key(self.name, self.digits, "split"), code), len(self.values) ** 2)


class DigitSum(Task):
    """The sum of the digits modulo 10; the thought is the running sums."""

    name = "digit-sum"
    operator = "+"

    @property
    def chance(self) -> float:
        """Every answer is equally frequent."""
        return 0.1

    def thought(self, digits_N: Integers) -> Integers:
        """Running sums modulo 10."""
        sums_C: Integers = digits_N.cumsum(axis=-1) % 10
        return sums_C

    def answer(self, digits_N: Integers) -> Integers:
        """The sum modulo 10."""
        return self.thought(digits_N)[..., -1:]


class DigitProduct(Task):
    """The product of digits from 2 to 9 modulo 11: a sum in disguise, behind a table of products that must be learned.

    Modulo 10 most products would be 0. Modulo the prime 11 no product is 0 and all ten values are about as frequent.
    """

    name = "digit-product"
    operator = "*"
    values = tuple(range(2, 10))

    @property
    def chance(self) -> float:
        """Frequency of the most frequent product, counted exactly."""
        frequency = {1: 1.0}
        for _ in range(self.digits):
            following = dict.fromkeys(range(1, 11), 0.0)
            for product, share in frequency.items():
                for digit in self.values:
                    following[product * digit % 11] += share / len(self.values)
            frequency = following
        return max(frequency.values())

    def thought(self, digits_N: Integers) -> Integers:
        """Running products modulo 11, from 1 to 10."""
        products = np.empty_like(digits_N)
        running = np.ones_like(digits_N[..., 0])
        for place in range(digits_N.shape[-1]):
            running = running * digits_N[..., place] % 11
            products[..., place] = running
        return products

    def answer(self, digits_N: Integers) -> Integers:
        """The product modulo 11."""
        return self.thought(digits_N)[..., -1:]


class DigitSort(Task):
    """The digits in ascending order: an answer of many symbols, all of which must be right."""

    name = "digit-sort"
    operator = "<"

    @property
    def chance(self) -> float:
        """Frequency of the commonest multiset of digits: as even as possible."""
        each, more = divmod(self.digits, 10)
        orders = math.factorial(self.digits) / (math.factorial(each) ** (10 - more) * math.factorial(each + 1) ** more)
        return float(orders / 10.0**self.digits)

    def thought(self, digits_N: Integers) -> Integers:
        """How many zeros, ones, ..., nines."""
        counts_C: Integers = (digits_N[..., None, :] == np.arange(10)[:, None]).sum(axis=-1)
        return counts_C

    def answer(self, digits_N: Integers) -> Integers:
        """The sorted digits."""
        return np.sort(digits_N, axis=-1)


_TASKS: tuple[type[Task], ...] = (DigitSum, DigitProduct, DigitSort)


def make_task(name: str, *, digits: int, seed: int, held_out_fraction: float = 0.05) -> Task:
    """The task of that name. Raises DataError where there is none."""
    for kind in _TASKS:
        if kind.name == name:
            return kind(digits=digits, seed=seed, held_out_fraction=held_out_fraction)
    raise DataError(f"There is no task {name!r}; the tasks are {', '.join(kind.name for kind in _TASKS)}.")


def _digits(question: Sequence[int] | torch.Tensor) -> Integers:
    return np.array([int(token) - ZERO for token in question[1:]], dtype=np.int64)


def _mark(like_N: Integers, token: int) -> Integers:
    return np.full((*like_N.shape[:-1], 1), token, dtype=np.int64)


def _join(*parts: Integers) -> Integers:
    return np.concatenate(parts, axis=-1)
