"""An emulated chip with a kernel of the test's own: what a probe must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch._ops import OpOverload

from beringia.chips.chip import Chip
from beringia.chips.emulated import device
from beringia.chips.open import open_chip


@contextmanager
def emulated_with(kernels: Mapping[OpOverload, Callable[..., Any]], profile: str = "exact") -> Iterator[Chip]:
    """The profile's chip with these kernels in the place of its own."""
    chip = open_chip(f"emulated:{profile}")
    state = device._state
    device.install({**state.kernels, **kernels}, state.interposers)
    try:
        yield chip
    finally:
        chip.close()
