"""Which checks run in which step: as often as the stated share of the step time pays for, and never less than a
minimum.

Every kind of check has an account. A step pays in the kind's part of the share, a check takes out what it took; checks
are planned a block of steps ahead, on rank 0, so that all ranks check the same things in the same steps without talking
in between. Reads no clock: the guard says how long steps and checks took.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

BLOCK_STEPS = 16
"""Steps planned at once; with several ranks also how often they talk about it."""
LONGEST_GAP_STEPS = 96
"""A kind that has not run for so long is planned whatever it costs, in the next block: so every kind runs at least
every 112 steps, and a slow host weakens a guard but never blinds it."""
_COSTS_REMEMBERED = 9
AIMED = 0.7
"""Part of the share that is planned with. The rest is for what cannot be told from the step itself: hooks that keep a
layer's tensors, caches that a check leaves cold, and the machine's noise, within which a share that is kept on average
cannot be shown to be kept (`benchmarks/guard_cost.py`)."""
_FIRST_COST = 0.1
"""Cost assumed of a kind that has not run yet, in steps."""


class Account:
    """What one kind of check may spend, and spent."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.credit_seconds = 0.0
        self._costs: deque[float] = deque(maxlen=_COSTS_REMEMBERED)
        self._idle_steps = LONGEST_GAP_STEPS

    def pay_in(self, seconds: float) -> None:
        """One step's share."""
        self.credit_seconds += seconds
        self._idle_steps += 1

    def take_out(self, seconds: float) -> None:
        """What one check took."""
        self.credit_seconds -= seconds
        self._costs.append(seconds)
        self._idle_steps = 0

    def plan_block(self, income_seconds: float, step_seconds: float) -> tuple[int, float]:
        """How many checks the next block may have, given what its steps will pay in, and the credit left over where
        even one in every step does not use it up; the account gives that away."""
        cost = statistics.median(self._costs) if self._costs else _FIRST_COST * step_seconds
        affordable = math.floor((self.credit_seconds + income_seconds) / cost) if cost > 0 else 0
        surplus = max(0.0, self.credit_seconds + income_seconds - (BLOCK_STEPS + 1) * cost) if self._costs else 0.0
        self.credit_seconds -= surplus
        starving = self._idle_steps + BLOCK_STEPS > LONGEST_GAP_STEPS
        return min(BLOCK_STEPS, max(affordable, 1 if starving else 0)), surplus


class Schedule:
    """Accounts of all kinds, from which it plans blocks of steps: for each step a bit mask of kinds.

    >>> schedule = Schedule({"shadow": 0.7, "memory": 0.3}, share=0.01)
    >>> masks = schedule.plan()            # on rank 0, at the start of a block
    """

    def __init__(self, weights: Mapping[str, float], share: float) -> None:
        self.kinds = tuple(weights)
        self._share = AIMED * share
        self._accounts = {kind: Account(weight / sum(weights.values())) for kind, weight in weights.items()}
        self._incomes: deque[float] = deque(maxlen=_COSTS_REMEMBERED)
        self._step_seconds: deque[float] = deque(maxlen=_COSTS_REMEMBERED)

    def step_took(self, seconds: float, frequent_seconds: float) -> None:
        """A step without its checks, and those that belong to no account because they are in every step: they are paid
        first."""
        income = self._share * seconds - frequent_seconds
        self._incomes.append(income)
        self._step_seconds.append(seconds)
        for account in self._accounts.values():
            account.pay_in(account.weight * income)

    def check_took(self, kind: str, seconds: float) -> None:
        """One check."""
        self._accounts[kind].take_out(seconds)

    def plan(self) -> list[int]:
        """Bit masks of the kinds due in each of the next `BLOCK_STEPS` steps, evenly spread."""
        step_seconds = statistics.median(self._step_seconds) if self._step_seconds else 0.0
        income = max(0.0, statistics.median(self._incomes)) if self._incomes else 0.0
        masks = [0] * BLOCK_STEPS
        surplus = 0.0
        # The first kind comes last: it gets what the others cannot use.
        for bit, kind in reversed(list(enumerate(self.kinds))):
            account = self._accounts[kind]
            if bit == 0:
                account.credit_seconds += surplus
            number, left = account.plan_block(account.weight * income * BLOCK_STEPS, step_seconds)
            surplus += left
            for turn in range(number):
                # Kinds begin at different steps of the block, so that few steps carry several.
                place = (turn * BLOCK_STEPS // number + bit * 3 + 1) % BLOCK_STEPS
                masks[place] |= 1 << bit
        return masks

    def due(self, mask: int) -> tuple[str, ...]:
        """The kinds that a mask names."""
        return tuple(kind for bit, kind in enumerate(self.kinds) if mask >> bit & 1)
