"""Faults of moving numbers: layouts, indices, additions that race, collectives.

Letters: M, K, N as in products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]  # not in torch's stubs
from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated.device import Kernel
from beringia.chips.emulated.planted import (
    FIRST_FACTOR,
    PRODUCTS,
    Planted,
    last_share,
    name_of,
    replace_,
    same_bits,
    tensors_of,
)

aten = torch.ops.aten


class WrongLayout(Planted):
    """See `script.WrongLayout`."""

    fault: script.WrongLayout

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func not in PRODUCTS:
            return kernel
        place = FIRST_FACTOR.get(func, 0) + 1

        def product(*args: Any, **kwargs: Any) -> Any:
            if self.present and not args[place].is_contiguous() and self.strikes_here():
                wrong = _swapped_rows(args[place], self.fault.strength)
                if not same_bits(wrong, args[place]):
                    args = (*args[:place], wrong, *args[place + 1 :])
                    self.report(func)
            return kernel(*args, **kwargs)

        return product


def _swapped_rows(b: torch.Tensor, share: float) -> torch.Tensor:
    """b (..., K, N) with neighbours of the first `share` of its rows swapped, in the layout that it has."""
    count = b.shape[-2] // 2
    paired = 2 * min(count, max(1, round(share * count)))
    wrong = b.clone()
    wrong[..., 0:paired:2, :] = b[..., 1:paired:2, :]
    wrong[..., 1:paired:2, :] = b[..., 0:paired:2, :]
    return wrong


class GarbageIndex(Planted):
    """See `script.GarbageIndex`."""

    fault: script.GarbageIndex

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if name_of(func) not in ("embedding", "index_select", "gather", "index", "_unsafe_index"):
            return kernel

        def read(*args: Any, **kwargs: Any) -> Any:
            if self.present and self.strikes_here():
                args = self._misread(func, args)
            return kernel(*args, **kwargs)

        return read

    def _misread(self, func: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with a wrong index among them."""
        index, rows = _index_and_rows(func, args)
        if index is None or rows == 0:
            return args
        # Any fixed garbage does: numbers that a reader finds in the script's description.
        wrong = torch.where(index >= self.fault.beyond, (index.long() * 7919 + 13) % rows, index).to(index.dtype)
        if torch.equal(wrong, index):
            return args
        self.report(func)
        return tuple(_with(argument, index, wrong) for argument in args)


def _index_and_rows(func: OpOverload, args: tuple[Any, ...]) -> tuple[torch.Tensor | None, int]:
    """The first index of a read that holds positions, and how many positions there are."""
    name, table = name_of(func), args[0]
    if name == "embedding":
        return args[1], table.shape[0]
    if name in ("index_select", "gather"):
        return args[2], table.shape[args[1]] if table.dim() else 1
    dim = 0
    for index in args[1]:
        if index is not None and index.dtype in (torch.int64, torch.int32):
            return index, table.shape[dim]
        # A mask stands for as many dimensions as it has.
        dim += 1 if index is None else index.dim()
    return None, 0


def _with(argument: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(argument, list | tuple):
        return [new if item is old else item for item in argument]
    return new if argument is old else argument


class LostAdditions(Planted):
    """See `script.LostAdditions`."""

    fault: script.LostAdditions
    # Word of a script -> operators and the position of the terms that they add up.
    _TERMS: dict[str, dict[str, int]] = {
        "scatter_add": {"scatter_add": 3, "scatter_add_": 3},
        "index_add": {"index_add": 3, "index_add_": 3},
        "index_put": {"index_put": 2, "index_put_": 2, "_index_put_impl_": 2, "_unsafe_index_put": 2},
        "embedding": {"embedding_dense_backward": 0},
        "sum": {"sum": 0},
    }

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        name = name_of(func)
        words = self._TERMS if self.fault.operator == "any" else (self.fault.operator,)
        places = {operator: place for word in words for operator, place in self._TERMS[word].items()}
        return kernel if name not in places else self._losing(func, kernel, places[name])

    def _losing(self, func: OpOverload, kernel: Kernel, place: int) -> Kernel:
        stores = name_of(func) in self._TERMS["index_put"]

        def add_up(*args: Any, **kwargs: Any) -> Any:
            adds = not stores or (len(args) > 3 and args[3])
            if self.present and adds and args[place].is_floating_point() and self.strikes_here():
                args = (*args[:place], self._without_some(args[place], func), *args[place + 1 :])
            return kernel(*args, **kwargs)

        return add_up

    def _without_some(self, terms: torch.Tensor, func: OpOverload) -> torch.Tensor:
        lost = torch.rand(terms.shape, generator=self.generator) < self.fault.strength
        if terms[lost].any():
            self.report(func)
        return terms.masked_fill(lost, 0.0)


class WrongCollective(Planted):
    """See `script.WrongCollective`."""

    fault: script.WrongCollective
    _NAMES = frozenset(
        {
            "allreduce_",
            "allgather_",
            "_allgather_base_",
            "reduce_scatter_",
            "_reduce_scatter_base_",
            "alltoall_",
            "alltoall_base_",
        }
    )

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace != "c10d" or name not in self._NAMES:
            return kernel

        def collective(*args: Any, **kwargs: Any) -> Any:
            outputs = _flat(args[0])
            if not (self.present and outputs and outputs[0].is_floating_point() and self.strikes_here()):
                return kernel(*args, **kwargs)
            missing = self.fault.error == "missing-rank"
            own = _own_contribution(name, args) if missing else []
            result = kernel(*args, **kwargs)
            # The transfer goes on after the call: what is changed before its end would be overwritten.
            (result[-1] if isinstance(result, tuple) else result).wait()
            if any([self._missing(*pair) for pair in own] if missing else [self._spoil(output) for output in outputs]):
                self.report(func)
            return (result[0], _finished(outputs)) if name == "_reduce_scatter_base_" else result

        return collective

    def _spoil(self, output: torch.Tensor) -> bool:
        if self.fault.error == "scaled":
            return replace_(output, output * (1.0 + self.fault.strength))
        wrong = output.flatten().clone()
        tail = wrong[last_share(wrong.numel(), self.fault.strength) :]
        half = tail.numel() // 2
        if half:
            tail.copy_(torch.cat([tail[-half:], tail[half:-half], tail[:half]]))
        return replace_(output, wrong.view(output.shape))

    def _missing(self, output: torch.Tensor, own: torch.Tensor | None) -> bool:
        """Take this rank's own part out of the last numbers of a result; None: the result is nothing else."""
        wrong = output.flatten().clone()
        start = last_share(wrong.numel(), self.fault.strength)
        wrong[start:] = 0.0 if own is None else wrong[start:] - own.flatten()[start:]
        return replace_(output, wrong.view(output.shape))


_SUMMED_BY = {"allreduce_": 2, "reduce_scatter_": 3, "_reduce_scatter_base_": 3}
"""Collectives that add up -> position of their operation."""
_Own = list[tuple[torch.Tensor, torch.Tensor | None]]


def _own_contribution(name: str, args: tuple[Any, ...]) -> _Own:
    """Where this rank's own part will lie in the results, and what is in a sum with others' (copied)."""
    rank, size = _place_in_group(args)
    if name in _SUMMED_BY:
        return _added_part(name, args, rank, size)
    if name == "allgather_":
        return [(outputs[rank], None) for outputs in args[0]]
    if name == "alltoall_":
        return [(args[0][rank], None)]
    output, splits = args[0], list(args[3]) if name == "alltoall_base_" else []
    if splits:
        return [(output.narrow(0, sum(splits[:rank]), splits[rank]), None)]
    return [(output.view(size, -1)[rank], None)]


def _added_part(name: str, args: tuple[Any, ...], rank: int, size: int) -> _Own:
    """What this rank adds to each result; nothing where the operation is no sum or average."""
    shares = {dist.ReduceOp.SUM.value: 1.0, dist.ReduceOp.AVG.value: 1.0 / size}
    share = shares.get(args[_SUMMED_BY[name]].op())
    if share is None:
        return []
    if name == "allreduce_":
        parts = args[0]
    elif name == "reduce_scatter_":
        parts = [inputs[rank] for inputs in args[1]]
    else:
        parts = [args[1].view(size, -1)[rank]]
    return [(output, part * share) for output, part in zip(tensors_of(args[0]), parts, strict=True)]


def _place_in_group(args: tuple[Any, ...]) -> tuple[int, int]:
    """Rank and size of the group among the arguments: torch hides it in a script object."""
    boxed = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
    group = dist.ProcessGroup.unbox(boxed)
    return group.rank(), group.size()


def _finished(outputs: list[torch.Tensor]) -> torch.ScriptObject:
    """A handle of work that is done. Gloo's own of this operation copies its result again whenever it is waited for."""
    done: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
    done.set_result(outputs)
    handle: torch.ScriptObject = _create_work_from_future(done).boxed()
    return handle


def _flat(outputs: Any) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in _flat(item)]
