"""Algorithms by the names that recipes use."""

from __future__ import annotations

from beringia.rl.algorithms.algorithm import Algorithm
from beringia.rl.algorithms.cispo import Cispo
from beringia.rl.algorithms.dapo import Dapo
from beringia.rl.algorithms.dr_grpo import DrGrpo
from beringia.rl.algorithms.grpo import Grpo
from beringia.rl.algorithms.gspo import Gspo

_BY_NAME: dict[str, type[Algorithm]] = {kind.name: kind for kind in (Grpo, DrGrpo, Dapo, Gspo, Cispo)}
NAMES = tuple(_BY_NAME)


def make_algorithm(
    name: str, *, max_tokens: int, clip_low: float | None = None, clip_high: float | None = None
) -> Algorithm:
    """The algorithm of that name; bounds that are not given are its paper's. Raises KeyError where there is none."""
    given = {"clip_low": clip_low, "clip_high": clip_high}
    options = {option: value for option, value in given.items() if value is not None}
    kind = _BY_NAME[name]
    if kind is DrGrpo:
        return DrGrpo(max_tokens=max_tokens, **options)
    return kind(**options)
