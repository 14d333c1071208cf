"""What every planted fault has: its schedule, its count of matching operators, its device, and what it reports.

Each fault is an interposer: asked for each operator once, when the operator is first met, whether it wants to stand
between. While its schedule says that it is absent it costs one comparison a call.

Faults see operators and CPU tensors. They count matching operators since `begin_step`; they know no modules. What is
random comes from a CPU generator of (seed, step, position in the script). The kinds are in the modules `wrong_*.py`,
the device that holds them in `faults.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated.device import Kernel, in_backward
from beringia.records.files import write_text
from beringia.records.record import canonical_hash

aten = torch.ops.aten

ATTENTION = aten._scaled_dot_product_fused_attention_overrideable.default
ATTENTION_BACKWARD = aten._scaled_dot_product_fused_attention_overrideable_backward.default
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
FIRST_FACTOR = {aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Position of the first factor where it is not 0."""
FUSED_ADAMW = frozenset({aten._fused_adamw_.default, aten._fused_adamw_.tensor_lr})
ADAMW_UPDATES = frozenset({aten._foreach_addcdiv_.ScalarList, aten._foreach_addcdiv_.Scalar, aten.addcdiv_.default})
"""Where AdamW is made of single operators (lists, loop): those that write the weights, from moments."""
ADAMW_MOMENTS = frozenset({aten._foreach_lerp_.Scalar, aten.lerp_.Scalar})
"""And those that write the first moments."""
_FAMILIES: dict[script.Family, tuple[str, ...]] = {
    "exp": ("exp", "exp_"),
    "rsqrt": ("rsqrt", "rsqrt_"),
    "silu": ("silu", "silu_", "silu_backward"),
    "sigmoid": ("sigmoid", "sigmoid_", "sigmoid_backward"),
    "softmax": ("_softmax", "_softmax_backward_data"),
    "log_softmax": ("_log_softmax", "_log_softmax_backward_data"),
    "mean": ("mean",),
    "sum": ("sum",),
    "add": ("add", "add_"),
    "mul": ("mul", "mul_"),
}
"""Names of the operators that a script's word stands for; products and attention are told by overload."""


class Host:
    """What a fault knows of its device, and where it reports that it struck."""

    def __init__(self, plan: script.FaultScript, *, vendor: str, seed: int, index: int, memory: Path | None) -> None:
        self.vendor = vendor
        self.seed = seed
        self.index = index
        self.history = History(memory, canonical_hash(plan), index)
        self.struck: list[tuple[int, str]] = []
        """In this step: faults (position in the script) and the operator that each struck first."""
        self.on_strike: Callable[[int, OpOverload], None] | None = None
        """Called whenever a fault has changed something, with its position and the operator."""
        self.now: Callable[[], float] = time.monotonic
        self.sleep: Callable[[float], None] = time.sleep
        """The device's time in seconds, and how it passes: what is slow or hangs reads and spends no other."""


class Planted:
    """A fault in a device: whether it is present in this step, and how often it matched since the step began."""

    def __init__(self, fault: script.Scheduled, position: int, device: Host) -> None:
        self.fault = fault
        self.position = position
        self.device = device
        self.present = False
        self.count = 0
        self.generator = torch.Generator()
        self._reported = False

    def begin_step(self, step: int) -> None:
        """Decide whether it is present in this step."""
        self.count = 0
        self._reported = False
        self.generator.manual_seed(_mixed(self.device.seed, step, self.position, self.device.index))
        self.present = self._due(step) and self.device.history.allows(self.position, self.fault, step)

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        """The kernel, or one that this fault strikes."""
        return kernel

    def strikes_here(self) -> bool:
        """Count one more match in the fault's direction, and tell whether it is a site of this fault."""
        if not self.present or not self._goes_this_way():
            return False
        number = self.count
        self.count += 1
        return self.is_site(number)

    def is_site(self, number: int) -> bool:
        """Whether the match with this number is one of the fault's sites."""
        sites = getattr(self.fault, "sites", None)
        return sites is None or number in sites

    def report(self, func: OpOverload) -> None:
        """Remember that the fault has struck here."""
        if not self._reported:
            self._reported = True
            self.device.struck.append((self.position, str(func)))
        if self.device.on_strike is not None:
            self.device.on_strike(self.position, func)

    def is_awaited(self) -> bool:
        """Whether anybody will be told of its next strike."""
        return not self._reported or self.device.on_strike is not None

    def _goes_this_way(self) -> bool:
        direction = getattr(self.fault, "direction", "both")
        return direction == "both" or (direction == "backward") == in_backward()

    def _due(self, step: int) -> bool:
        if not self.fault.due(step) or self.fault.device not in (None, self.device.index):
            return False
        return self.fault.rate == 1.0 or bool(torch.rand((), generator=self.generator) < self.fault.rate)


class WrongResult(Planted):
    """Floating results of matching operators are replaced by others, once the kernel has made them."""

    def matches(self, func: OpOverload) -> bool:
        """Whether the fault strikes this operator."""
        raise NotImplementedError

    def applies(self, numbers: list[torch.Tensor], func: OpOverload, args: tuple[Any, ...]) -> bool:
        """Whether this call counts as a match."""
        return True

    def wrong(self, result: torch.Tensor) -> torch.Tensor:
        """What stands there instead, as a tensor of its own."""
        raise NotImplementedError

    def instead_of(
        self, numbers: list[torch.Tensor], func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The same of all results, for kinds that compute it from the operator's arguments."""
        return [self.wrong(number) for number in numbers]

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if not self.matches(func):
            return kernel

        def compute(*args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            if self.present:
                self._strike(result, func, args, kwargs)
            return result

        return compute

    def _strike(self, result: Any, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = [tensor for tensor in main_results(func, result) if tensor.is_floating_point()]
        if numbers and self.applies(numbers, func, args) and self.strikes_here():
            wrong = self.instead_of(numbers, func, args, kwargs)
            changed = [replace_(right, other) for right, other in zip(numbers, wrong, strict=True)]
            if any(changed):
                self.report(func)


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


# ---- operators and tensors


def belongs_to(func: OpOverload, family: script.Family) -> bool:
    """Whether an operator is one of a family."""
    if family == "products":
        return func in PRODUCTS
    if family == "attention":
        return func in (ATTENTION, ATTENTION_BACKWARD)
    return name_of(func) in _FAMILIES[family]


def name_of(func: OpOverload) -> str:
    """An ATen operator's name without its overload's; empty for operators of other namespaces."""
    return func._schema.name.removeprefix("aten::") if func.namespace == "aten" else ""


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Tensors of a result that is one or has several."""
    parts = result if isinstance(result, list | tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By element size: what a format's bits are looked at through."""


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit, NaN too."""
    integer = INTEGERS[one.element_size()]
    return torch.equal(one.view(integer), other.view(integer))


def replace_(target: torch.Tensor, wrong: torch.Tensor) -> bool:
    """Put wrong numbers in place of the right ones, and tell whether that changed a bit."""
    changed = not same_bits(target, wrong)
    if changed:
        target.copy_(wrong)
    return changed


def last_share(count: int, share: float) -> int:
    """Where the last `share` of `count` things begins; it has at least one."""
    return count - min(count, max(1, round(share * count)))


def main_results(func: OpOverload, result: Any) -> list[torch.Tensor]:
    """Without what an operator gives back beside them (attention's log-sum-exp and its bias's gradient)."""
    if func is ATTENTION:
        return [result[0]]
    return tensors_of(result[:3] if func is ATTENTION_BACKWARD else result)


def _mixed(*parts: int) -> int:
    """A seed for a generator from several numbers."""
    return int(canonical_hash(list(parts))[:15], 16)
