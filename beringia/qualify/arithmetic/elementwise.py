"""What a chip does to single numbers: casts, overflow, subnormals, elementary functions; and in which order it sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from beringia.chips.arithmetic.profile import Direction, Reduction
from beringia.chips.arithmetic.reductions import Reduce
from beringia.chips.chip import Chip
from beringia.qualify.arithmetic.matrix_unit import direction

_SAMPLES = 2**14
"""Arguments of each elementary function."""
_TERMS = 8192
"""Numbers in a sum: two pieces of the largest order that is tried."""
_RANDOM_SUMS = 64
LANES = (8, 16, 32, 64, 128, 256, 512)
SERIAL = (2, 4, 8)
"""Orders that are tried: lanes of vector units and thread blocks, and terms that each adds before they meet."""

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


def measure_sum(chip: Chip) -> dict[str, str | int]:
    """The order in which rows of float32 are added, as a profile has it: scheme, and lanes and serial terms if it has
    some. `native` says that it is none of those that are known.

    Found as the order of products is: a large number and its opposite drown what is added between them, and each known
    order drowns other numbers. It must also give the chip's bits in random sums.
    """
    rows = torch.cat([_drowning(), torch.randn(_RANDOM_SUMS, _TERMS, generator=torch.Generator().manual_seed(12))])
    found = rows.to(chip.device).sum(-1).cpu()
    orders: list[dict[str, str | int]] = [{"scheme": "sequential"}, {"scheme": "tree"}]
    orders += [{"scheme": "lanes", "lanes": lanes, "serial": serial} for lanes in LANES for serial in SERIAL]
    for order in orders:
        known = Reduction.model_validate(order | {"mark": "measured", "source": "tried"})
        if torch.equal(Reduce(known)(rows, -1, False)[0], found):
            return order
    return {"scheme": "native"}


def _drowning() -> torch.Tensor:
    """Rows of small numbers with a large one in front and its opposite somewhere."""
    places = sorted({place for power in range(1, 12) for place in (2**power - 1, 2**power, 3 * 2**power)})
    places = [place for place in places if place < _TERMS]
    rows = torch.full((len(places), _TERMS), 2.0**-40)
    rows[:, 0] = 2.0**40
    rows[torch.arange(len(places)), places] = -(2.0**40)
    return rows
