"""Faults of torch's AdamW, in its one kernel and in the single operators (lists, loop) that it is made of otherwise.

They act around the kernel: what they need is copied before it, and what it wrote is changed after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from beringia.chips.emulated import fault_script as script
from beringia.chips.emulated.device import Kernel
from beringia.chips.emulated.planted import (
    ADAMW_MOMENTS,
    ADAMW_UPDATES,
    FUSED_ADAMW,
    Host,
    Planted,
    last_share,
    replace_,
)

aten = torch.ops.aten

_DECAYS = frozenset({aten._foreach_mul_.Scalar, aten.mul_.Tensor, aten.mul_.Scalar})
"""Operators that decay the weights, and do other things too."""


class WrongOptimizer(Planted):
    """See `script.WrongOptimizer`."""

    fault: script.WrongOptimizer

    def __init__(self, fault: script.WrongOptimizer, position: int, device: Host) -> None:
        super().__init__(fault, position, device)
        self._moments: dict[int, torch.Tensor] = {}
        self._decays: dict[int, float] = {}

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._moments.clear()
        self._decays.clear()

    def interpose(self, func: OpOverload, kernel: Kernel) -> Kernel:
        if func in FUSED_ADAMW:
            return self._fused(func, kernel)
        if func in ADAMW_UPDATES:
            return self._update(func, kernel)
        if func in ADAMW_MOMENTS and self.fault.error == "stale-moment":
            return self._keeping_moments(kernel)
        return self._noting_decay(kernel) if func in _DECAYS and self.fault.error == "weight-decay-twice" else kernel

    # ---- one kernel

    def _fused(self, func: OpOverload, kernel: Kernel) -> Kernel:
        def update(*args: Any, **kwargs: Any) -> Any:
            places = self._places(args[0])
            if not places or _is_skipped(kwargs):
                return kernel(*args, **kwargs)
            decay = 1.0 - float(kwargs["lr"]) * kwargs["weight_decay"]
            before = [(args[0][place].clone(), args[2][place].clone()) for place in places]
            changed = [self._decay_once_more(args[0][place], decay) for place in places]
            result = kernel(*args, **kwargs)
            for place, (weight, moment) in zip(places, before, strict=True):
                changed.append(self._spoil(args[0][place], weight, decay))
                if self.fault.error == "stale-moment":
                    changed.append(replace_(args[2][place], moment))
                if self.fault.error == "no-bias-correction":
                    changed.append(replace_(args[0][place], _uncorrected(weight * decay, place, args, kwargs)))
            if any(changed):
                self.report(func)
            return result

        return update

    # ---- single operators

    def _update(self, func: OpOverload, kernel: Kernel) -> Kernel:
        def update(*args: Any, **kwargs: Any) -> Any:
            weights, moments = _listed(args[0]), _listed(args[1])
            places = self._places(weights)
            before = {place: weights[place].clone() for place in places}
            decays = {place: self._decays.get(weights[place].data_ptr(), 1.0) for place in places}
            changed = [self._decay_once_more(weights[place], decays[place]) for place in places]
            result = kernel(*args, **kwargs)
            for place, weight in before.items():
                changed.append(self._spoil(weights[place], weight, 1.0))
                old = self._moments.get(moments[place].data_ptr())
                changed.append(old is not None and replace_(moments[place], old))
            if any(changed):
                self.report(func)
            return result

        return update

    def _keeping_moments(self, kernel: Kernel) -> Kernel:
        def update(*args: Any, **kwargs: Any) -> Any:
            if self.present:
                self._moments |= {moment.data_ptr(): moment.clone() for moment in _listed(args[0])}
            return kernel(*args, **kwargs)

        return update

    def _noting_decay(self, kernel: Kernel) -> Kernel:
        def multiply(*args: Any, **kwargs: Any) -> Any:
            factor = args[1]
            if self.present and not (isinstance(factor, torch.Tensor) and factor.dim() > 0):
                self._decays |= {weight.data_ptr(): float(factor) for weight in _listed(args[0])}
            return kernel(*args, **kwargs)

        return multiply

    # ---- what is changed

    def _places(self, weights: list[torch.Tensor]) -> list[int]:
        """Which tensors of a call are sites."""
        return [place for place in range(len(weights)) if self.strikes_here()] if self.present else []

    def _decay_once_more(self, weight: torch.Tensor, decay: float) -> bool:
        return self.fault.error == "weight-decay-twice" and replace_(weight, weight * decay)

    def _spoil(self, weight: torch.Tensor, before: torch.Tensor, decay: float) -> bool:
        """Change an updated weight by what it was before; `decay` is what the kernel multiplied it with."""
        if self.fault.error == "lost-update":
            wrong = weight.flatten().clone()
            start = last_share(wrong.numel(), self.fault.strength)
            wrong[start:] = before.flatten()[start:]
            return replace_(weight, wrong.view(weight.shape))
        if self.fault.error == "scaled":
            decayed = before * decay
            return replace_(weight, decayed + (weight - decayed) * (1.0 + self.fault.strength))
        return False


def _uncorrected(decayed: torch.Tensor, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A weight after an update whose moments were not divided by their bias (Kingma and Ba 2015, algorithm 1)."""
    moment, square = args[2][place], args[4 if kwargs["amsgrad"] else 3][place]
    wrong: torch.Tensor = decayed - float(kwargs["lr"]) * moment / (square.sqrt() + kwargs["eps"])
    return wrong.to(decayed.dtype)


def _is_skipped(kwargs: dict[str, Any]) -> bool:
    """A loss scaler found an overflow: the kernel changes nothing."""
    found = kwargs.get("found_inf")
    return found is not None and bool(found)


def _listed(argument: Any) -> list[torch.Tensor]:
    return list(argument) if isinstance(argument, list | tuple) else [argument]
