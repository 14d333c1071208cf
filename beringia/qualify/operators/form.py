"""Whether a call's results have the number, shapes, dtypes and layouts that torch gives: the form, before any number.

Shapes, layouts and the dtypes of integers are those of the call in float64; floating dtypes are those of the arguments,
or, where these differ or name another, what torch says without computing (its meta device), or else what the same call
gives on the CPU; attention's, which no two chips call alike, are its queries' or those of what a gradient is of. What
the same call gives on the CPU is right, too. Strides are the chip's own affair: numbers are compared by index. So is
the form of what an operator hands to its own backward pass beside its result (a log-sum-exp, a norm's deviations).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from beringia.qualify.operators.float64 import Attention, NotKnown, in_own_dtypes
from beringia.qualify.operators.watch import Call, tensors_in


@dataclass(frozen=True)
class WrongForm:
    """What a result is and what it should be."""

    words: str
    has_numbers: bool
    """Whether its elements can be compared nevertheless: only the dtype is another."""


def wrong_form(call: Call, exact: tuple[torch.Tensor, ...], dtypes: Sequence[torch.dtype]) -> WrongForm | None:
    """The first result of another form; None where there is none. `dtypes` are those due, as far as they are known."""
    due = exact[: _own_results(call, len(exact))]
    if len(call.results) < len(due):
        return WrongForm(f"{len(call.results)} results where torch gives {len(due)}", has_numbers=False)
    for place, (found, one) in enumerate(zip(call.results, due, strict=False)):
        dtype = _due(found, one, dtypes[place] if place < len(dtypes) else None)
        here, there = _form_of(found), _form(one.shape, dtype, one.layout)
        if here != there and not _so_on_the_cpu(call, place, found):
            comparable = (found.shape, found.layout) == (one.shape, one.layout)
            return WrongForm(f"{here} where torch gives {there}", has_numbers=comparable)
    return None


def _so_on_the_cpu(call: Call, place: int, found: torch.Tensor) -> bool:
    """Whether the call has a result of that very form here: what torch says without computing, and the rule of one
    dtype among the arguments, are not what its kernels do in every mixture of dtypes (`weight_norm`, `group_norm`)."""
    try:
        results = in_own_dtypes(call, "cpu")
    except NotKnown:
        return False
    return place < len(results) and _form_of(results[place]) == _form_of(found)


def _form_of(tensor: torch.Tensor) -> str:
    return _form(tensor.shape, tensor.dtype, tensor.layout)


def _due(found: torch.Tensor, exact: torch.Tensor, known: torch.dtype | None) -> torch.dtype:
    """The dtype that a result should have: float64's own where that is no real or complex number, and where it is, any
    of its kind if none is known."""
    if not (exact.is_floating_point() or exact.is_complex()):
        return exact.dtype
    alike = (found.is_floating_point(), found.is_complex()) == (exact.is_floating_point(), exact.is_complex())
    return known or (found.dtype if alike else exact.dtype)


def _form(shape: torch.Size, dtype: torch.dtype, layout: torch.layout) -> str:
    kind = "" if layout == torch.strided else f", {str(layout).removeprefix('torch.')}"
    return f"{list(shape)} in {str(dtype).removeprefix('torch.')}{kind}"


def _own_results(call: Call, count: int) -> int:
    """How many of the results are the operator's own, and not only for its backward pass."""
    name = call.func.overloadpacket.__name__
    if "attention" in name:
        return min(count, 3 if "backward" in name else 1)
    return 1 if name in _KEEPS_FOR_BACKWARD else count


_KEEPS_FOR_BACKWARD = frozenset({"native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"})


def dtypes_due(call: Call, exact: tuple[torch.Tensor, ...]) -> list[torch.dtype]:
    """Of the results that are the operator's own. Raises NotKnown where no device here has such a call."""
    tensors = list(tensors_in((call.args, dict(call.kwargs))))
    given = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    real = not any(tensor.is_complex() for tensor in (*tensors, *exact))  # or some are of numbers, and some of pairs
    if real and len(given) == 1 and not _names_a_dtype(call):
        return [*given] * len(call.results)
    attention = Attention.of(call)
    if attention is not None:
        return list(attention.dtypes)
    try:
        results = in_own_dtypes(call, "meta")
    except NotKnown:  # not every operator has a form without numbers
        results = in_own_dtypes(call, "cpu")
    return [tensor.dtype for tensor in results]


def _names_a_dtype(call: Call) -> bool:
    named = [argument.name for argument in call.func._schema.arguments]
    values = [*zip(named, call.args, strict=False), *call.kwargs.items()]
    return any(isinstance(value, torch.dtype) or (name == "half_to_float" and value) for name, value in values)
