"""Splits a call on lists of tensors (`_foreach_mul_`, `_fused_adamw_`) into calls on parts of those lists.

Such operators treat every entry of their lists alone, and nearly all every element. An optimizer's call has all
weights, gradients and moments at once, and judged in one piece it takes ten times their memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from beringia.qualify.operators.watch import Call, changed, tensors_in

PART_BYTES = 16 * 2**20
"""Of arguments in one part."""
_WHOLE_ENTRIES = ("_foreach_norm", "_foreach_max")
"""These look at all elements of an entry."""


@dataclass(frozen=True)
class Part:
    """A part of a call, which is a call as well."""

    call: Call
    first_row: int = 0
    """Where its tensors begin in those of the whole call, along their first dimension."""


def in_parts(call: Call) -> Iterator[Part]:
    """The parts, which together are the call; a call without lists is its only part."""
    count = num_entries(call)
    if not count:
        yield Part(call)
        return
    lists = [value for value in (*call.args, *call.kwargs.values()) if _is_tensors(value) and len(value) == count]
    for entries in _ranges([sum(_bytes(column[index]) for column in lists) for index in range(count)]):
        yield from _in_rows(of_entries(call, entries))


def num_entries(call: Call) -> int:
    """Of each of its lists; 0 where it treats no entry alone."""
    first = next((value for value in (*call.args, *call.kwargs.values()) if _is_tensors(value)), ())
    alone = call.func.overloadpacket.__name__.startswith(("_foreach_", "_fused_"))
    return len(first) if alone and first and len(call.results) % len(first) == 0 else 0


def of_entries(call: Call, entries: Sequence[int]) -> Call:
    """The call on these entries of its lists."""
    count = num_entries(call)

    def those_of(value: Any) -> Any:
        # Also of a list with a number for each tensor.
        return [value[index] for index in entries] if isinstance(value, list | tuple) and len(value) == count else value

    return replace(
        call,
        args=tuple(map(those_of, call.args)),
        kwargs={name: those_of(value) for name, value in call.kwargs.items()},
        results=tuple(call.results[start + index] for start in range(0, len(call.results), count) for index in entries),
    )


def _in_rows(call: Call) -> Iterator[Part]:
    """Parts with some rows of one entry that is too large."""
    given = list(tensors_in((call.args, call.kwargs)))
    shape, size = given[0].shape, _bytes(given)
    whole = call.func.overloadpacket.__name__.startswith(_WHOLE_ENTRIES)
    if whole or size <= PART_BYTES or not shape or any(result.shape != shape for result in call.results):
        yield Part(call)
        return
    rows = max(1, shape[0] * PART_BYTES // size)
    for first in range(0, shape[0], rows):

        def cut(tensor: torch.Tensor, first: int = first) -> torch.Tensor:
            return tensor[first : first + rows] if tensor.shape == shape else tensor

        yield Part(
            replace(
                call,
                args=changed(call.args, cut),
                kwargs=changed(call.kwargs, cut),
                results=tuple(cut(result) for result in call.results),
            ),
            first,
        )


def _ranges(sizes: Sequence[int]) -> Iterator[range]:
    """Neighbours together as long as they fit."""
    start, filled = 0, 0
    for index, size in enumerate(sizes):
        if index > start and filled + size > PART_BYTES:
            yield range(start, index)
            start, filled = index, 0
        filled += size
    yield range(start, len(sizes))


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))
