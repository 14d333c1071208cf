"""Whether a call's results have the number, shapes, dtypes and layouts that torch gives: the form, before any number.

Shapes, layouts and the dtypes of integers are those of the call in float64; floating dtypes are those of the arguments,
or, where these differ or name another, what torch says without computing (its meta device). Strides are the chip's own
affair: numbers are compared by index. So is the form of what an operator hands to its own backward pass beside its
result (a log-sum-exp, a norm's deviations).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from beringia.qualify.operators.watch import Call, changed, tensors_in, written_values


@dataclass(frozen=True)
class WrongForm:
    """What a result is and what it should be."""

    words: str
    has_numbers: bool
    """Whether its elements can be compared nevertheless: only the dtype is another."""


def wrong_form(call: Call, exact: tuple[torch.Tensor, ...]) -> WrongForm | None:
    """The first result of another form; None where there is none."""
    due = exact[: _own_results(call, len(exact))]
    if len(call.results) < len(due):
        return WrongForm(f"{len(call.results)} results where torch gives {len(due)}", has_numbers=False)
    dtypes = _dtypes(call)
    for place, (found, one) in enumerate(zip(call.results, due, strict=False)):
        dtype = one.dtype if not one.is_floating_point() else dtypes[place] if place < len(dtypes) else found.dtype
        here, there = _form(found.shape, found.dtype, found.layout), _form(one.shape, dtype, one.layout)
        if here != there:
            comparable = (found.shape, found.layout) == (one.shape, one.layout)
            return WrongForm(f"{here} where torch gives {there}", has_numbers=comparable)
    return None


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


def _dtypes(call: Call) -> list[torch.dtype]:
    """Of the results; empty where it is not known."""
    given = {tensor.dtype for tensor in tensors_in((call.args, dict(call.kwargs))) if tensor.is_floating_point()}
    if len(given) == 1 and not _names_a_dtype(call):
        return [*given] * len(call.results)
    args, kwargs = changed(call.args, _shadow), {name: _shadow(value) for name, value in call.kwargs.items()}
    try:
        result = call.func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # not every operator has such a form
        return []
    written = list(tensors_in(written_values(call.func, args, kwargs)))
    made = [tensor for tensor in tensors_in(result) if not any(tensor is one for one in written)]
    return [tensor.dtype for tensor in (*written, *made)]


def _names_a_dtype(call: Call) -> bool:
    named = [argument.name for argument in call.func._schema.arguments]
    values = [*zip(named, call.args, strict=False), *call.kwargs.items()]
    return any(isinstance(value, torch.dtype) or (name == "half_to_float" and value) for name, value in values)


def _shadow(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    return changed(value, lambda tensor: tensor.to("meta"))
