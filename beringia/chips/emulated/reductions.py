"""Sums in a declared order, on float32 CPU tensors.

Reduced dimensions are moved to the front, so that every step of the order is one addition of whole slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from beringia.chips.emulated.profile import Reduction


class Reduce:
    """`reduce(x, dim, keepdim)`: the sum over `dim` in the profile's order, and how many terms each sum has."""

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self.native = reduction.scheme == "native"

    def __call__(self, x: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> tuple[torch.Tensor, int]:
        dims = _normal_dims(dim, x.dim())
        kept = [d for d in range(x.dim()) if d not in dims]
        terms = x.permute(*dims, *kept).reshape(-1, *(x.shape[d] for d in kept))
        total = self._sum(terms)
        if keepdim:
            total = total.reshape([1 if d in dims else x.shape[d] for d in range(x.dim())])
        return total, terms.shape[0]

    def _sum(self, terms: torch.Tensor) -> torch.Tensor:
        if terms.shape[0] == 0:
            return terms.new_zeros(terms.shape[1:])
        if self._reduction.scheme == "sequential":
            return _serial(terms)
        if self._reduction.scheme == "lanes":
            terms = self._lanes(terms)
        return _tree(terms)

    def _lanes(self, terms: torch.Tensor) -> torch.Tensor:
        """Each lane's sum of its `serial` terms: (pieces * lanes, ...)."""
        lanes, serial = self._reduction.lanes, self._reduction.serial
        missing = -terms.shape[0] % (lanes * serial)
        if missing:
            # Adding a zero changes no sum.
            terms = torch.cat([terms, terms.new_zeros((missing, *terms.shape[1:]))])
        in_order = terms.unflatten(0, (-1, serial, lanes)).transpose(0, 1)
        return _serial(in_order).flatten(0, 1)


def _serial(terms: torch.Tensor) -> torch.Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _tree(terms: torch.Tensor) -> torch.Tensor:
    """Add the second half to the first until one is left; an odd one out waits for the next level."""
    while (count := terms.shape[0]) > 1:
        half = count // 2
        added = terms[:half] + terms[half : 2 * half]
        terms = torch.cat([added, terms[2 * half :]]) if count % 2 else added
    return terms[0].clone()


def _normal_dims(dim: int | Sequence[int] | None, count: int) -> list[int]:
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(count))
    return [d % max(count, 1) for d in ([dim] if isinstance(dim, int) else dim)][: max(count, 0)]
