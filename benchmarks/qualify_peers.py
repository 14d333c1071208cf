"""The rules of others, on the same operator calls and the same losses.

Each rule sees what its tool would see: calls one by one with the same inputs (assert_close, a fixed tolerance,
torch._dynamo's `same`, msprobe's benchmark method), tensors of two free runs (msprobe's first-difference rule, hashes
as DebugMode keeps them), or the loss alone. `refuses` says whether the rule would refuse the chip, `first` what it
would name. The reference of per-call rules is the CPU in the same dtype, golden results are float64's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from beringia.qualify.operators.float64 import NotKnown, in_float64
from beringia.qualify.operators.watch import Call, tensors_in

Key = tuple[str, str, str, int]

FIXED = 1e-3
FIRST_DIFFERENCE = 0.5
"""msprobe: relative difference of maximum, minimum, mean or norm."""
LOSS = 0.01
SAME_RMSE = 3.0
"""torch._dynamo.utils.same for 16-bit dtypes."""
MSPROBE_RMS, MSPROBE_MEAN, MSPROBE_MAX = 1.5, 1.5, 5.0
"""Its L1 limits for ratios to the other chip's errors; its L2 limits (1.2, 1.2, 2) are for products and norms."""
_L2 = ("mm", "bmm", "addmm", "layer_norm", "rms_norm", "sum", "cross_entropy", "nll_loss")

PER_CALL = ("assert_close", "fixed 1e-3", "dynamo same", "msprobe ratio")
WHOLE_RUN = ("msprobe first difference", "hashes")


def key_of(call: Call) -> Key:
    place = call.place
    return (place.module, place.operator, place.direction, place.ordinal)


@dataclass
class RunSummary:
    """Statistics and hashes of all results of a run, for the rules that compare two runs."""

    order: list[Key] = field(default_factory=list)
    numbers: dict[Key, tuple[float, ...]] = field(default_factory=dict)
    hashes: dict[Key, str] = field(default_factory=dict)

    def take(self, call: Call) -> None:
        floats = [result for result in call.results if result.is_floating_point() and result.numel()]
        key = key_of(call)
        if key in self.hashes:
            return
        self.order.append(key)
        if floats:
            wide = floats[0].double()
            self.numbers[key] = (float(wide.max()), float(wide.min()), float(wide.mean()), float(wide.norm()))
        digest = hashlib.blake2b(digest_size=8)
        for result in call.results:
            digest.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.hashes[key] = digest.hexdigest()


@dataclass
class Rules:
    """What each per-call rule refused first."""

    first: dict[str, Key] = field(default_factory=dict)

    def take(self, call: Call) -> None:
        wanted = [rule for rule in PER_CALL if rule not in self.first]
        if not wanted:
            return
        try:
            exact = in_float64(call)
        except NotKnown:
            return
        other = _on_cpu(call, exact)
        for found, golden, reference in zip(call.results, exact, other, strict=False):
            if not found.is_floating_point() or found.shape != golden.shape or found.numel() == 0:
                continue
            for rule in wanted:
                if rule not in self.first and not _accepts(rule, call, found, golden, reference):
                    self.first[rule] = key_of(call)


def _on_cpu(call: Call, exact: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The CPU's own results in the chip's dtypes; where it lacks the operator, float64's, rounded."""
    from beringia.qualify.operators.watch import changed

    try:
        args = changed(call.args, lambda tensor: tensor.clone())
        kwargs = changed(dict(call.kwargs), lambda tensor: tensor.clone())
        kwargs = {name: torch.device("cpu") if isinstance(v, torch.device) else v for name, v in kwargs.items()}
        if not call.func._schema.is_mutable:
            return list(tensors_in(call.func(*args, **kwargs)))
    except (NotImplementedError, RuntimeError):
        pass
    return [golden.to(found.dtype) for found, golden in zip(call.results, exact, strict=False)]


def _accepts(rule: str, call: Call, found: torch.Tensor, golden: torch.Tensor, reference: torch.Tensor) -> bool:
    if reference.dtype != found.dtype or reference.shape != found.shape:
        reference = golden.to(found.dtype)
    if rule == "assert_close":
        return _close(found, reference)
    if rule == "fixed 1e-3":
        return bool(torch.allclose(found.double(), reference.double(), rtol=FIXED, atol=FIXED, equal_nan=True))
    errors = [(one.double() - golden) for one in (found, reference)]
    if rule == "dynamo same":
        if torch.allclose(found.double(), reference.double(), rtol=FIXED, atol=FIXED, equal_nan=True):
            return True
        mine, theirs = (float(error.square().mean().sqrt()) for error in errors)
        return mine <= SAME_RMSE * theirs + FIXED / 10
    return _msprobe(call, errors, golden)


def _close(found: torch.Tensor, reference: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(found, reference, equal_nan=True)
    except AssertionError:
        return False
    return True


def _msprobe(call: Call, errors: list[torch.Tensor], golden: torch.Tensor) -> bool:
    """Ratios of the chip's errors to the other chip's; where the other's are zero, so must these be."""
    strict = any(name in call.place.operator for name in _L2)
    limits = (1.2, 1.2, 2.0) if strict else (MSPROBE_RMS, MSPROBE_MEAN, MSPROBE_MAX)
    relative = [(error / golden.abs().clamp_min(2.0**-10)).abs() for error in errors]
    values = [
        (float(e.square().mean().sqrt()), float(r.mean()), float(r.max()))
        for e, r in zip(errors, relative, strict=True)
    ]
    return all(
        not math.isnan(mine) and (mine <= limit * theirs or mine < 1e-12)
        for mine, theirs, limit in zip(*values, limits, strict=True)
    )


def whole_run(found: RunSummary, reference: RunSummary) -> dict[str, Key]:
    """First keys that the rules comparing two runs refuse."""
    first: dict[str, Key] = {}
    for key in found.order:
        if "hashes" not in first and key in reference.hashes and found.hashes[key] != reference.hashes[key]:
            first["hashes"] = key
        if WHOLE_RUN[0] not in first and key in found.numbers and key in reference.numbers:
            pairs = zip(found.numbers[key], reference.numbers[key], strict=True)
            if any(not abs(a - b) <= FIRST_DIFFERENCE * max(abs(b), 1e-9) for a, b in pairs):
                first[WHOLE_RUN[0]] = key
    return first


def loss_watching(found: Any, reference: Any) -> bool:
    """Whether the mean relative difference of the losses is above one per cent, or not a number."""
    difference = float(((found - reference) / reference).abs().mean())
    return not difference <= LOSS
