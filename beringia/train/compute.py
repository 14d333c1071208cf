"""Which dtype products are in, and whether to compile: what the recipe asks for, held against what the chip can do."""

from __future__ import annotations

from typing import Literal

import torch

from beringia.chips.chip import Chip
from beringia.errors import ChipUnavailable

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of one rounding to nearest (Higham, Accuracy and Stability, section 2.1). bfloat16 has 8
significant bits, so 2^-8 with the usual convention of half an ulp at 1 (2^-7)."""


def choose_compute_dtype(asked: Literal["auto", "float32", "bfloat16"], chip: Chip) -> torch.dtype:
    """The dtype of activations and products. Raises ChipUnavailable when the chip lacks what was asked for."""
    if asked == "auto":
        return chip.capabilities.compute_dtype
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]
    if dtype not in chip.capabilities.dtypes:
        raise ChipUnavailable(f'{chip.name} cannot compute in {asked}. Set train.compute to "auto" or to what it has.')
    return dtype


def reason_not_to_compile(chip: Chip) -> str | None:
    """Why torch.compile cannot be used here, or None."""
    if chip.capabilities.compile:
        return None
    return chip.compiler_missing() or f"{chip.name} has no backend for it"
