"""Replay of a module on the CPU: the same forward and backward pass with given inputs, in a dtype of the caller's
choice.

`Taps` watch named modules while they run, on any device: input, output and the gradients of both. The same taps on the
chip's module and on its replica give tensors that can be compared one by one. Taps change no number of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

REFERENCE_DTYPE = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
    torch.float64: torch.float64,
}
"""What a replay computes in. float32 has 2^-16 (2^-13) of the unit roundoff of bfloat16 (float16): its own error, which
meets the same amplification, is nothing beside theirs."""


@dataclass
class Call:
    """One call of a module; gradients arrive during the backward pass, and stay None where there are none."""

    inputs: tuple[Any, ...]
    """The first positional argument is kept as the taps keep tensors, the others as they are."""
    output: torch.Tensor
    input_gradient: torch.Tensor | None = None
    output_gradient: torch.Tensor | None = None


class Taps:
    """Hooks on modules for as long as the context lasts.

    `keep` says what of each tensor is kept (one sample of the batch, or all of it). Calls that cannot be made again
    from their positional arguments are not noted: those whose first is no tensor, or that have others by keyword, or
    whose output is no single tensor.

    >>> with Taps({"": layer, "mlp": layer.mlp}, keep=lambda tensor: tensor[:1]) as taps:
    ...     layer(x_BTD, rope).backward(gradient_BTD)
    >>> taps.calls["mlp"][0].input_gradient
    """

    def __init__(self, modules: Mapping[str, nn.Module], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.calls: dict[str, list[Call]] = {name: [] for name in modules}
        self._modules = modules
        self._keep = keep
        self._entered: dict[str, tuple[torch.Tensor, int]] = {}
        """Inputs of the calls that run, kept before the module may write to them, and their versions."""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._watch(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks away; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if inputs and isinstance(inputs[0], torch.Tensor):
                self._entered[name] = self._kept(inputs[0]), inputs[0]._version
            return _own_input(inputs)

        return enter

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            first, entered = inputs[0] if inputs else None, self._entered.pop(name, None)
            if entered is None or not isinstance(output, torch.Tensor) or _any_given(named):
                return
            assert isinstance(first, torch.Tensor)
            (given, version), shape = entered, output.shape
            call = Call((given, *inputs[1:]), self._kept(output))
            self.calls[name].append(call)

            def note_input(gradient: torch.Tensor) -> None:
                call.input_gradient = self._kept(gradient)

            def note_output(gradient: torch.Tensor) -> None:
                if call.output_gradient is None:
                    call.output_gradient = self._kept(gradient.reshape(shape))

            written = first._version != version
            if first.requires_grad and not written:  # or it is another tensor now
                first.register_hook(note_input)  # type: ignore[no-untyped-call]  # untyped in torch
            if output.requires_grad:
                output.register_hook(note_output)  # type: ignore[no-untyped-call]  # untyped in torch
                base = _viewed(output, first, written)
                if base is not None:  # where the next module writes to the view, autograd passes its hook by
                    base.register_hook(note_output)  # type: ignore[no-untyped-call]  # untyped in torch

        return note

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._keep(tensor.detach())


def _own_input(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # An alias used by this module alone: its gradient is this module's share, where others read the same tensor too.
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return inputs
    return (first.view_as(first), *inputs[1:])


def _viewed(output: torch.Tensor, first: torch.Tensor, written: bool) -> torch.Tensor | None:
    """The tensor that an output is another shape of, whose gradient is the output's as well. None where it is none, or
    is the input, which others may read too: unless the module wrote to that."""
    base = output._base
    if base is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return None
    return base if written or (base is not first and base is not first._base) else None


def _any_given(named: Mapping[str, Any]) -> bool:
    """Whether an argument was given by keyword."""
    return any(value is not None for value in named.values())


def run(
    call: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    gradient: torch.Tensor,
    also: Iterable[torch.Tensor] = (),
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Forward and backward: the output, and the gradients of `x` and of the tensors in `also` (None where unused).

    `.grad` of no tensor changes, nor does `x`, which what is called may write to: it gets a copy.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = call(x.clone())
        gradients = torch.autograd.grad(output, (x, *also), gradient.to(output.dtype), allow_unused=True)
    return output.detach(), gradients


def place(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, trainable: bool = False) -> None:
    """Give a module these tensors as its parameters and buffers (shared, not copied); names as in `state_dict`."""
    for name, tensor in tensors.items():
        owner_name, _, last = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=trainable)
        else:
            owner._buffers[last] = tensor
