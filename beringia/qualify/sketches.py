"""Sketches of tensors: at most `WIDTH` numbers each, of which differences have the norms that the tensors' have.

A sketch of a tensor with more elements adds them up, with random signs, in `WIDTH` places: sketches of differences are
differences of sketches, and their norms are those of the tensors within sqrt(2 / WIDTH), 4 % (Charikar, Chen and
Farach-Colton 2002).
"""

from __future__ import annotations

import hashlib

import torch

WIDTH = 1024
_BLOCK = 256 * WIDTH
"""Elements; in float64 they fit in a core's cache."""
NOT_FINITE = "#not-finite"
"""Follows the name of a sketch that says where its tensor is infinite or NaN."""
_APART = 1e200
"""Of such a sketch: one element that is not the same on two sides is farther off than any number's error."""


def sketch(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is small, else its elements added up with signs drawn from its name; float64.

    Infinities and NaN have sketches of their own (`not_finite`): here they are zeros.
    """
    flat = _as_reals(tensor.detach().cpu()).flatten()
    found = _added_with_signs(name, flat)
    # A sum is finite only if its terms are.
    return found if _all_finite(found) else _added_with_signs(name, flat.double().nan_to_num(0.0, 0.0, 0.0))


def sketches_of(name: str, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensor's sketch under its name, and, if not all is finite, the one that says what is not. `kind`: what the
    signs are drawn from."""
    flat = _as_reals(tensor.detach().cpu()).flatten()  # a faulty chip must not judge itself
    found = _added_with_signs(kind, flat)
    if _all_finite(found) or _all_finite(flat):
        return {name: found}
    codes = flat.isnan() * 4.0 + flat.isposinf() * 2.0 + flat.isneginf() * 1.0
    return {name: sketch(kind, flat), name + NOT_FINITE: sketch(kind, codes) * _APART}


def _as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _added_with_signs(name: str, flat: torch.Tensor) -> torch.Tensor:
    """Rows of `WIDTH`, added up a block at a time: of a large tensor neither a copy in float64 nor a product with its
    signs is made whole, which would take several passes over memory."""
    if flat.numel() <= WIDTH:
        return flat.to(torch.float64, copy=True)
    signs, found = _signs(name, flat.numel()), torch.zeros(WIDTH, dtype=torch.float64)
    for start in range(0, flat.numel(), _BLOCK):
        signed = flat[start : start + _BLOCK].double() * signs[start : start + _BLOCK]
        whole = signed.numel() // WIDTH * WIDTH
        found += signed[:whole].view(-1, WIDTH).sum(0)
        found[: signed.numel() - whole] += signed[whole:]
    return found


def _all_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _signs(name: str, count: int) -> torch.Tensor:
    """Plus or minus one, int8: the bits of random bytes."""
    draws = torch.randint(0, 256, (-(-count // 8), 1), generator=generator_of(name), dtype=torch.uint8)
    bits = (draws >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1)
    return bits.view(torch.int8).mul_(2).sub_(1).flatten()[:count]


def generator_of(name: str) -> torch.Generator:
    """On the CPU, seeded by a name: what is drawn from it is the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
