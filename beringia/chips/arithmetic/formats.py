"""Floating-point formats that operands of products may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from beringia.chips.arithmetic.profile import Format


@dataclass(frozen=True)
class OperandFormat:
    """What a format can hold, and the dtype of tensors that hold it (float32 for those that torch has no dtype for)."""

    dtype: torch.dtype
    fraction_bits: int
    smallest: int
    """Exponent of the smallest normal number."""
    largest: int
    """Exponent of the largest power of two."""


FORMATS: Mapping[Format, OperandFormat] = {
    "float32": OperandFormat(torch.float32, 23, -126, 127),
    "tfloat32": OperandFormat(torch.float32, 10, -126, 127),
    "hfloat32": OperandFormat(torch.float32, 10, -126, 127),
    "bfloat16": OperandFormat(torch.bfloat16, 7, -126, 127),
    "float16": OperandFormat(torch.float16, 10, -14, 15),
    "float8_e4m3": OperandFormat(torch.float8_e4m3fn, 3, -6, 8),
    "float8_e4m3fnuz": OperandFormat(torch.float8_e4m3fnuz, 3, -7, 7),
    "float8_e5m2": OperandFormat(torch.float8_e5m2, 2, -14, 15),
}
