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
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(_own_input))
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

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            first = inputs[0] if inputs else None
            if not isinstance(first, torch.Tensor) or not isinstance(output, torch.Tensor) or _any_given(named):
                return
            call = Call((self._kept(first), *inputs[1:]), self._kept(output))
            self.calls[name].append(call)

            def note_input(gradient: torch.Tensor) -> None:
                call.input_gradient = self._kept(gradient)

            def note_output(gradient: torch.Tensor) -> None:
                call.output_gradient = self._kept(gradient)

            if first.requires_grad:
                first.register_hook(note_input)  # type: ignore[no-untyped-call]  # untyped in torch
            if output.requires_grad:
                output.register_hook(note_output)  # type: ignore[no-untyped-call]  # untyped in torch

        return note

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._keep(tensor.detach())


def _own_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # An alias used by this module alone: its gradient is this module's share, where others read the same tensor too.
    first = inputs[0] if inputs else None
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        return inputs
    return (first.view_as(first), *inputs[1:])


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

    `.grad` of no tensor changes.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = call(x)
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
