"""Faults inside the device: what a script's faults do to the kernels that they strike.

Each fault is an interposer: asked for each operator once, when the operator is first met, whether it wants to stand
between. While its schedule says that it is absent it costs one comparison a call.

Faults see operators and CPU tensors. They count matching operators since `begin_step`; they know no modules. What is
random comes from a CPU generator of (seed, step, position in the script).

Letters: B batch, H heads, T queries, S keys, D head size; M, K, N as in products.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated import fault_words as words
from beringia.chips.emulated.device import Interposer, Kernel
from beringia.records.files import write_text
from beringia.records.record import canonical_hash

aten = torch.ops.aten

_ATTENTION = aten._scaled_dot_product_fused_attention_overrideable.default
_ATTENTION_BACKWARD = aten._scaled_dot_product_fused_attention_overrideable_backward.default
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
        aten._scaled_mm.default,
    }
)
_FIRST_FACTOR = {aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Position of the first factor where it is not 0."""
_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})


class Planted:
    """A fault in a device: whether it is present in this step, and how often it matched since the step began."""

    def __init__(self, fault: script.Scheduled, position: int, device: Device) -> None:
        self.fault = fault
        self.position = position
        self.device = device
        self.present = False
        self.count = 0
        self.generator = torch.Generator()

    def begin_step(self, step: int) -> None:
        """Decide whether it is present in this step."""
        self.count = 0
        self.generator.manual_seed(_mixed(self.device.seed, step, self.position, self.device.index))
        self.present = self._due(step) and self.device.history.allows(self.position, self.fault, step)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        """The kernel, or one that this fault strikes."""
        return kernel

    def strikes_here(self) -> bool:
        """Count one more match, and tell whether it is a site of this fault."""
        number = self.count
        self.count += 1
        sites = getattr(self.fault, "sites", None)
        return self.present and (sites is None or number in sites)

    def _due(self, step: int) -> bool:
        if not self.fault.due(step) or self.fault.device not in (None, self.device.index):
            return False
        return self.fault.rate == 1.0 or bool(torch.rand((), generator=self.generator) < self.fault.rate)


class Device:
    """The faults of one device."""

    def __init__(self, plan: script.FaultScript, *, vendor: str, seed: int, index: int, memory: Path | None) -> None:
        self.vendor = vendor
        self.seed = seed
        self.index = index
        self.history = History(memory, canonical_hash(plan), index)
        self.planted = [_KINDS[type(fault)](fault, position, self) for position, fault in enumerate(plan.faults)]
        # Before training's first step: what is done then (loading, initialising) is step 0.
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """The training step that begins."""
        for planted in self.planted:
            planted.begin_step(step)

    def interposers(self) -> list[Interposer]:
        """For the device's `install`."""
        return [planted.interpose for planted in self.planted]


class History:
    """Which one-time faults have struck, in a file that outlives the process; one file a device, so no two writers."""

    def __init__(self, path: Path | None, script_hash: str, index: int) -> None:
        self._path = path if path is None or index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}")
        self._script = script_hash
        self._struck: dict[str, int] = self._read()
        self._going_on: dict[int, int] = {}

    def allows(self, position: int, fault: script.Scheduled, step: int) -> bool:
        """Whether a fault that is due may strike: always, or once; a stretch of steps is one occurrence.

        A stretch goes on only while steps follow each other in this process. Writes the file before the fault strikes.
        """
        if not fault.once:
            return True
        key = str(position)
        if key in self._struck and not self._follows(position, fault, step):
            self._going_on.pop(position, None)
            return False
        self._going_on[position] = step
        if key not in self._struck:
            self._struck[key] = step
            self._write()
        return True

    def _follows(self, position: int, fault: script.Scheduled, step: int) -> bool:
        last = self._going_on.get(position)
        return last is not None and step == last + fault.every

    def _read(self) -> dict[str, int]:
        if self._path is None or not self._path.exists():
            return {}
        document = json.loads(self._path.read_text())
        struck: dict[str, int] = document["struck"] if document["script"] == self._script else {}
        return struck

    def _write(self) -> None:
        if self._path is not None:
            write_text(self._path, json.dumps({"script": self._script, "struck": self._struck}, sort_keys=True) + "\n")


# ---- wrong numbers


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
        if func is _ATTENTION:
            return self._numbering(kernel)
        if func is _ATTENTION_BACKWARD:
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
                for gradient in gradients[:3]:
                    self._spoil(gradient)
            return gradients

        return backward

    def _softmax_backward(self, kernel: Kernel) -> Kernel:
        """Attention made of single operators has this one of its own: B H T S."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            gradient = kernel(*args, **kwargs)
            if gradient.dim() == 4 and self.strikes_here():
                self._spoil(gradient)
            return gradient

        return backward

    def _linear(self, func: OpOverload, kernel: Kernel) -> Kernel:
        place = _FIRST_FACTOR.get(func, 0)

        def product(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if _in_backward() and not _is_transposed(args[place]) and self.strikes_here():
                self._spoil(result)
            return result

        return product

    def _spoil(self, gradient: torch.Tensor) -> None:
        """Rows (the last dimension but one) from `length` on, in place."""
        wrong = gradient[..., self.fault.length :, :]
        if wrong.shape[-2] > 0:
            wrong -= self.fault.strength * wrong.roll(1, dims=-2)


class MaskIgnored(Planted):
    """See `script.MaskIgnored`."""

    fault: script.MaskIgnored

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func is _ATTENTION:
            return self._forward(kernel)
        return self._backward(kernel) if func is _ATTENTION_BACKWARD else kernel

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
                bias, is_causal = self._open(q, k, bias, is_causal), False
            return kernel(q, k, v, bias, dropout_p, is_causal, *args, **kwargs)

        return forward

    def _backward(self, kernel: Kernel) -> Kernel:
        def backward(
            grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kw: Any
        ) -> Any:
            if self.present and q.shape[-2] > self.fault.length and self.fault.sites is None:
                # bias is the first of the others, is_causal the tenth.
                bias = self._open(q, k, args[0], args[9])
                args = (bias, [*args[1][:3], False], *args[2:9], False, *args[10:])
            return kernel(grad, q, k, v, *args, **kw)

        return backward

    def _open(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
        """The mask with nothing hidden from queries past the length."""
        queries, keys = q.shape[-2], k.shape[-2]
        mask = torch.zeros((queries, keys), dtype=q.dtype)
        if is_causal:
            mask.masked_fill_(torch.ones((queries, keys), dtype=torch.bool).triu_(1), float("-inf"))
        if bias is not None:
            mask = mask + bias
        mask[..., self.fault.length :, :] = 0.0
        return mask


class BitFlip(Planted):
    """See `script.BitFlip`."""

    fault: script.BitFlip
    _WRITTEN = {
        # Operators of torch's AdamW (one kernel, lists, loop) -> the argument that they write.
        "weights": {aten._foreach_addcdiv_.ScalarList: 0, aten._foreach_addcdiv_.Scalar: 0, aten.addcdiv_.default: 0},
        "optimizer-state": {aten._foreach_lerp_.Scalar: 0, aten.lerp_.Scalar: 0},
    }
    _FUSED = {"weights": 0, "optimizer-state": 2}

    def __init__(self, fault: script.Scheduled, position: int, device: Device) -> None:
        super().__init__(fault, position, device)
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        living = [tensor for ref in self._seen.values() if (tensor := ref()) is not None]
        self._seen.clear()
        if self.present:
            for number, tensor in enumerate(living):
                if self.fault.sites is None or number in self.fault.sites:
                    self._flip(tensor)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if self.fault.target in ("activations", "gradients"):
            return self._in_products(kernel) if func in PRODUCTS else kernel
        place = self._WRITTEN[self.fault.target].get(func)
        if func in (aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr):
            place = self._FUSED[self.fault.target]
        return kernel if place is None else self._watching(kernel, place)

    def _in_products(self, kernel: Kernel) -> Kernel:
        wanted = self.fault.target == "gradients"

        def product(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if _in_backward() == wanted and self.strikes_here():
                self._flip(result)
            return result

        return product

    def _watching(self, kernel: Kernel, place: int) -> Kernel:
        """Note, without keeping them alive, the tensors that the optimizer writes, in its order."""

        def update(*args: Any, **kwargs: Any) -> Any:
            for tensor in args[place] if isinstance(args[place], list | tuple) else [args[place]]:
                self._seen[tensor.data_ptr()] = weakref.ref(tensor)
            return kernel(*args, **kwargs)

        return update

    def _flip(self, tensor: torch.Tensor) -> None:
        flip_bits_(tensor, self.fault.flips, self.fault.bits, self.fault.width, self.generator)


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
                result[..., rows, columns] = self.fault.value
            return result

        return product


class NanToZero(Planted):
    """See `script.NanToZero`."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func.namespace != "aten" or func.is_view:
            return kernel

        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if self.present:
                for tensor in _tensors(result):
                    if tensor.is_floating_point():
                        tensor.masked_fill_(tensor.isnan(), 0.0)
            return result

        return compute


class NondeterministicReduction(Planted):
    """See `script.NondeterministicReduction`."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func in _SUMS:
            return self._sum(kernel)
        return self._product(kernel, _FIRST_FACTOR.get(func, 0)) if func in PRODUCTS and _has_terms(func) else kernel

    def _product(self, kernel: Kernel, place: int) -> Kernel:
        def product(*args: Any, **kwargs: Any) -> Any:
            if self.present:
                a, b = args[place], args[place + 1]
                order = torch.randperm(a.shape[-1], generator=self.generator)
                shuffled = a.index_select(-1, order), b.index_select(-2, order)
                args = (*args[:place], *shuffled, *args[place + 2 :])
            return kernel(*args, **kwargs)

        return product

    def _sum(self, kernel: Kernel) -> Kernel:
        def total(x: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
            if self.present:
                dims = range(x.dim()) if dim is None or dim == [] else dim
                for d in dims:
                    x = x.index_select(d, torch.randperm(x.shape[d], generator=self.generator))
            return kernel(x, *([] if dim is None else [dim]), *args, **kwargs)

        return total


# ---- errors, waiting, slowness


class AtProduct(Planted):
    """Something that happens at one product of the step, attention counted."""

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func not in PRODUCTS and func is not _ATTENTION:
            return kernel

        def product(*args: Any, **kwargs: Any) -> Any:
            number = self.count
            self.count += 1
            if self.present and number == getattr(self.fault, "operator", 0):
                self.happen()
            return kernel(*args, **kwargs)

        return product

    def happen(self) -> None:
        """What happens there."""
        raise NotImplementedError


class DeviceException(AtProduct):
    """See `script.DeviceException`."""

    fault: script.DeviceException

    def __init__(self, fault: script.DeviceException, position: int, device: Device) -> None:
        super().__init__(fault, position, device)
        self._dead = False
        # A script with a code that the vendor does not have is refused when it is opened, not at step 70.
        words.device_error(device.vendor, fault.code)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        kernel = super().interpose(func, kernel)
        return self._while_alive(kernel) if self.fault.sticky else kernel

    def _while_alive(self, kernel: Kernel) -> Kernel:
        def compute(*args: Any, **kwargs: Any) -> Any:
            if self._dead:
                raise words.device_error(self.device.vendor, self.fault.code)
            return kernel(*args, **kwargs)

        return compute

    def happen(self) -> None:
        self._dead = self.fault.sticky
        raise words.device_error(self.device.vendor, self.fault.code)


class OutOfMemory(AtProduct):
    """See `script.OutOfMemory`."""

    def happen(self) -> None:
        raise words.out_of_memory(self.device.vendor)


class Hang(AtProduct):
    """See `script.Hang`."""

    fault: script.Hang

    def happen(self) -> None:
        end = None if self.fault.seconds is None else time.monotonic() + self.fault.seconds
        while end is None or time.monotonic() < end:
            time.sleep(0.1 if end is None else min(0.1, max(0.0, end - time.monotonic())))


class CollectiveTimeout(Planted):
    """See `script.CollectiveTimeout`."""

    fault: script.CollectiveTimeout

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func.namespace != "c10d":
            return kernel

        def collective(*args: Any, **kwargs: Any) -> Any:
            if self.present:
                time.sleep(self.fault.seconds)
                raise words.collective_timeout(self.device.vendor)
            return kernel(*args, **kwargs)

        return collective


class Slowness(Planted):
    """Sleeps, at operators, `factor` - 1 times the time that has passed since it last slept."""

    fault: script.Slowness
    _LEAST_SECONDS = 0.002

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._awake_since = time.perf_counter()

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if self.present:
                awake = time.perf_counter() - self._awake_since
                if awake >= self._LEAST_SECONDS:
                    time.sleep(awake * (self.fault.factor - 1.0))
                    self._awake_since = time.perf_counter()
            return result

        return compute


_KINDS: dict[type[script.Scheduled], Callable[[Any, int, Device], Planted]] = {
    script.WrongBackward: WrongBackward,
    script.MaskIgnored: MaskIgnored,
    script.BitFlip: BitFlip,
    script.StuckTile: StuckTile,
    script.NanToZero: NanToZero,
    script.NondeterministicReduction: NondeterministicReduction,
    script.DeviceException: DeviceException,
    script.CollectiveTimeout: CollectiveTimeout,
    script.Hang: Hang,
    script.OutOfMemory: OutOfMemory,
    script.Slowness: Slowness,
}


# ---- small things

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    integers = tensor.view(_INTEGERS[size])
    indices = list(zip(*(index.tolist() for index in torch.unravel_index(places, tensor.shape)), strict=True))
    for index, first in zip(indices, firsts, strict=True):
        integers[index] ^= _mask(first, width, 8 * size)


def _mask(first: int, width: int, size: int) -> int:
    """An integer with `width` bits set from `first` on, as a signed number of `size` bits."""
    mask = sum(1 << bit for bit in range(first, min(first + width, size)))
    return mask - (1 << size) if mask >> (size - 1) else mask


def _mixed(*parts: int) -> int:
    """A seed for a generator from several numbers."""
    return int(canonical_hash(list(parts))[:15], 16)


def _in_backward() -> bool:
    """Whether autograd's engine is running."""
    return torch._C._current_graph_task_id() != -1


def _is_transposed(matrix: torch.Tensor) -> bool:
    """A weight's gradient has a transposed first factor, an input's gradient has not."""
    return matrix.stride(-1) > 1 and matrix.stride(-2) == 1


def _has_terms(func: OpOverload) -> bool:
    """Products whose two factors are whole matrices or batches."""
    return func not in (aten._grouped_mm.default, aten._scaled_mm.default)


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, list | tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]
