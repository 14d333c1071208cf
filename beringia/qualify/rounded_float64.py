"""A sound chip on any CPU: every operator's result is float64's, rounded once to the dtype that it should have.

What a reference's own arithmetic is judged beside. Draws that the reference makes itself would say that its faults are
noise; here its kernels' numbers are replaced one by one, in the forward and in the backward pass alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from beringia.qualify.operators.float64 import NotKnown, in_float64
from beringia.qualify.operators.parts import in_parts
from beringia.qualify.operators.watch import Call, Place, as_they_are, results_of

_NOWHERE = Place("", "", "forward", 0, 0)


class RoundedFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook is untyped
    """Inside, operators on the CPU give float64's results, rounded; those without a float64 form give their own.

    >>> with RoundedFloat64():
    ...     model(tokens).backward()
    """

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        before, before_named = as_they_are(func, args, kwargs, torch.clone)
        result = func(*args, **kwargs)
        results = results_of(func, args, kwargs, result)
        if any(_is_rounded(one) for one in results):
            _replace(Call(_NOWHERE, func, before, before_named, results))
        return result


def _replace(call: Call) -> None:
    """Write float64's numbers over the call's own."""
    for part in in_parts(call):
        try:
            exact = in_float64(part.call)
        except NotKnown:
            return
        for found, right in zip(part.call.results, exact, strict=False):
            if _is_rounded(found) and found.shape == right.shape:
                found.copy_(right)


def _is_rounded(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64
