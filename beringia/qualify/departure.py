"""Where a model first leaves what rounding explains although each operator computes rightly: a wrong constant, a wrong
table, a formula that is not the model's.

Every module is called by itself with what float64 sends through it (its input, and its output's gradient), on the chip
and in float64, so that what an earlier module did wrong is not the later one's fault. A module comes after those inside
it: of two that are wrong for the same reason the inner one is named. The bound is measured, as a layer's: the same
module on the CPU in the compute dtype, from weights moved by up to a unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.model.layers import precise
from beringia.numerics.metrics import rounding_floor
from beringia.numerics.replay import Call, Taps, run
from beringia.qualify.effects import EFFECT_ALLOWED, minus
from beringia.qualify.operators.watch import changed
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.subject import Routes, Subject, on_device
from beringia.records.certificate import Departure

DRAWS = 3
_CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Sides:
    """The model on the chip, in float64, and on the CPU in the compute dtype, once for each draw."""

    chip: nn.Module
    exact: nn.Module
    draws: tuple[tuple[nn.Module, RoundingDraw], ...]


def first_departure(chip: Chip, subject: Subject, dtype: torch.dtype, routes: Routes) -> Departure | None:
    """The first module of a training pass over the first batch that is beyond its bound; None where none is."""
    sides = _Sides(
        subject.place(subject.build(), chip.device, dtype),
        subject.place(subject.build(), _CPU, torch.float64),
        tuple(_moved(subject, RoundingDraw(seed, dtype)) for seed in range(DRAWS)),
    )
    calls = _calls(subject, sides.exact, routes)
    departures = (_departure(subject, sides, name, calls[name], routes, dtype) for name in _inner_first(sides.exact))
    return next((one for one in departures if one is not None), None)


def _moved(subject: Subject, draw: RoundingDraw) -> tuple[nn.Module, RoundingDraw]:
    model = subject.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter))
    return subject.place(model, _CPU, draw.dtype), draw


def _calls(subject: Subject, exact: nn.Module, routes: Routes) -> dict[str, list[Call]]:
    modules = {name: module for name, module in exact.named_modules() if name}
    # Copies: a module may write to its input, which another one's output or input is, too.
    with Taps(modules, torch.clone) as taps, subject.forcing_routes(exact, routes):
        subject.loss(exact, on_device(subject.batch(0), _CPU)).backward()  # type: ignore[no-untyped-call]  # untyped in torch
    return taps.calls


def _inner_first(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of all modules inside, each after those inside it."""
    for name, child in module.named_children():
        yield from _inner_first(child, f"{path}{name}.")
        yield f"{path}{name}"


def _departure(
    subject: Subject, sides: _Sides, name: str, calls: list[Call], routes: Routes, dtype: torch.dtype
) -> Departure | None:
    call = next((one for one in calls if one.output_gradient is not None and one.inputs[0].is_floating_point()), None)
    if call is None:
        return None  # of no use in training, or it reads indices, which every chip has alike
    found = _results(subject, sides.chip, name, call, routes, dtype)
    exact = _results(subject, sides.exact, name, call, routes, torch.float64)
    draws: list[Tensors] = []
    for model, draw in sides.draws:
        with draw.moving_results():
            draws.append(_results(subject, model, name, call, routes, dtype))
    used = {part: _used(found[part], exact[part], [draw[part] for draw in draws], dtype) for part in exact}
    part = next((part for part, share in used.items() if share > 1.0), None)
    if part is None:
        return None
    return Departure(
        module=name, quantity=part, times=EFFECT_ALLOWED * used[part] if math.isfinite(used[part]) else None
    )


def _results(subject: Subject, model: nn.Module, name: str, call: Call, routes: Routes, dtype: torch.dtype) -> Tensors:
    """Output and gradients of one module, on the CPU in float64."""
    module = model.get_submodule(name)
    device = next(model.parameters()).device
    parameters = dict(module.named_parameters())
    assert call.output_gradient is not None
    others = tuple(_there(one, device, dtype) for one in call.inputs[1:])
    with subject.forcing_routes(model, routes):
        output, (of_input, *of_parameters) = run(
            lambda x: subject.call_module(model, module, (x, *others)),
            call.inputs[0].to(device, dtype),
            call.output_gradient.to(device),
            parameters.values(),
        )
    named = {"input's gradient": of_input} | {
        f"{part}'s gradient": gradient for part, gradient in zip(parameters, of_parameters, strict=True)
    }
    present = {part: gradient for part, gradient in named.items() if gradient is not None}
    return {part: tensor.detach().cpu().double() for part, tensor in ({"output": output} | present).items()}


def _there(value: object, device: torch.device, dtype: torch.dtype) -> object:
    """A further input, copied: numbers are the router's weights, which are never narrower than float32."""

    def there(one: torch.Tensor) -> torch.Tensor:
        return one.detach().to(device, precise(dtype) if one.is_floating_point() else one.dtype, copy=True)

    return changed(value, there)


def _used(found: torch.Tensor, exact: torch.Tensor, draws: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Share of the bound."""
    size = float(exact.nan_to_num(0.0, 0.0, 0.0).norm())
    floor = math.sqrt(sum(float(minus(draw, exact).norm()) ** 2 for draw in draws) / len(draws))
    bound = EFFECT_ALLOWED * max(floor, rounding_floor(dtype) * size)
    error = float(minus(found, exact).norm()) if found.shape == exact.shape else math.inf
    return error / bound if bound else math.inf if error else 0.0
