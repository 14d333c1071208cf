"""Which experts a chip's routers choose, each by itself with what float64 sends through its layer.

Elsewhere float64's choice is made for the chip, since near a tie another one is no error of arithmetic; so a wrong
choice shows nowhere else. Here the chip chooses, and tokens are counted that go to other experts than in float64. How
many are near a tie is measured: by draws of what rounding may do on the CPU.

M tokens, K experts a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from scipy import special
from torch import nn

from beringia.chips.chip import Chip
from beringia.qualify.layers import DRAWS, Traffic, moved
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.subject import Routes, Subject
from beringia.records.certificate import Departure, Measure, ProbeResult

_CPU = torch.device("cpu")
ROUTER = "mlp.gate"
"""In a layer."""
FALSE_ALARMS = 1e-5
"""Chance that of a sound chip's routers any is called wrong, were its counts of rare events (Poisson's) with the mean
of the draw that has most, and one more, since none seen is not none."""


def probe_choices(
    chip: Chip, subject: Subject, dtype: torch.dtype, traffic: Mapping[str, Traffic], routes: Routes
) -> Iterator[ProbeResult]:
    """One result a layer with experts; `routes` says which have any."""
    layers = [name for name in traffic if name in routes]
    if not layers:
        return
    here = subject.place(subject.build(), chip.device, dtype)
    plain, wide = (subject.place(subject.build(), _CPU, kind) for kind in (dtype, torch.float64))
    for name in layers:
        exact_MK = _chosen(subject, wide, name, traffic[name], torch.float64)
        drawn = []
        for seed in range(DRAWS):
            with moved(plain, name, RoundingDraw(seed, dtype)):
                drawn.append(_others(_chosen(subject, plain, name, traffic[name], dtype), exact_MK))
        yield _judged(
            name,
            _others(_chosen(subject, here, name, traffic[name], dtype), exact_MK),
            drawn,
            len(layers),
            len(exact_MK),
        )


def departed_choice(result: ProbeResult) -> Departure:
    """What a layer's failed result says where nothing else is wrong."""
    return Departure(
        module=f"{result.subject}.{ROUTER}", quantity="experts that are chosen", times=result.measures[0].used
    )


def _chosen(subject: Subject, model: nn.Module, name: str, traffic: Traffic, dtype: torch.dtype) -> torch.Tensor:
    """M K, on the CPU, in ascending order."""
    layer = model.get_submodule(name)
    x_BTD = traffic.input_BTD.to(next(layer.parameters()).device, dtype)
    with torch.no_grad(), subject.recording_routes(model) as routes:
        subject.call_layer(model, layer, x_BTD)
    return routes[name].sort(-1).values


def _others(found_MK: torch.Tensor, exact_MK: torch.Tensor) -> int:
    """Tokens that go to other experts."""
    return int((found_MK != exact_MK).any(-1).sum())


def _judged(name: str, found: int, drawn: list[int], layers: int, tokens: int) -> ProbeResult:
    allowed = _rarely_more(max(drawn) + 1.0, FALSE_ALARMS / layers)
    failed = found > allowed
    return ProbeResult(
        probe="experts",
        subject=name,
        outcome="failed" if failed else "passed",
        rules_out="infer",
        summary=f"{name} sends {found:,} of {tokens:,} tokens to other experts than float64 does"
        + (", more than rounding explains" if failed else ""),
        measures=(
            Measure(
                name="tokens that go to other experts",
                value=float(found),
                bound=allowed,
                unit="tokens",
                reason=f"counts about the most of {DRAWS} draws of what rounding may do ({max(drawn)}), of which one "
                f"in {1 / FALSE_ALARMS:,.0f} is larger in any of {layers} layers",
            ),
        ),
    )


def _rarely_more(mean: float, chance: float) -> float:
    """The smallest count that a Poisson variable of this mean is above with no more than this chance. (`scipy.stats`
    has it, and takes a second to import in each of a qualification's processes.)"""
    return float(next(count for count in itertools.count() if special.pdtrc(count, mean) <= chance))
