"""Each layer by itself, with float64's own inputs and output gradients (teacher-forced): output and gradients.

What a layer magnifies does not reach the next one here, so a defect shows where it is, also one that no single operator
shows. The bound is measured: the same layer on the CPU in the compute dtype, from weights moved by up to one unit in
the last place. A reference, which may be that CPU, is held against float64's results rounded instead
(`rounded_float64.py`).

B samples, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from beringia.chips.chip import Chip
from beringia.numerics.metrics import rounding_floor
from beringia.numerics.replay import run
from beringia.qualify.effects import EFFECT_ALLOWED, minus
from beringia.qualify.rounding_draw import Change, RoundingDraw
from beringia.qualify.subject import Routes, Subject
from beringia.records.certificate import Measure, ProbeResult

DRAWS = 3
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Traffic:
    """What float64 sent through a layer in the first batch, rounded to the compute dtype."""

    input_BTD: torch.Tensor
    gradient_BTD: torch.Tensor
    """Of the layer's output."""


Tensors = dict[str, torch.Tensor]


def probe_layers(
    chip: Chip,
    subject: Subject,
    dtype: torch.dtype,
    traffic: Mapping[str, Traffic],
    routes: Routes,
    *,
    draws: int = DRAWS,
    drawing: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[ProbeResult]:
    """One result a layer. `drawing`: inside it the CPU's draws are made."""
    here = subject.place(subject.build(), chip.device, dtype)
    plain, wide = (subject.place(subject.build(), _CPU, kind) for kind in (dtype, torch.float64))
    for name, one in traffic.items():
        found = _run(subject, here, name, one, routes, dtype)
        exact = _run(subject, wide, name, one, routes, torch.float64)
        drawn = []
        for seed in range(draws):
            draw = RoundingDraw(seed, dtype)
            with moved(plain, name, draw), draw.moving_results(), drawing():
                drawn.append(_run(subject, plain, name, one, routes, dtype))
        yield _judged(name, found, exact, drawn, dtype)


def _run(
    subject: Subject, model: nn.Module, name: str, traffic: Traffic, routes: Routes, dtype: torch.dtype
) -> Tensors:
    """Output and gradients of one layer, on the CPU in float64."""
    layer = model.get_submodule(name)
    device = next(layer.parameters()).device
    parameters = dict(layer.named_parameters())
    with subject.forcing_routes(model, routes):
        output_BTD, gradients = run(
            lambda x_BTD: subject.call_layer(model, layer, x_BTD),
            traffic.input_BTD.to(device, dtype),
            traffic.gradient_BTD.to(device),
            parameters.values(),
        )
    named = zip(("input", *parameters), gradients, strict=True)
    found = {f"gradient of {part}": gradient for part, gradient in named if gradient is not None}
    return {part: tensor.cpu().double() for part, tensor in ({"output": output_BTD} | found).items()}


@contextmanager
def moved(model: nn.Module, name: str, change: Change) -> Iterator[None]:
    """Inside, one layer's weights are changed."""
    own = {f"{name}.{part}": parameter for part, parameter in model.get_submodule(name).named_parameters()}
    before = {path: parameter.detach().clone() for path, parameter in own.items()}
    with torch.no_grad():
        for path, parameter in own.items():
            parameter.copy_(change(path, parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for path, parameter in own.items():
                parameter.copy_(before[path])


def _judged(name: str, found: Tensors, exact: Tensors, draws: list[Tensors], dtype: torch.dtype) -> ProbeResult:
    measures = [_measure(part, found[part], exact[part], [draw[part] for draw in draws], dtype) for part in exact]
    kept = [measures[0], max(measures[1:], key=lambda measure: measure.used)]
    beyond = [measure for measure in kept if measure.used > 1.0]
    worst = max(kept, key=lambda measure: measure.used)
    return ProbeResult(
        probe="layers",
        subject=name,
        outcome="failed" if beyond else "passed",
        rules_out="neither",
        summary=f"{name} by itself: {worst.name} is {worst.used * EFFECT_ALLOWED:.3g} times as far from float64 as "
        "rounding explains",
        measures=tuple(kept),
    )


def _measure(
    part: str, found: torch.Tensor, exact: torch.Tensor, draws: list[torch.Tensor], dtype: torch.dtype
) -> Measure:
    size = float(exact.nan_to_num(0.0, 0.0, 0.0).norm()) or 1.0
    floor = math.sqrt(sum(float(minus(draw, exact).norm()) ** 2 for draw in draws) / len(draws)) / size
    error = float(minus(found, exact).norm()) / size if found.shape == exact.shape else math.inf
    return Measure(
        name=f"relative error of the {part}",
        value=error if math.isfinite(error) else None,
        bound=EFFECT_ALLOWED * max(floor, rounding_floor(dtype)),
        reason=f"{EFFECT_ALLOWED:g} times the CPU's, with weights moved by one unit in the last place",
    )
