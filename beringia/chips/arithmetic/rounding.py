"""Rounding of float32 and float64 tensors to fewer fraction bits, and what else happens to a number's bits.

Everything works on the bits (an integer view), so that the same numbers give the same bits everywhere. Infinities and
NaN pass unchanged. Nothing here knows about chips.
"""

from __future__ import annotations

import torch

from beringia.chips.arithmetic.profile import Direction

_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_FRACTION_BITS = {torch.float32: 23, torch.float64: 52}
_SMALLEST_NORMAL_FLOAT32 = 2.0**-126
_EXPONENT_FLOAT32 = 0xFF << 23

# Multipliers of a 32-bit integer hash whose every input bit reaches every output bit (Wellons' `lowbias32` search).
_HASH_FIRST = 0x7FEB352D
_HASH_SECOND = 0x846CA68B - 2**32


def round_fraction_(number: torch.Tensor, bits: int, direction: Direction) -> torch.Tensor:
    """Round float32 or float64 in place to `bits` fraction bits, relative to each number's own exponent."""
    dropped = _FRACTION_BITS[number.dtype] - bits
    if dropped <= 0:
        return number
    integer = number.view(_INTEGER[number.dtype])
    mask = -(1 << dropped)
    if direction == "truncate":
        # A NaN of this arithmetic is quiet: its highest fraction bit stays, so it stays a NaN.
        integer.bitwise_and_(mask)
        return number
    finite = torch.isfinite(number)
    integer.copy_(torch.where(finite, (integer + _increment(integer, dropped, direction)) & mask, integer))
    return number


def _increment(integer: torch.Tensor, dropped: int, direction: Direction) -> torch.Tensor | int:
    """What is added to sign-magnitude bits before the dropped ones are cleared."""
    half = 1 << (dropped - 1)
    if direction == "nearest-even":
        return ((integer >> dropped) & 1) + (half - 1)
    if direction == "half-away":
        return half
    # floor: a negative number's magnitude is rounded up.
    return torch.where(integer < 0, (1 << dropped) - 1, 0)


def floor_beside_(number: torch.Tensor, other: torch.Tensor, bits: int) -> torch.Tensor:
    """Floor float32 numbers in place to a multiple of 2**(e - bits), e the larger exponent of `number` and `other`.

    Exact: scaling by a power of two and flooring a float32 number lose nothing else. (In the highest binade the grid is
    finer by half, and below the smallest normal number it is that number's.)
    """
    largest = torch.maximum(number.abs(), other.abs()).view(torch.int32)
    exponents = largest.bitwise_and_(_EXPONENT_FLOAT32).clamp_(1 << 23, 253 << 23)
    number.mul_(((254 << 23) - exponents).view(torch.float32)).mul_(2.0**bits).floor_()
    return number.mul_(2.0**-bits).mul_(exponents.view(torch.float32))


def flush_subnormals_(number: torch.Tensor, smallest_normal: float = _SMALLEST_NORMAL_FLOAT32) -> torch.Tensor:
    """Numbers smaller in magnitude than `smallest_normal` become zero of their sign, in place."""
    return number.mul_(number.abs() >= smallest_normal)


def saturate_(number: torch.Tensor) -> torch.Tensor:
    """Infinities become the format's largest number, NaN becomes 0, in place."""
    limit = torch.finfo(number.dtype).max
    return number.nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)


def perturb_(result: torch.Tensor, keyed_by: torch.Tensor, ulps: int) -> torch.Tensor:
    """Move float32 results by up to `ulps` units in the last place, in place.

    The direction and distance depend on the bits of `keyed_by` (float32, same shape) alone: the same argument has the
    same error every time, as in hardware. Zeros, infinities and NaN stay, and so do results for an argument of zero,
    which implementations get exactly right (exp(0) = 1).
    """
    hashed = keyed_by.view(torch.int32) * _HASH_FIRST
    hashed ^= (hashed >> 15) & 0x1FFFF
    hashed *= _HASH_SECOND
    offset = (((hashed >> 12) & 0xFFFF) * (2 * ulps + 1) >> 16) - ulps
    magnitude = result.abs()
    steady = (magnitude < _SMALLEST_NORMAL_FLOAT32) | ~(magnitude < torch.finfo(torch.float32).max) | (keyed_by == 0)
    result.view(torch.int32).add_(offset.masked_fill_(steady, 0))
    return result
