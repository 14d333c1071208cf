"""Emulated chips: torch devices whose arithmetic and faults are declared. See docs/emulated-chips.md."""

from beringia.chips.arithmetic.products import matmul
from beringia.chips.arithmetic.profile import profile_names
from beringia.chips.emulated.chip import EmulatedChip, register_device

__all__ = ["EmulatedChip", "matmul", "profile_names", "register_device"]
