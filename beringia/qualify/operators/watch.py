"""Sees every operator call of a model on a chip, and says where it belongs: module, direction, which call.

A call below autograd has no module of its own. In the forward pass hooks know which module is running. In the backward
pass autograd's current node has the sequence number that it got in the forward pass, where it was noted which module
was running at that number. So both passes are attributed, whatever the chip makes of a module's operators.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from beringia.qualify.refusals import REFUSALS, NotJudged, first_line
from beringia.records.certificate import Direction

_NOT_COMPUTED = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "resize_",
    "set_",
)
"""Operators whose results are no numbers, or no new ones."""
_NOT_OF_THE_MODEL = ("profiler", "prim", "prims", "c10d", "_c10d_functional", "higher_order")
"""Namespaces of marks and of collectives, which have a probe of their own. Operators of a vendor's own are watched."""


@dataclass(frozen=True)
class Place:
    """Where a call belongs."""

    module: str
    operator: str
    direction: Direction
    ordinal: int
    """Which call of this operator in this module and direction, from 0."""
    position: int
    """Which call of all."""


@dataclass(frozen=True)
class Call:
    """One operator call, on the CPU: arguments as they were before it, results as they were after it."""

    place: Place
    func: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[torch.Tensor, ...]
    """First what it wrote in place, then what it returned, lists laid flat."""


@dataclass(frozen=True)
class RefusedCall:
    """A call that the chip did not carry out."""

    place: Place
    func: OpOverload
    shapes: tuple[tuple[int, ...], ...]
    words: str


def _of_the_judge(call: Call, error: Exception) -> Exception:
    """Never one of those that a chip raises, whose they would be taken for."""
    if not isinstance(error, REFUSALS):
        return error
    problem = NotJudged(f"{call.place.operator} was not judged: {first_line(error)}")
    problem.__cause__ = error
    return problem


CallCounts = Counter[tuple[str, str, Direction]]
"""How many calls were seen, by module, operator and direction."""


def in_backward() -> bool:
    """Whether autograd's backward pass is running."""
    return torch._C._current_graph_task_id() != -1


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook is untyped
    """Inside, every operator call with a tensor of the device is handed to `take`; no number of the run changes.

    >>> with Watch(model, chip.device, take) as watch, watch.direction("forward"):
    ...     model(tokens).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        take: Callable[[Call], None],
        counts: CallCounts | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        """`counts`: of the calls that were seen before, which this goes on with. `left_out`: modules whose calls, and
        those of the modules inside them, are made and counted and not handed on."""
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.refused: RefusedCall | None = None
        """The first call that raised; the error goes on to the caller, who knows the chip's words."""
        self._take = take
        self._left_out = tuple(f"{name}." for name in left_out)
        self._problem: Exception | None = None
        self._paused = False
        self._device = device
        self._stack = [""]
        self._phase: Direction = "forward"
        self._noted: list[tuple[int, str]] = []
        self._counts: CallCounts = Counter() if counts is None else counts
        self._position = self._counts.total()
        self._parameters = dict(model.named_parameters())
        self._named = WeakTensorKeyDictionary({parameter: name for name, parameter in model.named_parameters()})
        # Weak: a gradient is freed in each step, and another tensor may get its place.
        self._handles = [handle for name, module in model.named_modules() for handle in self._hook(name, module)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # untyped in torch
        if self._problem is not None and error is None:
            raise self._problem

    @contextmanager
    def paused(self, paused: bool = True) -> Iterator[None]:
        """Inside, calls are made and nothing is seen of them; but what is in a `paused(False)` there is."""
        before, self._paused = self._paused, paused
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Inside, calls outside the modules have this name in the place of a module's."""
        self._stack.append(name)
        try:
            yield
        finally:
            self._stack.pop()

    @contextmanager
    def direction(self, phase: Direction) -> Iterator[None]:
        """What calls outside the backward pass are."""
        before, self._phase = self._phase, phase
        if phase == "optimizer":
            # Gradients have no names of their own: those of their parameters.
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self._named[parameter.grad] = name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        backward = in_backward()
        if not backward:
            # Also where gradients are off: so runs a custom autograd function's forward, whose node has its number.
            self._noted.append((torch._C._autograd._get_sequence_nr(), self._stack[-1]))
        if self._paused or func.is_view or func.namespace in _NOT_OF_THE_MODEL or _packet(func) in _NOT_COMPUTED:
            return func(*args, **kwargs)
        kept, kept_kwargs = as_they_are(func, args, kwargs, _copied)
        try:
            result = func(*args, **kwargs)
        except REFUSALS as error:
            self._refuse(func, args, backward, error)
            raise
        results = results_of(func, args, kwargs, result)
        if any(tensor.device.type == self._device.type for tensor in (*tensors_in((args, kwargs)), *results)):
            place = self._place(func, args, backward)
            if f"{place.module}.".startswith(self._left_out):
                return result
            self._hand_on(Call(place, func, _to_cpu(kept), _to_cpu(kept_kwargs), tuple(_to_cpu(results))), backward)
        return result

    def _hand_on(self, call: Call, backward: bool) -> None:
        try:
            self._take(call)
        except Exception as error:
            problem = _of_the_judge(call, error)
            # Raised below autograd on a device made in Python, it would end the process without a word.
            if not backward:
                raise problem from problem.__cause__
            self._problem = self._problem or problem

    def _refuse(self, func: OpOverload, args: tuple[Any, ...], backward: bool, error: Exception) -> None:
        if self.refused is None:
            shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(args))
            self.refused = RefusedCall(
                self._place(func, args, backward),
                func,
                shapes,
                (str(error).splitlines() or [type(error).__name__])[0][:300],
            )

    def _place(self, func: OpOverload, args: tuple[Any, ...], backward: bool) -> Place:
        direction: Direction = "backward" if backward else self._phase
        module = self._module_of_node() if backward else self._stack[-1]
        if direction == "optimizer":
            module = self._parameter(args) or module
        key = (module, str(func), direction)
        ordinal = self._counts[key]
        self._counts[key] += 1
        self._position += 1
        return Place(module, str(func), direction, ordinal, self._position - 1)

    def _parameter(self, args: tuple[Any, ...]) -> str:
        tensor = next(tensors_in(args), None)
        return "" if tensor is None else self._name_of(tensor)

    def _name_of(self, tensor: torch.Tensor) -> str:
        return str(self._named.get(tensor, ""))  # type: ignore[no-untyped-call]  # untyped in torch

    def _module_of_node(self) -> str:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if variable is not None:  # the node that adds up a parameter's gradient
            return self._name_of(variable).rpartition(".")[0]
        # A node gets its number before its operator runs, which then finds the next number due.
        index = bisect.bisect_left(self._noted, (node._sequence_nr() + 1, ""))
        return self._noted[min(index, len(self._noted) - 1)][1] if self._noted else ""

    def _hook(self, name: str, module: nn.Module) -> list[Any]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._stack.append(name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._stack.pop()

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]


@cache
def written_arguments(func: OpOverload) -> tuple[int | str, ...]:
    """Arguments that an operator writes: position, or name if keyword-only."""
    places = enumerate(func._schema.arguments)
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in places
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def written_values(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that its operator writes."""
    return [
        args[place] if isinstance(place, int) else kwargs[place]
        for place in written_arguments(func)
        if (place < len(args) if isinstance(place, int) else place in kwargs)
    ]


def as_they_are(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], copied: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments before the operator writes any: copies of those that it writes, and of those that share memory with
    them (`x.mul_(x)`)."""
    written = {_memory_of(tensor) for tensor in tensors_in(written_values(func, args, kwargs))}
    if not written:
        return args, kwargs

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor) if _memory_of(tensor) in written else tensor

    return changed(args, kept), changed(kwargs, kept)


def results_of(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[torch.Tensor, ...]:
    """What a call wrote in place, then what else it returned, lists laid flat. What an `output_mask` does not ask for
    is no result: some chips give it all the same, and autograd drops it."""
    written = list(tensors_in(written_values(func, args, kwargs)))
    asked = _asked(func, args, kwargs)
    if asked is not None and isinstance(result, tuple) and len(asked) == len(result):
        result = tuple(one for one, wanted in zip(result, asked, strict=True) if wanted)
    return (*written, *(tensor for tensor in tensors_in(result) if not any(tensor is one for one in written)))


def _asked(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[bool] | None:
    """Which of its results a backward operator is asked for; None where it is not said."""
    place = _place_of_mask(func)
    if place is None or place >= len(args):
        return next((kwargs[name] for name in _MASKS if name in kwargs), None)
    asked: Sequence[bool] = args[place]
    return asked


_MASKS = ("output_mask", "grad_input_mask")


@cache
def _place_of_mask(func: OpOverload) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return next((names.index(name) for name in _MASKS if name in names), None)


def _memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, and for all of which that cannot be told."""
    try:
        storage = tensor.untyped_storage()
        return int(storage._cdata) if storage.data_ptr() else 0
    except RuntimeError:  # a sparse tensor, or one on the meta device, has no storage
        return 0


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([changed(item, change) for item in value])
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    return value


def _packet(func: OpOverload) -> str:
    name: str = func.overloadpacket.__name__
    return name


def _to_cpu(value: Any) -> Any:
    # In this order: on a device made in Python, detaching is a call of its own.
    return changed(value, lambda tensor: tensor.cpu().detach())


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().detach().clone()
