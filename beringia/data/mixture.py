"""Rows of several sources as one stream: which source row number n comes from, and which of that source's rows it is.

After n rows every source has had its share of n, rounded up or down, for every n (a property that giving the next row
to whoever lacks most does not have). Row j of a source with share w may come from number floor(j / w) on and must come
before ceil((j + 1) / w); of the sources whose row may come, the one whose row must come first is taken. Single rows
with such times can all be met, and earliest deadline first meets them (Tijdeman, "The chairman assignment problem",
1980; Baruah, Cohen, Plaxton and Varvel, "Proportionate progress", 1996). All in integers.

The order repeats after one period, in which every source has exactly its share, and is held as a table: any row is
found at once, so that a run resumes at any row, on any number of ranks, and the cursors of the sources follow from the
run's one cursor.

Axes: B rows, P rows of a period, S sources, T tokens of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from beringia.data.counter import Integers
from beringia.data.rows import Rows


@dataclass(frozen=True)
class Interleaving:
    """The order of the sources."""

    rows_S: Integers
    """Rows of each source in a period."""
    sources_P: Integers
    """Which source each row of a period comes from."""
    earlier_P: Integers
    """How many rows of that source came before it in the period."""

    def locate(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """The source of each row, and its number among that source's rows."""
        periods_B, places_B = np.divmod(indices_B, len(self.sources_P))
        sources_B = self.sources_P[places_B]
        return sources_B, periods_B * self.rows_S[sources_B] + self.earlier_P[places_B]

    def cursors(self, count: int) -> list[int]:
        """How many rows of each source the first `count` rows are."""
        periods, rest = divmod(count, len(self.sources_P))
        begun_S = np.bincount(self.sources_P[:rest], minlength=len(self.rows_S))
        cursors: list[int] = (periods * self.rows_S + begun_S).tolist()
        return cursors


@functools.lru_cache(maxsize=4)
def interleave(rows: tuple[int, ...]) -> Interleaving:
    """The order in which each source has so many rows in a period."""
    period, taken = sum(rows), [0] * len(rows)
    sources_P, earlier_P = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    deadlines = [-(-period // count) for count in rows]
    for place in range(period):
        ready = (one for one, count in enumerate(rows) if taken[one] * period < (place + 1) * count)
        source = min(ready, key=deadlines.__getitem__)
        sources_P[place], earlier_P[place] = source, taken[source]
        taken[source] += 1
        deadlines[source] = -(-(taken[source] + 1) * period // rows[source])
    return Interleaving(np.array(rows, dtype=np.int64), sources_P, earlier_P)


@dataclass(frozen=True)
class MixedRows:
    """Rows of several sources, in the order of an interleaving."""

    sources: Sequence[Rows]
    order: Interleaving

    def rows(self, indices_B: Integers) -> tuple[Integers, Integers]:
        """Tokens and labels, int64 (B, T) each."""
        sources_B, numbers_B = self.order.locate(indices_B)
        places = {source: np.flatnonzero(sources_B == source) for source in np.unique(sources_B).tolist()}
        parts = [(here_B, *self.sources[source].rows(numbers_B[here_B])) for source, here_B in places.items()]
        shape = (len(indices_B), parts[0][1].shape[1])
        tokens_BT, labels_BT = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        for here_B, tokens, labels in parts:
            tokens_BT[here_B], labels_BT[here_B] = tokens, labels
        return tokens_BT, labels_BT
