"""What a machine computes again of a bundle that another made, before it believes the rest.

Float64 of the first batch and of a step of decoding, with its routes, must be float64's here; the first draw's
distances must be such as this CPU has with the same moved weights. The other batches, the training steps and the other
draws are taken from the bundle: they would take as long as making one.
"""

from __future__ import annotations

import torch

from beringia.chips.cpu import Cpu
from beringia.errors import InputError
from beringia.qualify.bundle import Bundle
from beringia.qualify.effects import Cell, distances
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.subject import Routes, Subject
from beringia.qualify.trace import Trace, TraceExtent, Tracer
from beringia.records.certificate import Measure, ProbeResult

FLOAT64_SHARE = 1e-3
"""Of the draws' distances, that float64 here and there may be apart. Float64's roundings are 2^29 times smaller than
float32's, and adding up 10^5 terms makes them a hundred times larger: 10^-7 of the smallest noise. A thousandth of it
changes no effect."""
DRAW_TIMES = 4.0
"""A draw's distance there over that of the same weights here. Its weights' motion is the same on both, and at least 0.6
of the noise, since arithmetic alone has effects of up to 0.8; a reference may have up to 1.5 (`sound_reference.py`):
sqrt(0.6^2 + 1.5^2) / 0.6 = 2.7. The rest is for single tensors, in which a rounding may tip over."""


def recompute(subject: Subject, bundle: Bundle) -> ProbeResult:
    """What was computed again, and what was not. Raises InputError where the bundle says otherwise."""
    dtype = getattr(torch, bundle.manifest.compute_dtype)
    tracer = Tracer(subject, TraceExtent(batches=1, steps=0, scenarios=False))
    exact, routes = tracer.in_float64()
    if not _same_routes(routes.batches[0], bundle.routes.batches[0]):
        raise _other(bundle, "other experts were chosen")
    here = tracer.on_chip(Cpu(), dtype, routes, begin_step=lambda: None, change=RoundingDraw(0, dtype))
    drawn = _of_first_batch(distances(here, exact))
    apart, wider = _float64_apart(bundle, exact), _draws_wider(bundle, drawn)
    for measure in (apart, wider):
        if measure.used > 1.0:
            raise _other(bundle, f"{measure.name} is {measure.value}, at most {measure.bound:g} is right")
    return ProbeResult(
        probe="reference",
        subject="computed again here",
        outcome="passed",
        summary="float64 of the first batch and of a step of decoding, its routes and the first draw were computed "
        f"again here; the other {bundle.plan.batches - 1} batches, {bundle.plan.steps} training steps and "
        f"{len(bundle.noise.drawn) - 1} draws are as the bundle has them",
        measures=(apart, wider),
    )


def _float64_apart(bundle: Bundle, exact: Trace) -> Measure:
    there = {name: one for name, one in bundle.noise.exact.sketches.items() if name in exact.sketches}
    far = _of_first_batch(distances(exact, Trace(there, exact.losses_K, exact.losses_N)))
    noise = _farthest(bundle)
    shares = [one / noise[cell] if one else 0.0 for cell, one in far.items()]
    return Measure(
        name="distance of float64 here from the bundle's",
        value=max(shares, default=None),
        bound=FLOAT64_SHARE,
        unit="draws",
        reason="float64's roundings",
    )


def _draws_wider(bundle: Bundle, here: dict[Cell, float]) -> Measure:
    first = bundle.noise.drawn[0]
    # Decoding chooses its experts freely, so a rounding may tip it over here and not there.
    times = [first[cell] / far for cell, far in here.items() if far and cell[0] != "decode"]
    return Measure(
        name="distance of the bundle's first draw",
        value=max(times, default=None),
        bound=DRAW_TIMES,
        unit="times that of the same weights here",
        reason="the weights move alike, so only arithmetic differs",
    )


def _farthest(bundle: Bundle) -> dict[Cell, float]:
    return {cell: max(max(one[cell] for one in bundle.noise.drawn), 1e-300) for cell in bundle.noise.drawn[0]}


def _of_first_batch(cells: dict[Cell, float]) -> dict[Cell, float]:
    return {cell: far for cell, far in cells.items() if cell[2] == "0" or cell[0] == "decode"}


def _same_routes(here: Routes, there: Routes) -> bool:
    return here.keys() == there.keys() and all(torch.equal(here[name].long(), there[name].long()) for name in here)


def _other(bundle: Bundle, what: str) -> InputError:
    return InputError(
        f"The bundle of {bundle.manifest.source} does not say what float64 and rounding give on this machine: {what}. "
        "Whoever signed it should make it again, or make one here."
    )
