"""Whether what a chip does to a model differs by more than rounding does: its trace against float64 and noise.

The noise floor comes from draws: traces of the reference chip from weights that were moved as rounding may move them
(`trace.RoundingDraw`). A chip's distance from float64 over that of the draws is its *effect*; soundly different
chips have effects well below 1, because all round the same numbers to the same dtype. Where a rounding may tip a batch
over, as in a trained model, draws are far apart themselves: no less is allowed to a chip.

The losses are held against an equivalence test, two one-sided tests (Schuirmann 1987), not a test of difference, which
a noisy chip would pass: too few batches for a proof make it inconclusive.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy
import torch
from scipy import special

from beringia.numerics.metrics import UNIT_ROUNDOFF, few
from beringia.qualify.sketches import NOT_FINITE
from beringia.qualify.trace import Trace
from beringia.records.certificate import NOISE_FLOORS, REFERENCES, Measure, ProbeResult, Use

EFFECT_ALLOWED = 1.5
"""Times the noise floor. Sound chips have 0.1 to 0.8 (`docs/qualify.md`); a defect that moves a gradient by twice the
noise has at least 2."""
DRAW_ALLOWED = 1.25
"""Times the farthest draw's distance, in the worst batch. In a trained model a rounding may tip a few batches over,
whose distance is then many times that of others (SmolLM2: 24 draws of one gradient from 0.1 to 3.5 floors): nothing
that a draw does may be held against a chip."""
FEW_ALLOWED = 1.1
"""Times the noise floor, where a distance is that of few numbers: what a sound chip's is at most where it is of many
(`docs/qualify.md`), times how far the root mean square of so few may be above that of others (`few`). Adam's first
steps, for one, make of a gradient near zero a whole step of either sign: then a handful of weights are most of an
update's distance, in draws as on chips."""
REFERENCE_ALLOWED = 1.6
"""Times the reference's own distance, in 16-bit dtypes, where the rounding of results is nearly all of a sound chip's
error and falls on the same numbers on every chip. Sound ones have 0.9 to 1.25, and up to 1.45 where they compute
attention as one kernel and the reference in parts (`docs/qualify.md`); both beside what `few` allows."""
OVERALL_ALLOWED = 1.2
"""Times the reference's own distance, in 16-bit dtypes, in the median of all groups: what single groups may have by
chance averages out there. Sound chips and software have 0.96 to 1.04, whatever units, kernels and attention they use,
and 1.08 on one of six models (`docs/qualify.md`). More than this, beside what `few` allows, is told and rules nothing
out: harm is what single quantities suffer, and of faults with 1.2 to 1.35 about as many are harmless as not. It leaves
open whether a chip may train (`doubt.py`)."""
EVEN_DRAWS = 1.5
"""Largest over smallest of the draws' distances that are even: where a rounding may tip a single distance over, the
reference's own says little."""
MEDIAN_BATCHES = 3
"""With fewer batches the median is as much at one batch's mercy as the worst is."""
BESIDE_REFERENCE = "distance beside the reference's"
OVERALL = "distance overall"
"""The subject of what all groups say together."""
IN_THE_MEDIAN = "effect in the median batch"
"""The measure that no single batch decides."""
LOSS_MARGIN = 2.0
"""Mean difference of the loss, in standard deviations of the draws' differences, that still counts as equivalent."""
CONFIDENCE = 0.95
"""Of each of the two one-sided tests."""
_QUANTILES = 1000


Group = tuple[str, str]
"""Kind (outputs, decode, serve, gradient, accumulated, update, buffer), and the scenario, parameter, layer or
buffer."""
Cell = tuple[str, str, str]
"""A group in one batch; the batch is empty where there is only one."""

_OUTPUTS: Group = ("outputs", "")


@dataclass(frozen=True)
class RoundingNoise:
    """What the reference machine knows of rounding: float64, and how far the reference and its draws are from it."""

    exact: Trace
    own: Mapping[Cell, float]
    """Distances of the reference chip's trace."""
    drawn: tuple[Mapping[Cell, float], ...]
    """Distances of each draw's trace."""
    losses_PK: torch.Tensor
    """Differences of the draws' losses from float64, by batch."""
    losses_PN: torch.Tensor
    """And by training step."""
    numbers: Mapping[Cell, float] = field(default_factory=dict)
    """Of how many numbers, as it were, a draw's distance is: 1 where one sketched number is all of it. Where nothing is
    said: of very many."""
    rounds_once: bool = False
    """Whether the rounding of results is nearly all of a sound chip's error: in 16-bit dtypes."""
    tipped: Mapping[Cell, float] = field(default_factory=dict)
    """Distances of the reference chip's trace in groups where it is farther than all its draws: there it counts as one
    of them (`sound_reference.keeping_its_bounds`)."""
    tipped_loss: float = 0.0
    """As `tipped`, of the batches' losses: the farther end of their mean difference's interval, in nats."""
    tipped_training: float = 0.0
    """As `tipped`, of the training steps' losses: their effect, in noise floors."""

    @staticmethod
    def of(exact: Trace, reference: Trace, draws: Iterable[Trace]) -> RoundingNoise:
        """From the traces themselves. Draws may be made one by one: of each only the distances are kept.

        Of how many numbers a distance is, is the harmonic mean over draws: that averages fourth moments, so a draw that
        one number decides is not outvoted by another that many do.
        """
        drawn, losses_K, losses_N = [], [], []
        numbers: dict[Cell, list[float]] = defaultdict(list)
        for draw in draws:
            drawn.append(distances(draw, exact))
            for cell, count in numbers_of(draw, exact).items():
                numbers[cell].append(count)
            losses_K.append(minus(draw.losses_K, exact.losses_K))
            losses_N.append(minus(draw.losses_N, exact.losses_N))
        return RoundingNoise(
            exact,
            distances(reference, exact),
            tuple(drawn),
            torch.stack(losses_K),
            torch.stack(losses_N),
            {cell: statistics.harmonic_mean(counts) for cell, counts in numbers.items()},
        )

    def floors(self) -> dict[Group, Floor]:
        """Of every group."""
        drawn = [_by_group(one) for one in self.drawn]
        numbers, tipped = _by_group(self.numbers), _by_group(self.tipped)
        return {
            group: _floor(
                own,
                [one[group] for one in drawn],
                min(numbers[group].values(), default=math.inf),
                self.rounds_once,
                max(tipped[group].values(), default=0.0),
            )
            for group, own in _by_group(self.own).items()
        }


@dataclass(frozen=True)
class Floor:
    """How far from float64 rounding brings one group, in the unit of its sketches."""

    overall: float
    """Root mean square over draws and batches, and not less than the reference's own."""
    farthest: float
    """Of all draws, in any batch, and of the reference where it tipped over."""
    by_batch: Mapping[str, float]
    """Root mean square over draws, and not less than the reference's own."""
    numbers: float
    """Of how many numbers a distance is, in the batch where these are fewest."""
    reference: Mapping[str, float] | None
    """The reference's own distances by batch, where they say what a sound chip's are."""


def judge_trace(noise: RoundingNoise, found: Trace) -> list[ProbeResult]:
    """All that the trace says: outputs, decoding, gradients, updates, losses."""
    results = judge_sketches(noise, found)
    # Where all that is served is right, only what is made of it can be wrong: the loss.
    served_rightly = all(result.outcome == "passed" for result in results if result.rules_out == "infer")
    losses = _judge_losses(noise, found, "train" if served_rightly else "infer")
    return [*results, losses, _judge_training(noise, found)]


def judge_sketches(noise: RoundingNoise, found: Trace) -> list[ProbeResult]:
    """What its sketches alone say, of every group that the noise has."""
    sizes = _by_group(_norms(noise.exact.sketches))
    far = _by_group(distances(found, noise.exact))
    floors = noise.floors()
    smallest = {group: _rounding(max(size.values())) for group, size in sizes.items()}
    of_groups = [_judge_group(group, far[group], floor, smallest[group]) for group, floor in floors.items()]
    return [*of_groups, *_judge_overall(far, floors, smallest)]


def judge_served(noise: RoundingNoise, found: Trace) -> list[ProbeResult]:
    """What is served, of a chip that cannot train."""
    exact = {name: sketch for name, sketch in noise.exact.sketches.items() if _RULES_OUT[cell_of(name)[0]] == "infer"}
    own = {cell: distance for cell, distance in noise.own.items() if _RULES_OUT[cell[0]] == "infer"}
    return judge_sketches(replace(noise, exact=replace(noise.exact, sketches=exact), own=own), found)


def judge_outputs(noise: RoundingNoise, outputs: Mapping[str, torch.Tensor]) -> ProbeResult:
    """Sketches of outputs alone (`outputs/0`, ...) with the same floor: for software that infers and does not train."""
    exact = {name: sketch for name, sketch in noise.exact.sketches.items() if cell_of(name)[0] == "outputs"}
    one, other = (replace(noise.exact, sketches=sketches) for sketches in (outputs, exact))
    far = _by_group(distances(one, other))[_OUTPUTS]
    return _judge_group(_OUTPUTS, far, noise.floors()[_OUTPUTS], _rounding(max(_norms(exact).values())))


def power_of(batches: int) -> float:
    """Probability that a chip no different from the reference is found equivalent, with so many batches."""
    if batches < 2:
        return 0.0
    critical = float(special.stdtrit(batches - 1, CONFIDENCE))
    # The measured deviation varies itself: averaged over its quantiles.
    quantiles = (numpy.arange(_QUANTILES) + 0.5) / _QUANTILES
    deviations = numpy.sqrt(special.chdtri(batches - 1, 1.0 - quantiles) / (batches - 1))
    inside = 2.0 * special.ndtr(LOSS_MARGIN * math.sqrt(batches) - critical * deviations) - 1.0
    return float(numpy.maximum(inside, 0.0).mean())


def _floor(
    own: Mapping[str, float], drawn: Sequence[Mapping[str, float]], numbers: float, rounds_once: bool, tipped: float
) -> Floor:
    """From the reference's own distances by batch and the draws'; `tipped`: how far it was where it tipped over."""
    of_draws = [far for one in drawn for far in one.values()]
    even = len(own) >= MEDIAN_BATCHES or max(of_draws) <= EVEN_DRAWS * min(of_draws)
    tells = even and tipped <= DRAW_ALLOWED * max(of_draws)
    return Floor(
        max(_rms(of_draws), _rms(list(own.values()))),
        max(tipped, *of_draws),
        {batch: max(_rms([one[batch] for one in drawn]), far) for batch, far in own.items()},
        numbers,
        own if rounds_once and tells else None,
    )


_RULES_OUT: Mapping[str, Use] = {
    "outputs": "infer",
    "decode": "infer",
    "serve": "infer",
    "gradient": "train",
    "accumulated": "train",
    "update": "train",
    "buffer": "train",
}
WHAT = {
    "outputs": "outputs",
    "decode": "a step of decoding",
    "serve": "serving",
    "gradient": "the gradient",
    "accumulated": "the gradient over unlike batches",
    "update": "the update after training steps",
    "buffer": "the value after training steps",
}
"""What a kind of distance is of, for a sentence."""


def cell_of(name: str) -> Cell:
    """Where a sketch belongs: outputs by batch, gradients by parameter and batch, updates by layer."""
    kind, _, rest = name.removesuffix(NOT_FINITE).partition("/")
    if kind == "gradient":
        batch, _, parameter = rest.partition("/")
        return kind, parameter, batch
    if kind in ("serve", "buffer"):
        return kind, rest, ""
    return (kind, layer_of(rest), "") if kind in ("update", "accumulated") else (kind, "", rest)


def layer_of(parameter: str) -> str:
    """`model.layers.3.mlp.gate.weight` is of `model.layers.3`; without a numbered layer, its module."""
    numbered = re.match(r"(.*?\.\d+)\.", parameter)
    return numbered[1] if numbered else parameter.rpartition(".")[0]


def _judge_group(group: Group, far: Mapping[str, float], floor: Floor, smallest: float) -> ProbeResult:
    """Distances by batch against the floor, which is never below `smallest`.

    The worst batch is held against the draws of all batches, which know how far single batches may go; the median
    batch against its own draws, which are closer where nothing tips over.
    """
    kind, name = group
    overall = max(floor.overall, smallest)
    measures = [
        _effect(
            "effect",
            max(far.values()) / overall,
            max(EFFECT_ALLOWED, DRAW_ALLOWED * floor.farthest / overall, FEW_ALLOWED * few(floor.numbers)),
            "distance from float64 in the worst batch, over the reference's with weights moved by one last place; "
            "no less is allowed than to the farthest of those",
        )
    ]
    if len(far) >= MEDIAN_BATCHES:
        of_batches = [distance / max(floor.by_batch[batch], smallest) for batch, distance in far.items()]
        reason = "the same in the median batch, over that batch's own floor"
        measures.append(_effect(IN_THE_MEDIAN, statistics.median(of_batches), EFFECT_ALLOWED, reason))
    if floor.reference is not None:
        beside = _beside(far, floor.reference, smallest)
        numbers = floor.numbers * (1 + len(beside) // 2)  # a median is made of half of the batches
        reason = "distance from float64 over the reference's own, which rounds the same numbers; in the median batch"
        allowed = REFERENCE_ALLOWED * few(numbers)
        times = _effect(BESIDE_REFERENCE, statistics.median(beside), allowed, reason)
        measures.append(times.model_copy(update={"unit": REFERENCES}))
    failed = [measure for measure in measures if measure.used > 1.0]
    of = f": {name}" if kind == "serve" else f" of {name}" if name else ""
    return ProbeResult(
        probe="lockstep",
        subject=f"{kind} {name}".strip(),
        outcome="failed" if failed else "passed",
        rules_out=_RULES_OUT[kind],
        summary=f"{WHAT[kind]}{of} {'differs' if failed else 'is as far from float64 as rounding explains'}"
        + (f" from float64 by {_times(failed)} what rounding explains" if failed else ""),
        measures=tuple(measures),
    )


def _judge_overall(
    far: Mapping[Group, Mapping[str, float]], floors: Mapping[Group, Floor], smallest: Mapping[Group, float]
) -> list[ProbeResult]:
    """All groups in one number, where the reference's own distances say what a sound chip's are: a chip whose every
    result is a little worse stays within the bound of each. Told; what it leaves open, `doubt.py` says."""
    beside = [
        statistics.median(_beside(far[group], floor.reference, smallest[group]))
        for group, floor in floors.items()
        if floor.reference is not None and any(floor.reference.values())
    ]
    if not beside:
        return []
    value = statistics.median(beside)
    bound = OVERALL_ALLOWED * few(sum(floor.numbers for floor in floors.values() if floor.reference is not None))
    reason = f"beyond the reference's own distance from float64, which rounds the same numbers: median of {len(beside)}"
    measure = _effect("distance beyond the reference's", max(value - 1.0, 0.0), bound - 1.0, f"{reason} groups")
    beyond = measure.used > 1.0
    return [
        ProbeResult(
            probe="lockstep",
            subject=OVERALL,
            outcome="told" if beyond else "passed",
            summary=f"what is served and learned is {value:.3g} times as far from float64 as the reference's, in all"
            + (": farther than that of any chip that is known to be sound" if beyond else ""),
            measures=(measure.model_copy(update={"unit": "of the reference's"}),),
        )
    ]


def _beside(far: Mapping[str, float], reference: Mapping[str, float], smallest: float) -> list[float]:
    return [distance / max(reference[batch], smallest) for batch, distance in far.items()]


def _effect(name: str, value: float, bound: float, reason: str) -> Measure:
    return Measure(
        name=name, value=value if math.isfinite(value) else None, bound=bound, unit=NOISE_FLOORS, reason=reason
    )


def _times(failed: Sequence[Measure]) -> str:
    worst = max(failed, key=lambda measure: measure.used)
    return "more than any multiple of" if worst.value is None else f"{worst.value:.3g} times"


def _judge_losses(noise: RoundingNoise, found: Trace, use: Use) -> ProbeResult:
    differences = minus(found.losses_K, noise.exact.losses_K).tolist()
    spread = _rms(noise.losses_PK.flatten().tolist())
    margin = LOSS_MARGIN * max(spread, _rounding(_mean_size(noise.exact.losses_K)))
    margin = max(margin, DRAW_ALLOWED * noise.tipped_loss)
    low, high = _interval(differences)
    outside = low > margin or high < -margin or not all(map(math.isfinite, differences))
    inside = -margin < low and high < margin
    farthest = max(abs(low), abs(high))
    return ProbeResult(
        probe="lockstep",
        subject="loss",
        outcome="failed" if outside else "passed" if inside else "inconclusive",
        rules_out=use,
        summary="the loss is "
        + ("equivalent" if inside else "not equivalent" if outside else "neither shown equal nor different")
        + f" (mean difference within {low:.3g} and {high:.3g}, margin {margin:.3g})",
        measures=(
            Measure(
                name="difference of the loss, 90 % interval's farther end",
                value=farthest if math.isfinite(farthest) else None,
                bound=margin,
                unit="nats",
                reason=f"two one-sided tests; {LOSS_MARGIN:g} standard deviations of the draws",
            ),
        ),
    )


def _judge_training(noise: RoundingNoise, found: Trace) -> ProbeResult:
    """Losses of the training steps: their differences grow, for draws as for chips, so each step has its own floor."""
    floor_N = noise.losses_PN.square().mean(0).sqrt()
    floor_N = floor_N.clamp_min(_rounding(_mean_size(noise.exact.losses_N)))
    effect = float((minus(found.losses_N, noise.exact.losses_N) / floor_N).square().mean().sqrt())
    bound = max(2 * EFFECT_ALLOWED, DRAW_ALLOWED * noise.tipped_training)
    failed = not effect <= bound
    return ProbeResult(
        probe="lockstep",
        subject="losses of training",
        outcome="failed" if failed else "passed",
        rules_out="train",
        summary=f"the losses of {len(floor_N)} training steps are {effect:.3g} times as far from float64 as the draws'",
        measures=(
            Measure(
                name="effect",
                value=effect if math.isfinite(effect) else None,
                bound=bound,
                unit=NOISE_FLOORS,
                reason="a handful of numbers that depend on each other: twice the bound of a gradient; no less is "
                "allowed than to the reference",
            ),
        ),
    )


def minus(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The difference; 0 where both are the same infinity, or both NaN."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, one - other)


def _mean_size(numbers: torch.Tensor) -> float:
    """Of those that are finite."""
    return float(numbers.nan_to_num(0.0, 0.0, 0.0).abs().mean())


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean lies by two one-sided tests: the 90 % interval of Student's t."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return -math.inf, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(special.stdtrit(count - 1, CONFIDENCE)) * deviation / math.sqrt(count)
    return mean - half, mean + half


def numbers_of(found: Trace, exact: Trace) -> dict[Cell, float]:
    """How many numbers of equal size have the norm and the fourth moment of two traces' differences (the participation
    ratio), by cell."""
    squares: dict[Cell, float] = defaultdict(float)
    fourths: dict[Cell, float] = defaultdict(float)
    for name, sketch in exact.sketches.items():
        other = found.sketches.get(name)
        if other is not None and other.shape == sketch.shape:
            square = (other - sketch).square()
            squares[cell_of(name)] += float(square.sum())
            fourths[cell_of(name)] += float(square.square().sum())
    return {
        cell: max(1.0, square**2 / fourths[cell]) if fourths[cell] and math.isfinite(fourths[cell]) else 1.0
        for cell, square in squares.items()
    }


def distances(found: Trace, exact: Trace) -> dict[Cell, float]:
    """Norms of the differences between two traces, by cell; infinite where not the same elements are infinite or NaN,
    and where one is missing, or has another shape."""
    differences = {
        name: other - sketch
        if (other := found.sketches.get(name)) is not None and other.shape == sketch.shape
        else torch.full((1,), math.inf)
        for name, sketch in exact.sketches.items()
    }
    # Not finite in elements that are so in no other trace.
    differences |= {
        name: torch.full((1,), math.inf) for name in found.sketches if NOT_FINITE in name and name not in differences
    }
    return _norms(differences)


def sizes(trace: Trace) -> dict[Cell, float]:
    """Norms of what a trace holds, by cell."""
    return _norms(trace.sketches)


def _norms(sketches: Mapping[str, torch.Tensor]) -> dict[Cell, float]:
    squares: dict[Cell, float] = defaultdict(float)
    for name, sketch in sketches.items():
        squares[cell_of(name)] += float(sketch.square().sum())  # infinite already from 1e154 on
    return {cell: math.sqrt(square) if square == square else math.inf for cell, square in squares.items()}


def _by_group(cells: Mapping[Cell, float]) -> dict[Group, dict[str, float]]:
    """Values by batch, of each group."""
    groups: dict[Group, dict[str, float]] = defaultdict(dict)
    for (kind, name, batch), value in cells.items():
        groups[kind, name][batch] = value
    return groups


def _rounding(size: float) -> float:
    """Nothing is nearer to float64 than a few roundings of float32."""
    return 16 * UNIT_ROUNDOFF[torch.float32] * size + 1e-30


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
