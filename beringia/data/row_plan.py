"""Which stretch of which shard is row number n.

Texts are cut into windows of T targets that overlap by one token, so that every token is a target once; what follows an
end token is another document, and the model learns to ignore what lies before one. Chats are never cut in two: whole
ones are put in a row while they fit, and one that is longer than a row loses its tail, which is reported.

B rows, T tokens of a row; a row of T targets takes T + 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from beringia.data.counter import Integers
from beringia.data.documents import DataKind
from beringia.data.shards import OpenShard, Spans


class RowPlan(Protocol):
    """Rows by number."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    def spans(self, rows_B: Integers) -> Spans:
        """Where these rows lie."""


@dataclass(frozen=True)
class Windows:
    """Windows over texts, computed, not stored: a plan for any amount of data."""

    ends_S: Integers
    """Number of the first window after each shard."""
    tokens_S: Integers
    """Tokens in each shard."""
    targets: int
    """T"""

    @classmethod
    def over(cls, shards: list[OpenShard], targets: int) -> Self:
        """The last window of a shard is shorter, unless it happens to fit."""
        tokens_S = np.array([len(shard.tokens) for shard in shards], dtype=np.int64)
        windows_S = np.maximum(-(-(tokens_S - 1) // targets), 0)
        return cls(windows_S.cumsum(), tokens_S, targets)

    @property
    def rows(self) -> int:
        """How many windows there are."""
        return int(self.ends_S[-1])

    def spans(self, rows_B: Integers) -> Spans:
        """Where these windows lie."""
        shards_B = np.searchsorted(self.ends_S, rows_B, side="right")
        first_B = np.where(shards_B > 0, self.ends_S[shards_B - 1], 0)
        starts_B = (rows_B - first_B) * self.targets
        return Spans(shards_B, starts_B, np.minimum(self.tokens_S[shards_B] - starts_B, self.targets + 1))


@dataclass(frozen=True)
class Table:
    """Rows of whole chats, listed."""

    all: Spans

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.all.starts_B)

    def spans(self, rows_B: Integers) -> Spans:
        """Where these rows lie."""
        return Spans(self.all.shards_B[rows_B], self.all.starts_B[rows_B], self.all.lengths_B[rows_B])


def plan_rows(shards: list[OpenShard], kind: DataKind, targets: int) -> tuple[RowPlan, tuple[str, ...]]:
    """The plan for rows of `targets` targets, and what was cut, one sentence each."""
    if kind == "text":
        return Windows.over(shards, targets), ()
    chats = [_Chats.of(shard, targets + 1) for shard in shards]
    rows = [(number, *row) for number, shard in enumerate(chats) for row in shard.rows(targets + 1)]
    table = Table(Spans(*np.array(rows, dtype=np.int64).reshape(-1, 3).T))
    cut, dropped = sum(shard.cut for shard in chats), sum(shard.dropped for shard in chats)
    notes = []
    if cut:
        notes.append(f"{cut} chats are longer than {targets + 1} tokens and were cut.")
    if dropped:
        notes.append(f"{dropped} of them have no turn of the assistant before the cut and were left out.")
    return table, tuple(notes)


def rows_without_targets(shards: list[OpenShard], plan: RowPlan) -> list[int]:
    """Numbers of the rows on which nothing is learned: chats in which the assistant says nothing (texts have none)."""
    if not isinstance(plan, Table):
        return []
    rows = zip(plan.all.shards_B.tolist(), plan.all.starts_B.tolist(), plan.all.lengths_B.tolist(), strict=True)
    return [number for number, row in enumerate(rows) if not _has_target(shards[row[0]], *row[1:])]


def _has_target(shard: OpenShard, start: int, length: int) -> bool:
    assert shard.said is not None, "a shard packed as chats"
    return bool(shard.said[start + 1 : start + length].any())  # the first token of a row is no target


@dataclass(frozen=True)
class _Chats:
    """Where the chats of one shard lie, cut to the width of a row."""

    pieces: list[tuple[int, int]]
    """(start, length) in order."""
    cut: int
    dropped: int

    @classmethod
    def of(cls, shard: OpenShard, width: int) -> Self:
        assert shard.ends is not None and shard.said is not None, "a shard packed as chats"
        ends = shard.ends.tolist()
        whole = [(start, end - start) for start, end in zip([0, *ends], ends, strict=False)]
        pieces = [
            (start, min(length, width))
            for start, length in whole
            if length <= width or _has_target(shard, start, width)
        ]
        return cls(pieces, sum(length > width for _, length in whole), len(whole) - len(pieces))

    def rows(self, width: int) -> list[tuple[int, int]]:
        """Neighbours put together while they fit in `width`."""
        rows: list[tuple[int, int]] = []
        for start, length in self.pieces:
            if rows and sum(rows[-1]) == start and rows[-1][1] + length <= width:
                rows[-1] = (rows[-1][0], rows[-1][1] + length)
            else:
                rows.append((start, length))
        return rows
