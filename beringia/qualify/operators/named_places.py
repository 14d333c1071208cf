"""Indices that an operator gives beside numbers, or in their stead: those of `topk`, `argmax`, a pooling.

Of equal numbers any may be named, so indices are not compared with indices: the numbers that lie where they point are.
An index that points at nothing is a finding of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from beringia.qualify.operators.watch import Call

_RESULT = {
    "topk": 1,
    "sort": 1,
    "max": 1,
    "min": 1,
    "median": 1,
    "nanmedian": 1,
    "kthvalue": 1,
    "mode": 1,
    "max_pool2d_with_indices": 1,
    "max_pool3d_with_indices": 1,
    "adaptive_max_pool2d": 1,
    "adaptive_max_pool3d": 1,
    "argmax": 0,
    "argmin": 0,
    "argsort": 0,
}
"""Which result of an operator has places in its first argument."""
_EACH_ONCE = frozenset({"topk", "sort", "argsort"})
"""Operators that name several places in a row, and none twice."""
_LAST_DIMENSION = frozenset({"topk", "sort", "argsort", "kthvalue", "mode"})
"""Operators that look along the last dimension where none is given; others, at all elements."""


def result_of_places(call: Call, exact: tuple[torch.Tensor, ...]) -> int | None:
    """Which of its results has places; None where none has."""
    result = _RESULT.get(_name(call))
    return result if result is not None and result < len(exact) and exact[result].dtype == torch.int64 else None


def are_indices(tensor: torch.Tensor, shape: torch.Size) -> bool:
    """Whether it can be read as places of that shape, in whatever dtype of whole numbers."""
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return whole and tensor.shape == shape


def lying_there(call: Call, indices: torch.Tensor) -> torch.Tensor:
    """The numbers of the first argument in these places, in its dtype; for a place that it does not have, any."""
    source, dim = _searched(call)
    places = indices.long().clamp(0, max(0, source.shape[dim] - 1))
    if source.dim() == 1:
        return source[places]
    pooled = _pooled_dimensions(call)
    if pooled:
        return source.gather(-1, places.flatten(-pooled)).view(places.shape)
    reduced = places.dim() < source.dim()
    found = source.gather(dim, places.unsqueeze(dim) if reduced else places)
    return found.squeeze(dim) if reduced else found


def outside(call: Call, indices: torch.Tensor) -> torch.Tensor:
    """Which indices point at nothing."""
    source, dim = _searched(call)
    places = indices.long()
    return (places < 0) | (places >= source.shape[dim])


def named_again(call: Call, indices: torch.Tensor) -> torch.Tensor:
    """Which indices name an element that another one of the same row names already, where an operator names each but
    once."""
    _, dim = _searched(call)
    if _name(call) not in _EACH_ONCE or indices.dim() == 0 or indices.shape[dim] < 2:
        return torch.zeros_like(indices, dtype=torch.bool)
    ordered, order = indices.long().sort(dim=dim)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    count = indices.shape[dim]
    again.narrow(dim, 1, count - 1).copy_(ordered.narrow(dim, 1, count - 1) == ordered.narrow(dim, 0, count - 1))
    return torch.empty_like(again).scatter_(dim, order, again)


def _searched(call: Call) -> tuple[torch.Tensor, int]:
    """The first argument, and the dimension of it that indices count along."""
    source: torch.Tensor = call.args[0]
    pooled = _pooled_dimensions(call)
    if pooled:
        return source.flatten(-pooled), -1
    dim = argument(call, "dim", -1 if _name(call) in _LAST_DIMENSION else None)
    return (source.flatten(), 0) if dim is None or source.dim() == 0 else (source, dim)


def _pooled_dimensions(call: Call) -> int:
    """Over how many dimensions a pooling counts; 0 where the operator is none."""
    name = _name(call)
    return 0 if "pool" not in name else 3 if "3d" in name else 2


def argument(call: Call, name: str, default: Any) -> Any:
    """What was given under a name of the operator's schema."""
    names = [one.name for one in call.func._schema.arguments]
    return dict(zip(names, call.args, strict=False)).get(name, call.kwargs.get(name, default))


def _name(call: Call) -> str:
    name: str = call.func.overloadpacket.__name__
    return name
