"""Where rows of tokens and labels come from, by number: packed shards, or a task's questions.

Axes: B rows, T tokens of a row, M questions of a row, L tokens of a question with its completion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from beringia.data.alphabet import PAD_TOKEN
from beringia.data.counter import Booleans, Integers, Permutation, chance, derive_key, random_words
from beringia.data.row_plan import RowPlan
from beringia.data.shards import OpenShard, gather
from beringia.data.tasks import Split, Task
from beringia.errors import DataError

NO_LOSS = -100  # the label that torch's cross entropy leaves out


class Rows(Protocol):
    """Where rows come from."""

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each, of the samples with these numbers."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of packed shards, in an order that is a permutation of its own in every epoch."""

    shards: list[OpenShard]
    plan: RowPlan
    key: int
    sequence_length: int
    pad: int

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        epochs_B, places_B = np.divmod(indices_B, self.plan.rows)
        chosen_B = np.empty_like(places_B)
        for epoch in np.unique(epochs_B):
            here = epochs_B == epoch
            chosen_B[here] = Permutation(self.plan.rows, derive_key(self.key, int(epoch)))(places_B[here])
        tokens, learned = gather(self.shards, self.plan.spans(chosen_B), self.sequence_length + 1, self.pad)
        labels_BT = np.where(learned[:, 1:], tokens[:, 1:], NO_LOSS)
        return np.ascontiguousarray(tokens[:, :-1]), labels_BT


@dataclass(frozen=True)
class TaskRows:
    """Rows of questions with their completions, one after the other from the row's first token, the last one cut off.

    Cutting the last keeps the mix honest: whether it is short or long is decided by a mark that is seen before its
    length matters, so the share of long completions among the marks of a row is `long_fraction` (Wald's identity),
    while dropping what does not fit would favour short ones. The question's own digits are random: no loss on them.
    """

    task: Task
    split: Split
    sequence_length: int
    long_fraction: float

    def __post_init__(self) -> None:
        longest = self.task.text_tokens(long=True)
        if longest > self.sequence_length + 1:
            raise DataError(
                f"{self.task.name} with {self.task.digits} digits needs {longest - 1} tokens a sample; "
                f"data.sequence_length is {self.sequence_length}: raise it or take fewer digits."
            )

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        digits_BMN, long_BM = self._draw(indices_B)
        tokens_BML, lengths_BM = self._texts(digits_BMN, long_BM)
        starts_BM = lengths_BM.cumsum(axis=1) - lengths_BM
        places_L = np.arange(tokens_BML.shape[-1])
        width = self.sequence_length + 1
        # Everything past the row's end, or past a text's end, lands in one column too many, which is then cut off.
        columns_BML = np.where(places_L < lengths_BM[..., None], starts_BM[..., None] + places_L, width)
        columns_BML = np.minimum(columns_BML, width)
        rows_B = np.arange(len(indices_B))[:, None, None]
        tokens = np.full((len(indices_B), width + 1), PAD_TOKEN, dtype=np.int64)
        targets = np.full_like(tokens, NO_LOSS)
        tokens[rows_B, columns_BML] = tokens_BML
        targets[rows_B, columns_BML] = np.where(places_L > self.task.digits, tokens_BML, NO_LOSS)
        return np.ascontiguousarray(tokens[:, : width - 1]), np.ascontiguousarray(targets[:, 1:width])

    def _draw(self, indices_B: Integers) -> tuple[Integers, Booleans]:
        words_a_question = self.task.digits + 1
        counters_BM = indices_B[:, None] * self._questions() + np.arange(self._questions())
        counters = counters_BM[..., None] * words_a_question + np.arange(words_a_question)
        words = random_words(derive_key(self.task.seed, self.task.name, self.split, "samples"), counters)
        return self.task.draw(words[..., :-1], self.split), chance(words[..., -1], self.long_fraction)

    def _texts(self, digits_BMN: Integers, long_BM: Booleans) -> tuple[Integers, Integers]:
        completions = self.task.long_tokens(digits_BMN)
        short = self.task.short_tokens(digits_BMN)
        head = completions[..., : short.shape[-1]]
        head[...] = np.where(long_BM[..., None], head, short)
        tokens_BML = np.concatenate([self.task.question_tokens(digits_BMN), completions], axis=-1)
        lengths_BM = np.where(long_BM, self.task.text_tokens(long=True), self.task.text_tokens(long=False))
        return tokens_BML, lengths_BM

    def _questions(self) -> int:
        """How many of the shortest texts it takes to fill a row."""
        return -(-(self.sequence_length + 1) // self.task.text_tokens(long=False))


@dataclass(frozen=True)
class Respelled:
    """Rows in the tokens of another tokenizer, one for one."""

    source: Rows
    tokens_V: Integers
    """What each token of the source is there."""

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        tokens_BT, labels_BT = self.source.rows(indices_B)
        learned_BT = labels_BT != NO_LOSS
        labels_BT[learned_BT] = self.tokens_V[labels_BT[learned_BT]]
        return self.tokens_V[tokens_BT], labels_BT
