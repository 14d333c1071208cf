"""Faults inside the device: a script's faults, planted in the kernels that they strike.

What a fault is stands in `planted.py`; what each kind does in `wrong_numbers.py`, `wrong_arithmetic.py`,
`wrong_movement.py`, `wrong_optimizer.py` and, where no number is wrong, `wrong_behaviour.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated import wrong_arithmetic as arithmetic
from beringia.chips.emulated import wrong_behaviour as behaviour
from beringia.chips.emulated import wrong_movement as movement
from beringia.chips.emulated import wrong_numbers as numbers
from beringia.chips.emulated.device import Interposer
from beringia.chips.emulated.planted import PRODUCTS, Host, Planted
from beringia.chips.emulated.wrong_numbers import flip_bits_
from beringia.chips.emulated.wrong_optimizer import WrongOptimizer

__all__ = ["PRODUCTS", "Device", "flip_bits_"]

_KINDS: dict[type[script.Scheduled], Callable[[Any, int, Host], Planted]] = {
    script.WrongBackward: numbers.WrongBackward,
    script.MaskIgnored: numbers.MaskIgnored,
    script.BitFlip: numbers.BitFlip,
    script.StuckTile: numbers.StuckTile,
    script.NanToZero: numbers.NanToZero,
    script.NondeterministicReduction: numbers.NondeterministicReduction,
    script.WrongCast: arithmetic.WrongCast,
    script.ShortAccumulator: arithmetic.ShortAccumulator,
    script.Saturate: arithmetic.Saturate,
    script.Flush: arithmetic.Flush,
    script.WrongFunction: arithmetic.WrongFunction,
    script.WrongLayout: movement.WrongLayout,
    script.GarbageIndex: movement.GarbageIndex,
    script.LostAdditions: movement.LostAdditions,
    script.WrongCollective: movement.WrongCollective,
    script.WrongOptimizer: WrongOptimizer,
    script.DeviceException: behaviour.DeviceException,
    script.CollectiveTimeout: behaviour.CollectiveTimeout,
    script.Hang: behaviour.Hang,
    script.OutOfMemory: behaviour.OutOfMemory,
    script.Slowness: behaviour.Slowness,
}


class Device(Host):
    """The faults of one device."""

    def __init__(self, plan: script.FaultScript, *, vendor: str, seed: int, index: int, memory: Path | None) -> None:
        super().__init__(plan, vendor=vendor, seed=seed, index=index, memory=memory)
        self.planted = [_KINDS[type(fault)](fault, position, self) for position, fault in enumerate(plan.faults)]
        # Before training's first step: what is done then (loading, initialising) is step 0.
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """The training step that begins."""
        # First: some faults strike between two steps, and that belongs to the one that begins.
        self.struck.clear()
        for planted in self.planted:
            planted.begin_step(step)

    def interposers(self) -> list[Interposer]:
        """For the device's `install`."""
        return [planted.interpose for planted in self.planted]
