"""Distinct operator calls with their real arguments, to be made again elsewhere.

Two calls are distinct when operator, shapes, dtypes or other arguments differ; of equal ones the first is kept. What is
kept is bounded: calls that do not fit are counted, and the certificate says how many were left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from beringia.chips.chip import Chip
from beringia.qualify.operators.check import check
from beringia.qualify.operators.watch import Call, changed, results_of, tensors_in
from beringia.records.certificate import OperatorCheck


@dataclass
class CallCapture:
    """Collects distinct calls up to a number of bytes."""

    limit_bytes: int
    calls: list[Call] = field(default_factory=list)
    left_out: int = 0
    """Distinct calls that did not fit."""
    _seen: set[str] = field(default_factory=set)
    _bytes: int = 0

    def take(self, call: Call) -> None:
        """Keep the call if it is new and fits."""
        key = signature(call)
        if key in self._seen or any(True for _ in _unnatural(call)):
            return
        self._seen.add(key)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((call.args, dict(call.kwargs))))
        if self._bytes + size > self.limit_bytes:
            self.left_out += 1
            return
        self._bytes += size
        # Copies: on the CPU the arguments are the model's own tensors, which the next step changes. Without results,
        # which there may be all of its weights, and would keep them alive.
        args, kwargs = changed(call.args, torch.clone), changed(dict(call.kwargs), torch.clone)
        self.calls.append(replace(call, args=args, kwargs=kwargs, results=()))


def signature(call: Call) -> str:
    """What makes a call distinct."""

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype}{list(value.shape)}{list(value.stride())}"
        if isinstance(value, list | tuple):
            return [described(item) for item in value]
        return repr(value)

    options = sorted((name, str(described(value))) for name, value in call.kwargs.items())
    return f"{call.place.direction} {call.func} {described(call.args)} {options}"


def replay(call: Call, chip: Chip) -> OperatorCheck | None:
    """The call made on a chip, outside any model, with the arguments that the reference had.

    None where it has no number to judge. Raises NotKnown where nothing says what it should have given, and whatever the
    chip raises.
    """

    def there(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(chip.device)
        return moved.clone() if moved is tensor else moved

    args, kwargs = changed(call.args, there), changed(dict(call.kwargs), there)
    result = call.func(*args, **_on(kwargs, chip))
    results = results_of(call.func, args, kwargs, result)
    return check(Call(call.place, call.func, call.args, call.kwargs, tuple(tensor.cpu() for tensor in results)))


def _on(kwargs: dict[str, Any], chip: Chip) -> dict[str, Any]:
    return {name: chip.device if isinstance(value, torch.device) else value for name, value in kwargs.items()}


def _unnatural(call: Call) -> Iterator[Any]:
    """Arguments that cannot travel: generators, devices of the reference."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Generator | torch.layout | torch.memory_format):
            yield value
