"""Faults that give wrong numbers: gradients, masks, flipped bits, stuck tiles, hidden NaN, an order that changes.

Letters: B batch, H heads, T queries, S keys, D head size; M, K, N as in products.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated.device import Kernel, in_backward
from beringia.chips.emulated.planted import (
    ADAMW_MOMENTS,
    ADAMW_UPDATES,
    ATTENTION,
    ATTENTION_BACKWARD,
    FIRST_FACTOR,
    FUSED_ADAMW,
    INTEGERS,
    PRODUCTS,
    Host,
    Planted,
    tensors_of,
)

aten = torch.ops.aten

_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})


class WrongBackward(Planted):
    """See `script.WrongBackward`."""

    fault: script.WrongBackward
    _calls: dict[int, int]

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._calls = {}

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if self.fault.operator == "linear":
            return self._linear(func, kernel) if func in PRODUCTS else kernel
        if func is ATTENTION:
            return self._numbering(kernel)
        if func is ATTENTION_BACKWARD:
            return self._attention_backward(kernel)
        return self._softmax_backward(kernel) if func is aten._softmax_backward_data.default else kernel

    def _numbering(self, kernel: Kernel) -> Kernel:
        """Remember which forward call a log-sum-exp belongs to: the backward pass brings it back."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            self._calls[result[1].data_ptr()] = self.count
            self.count += 1
            return result

        return forward

    def _attention_backward(self, kernel: Kernel) -> Kernel:
        def backward(*args: Any, **kwargs: Any) -> Any:
            gradients = kernel(*args, **kwargs)
            number = self._calls.get(args[7].data_ptr(), -1)
            if self.present and (self.fault.sites is None or number in self.fault.sites):
                self._spoil(gradients[:3], ATTENTION_BACKWARD)
            return gradients

        return backward

    def _softmax_backward(self, kernel: Kernel) -> Kernel:
        """Attention made of single operators has this one of its own: B H T S."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            gradient = kernel(*args, **kwargs)
            if gradient.dim() == 4 and self.strikes_here():
                self._spoil([gradient], aten._softmax_backward_data.default)
            return gradient

        return backward

    def _linear(self, func: OpOverload, kernel: Kernel) -> Kernel:
        place = FIRST_FACTOR.get(func, 0)

        def product(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if in_backward() and not _is_transposed(args[place]) and self.strikes_here():
                self._spoil([result], func)
            return result

        return product

    def _spoil(self, gradients: Sequence[torch.Tensor], func: OpOverload) -> None:
        """Rows (the last dimension but one) from `length` on, in place."""
        changed = False
        for gradient in gradients:
            wrong = gradient[..., self.fault.length :, :]
            if wrong.shape[-2] > 0:
                error = self.fault.strength * wrong.roll(1, dims=-2)
                changed |= bool(error.any())
                wrong -= error
        if changed:
            self.report(func)


class MaskIgnored(Planted):
    """See `script.MaskIgnored`."""

    fault: script.MaskIgnored

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func is ATTENTION:
            return self._forward(kernel)
        return self._backward(kernel) if func is ATTENTION_BACKWARD else kernel

    def _forward(self, kernel: Kernel) -> Kernel:
        def forward(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            bias: torch.Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if self.strikes_here() and q.shape[-2] > self.fault.length:
                bias, is_causal = self._open(q, k, bias, is_causal, ATTENTION), False
            return kernel(q, k, v, bias, dropout_p, is_causal, *args, **kwargs)

        return forward

    def _backward(self, kernel: Kernel) -> Kernel:
        def backward(
            grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kw: Any
        ) -> Any:
            if self.present and q.shape[-2] > self.fault.length and self.fault.sites is None:
                # bias is the first of the others, is_causal the tenth.
                bias = self._open(q, k, args[0], args[9], ATTENTION_BACKWARD)
                args = (bias, [*args[1][:3], False], *args[2:9], False, *args[10:])
            return kernel(grad, q, k, v, *args, **kw)

        return backward

    def _open(
        self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, is_causal: bool, func: OpOverload
    ) -> torch.Tensor:
        """The mask with nothing hidden from queries past the length."""
        queries, keys = q.shape[-2], k.shape[-2]
        mask = torch.zeros((queries, keys), dtype=q.dtype)
        if is_causal:
            mask.masked_fill_(torch.ones((queries, keys), dtype=torch.bool).triu_(1), float("-inf"))
        if bias is not None:
            mask = mask + bias
        if mask[..., self.fault.length :, :].any():
            self.report(func)
        mask[..., self.fault.length :, :] = 0.0
        return mask


class BitFlip(Planted):
    """See `script.BitFlip`."""

    fault: script.BitFlip
    # Operators of torch's AdamW that write it as their first argument; its place in the one kernel's.
    _WRITTEN = {"weights": ADAMW_UPDATES, "optimizer-state": ADAMW_MOMENTS}
    _FUSED = {"weights": 0, "optimizer-state": 2}

    def __init__(self, fault: script.Scheduled, position: int, device: Host) -> None:
        super().__init__(fault, position, device)
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], OpOverload]] = {}

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        living = [(tensor, func) for ref, func in self._seen.values() if (tensor := ref()) is not None]
        self._seen.clear()
        if self.present:
            for number, (tensor, func) in enumerate(living):
                if self.is_site(number):
                    self._flip(tensor, func)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if self.fault.target in ("activations", "gradients"):
            return self._in_products(func, kernel) if func in PRODUCTS else kernel
        if func in FUSED_ADAMW:
            return self._watching(func, kernel, self._FUSED[self.fault.target])
        return self._watching(func, kernel, 0) if func in self._WRITTEN[self.fault.target] else kernel

    def _in_products(self, func: OpOverload, kernel: Kernel) -> Kernel:
        wanted = self.fault.target == "gradients"

        def product(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if in_backward() == wanted and self.strikes_here():
                self._flip(result, func)
            return result

        return product

    def _watching(self, func: OpOverload, kernel: Kernel, place: int) -> Kernel:
        """Note, without keeping them alive, the tensors that the optimizer writes, in its order."""

        def update(*args: Any, **kwargs: Any) -> Any:
            for tensor in args[place] if isinstance(args[place], list | tuple) else [args[place]]:
                self._seen[tensor.data_ptr()] = weakref.ref(tensor), func
            return kernel(*args, **kwargs)

        return update

    def _flip(self, tensor: torch.Tensor, func: OpOverload) -> None:
        flip_bits_(tensor, self.fault.flips, self.fault.bits, self.fault.width, self.generator)
        if tensor.numel() > 0:
            self.report(func)


class StuckTile(Planted):
    """See `script.StuckTile`."""

    fault: script.StuckTile

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func not in PRODUCTS:
            return kernel
        size = self.fault.size
        rows = slice(self.fault.row * size, (self.fault.row + 1) * size)
        columns = slice(self.fault.column * size, (self.fault.column + 1) * size)

        def product(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if self.strikes_here():
                tile = result[..., rows, columns]
                if (tile != self.fault.value).any():
                    self.report(func)
                tile.fill_(self.fault.value)
            return result

        return product


class NanToZero(Planted):
    """See `script.NanToZero`."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func.namespace != "aten" or func.is_view:
            return kernel

        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            # Every tensor is changed: the list is whole before `any` looks at it.
            if self.present and any([_nan_to_zero_(tensor) for tensor in tensors_of(result)]):
                self.report(func)
            return result

        return compute


class NondeterministicReduction(Planted):
    """See `script.NondeterministicReduction`."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func in _SUMS:
            return self._sum(func, kernel)
        return (
            self._product(func, kernel, FIRST_FACTOR.get(func, 0)) if func in PRODUCTS and _has_terms(func) else kernel
        )

    def _product(self, func: OpOverload, kernel: Kernel, place: int) -> Kernel:
        def product(*args: Any, **kwargs: Any) -> Any:
            if self.present:
                a, b = args[place], args[place + 1]
                order = self._order(a.shape[-1], func)
                shuffled = a.index_select(-1, order), b.index_select(-2, order)
                args = (*args[:place], *shuffled, *args[place + 2 :])
            return kernel(*args, **kwargs)

        return product

    def _sum(self, func: OpOverload, kernel: Kernel) -> Kernel:
        def total(x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
            if self.present:
                dims = range(x.dim()) if dim is None or dim == [] else dim
                for d in dims:
                    x = x.index_select(d, self._order(x.shape[d], func))
            return kernel(x, *([] if dim is None else [dim]), *args, **kwargs)

        return total

    def _order(self, count: int, func: OpOverload) -> torch.Tensor:
        """An order of terms. Reported though the sum may come out the same, which only a second call would tell."""
        order = torch.randperm(count, generator=self.generator)
        if count > 1 and not torch.equal(order, torch.arange(count)):
            self.report(func)
        return order


def _nan_to_zero_(tensor: torch.Tensor) -> bool:
    missing = tensor.isnan() if tensor.is_floating_point() else None
    if missing is None or not missing.any():
        return False
    tensor.masked_fill_(missing, 0.0)
    return True


def flip_bits_(tensor: torch.Tensor, flips: int, bits: tuple[int, int], width: int, generator: torch.Generator) -> None:
    """Flip bits of `flips` numbers in place; `bits` are counted as in float32, whose highest bit (sign) is 31."""
    if tensor.numel() == 0:
        return
    size = tensor.element_size()
    # The highest bits of a narrow format correspond to the highest of float32: bfloat16 is its upper half.
    shift = 32 - 8 * size
    low, high = (min(max(bit - shift, 0), 8 * size - 1) for bit in bits)
    places = torch.randint(tensor.numel(), (flips,), generator=generator)
    firsts = torch.randint(low, high + 1, (flips,), generator=generator).tolist()
    integers = tensor.view(INTEGERS[size])
    indices = list(zip(*(index.tolist() for index in torch.unravel_index(places, tensor.shape)), strict=True))
    for index, first in zip(indices, firsts, strict=True):
        integers[index] ^= _mask(first, width, 8 * size)


def _mask(first: int, width: int, size: int) -> int:
    """An integer with `width` bits set from `first` on, as a signed number of `size` bits."""
    mask = sum(1 << bit for bit in range(first, min(first + width, size)))
    return mask - (1 << size) if mask >> (size - 1) else mask


def _is_transposed(matrix: torch.Tensor) -> bool:
    """A weight's gradient has a transposed first factor, an input's gradient has not."""
    return matrix.stride(-1) > 1 and matrix.stride(-2) == 1


def _has_terms(func: OpOverload) -> bool:
    """Products whose two factors are whole matrices or batches."""
    return func not in (aten._grouped_mm.default, aten._scaled_mm.default)
