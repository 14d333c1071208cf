"""A PyTorch device in pure Python: tensors that say `emu:0` and keep their numbers in a CPU tensor.

`EmulatedTensor` is a wrapper subclass with `__torch_dispatch__`; operators that have no tensor argument (factories)
come through a boxed PrivateUse1 fallback. Each operator gets one handler, planned from its schema when it is first met
and kept in a dict, because the handler's own cost is paid a few thousand times in a training step.

What an operator computes is its *kernel*, a function of CPU tensors: ATen's own, or one given to `install` (an
arithmetic's, see `kernels.py`). *Interposers* given to `install` may wrap any kernel (see `faults.py`).

Does not emulate: storage pointers (0), streams (one), `torch.Generator(device="emu")`, autocast's casts, FSDP2.
One process has one PrivateUse1 device, under one name, for its whole life.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

from beringia.errors import ChipUnavailable

Kernel = Callable[..., Any]
"""Computes an operator from CPU tensors, with the operator's own arguments."""
Interposer = Callable[[OpOverload, Kernel], Kernel]
"""Gives back the kernel, or another one that calls it."""
Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_CPU = torch.device("cpu")
_aten = torch.ops.aten


class EmulatedTensor(torch.Tensor):
    """A tensor on the emulated device; `_cpu` holds its numbers."""

    _cpu: torch.Tensor

    # Operators are met in __torch_dispatch__ only; torch functions need no interception and would cost time.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own idiom

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> EmulatedTensor:
        if plain.is_conj() or plain.is_neg():  # a bit that says how to read numbers, which is lost below dispatch
            plain = plain.resolve_conj().resolve_neg()
        wrapper: EmulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            layout=plain.layout,
            device=_state.device,
        )
        wrapper._cpu = plain
        return wrapper

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as a plain method
        cls, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _state.late_error is not None and not in_backward():
            error, _state.late_error = _state.late_error, None
            raise error
        handler = _state.handlers.get(func)
        if handler is None:
            handler = _state.handlers[func] = _plan(func)
        return handler(args, kwargs or {})

    def tolist(self) -> Any:
        # torch reads the storage itself here, which a wrapper does not have.
        return self._cpu.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where its numbers lie: two tensors of the device share memory where those behind them do."""
        return self._cpu.untyped_storage()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        ending = f", requires_grad={self.requires_grad})" if self.is_leaf and self.requires_grad else ")"
        return f"{repr(self._cpu)[:-1]}, device='{self.device}'{ending}"


class _State:
    """The one emulated device of this process."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.too_late = False
        """Whether this process had made a backward pass before the device was there."""
        self.device = _CPU
        self.handlers: dict[OpOverload, Handler] = {}
        self.kernels: Mapping[OpOverload, Kernel] = {}
        self.interposers: Sequence[Interposer] = ()
        self.generator = torch.Generator()
        self.libraries: list[torch.library.Library] = []
        self.late_error: RuntimeError | None = None
        """Of an operator in the backward pass, to be raised by the first one after it."""


_state = _State()


def register(name: str = "emu", module_extras: Mapping[str, Any] | None = None) -> torch.device:
    """Make the device exist as `<name>:0`; a second call with the same name does nothing.

    `module_extras` become attributes of `torch.<name>`, beside those that every device module has.
    Raises ChipUnavailable when this process already has a device with another name (torch has room for one), or has
    made a backward pass without it.
    """
    if _state.name is None:
        _register_once(name)
        _state.too_late = not _backward_works()
    elif _state.name != name:
        raise ChipUnavailable(
            f"A device called {name!r} was asked for, but this process already has {_state.name!r}, and torch has room "
            "for one plugin device: start another process."
        )
    if _state.too_late:
        raise ChipUnavailable(
            f"The device {name!r} was asked for in a process that has made a backward pass without it, and torch takes "
            "no new device then: open the chip before (beringia.chip), or start another process."
        )
    module = getattr(torch, name)
    for attribute, value in (module_extras or {}).items():
        setattr(module, attribute, value)
    return _state.device


def _backward_works() -> bool:
    """Torch makes the queues of its backward passes in the first one, for the devices that there are then."""
    with torch.inference_mode(False), torch.enable_grad():  # whoever opens a chip may be inside another mode
        try:
            torch.ones(1, device=_state.device, requires_grad=True).neg().backward()  # type: ignore[no-untyped-call]  # untyped in torch
        except RuntimeError:
            return False
    return True


def install(kernels: Mapping[OpOverload, Kernel], interposers: Sequence[Interposer] = ()) -> None:
    """Give the device its arithmetic and its interposers, replacing what it had."""
    _state.kernels = kernels
    _state.interposers = tuple(interposers)
    _state.late_error = None
    _state.handlers.clear()


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor behind a tensor of the device (shared, not copied), or the tensor itself."""
    return tensor._cpu if isinstance(tensor, EmulatedTensor) else tensor


# ---- wrapping and unwrapping


def _plain(value: Any) -> Any:
    if isinstance(value, EmulatedTensor):
        return value._cpu
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_plain(item) for item in value])
    if kind is torch.device and value.type == _state.name:
        return _CPU
    return value


def _wrapped(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if isinstance(value, EmulatedTensor) else EmulatedTensor(value)
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_wrapped(item) for item in value])
    return value


def _same_device(func: OpOverload, args: tuple[Any, ...]) -> None:
    """What a real device refuses too: a tensor of another device among the arguments (numbers of no dimension pass)."""
    for value in args:
        if isinstance(value, torch.Tensor) and not isinstance(value, EmulatedTensor) and value.dim() > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {_state.device} and "
                f"{value.device}! (when checking arguments of {func})"
            )


# ---- one handler per operator


def _plan(func: OpOverload) -> Handler:
    """The handler of an operator, from its schema."""
    if func.namespace == "c10d":
        return _collective(func, _kernel(func))
    if func in _CROSSING:
        return _CROSSING[func](func, _kernel(func))
    if func is _aten.scaled_dot_product_attention.default:
        return lambda args, kwargs: _attention(*args, **kwargs)
    if func not in _state.kernels and func._can_decompose():
        return lambda args, kwargs: func.decompose(*args, **kwargs)
    if torch.Tag.inplace_view in func.tags:
        return _changing_shape(func, _kernel(func))
    written = _written_arguments(func)
    if written is not None:
        return _in_place(func, _kernel(func), written)
    return _fresh(func, _kernel(func))


def _kernel(func: OpOverload) -> Kernel:
    kernel: Kernel = _state.kernels.get(func, func)
    if torch.Tag.nondeterministic_seeded in func.tags:
        kernel = _drawing(func, kernel)
    for interpose in _state.interposers:
        kernel = interpose(func, kernel)
    return kernel if kernel is func else _raising_late(func, kernel)


def _raising_late(func: OpOverload, kernel: Kernel) -> Kernel:
    """An error in the backward pass comes to light after it, as errors of hardware do, which works behind the host.

    It has to: torch calls the device guard, which is Python here, while the error unwinds autograd's C++, and Python
    called with an error under way ends the process.
    """

    def compute(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except RuntimeError as error:
            if not in_backward():
                raise
            _state.late_error = _state.late_error or error
            return _state.kernels.get(func, func)(*args, **kwargs)

    return compute


def in_backward() -> bool:
    """Whether autograd's engine is running."""
    return torch._C._current_graph_task_id() != -1


def _drawing(func: OpOverload, kernel: Kernel) -> Kernel:
    """Draw from the device's generator where the caller gave none."""
    if not any(argument.name == "generator" for argument in func._schema.arguments):
        return kernel

    def draw(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None:
            kwargs["generator"] = _state.generator
        return kernel(*args, **kwargs)

    return draw


def _written_arguments(func: OpOverload) -> list[int | str | None] | None:
    """For each result, the argument that it is, written in place (position, or name if keyword-only), or None where it
    is a new tensor.

    None where nothing is written; an empty list for operators that write and return nothing (`_foreach_add_`).
    """
    schema = func._schema
    places: dict[str, int | str] = {}
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for name in argument.alias_info.before_set:
                places[name] = argument.name if argument.kwarg_only else position
    if not places:
        return None
    return [places[next(iter(one.alias_info.before_set))] if one.alias_info else None for one in schema.returns]


def _fresh(func: OpOverload, kernel: Kernel) -> Handler:
    foreign_allowed = func in _FOREIGN_ALLOWED
    make = EmulatedTensor

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not foreign_allowed:
            _same_device(func, args)
        plain = [value._cpu if isinstance(value, make) else _plain(value) for value in args]
        if kwargs:
            kwargs = {name: _plain(value) for name, value in kwargs.items()}
        result = kernel(*plain, **kwargs)
        return make(result) if type(result) is torch.Tensor else _wrapped(result)

    return handle


def _in_place(func: OpOverload, kernel: Kernel, written: list[int | str | None]) -> Handler:
    foreign_allowed = func in _FOREIGN_ALLOWED

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not foreign_allowed:
            _same_device(func, args)
        found = kernel(*[_plain(value) for value in args], **{name: _plain(value) for name, value in kwargs.items()})
        # As a batch norm, which writes its averages, an operator may return new tensors, too.
        new = found if isinstance(found, tuple) else (found,)
        results = [
            _wrapped(new[number]) if place is None else args[place] if isinstance(place, int) else kwargs[place]
            for number, place in enumerate(written)
        ]
        for result in results:
            _follow_shape(result)
        return results[0] if len(results) == 1 else tuple(results) if results else None

    return handle


def _follow_shape(result: Any) -> None:
    """An `out=` that was resized: the wrapper takes the sizes of what it holds."""
    if isinstance(result, EmulatedTensor) and result._cpu.shape != result.shape:
        result.data = EmulatedTensor(result._cpu)


def _changing_shape(func: OpOverload, kernel: Kernel) -> Handler:
    """`t_`, `squeeze_`, `resize_`, ...: the wrapper's own sizes have to follow."""

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = kernel(*_plain(args), **{name: _plain(value) for name, value in kwargs.items()})
        return return_and_correct_aliasing(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            func, args, kwargs, _wrapped(result)
        )

    return handle


def _to_copy(func: OpOverload, kernel: Kernel) -> Handler:
    """`_to_copy`: what goes to the CPU leaves the device, everything else stays."""

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = kwargs.get("device")
        leaves = target is not None and target.type == "cpu"
        if target is not None:
            kwargs = {**kwargs, "device": _CPU}
        result = kernel(_plain(args[0]), **kwargs)
        return result if leaves else EmulatedTensor(result)

    return handle


def _collective(func: OpOverload, kernel: Kernel) -> Handler:
    """Collectives run on the CPU tensors, in place; the caller gets its own tensors back beside the work handle."""

    def handle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = kernel(*_plain(args), **{name: _plain(value) for name, value in kwargs.items()})
        if isinstance(result, tuple) and isinstance(result[0], torch.Tensor | list | tuple):
            return (args[0], *result[1:])
        return result

    return handle


_CROSSING: dict[OpOverload, Callable[[OpOverload, Kernel], Handler]] = {_aten._to_copy.default: _to_copy}
_FOREIGN_ALLOWED = frozenset(
    {
        _aten.copy_.default,
        _aten._copy_from.default,
        _aten._copy_from_and_resize.default,
        # As on CUDA, index tensors may lie on the CPU (they are in a list), and so may what is only compared or read.
        _aten.index.Tensor,
        _aten.index_put_.default,
        _aten.index_put.default,
        _aten._index_put_impl_.default,
    }
)
"""Operators whose tensor arguments may lie on different devices."""


# ---- registration


def _register_once(name: str) -> None:
    module = _device_module(name)
    # The public way to make a Python device (marked experimental in torch 2.10 to 2.14).
    backend_registration._setup_privateuseone_for_python_backend(
        rename=name, backend_module=module, device_guard=_Guard()
    )
    _state.name = name
    _state.device = torch.device(name, 0)
    library: Any = torch.library.Library  # untyped in torch
    anything = library("_", "IMPL")
    anything.fallback(_without_tensors, "PrivateUse1")
    anything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    kernels = library("aten", "IMPL")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    # `torch.tensor(..., device=...)` copies with Python dispatch off, where only this is looked up.
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    # Torch asks a table in C++ which devices have fused attention, and this one cannot be in it.
    kernels.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    # `module.to(device)` would make a new parameter for each name, and so untie tied weights.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # A library's registrations end with it.
    _state.libraries += [anything, kernels]


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


def _without_tensors(func: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Operators that reach the device without one of its tensors: factories such as `arange`."""
    return EmulatedTensor.__torch_dispatch__(func, (), args, kwargs)


def _empty(size: Sequence[int], **options: Any) -> torch.Tensor:
    return EmulatedTensor(torch.empty(size, **_on_cpu(options)))


def _empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> torch.Tensor:
    return EmulatedTensor(torch.empty_strided(size, stride, **_on_cpu(options)))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    numbers(target).copy_(numbers(source))
    return target


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The device's fused attention; torch's composite of single operators where there is dropout or no four dimensions.

    Torch itself differentiates the fused operator. Heads that share keys are told by their number.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    if dropout_p > 0.0 or query.dim() != 4 or (is_causal and attn_mask is not None):
        single = _aten._scaled_dot_product_attention_math.default
        results = single(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:
        fused = _aten._scaled_dot_product_fused_attention_overrideable.default
        results = fused(query, key, value, attn_mask, 0.0, is_causal, False, scale=scale)
    out: torch.Tensor = results[0]
    return out


def _on_cpu(options: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in options.items() if value is not None and name != "pin_memory"}
    return {**kept, "device": _CPU}


class _Stream:
    """There is one queue, and it is always empty: operators end before they return."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *details: object) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _device_module(name: str) -> types.ModuleType:
    """`torch.<name>`, with what torch asks of a device's module."""
    module = types.ModuleType(f"torch.{name}")
    provided: dict[str, Any] = {
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": _manual_seed,
        "manual_seed_all": _manual_seed,
        "get_rng_state": lambda device=None: _state.generator.get_state(),
        "set_rng_state": lambda new_state, device=None: _state.generator.set_state(new_state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: stream,
        "current_stream": lambda device=None: _Stream(),
    }
    for attribute, value in provided.items():
        setattr(module, attribute, value)
    return module


def _manual_seed(seed: int) -> None:
    _state.generator.manual_seed(seed)
