"""Sums in a declared order, on float32 CPU tensors.

The terms are brought to one axis, the last where they lie there already, else the first, so that every step of the
order is one addition of whole slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from beringia.chips.arithmetic.profile import Reduction


class Reduce:
    """`reduce(x, dim, keepdim)`: the sum over `dim` in the profile's order, and how many terms each sum has."""

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self.native = reduction.scheme == "native"

    def __call__(self, x: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> tuple[torch.Tensor, int]:
        dims = _normal_dims(dim, x.dim())
        terms, axis = _on_one_axis(x, dims)
        total = self._sum(terms, axis)
        shape = [1 if d in dims else size for d, size in enumerate(x.shape) if keepdim or d not in dims]
        return total.reshape(shape), terms.shape[axis]

    def _sum(self, terms: torch.Tensor, axis: int) -> torch.Tensor:
        count = terms.shape[axis]
        if count == 0:
            return terms.sum(axis)
        if self._reduction.scheme == "sequential":
            return _serial(terms, axis)
        if self._reduction.scheme == "lanes" and count > self._reduction.lanes:
            terms = self._lanes(terms, axis)
        return _tree(terms, axis)

    def _lanes(self, terms: torch.Tensor, axis: int) -> torch.Tensor:
        """Each lane's sum of its terms, lanes of all pieces on `axis`."""
        lanes, count = self._reduction.lanes, terms.shape[axis]
        serial = min(self._reduction.serial, -(-count // lanes))
        missing = -count % (lanes * serial)
        if missing:
            # Adding a zero changes no sum.
            sizes = list(terms.shape)
            sizes[axis] = missing
            terms = torch.cat([terms, terms.new_zeros(sizes)], dim=axis)
        pieces = torch.unflatten(terms, axis, (-1, serial, lanes))
        if axis == 0:
            return _serial(pieces, 1).flatten(0, 1)
        return _serial(pieces, -2).flatten(-2)


def _on_one_axis(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, int]:
    kept = [d for d in range(x.dim()) if d not in dims]
    sizes = [x.shape[d] for d in kept]
    count = math.prod(x.shape[d] for d in dims)
    if dims == list(range(len(kept), x.dim())):
        return x.reshape(*sizes, count), -1
    return x.permute(*dims, *kept).reshape(count, *sizes), 0


def _serial(terms: torch.Tensor, axis: int) -> torch.Tensor:
    first, *others = terms.unbind(axis)
    total = first.clone()
    for term in others:
        total += term
    return total


def _tree(terms: torch.Tensor, axis: int) -> torch.Tensor:
    """Halves added to each other until one is left; what exceeds a power of two is added at the beginning."""
    count = terms.shape[axis]
    width = 1 << (count.bit_length() - 1)
    if width < count:
        head = terms.narrow(axis, 0, width).clone()
        head.narrow(axis, 0, count - width).add_(terms.narrow(axis, width, count - width))
        terms = head
    while width > 1:
        width //= 2
        terms = terms.narrow(axis, 0, width) + terms.narrow(axis, width, width)
    return terms.select(axis, 0).clone()


def _normal_dims(dim: int | Sequence[int] | None, count: int) -> list[int]:
    """Dimensions from 0 up, in order; all of them where none is named."""
    if dim is None or count == 0 or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(count))
    return sorted(d % count for d in ([dim] if isinstance(dim, int) else dim))
