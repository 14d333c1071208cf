"""Whether a reference may be one: its own recording, judged before a bundle is written.

A candidate is held against what the reference did, so a fault of the reference would make the candidate's same fault
sound. What is asked, and what none of the reference's own noise answers:

1. are there numbers at all? A model that gives NaN in float64 can be compared with nothing
2. did each operator and each layer give what float64 gives? What is beyond its bound is no harm yet: a sound CPU has a
   few such calls in a trained model. So then: is the first pass farther from float64 than a candidate's may be, beside
   draws of float64's results rounded once (`rounded_float64.py`), which no kernel of the reference has touched?
3. is its own trace as far from float64 as its draws are, in the median batch? In a single batch a rounding may tip
   over; that counts for no more than 1.25 times the farthest draw (`capped`)
4. is the trace of a chip that is no CPU as near to float64 as a candidate's must be, beside draws of this machine's
   CPU? What is wrong in no operator and in no layer, as a loss may be, is in all that the reference draws itself
5. is a way of serving, or the gradient over unlike batches, as far from float64, for its size, as the batches are? A
   fault past some length, or of ignored targets, is in no first pass, and in all that the reference draws. Where one
   stands out, it is held against draws of float64's results, too: a trained model may stand out by itself
6. are gradients clipped as asked? An update hardly shows it (`clipping.py`)

What the optimizer does is not in a first pass; there a call's own error is what is judged. So it is in float32, where a
sound chip's sums round as often as its results: float64's results, rounded once, have less noise than any chip, and
draws of the CPU take their place, which judge any reference but the CPU itself.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch

from beringia.chips.chip import Chip
from beringia.chips.cpu import Cpu
from beringia.errors import InputError, Refusal
from beringia.numerics.metrics import UNIT_ROUNDOFF, few
from beringia.qualify.clipping import probe_clipping
from beringia.qualify.effects import (
    DRAW_ALLOWED,
    IN_THE_MEDIAN,
    WHAT,
    Cell,
    Group,
    RoundingNoise,
    cell_of,
    judge_sketches,
    judge_trace,
    layer_of,
    sizes,
)
from beringia.qualify.layers import Traffic, probe_layers
from beringia.qualify.locate import first_wrong
from beringia.qualify.operators.check import is_grave, wrong_form_words
from beringia.qualify.recording import Recording, left_out_later
from beringia.qualify.refusals import REFUSALS, raised_words
from beringia.qualify.rounded_float64 import RoundedFloat64
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.sketches import NOT_FINITE
from beringia.qualify.subject import Subject
from beringia.qualify.trace import ChosenRoutes, Trace, TraceExtent, Tracer
from beringia.qualify.wrong_calls import USED_AT_MOST
from beringia.records.certificate import OperatorCheck, ProbeResult

SOUND_DRAWS = 3
"""Of the first pass (outputs, every gradient, a step of decoding) where something is beyond its bound; of the whole
trace for a reference that is no CPU; and of scenarios that stand out."""
LAYER_DRAWS = 1
"""Of each layer where what it shows is looked at again: its tensors have thousands of elements, over which norms are
even."""
STANDS_OUT = 3.0
"""Times the relative distance from float64 of the farthest batch, from which on draws that are not the reference's are
made of what is served and of unlike batches. On sound chips these are at most 2.2 times as far off (`docs/qualify.md`);
to be farther off refuses nobody by itself."""
TIPPED_AT_MOST = 2.0
"""Times what its draws allow a chip, in groups where the reference's own trace tipped over and nothing else is wrong
with it. In float16, where a second moment that rounds to zero makes a step of any size, a sound CPU had 1.3 in one
group of one model; from twice a sound chip's error on it may be harm."""
EVEN_AT_MOST = 3.0
"""How many times as far as the median draw one may be, in the median over what is alike (gradients, ways of serving).
On sound chips it is at most 1.62, in updates, which a handful of weights decide."""
BESIDE_TRACE_AT_MOST = {True: 8.0, False: 100.0}
"""How many times as far as the reference's own trace its draws may be, in the same median; True: in dtypes in which
results round more often than sums. On sound chips at most 3.6; where sums round as often, draws are moved by what
adding up one term after another costs, which grows with their length and which chips stay far below."""
BESIDE_CPU_AT_MOST = 2.0
"""How many times as far as the draws of this machine's CPU, in the same median."""
FEWEST_ALIKE = 4
"""Distances whose median says something; a step of decoding is one alone."""
LOSS_AT_MOST = 10.0
"""Times how far sound draws are, in root mean square, that a loss may be from float64's: of few draws of one number,
where a wrong operator asks for it."""
_ADVICE = (
    "No bundle was written: record on a chip or a machine that is sound, and give `beringia qualify` this one to learn "
    "what else is wrong with it"
)


@dataclass(frozen=True)
class Reference:
    """What is judged: a chip with a subject in a dtype."""

    chip: Chip
    subject: Subject
    dtype: torch.dtype
    routes: ChosenRoutes
    """Float64's."""
    plan: TraceExtent = TraceExtent()
    """Of its trace."""

    @property
    def drawing(self) -> Callable[[], AbstractContextManager[object]]:
        """Inside it the draws are made that this reference is judged beside."""
        return RoundedFloat64 if _rounds_once(self.dtype) else nullcontext

    @property
    def name(self) -> str:
        """For a sentence: `cpu (Intel Xeon), as a reference for r2-nano in bfloat16,`."""
        word = str(self.dtype).removeprefix("torch.")
        return f"{self.chip.name} ({self.chip.identity.sku}), as a reference for {self.subject.name} in {word},"


def check_has_numbers(exact: Trace, name: str) -> None:
    """Raise InputError where the model gives numbers that are not finite in float64 already."""
    if _is_finite(exact):
        return
    raise InputError(
        f"{name} was to be qualified, but already in float64 it gives losses, outputs or gradients that are infinite "
        "or NaN: there is nothing to compare a chip with. Give a model whose numbers are finite."
    )


@contextmanager
def raising_nothing(reference: Reference) -> Iterator[None]:
    """What a chip raises inside, where float64 has made the same passes, makes it no reference: raises Refusal. From a
    CPU it goes on as it is: there it is a mistake in the model that only its dtype shows, or ours."""
    try:
        yield
    except REFUSALS as problem:
        if reference.chip.device.type == "cpu":
            raise
        raise Refusal(
            f"{reference.name} is not sound: it {raised_words(reference.chip, problem)}. {_ADVICE}."
        ) from problem


def check_operators(reference: Reference, checks: Sequence[OperatorCheck]) -> None:
    """Raise Refusal for a call of the reference that no effect excuses: an operator that is missing, other integers, a
    result of another form than torch's; where no effect is judged, one beyond `USED_AT_MOST`."""
    grave = next((one for one in checks if one.used > 1.0 and _is_grave(one, reference.dtype)), None)
    if grave is not None:
        raise Refusal(f"{reference.name} is not sound: {_wrong_call(grave)}. {_ADVICE}.")


def check_effects(
    reference: Reference, recording: Recording, noise: RoundingNoise, traffic: Mapping[str, Traffic]
) -> None:
    """Raise Refusal where the reference harms the model, InputError where its dtype does not hold the model's numbers.
    `noise`: float64, the reference's trace and its draws, as they were found."""
    assert recording.trace is not None, "a reference has every operator"
    wrong = first_wrong(recording.checks)
    if not _is_finite(recording.trace) or not _are_finite(noise):
        _refuse_without_numbers(reference, wrong)
    layer = next((one for one in _layers(reference, traffic) if one.outcome == "failed"), None)
    of_the_cpu = _noise_of_the_cpu(reference, noise.exact)
    harm = _beside_draws(noise, recording.trace)
    judged = [] if of_the_cpu is None else judge_trace(of_the_cpu, recording.trace)
    harm += [one for one in judged if one.outcome == "failed"]
    if wrong is not None or layer is not None:
        harm += _first_pass_beside_others(reference, noise.exact, recording.trace)
    harm += _scenarios_beside_others(reference, noise, recording.trace)
    clipping = probe_clipping(reference.chip, reference.subject, reference.dtype, noise)
    harm += [clipping] if clipping is not None and clipping.outcome == "failed" else []
    if harm:
        first = f"{_wrong_call(wrong)}, and " if wrong is not None else f"{layer.summary}, and " if layer else ""
        raise Refusal(f"{reference.name} is not sound: {first}{harm[0].summary}. {_ADVICE}.")
    _check_draws(reference, noise, of_the_cpu)


def _refuse_without_numbers(reference: Reference, wrong: OperatorCheck | None) -> NoReturn:
    """Whose fault it is that the reference has none: the dtype's, where float64's results rounded to it have none."""
    if not _is_finite(_first_batch(next(_sound_draws(reference)))):
        raise InputError(
            f"{reference.name} cannot be recorded: in that dtype the model overflows, also where every operator gives "
            "float64's result, rounded. Give a dtype with more exponent bits (bfloat16, float32), or a model whose "
            "numbers are smaller."
        )
    first = "no watched call is wrong" if wrong is None else _wrong_call(wrong)
    raise Refusal(
        f"{reference.name} is not sound: {first}, and it gives infinities or NaN where float64 has numbers. {_ADVICE}."
    )


def _check_draws(reference: Reference, noise: RoundingNoise, of_the_cpu: RoundingNoise | None) -> None:
    """Raise Refusal for draws that a fault struck and the trace not, or another draw not: bounds are made of them."""
    refuse = partial(_refuse_far_draws, reference, noise.numbers)
    for number, one in enumerate(noise.drawn):
        beside = one, _median_draw(noise)
        refuse(*beside, EVEN_AT_MOST, f"draw {number + 1}", "the median draw")
    most = BESIDE_TRACE_AT_MOST[_rounds_once(reference.dtype)]
    refuse(_median_draw(noise), noise.own, most, "its draws", "its own trace")
    if of_the_cpu is not None:
        beside = _median_draw(noise), _median_draw(of_the_cpu)
        refuse(*beside, BESIDE_CPU_AT_MOST, "its draws", "those of this machine's CPU")


def _median_draw(noise: RoundingNoise) -> dict[Cell, float]:
    return {cell: statistics.median(one[cell] for one in noise.drawn) for cell in noise.own}


def _refuse_far_draws(
    reference: Reference,
    numbers: Mapping[Cell, float],
    draw: Mapping[Cell, float],
    other: Mapping[Cell, float],
    most: float,
    *words: str,
) -> None:
    """`numbers`: of how many each distance is, as the noise has it."""
    times: dict[str, dict[Cell, float]] = defaultdict(dict)
    for cell, far in draw.items():
        if other[cell] > 0.0:
            times[cell[0]][cell] = far / other[cell]
    for kind, found in times.items():
        median = statistics.median(found.values())
        # Distances of few numbers scatter, and those of a handful of weights do so together.
        allowed = most * few(statistics.median(numbers[cell] for cell in found))
        if len(found) >= FEWEST_ALIKE and not median <= allowed:
            what, beside = words
            raise Refusal(
                f"{reference.name} is not sound: the distance from float64 of {what}, which bounds are made of, is "
                f"{median:.3g} times that of {beside} in {WHAT[kind]}, and {allowed:.3g} times is the most. "
                f"{_ADVICE}."
            )


def capped(noise: RoundingNoise) -> RoundingNoise:
    """With the reference's own distances no larger than what its draws allow a chip: where its trace alone tipped over,
    or a fault struck it alone, no bound becomes wider for that."""
    farthest = _farthest(noise)
    own = {cell: min(far, DRAW_ALLOWED * farthest[cell[:2]]) for cell, far in noise.own.items()}
    return replace(noise, own=own)


def _farthest(noise: RoundingNoise) -> dict[Group, float]:
    """Of all draws, by group."""
    farthest: dict[Group, float] = {}
    for one in noise.drawn:
        for (kind, name, _), far in one.items():
            farthest[kind, name] = max(far, farthest.get((kind, name), 0.0))
    return farthest


def keeping_its_bounds(reference: Reference, noise: RoundingNoise, trace: Trace) -> RoundingNoise:
    """The noise that a bundle has, with bounds that the reference's own trace keeps: a chip with its very bits must not
    be refused, nor one that rounds nearly as it does. Where the trace is farther than all draws, in a single batch or
    an update, or than they allow a chip in the losses, it counts as one draw more; raises Refusal where it is more than
    `TIPPED_AT_MOST` times as far as they allow."""
    bounded = replace(capped(noise), rounds_once=_rounds_once(reference.dtype))
    *of_groups, loss, training = judge_trace(bounded, trace)
    groups = zip(bounded.floors(), of_groups, strict=False)  # all groups together come last
    tipped = {group: one for group, one in groups if one.outcome == "failed"}
    beyond = [*tipped.values(), *(one for one in (loss, training) if one.outcome == "failed")]
    far = next((one for one in beyond if max(part.used for part in one.measures) > TIPPED_AT_MOST), None)
    if far is not None:
        raise Refusal(f"{reference.name} is not sound: {far.summary}. {_ADVICE}.")
    farthest = _farthest(noise)
    return replace(
        bounded,
        tipped={cell: own for cell, own in noise.own.items() if cell[:2] in tipped or own > farthest[cell[:2]]},
        tipped_loss=_value(loss) if loss in beyond else 0.0,
        tipped_training=_value(training) if training in beyond else 0.0,
    )


def _value(result: ProbeResult) -> float:
    """Of its only measure."""
    (measure,) = result.measures
    assert measure.value is not None, "it is within its limit"
    return measure.value


def _is_grave(check: OperatorCheck, dtype: torch.dtype) -> bool:
    alone = check.direction == "optimizer" or not _rounds_once(dtype)
    too_far = alone and check.used > USED_AT_MOST
    return is_grave(check) or too_far


def _rounds_once(dtype: torch.dtype) -> bool:
    """Whether the rounding of a sound chip's results is nearly all its noise, its sums being much more exact."""
    return UNIT_ROUNDOFF[dtype] > UNIT_ROUNDOFF[torch.float32]


def _wrong_call(check: OperatorCheck) -> str:
    if check.refused:
        return f"it does not have {check.name} ({check.refused})"
    return f"{check.name} is {wrong_form_words(check) or f'{check.used:.3g} times its bound'}"


def _layers(reference: Reference, traffic: Mapping[str, Traffic]) -> Iterator[ProbeResult]:
    if reference.drawing is nullcontext and reference.chip.device.type == "cpu":
        return iter(())  # it would be held against itself
    left_out = left_out_later(list(traffic))  # what is wrong in a kind of layer is so in each of them
    traffic = {name: one for name, one in traffic.items() if name not in left_out}
    batch = reference.routes.batches[0]
    of = reference.chip, reference.subject, reference.dtype
    return probe_layers(*of, traffic, batch, draws=LAYER_DRAWS, drawing=reference.drawing)


def _beside_draws(noise: RoundingNoise, trace: Trace) -> list[ProbeResult]:
    """Groups in whose median batch the trace is farther off than its draws, which alone are the floor here; and ways of
    serving that are, of which the draws are one pass over the whole."""
    judged = judge_sketches(replace(noise, own=dict.fromkeys(noise.own, 0.0)), trace)
    return [
        one
        for one in judged
        if any(
            (part.name == IN_THE_MEDIAN or one.subject.startswith("serve ")) and part.used > 1.0
            for part in one.measures
        )
    ]


def _noise_of_the_cpu(reference: Reference, exact: Trace) -> RoundingNoise | None:
    """That of this machine's CPU, where the reference is another chip, which is judged beside it as a candidate is:
    what is wrong in no operator and in no layer, as a loss may be, is in all that the reference draws."""
    if reference.chip.device.type == "cpu":
        return None
    tracer = Tracer(reference.subject, reference.plan)
    of = Cpu(), reference.dtype, reference.routes
    noise = RoundingNoise.of(exact, tracer.on_chip(*of, begin_step=lambda: None), _drawn(reference, tracer))
    return replace(noise, rounds_once=_rounds_once(reference.dtype))


def _first_pass_beside_others(reference: Reference, exact: Trace, found: Trace) -> list[ProbeResult]:
    """Groups of the first pass, and its loss, that are farther off than draws that are not the reference's."""
    draws = list(_sound_draws(reference))
    of_groups = _beyond(map(_first_batch, draws), _first_batch(exact), _first_batch(found))
    return of_groups + _loss_beyond(draws, exact, found)


def _loss_beyond(draws: Sequence[Trace], exact: Trace, found: Trace) -> list[ProbeResult]:
    off, *of_draws = (float(abs(one.losses_K[0] - exact.losses_K[0])) for one in (found, *draws))
    spread = math.sqrt(sum(one * one for one in of_draws) / len(of_draws))
    bound = LOSS_AT_MOST * max(spread, UNIT_ROUNDOFF[torch.float32] * float(exact.losses_K[0].abs()), 1e-30)
    if off <= bound:
        return []
    summary = f"the loss differs from float64's by {off:.3g}, {off / bound:.3g} times what rounding explains"
    return [ProbeResult(probe="lockstep", subject="loss", outcome="failed", rules_out="train", summary=summary)]


def _scenarios_beside_others(reference: Reference, noise: RoundingNoise, found: Trace) -> list[ProbeResult]:
    """What stands out beside the batches, and is farther off than draws that are not the reference's, too."""
    groups = standing_out(noise)
    if not groups:
        return []
    draws = (_only(groups, draw) for draw in _sound_scenarios(reference))
    return _beyond(draws, _only(groups, noise.exact), _only(groups, found))


def standing_out(noise: RoundingNoise) -> list[Group]:
    """Ways of serving, and layers' gradients over unlike batches, whose relative distance from float64 in the
    reference's trace is more than `STANDS_OUT` times that of outputs, or of the layer's gradient, in any batch."""
    relative = _relative(noise)
    batches: dict[Group, float] = {}
    for (kind, name, batch), distance in relative.items():
        if batch:
            batches[kind, name] = max(distance, batches.get((kind, name), 0.0))
    return [
        (kind, name)
        for (kind, name, _), distance in relative.items()
        if (alike := _alike(kind, name)) is not None and distance > STANDS_OUT * batches.get(alike, 0.0)
    ]


def _alike(kind: str, name: str) -> Group | None:
    """What of the batches is computed as this is."""
    return {"serve": ("outputs", ""), "accumulated": ("gradient", name)}.get(kind)


def _relative(noise: RoundingNoise) -> dict[Cell, float]:
    """Distances of the reference's trace over the size of what they are of; gradients by layer."""
    far: dict[Cell, float] = defaultdict(float)
    size: dict[Cell, float] = defaultdict(float)
    norms = sizes(noise.exact)
    for (kind, name, batch), distance in noise.own.items():
        cell = kind, layer_of(name) if kind == "gradient" else name, batch
        far[cell] += distance**2
        size[cell] += norms[kind, name, batch] ** 2
    return {
        cell: math.sqrt(square / size[cell]) if size[cell] else math.inf if square else 0.0
        for cell, square in far.items()
    }


def _beyond(draws: Iterator[Trace], exact: Trace, found: Trace) -> list[ProbeResult]:
    """What is farther from float64 than draws explain, which alone are the floor."""
    noise = RoundingNoise.of(exact, exact, draws)
    return [one for one in judge_sketches(noise, found) if one.outcome == "failed"]


def _sound_draws(reference: Reference) -> Iterator[Trace]:
    tracer = Tracer(reference.subject, TraceExtent(batches=1, steps=0, scenarios=False))
    return _drawn(reference, tracer, reference.drawing)


def _sound_scenarios(reference: Reference) -> Iterator[Trace]:
    """As `_sound_draws`, but from float64's results in any dtype: a draw of the CPU would have the CPU's faults."""
    tracer = Tracer(reference.subject, replace(reference.plan, batches=1, steps=0))
    return _drawn(reference, tracer, RoundedFloat64)


def _drawn(
    reference: Reference, tracer: Tracer, drawing: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[Trace]:
    """Draws that the CPU makes; inside `drawing`."""
    for seed in range(SOUND_DRAWS):
        change = RoundingDraw(seed, reference.dtype)
        with drawing():
            trace = tracer.on_chip(Cpu(), reference.dtype, reference.routes, begin_step=lambda: None, change=change)
        yield trace  # after the context: what its receiver computes is not drawn


def _first_batch(trace: Trace) -> Trace:
    """Outputs and gradients of the first batch, and decoding, without losses."""
    return _kept(trace, lambda cell: cell[0] == "decode" or cell[2] == "0")


def _only(groups: Sequence[Group], trace: Trace) -> Trace:
    """Of some groups, without losses."""
    return _kept(trace, lambda cell: cell[:2] in groups)


def _kept(trace: Trace, wanted: Callable[[Cell], bool]) -> Trace:
    none = torch.zeros(0)
    return Trace({name: one for name, one in trace.sketches.items() if wanted(cell_of(name))}, none, none)


def _are_finite(noise: RoundingNoise) -> bool:
    """Whether every draw has numbers."""
    losses = bool(noise.losses_PK.isfinite().all() and noise.losses_PN.isfinite().all())
    return losses and all(math.isfinite(far) for one in noise.drawn for far in one.values())


def _is_finite(trace: Trace) -> bool:
    losses = torch.cat([trace.losses_K, trace.losses_N])
    return bool(losses.isfinite().all()) and not any(name.endswith(NOT_FINITE) for name in trace.sketches)
