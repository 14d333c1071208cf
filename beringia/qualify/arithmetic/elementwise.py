"""What a chip does to single numbers: casts, overflow, subnormals, elementary functions; and in which order it sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from beringia.chips.arithmetic.profile import Direction
from beringia.chips.chip import Chip
from beringia.qualify.arithmetic.matrix_unit import direction

_SAMPLES = 2**14
"""Arguments of each elementary function."""
_TERMS = 1024
"""Numbers in a sum: more than a thread block's lanes."""

DOMAINS: Mapping[str, tuple[float, float]] = {
    "exp": (-80.0, 80.0),
    "exp2": (-120.0, 120.0),
    "expm1": (-1.0, 10.0),
    "log1p": (-0.9, 100.0),
    "erf": (-4.0, 4.0),
    "sin": (-100.0, 100.0),
    "cos": (-100.0, 100.0),
    "tanh": (-10.0, 10.0),
    "sigmoid": (-20.0, 20.0),
}
"""Functions and the arguments that are tried, evenly spread."""
POSITIVE = ("log", "log2", "log10", "rsqrt")
"""Functions of positive numbers, tried over 200 binary orders of magnitude."""


def measure_cast(chip: Chip, dtype: torch.dtype) -> Direction:
    """How float32 is rounded to a 16-bit dtype."""
    half = torch.finfo(dtype).eps / 2
    numbers = torch.tensor([-1 - half, -1 - 1.5 * half, 1 + 1.5 * half], dtype=torch.float32)
    found = numbers.to(chip.device).to(dtype).cpu().float()
    return direction((found.abs() != 1).tolist())


def saturates(chip: Chip) -> bool:
    """Whether an overflow becomes the largest number instead of infinity."""
    large = torch.full((4,), 3e38, device=chip.device)
    return bool(torch.isfinite((large * 10).cpu()).all())


def flushes_subnormals(chip: Chip) -> bool:
    """Whether a product of two float32 numbers that is subnormal becomes zero."""
    small = torch.full((4,), 2.0**-70, device=chip.device)
    return bool((small * small).cpu().eq(0).all())


def measure_elementary(chip: Chip) -> dict[str, int]:
    """Largest error of each function on float32, in units in the last place beyond the half that rounding costs."""
    return {name: _ulps(chip, name, _arguments(name)) for name in (*DOMAINS, *POSITIVE)}


def _arguments(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    share = torch.rand(_SAMPLES, generator=generator, dtype=torch.float64)
    if name in POSITIVE:
        return torch.exp2(200 * (share - 0.5)).float()
    low, high = DOMAINS[name]
    return (low + (high - low) * share).float()


def _ulps(chip: Chip, name: str, x: torch.Tensor) -> int:
    function: Callable[[torch.Tensor], torch.Tensor] = getattr(torch, name)
    exact = function(x.double())
    found = function(x.to(chip.device)).cpu().double()
    _, exponent = torch.frexp(exact)
    unit = torch.exp2((exponent - 24).clamp(min=-149).double())
    worst = float(((found - exact).abs() / unit).max())
    return max(0, math.ceil(worst - 0.5))


def measure_sum(chip: Chip) -> str:
    """The order in which rows of float32 are added: `sequential`, `tree`, or `native`, which says neither.

    Found as the order of products is: a large number and its opposite drown what is added between them.
    """
    rows = torch.full((_TERMS - 1, _TERMS), 2.0**-40)
    rows[:, 0] = 2.0**40
    places = torch.arange(1, _TERMS)
    rows[torch.arange(_TERMS - 1), places] = -(2.0**40)
    drowned = (_TERMS - rows.to(chip.device).sum(-1).cpu() * 2.0**40).round().long()
    if torch.equal(drowned, places + 1):
        return "sequential"
    tree = torch.tensor([2 ** int(place).bit_length() for place in places])
    return "tree" if torch.equal(drowned, tree) else "native"
