"""Emulated chips: torch devices whose arithmetic and faults are declared. See docs/emulated-chips.md."""

from beringia.chips.emulated.chip import EmulatedChip, register_device
from beringia.chips.emulated.products import matmul
from beringia.chips.emulated.profile import profile_names

__all__ = ["EmulatedChip", "matmul", "profile_names", "register_device"]
