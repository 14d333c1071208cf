"""Which kind of operators a chip gets."""

from __future__ import annotations

import torch

from beringia.chips.chip import Chip
from beringia.engine.operators.compiled import DTYPES, Compiled
from beringia.engine.operators.in_torch import InTorch
from beringia.engine.operators.operators import Operators
from beringia.errors import InputError


def open_operators(kind: str | None, chip: Chip, dtype: torch.dtype, *, batch_invariant: bool = False) -> Operators:
    """`torch`, `compiled`, or None: compiled on the CPU in float32 and bfloat16, torch elsewhere. Compiled ones are
    always batch-invariant.

    Raises InputError where compiled ones are asked for, or are what this chip has, and cannot be had.
    """
    can = chip.device.type == "cpu" and dtype in DTYPES
    if kind == "torch" or (kind is None and not can):
        return InTorch(batch_invariant=batch_invariant)
    if kind not in (None, "compiled"):
        raise InputError(f"operators must be 'torch' or 'compiled', but is {kind!r}.")
    if not can:
        raise InputError(
            f"Compiled operators run on the CPU in float32 and bfloat16; this engine is on {chip.name} in {dtype}. "
            "Use operators='torch'."
        )
    return Compiled()
