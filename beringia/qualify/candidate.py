"""All probes of one chip with one model, from a bundle: yields evidence, fact by fact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from beringia.chips.chip import Chip
from beringia.errors import ChipUnavailable
from beringia.model import Decoder
from beringia.qualify.arithmetic.integers import probe_integers
from beringia.qualify.arithmetic.multiply_add import probe_multiply_add
from beringia.qualify.arithmetic.transfers import probe_transfers
from beringia.qualify.bundle import Bundle
from beringia.qualify.capture import replay
from beringia.qualify.choices import departed_choice, probe_choices
from beringia.qualify.clipping import departed_clipping, probe_clipping
from beringia.qualify.departure import first_departure
from beringia.qualify.doubt import doubt, left_open
from beringia.qualify.effects import judge_served, judge_trace
from beringia.qualify.evidence import Begun, Checked, Departed, Fact, Probed, Unrepeatable, failure
from beringia.qualify.hardware.memory import probe_memory
from beringia.qualify.hardware.soak import matrix_load, probe_soak
from beringia.qualify.hardware.speed import probe_speed
from beringia.qualify.layers import probe_layers
from beringia.qualify.lengths import LENGTHS, Heads, probe_lengths
from beringia.qualify.operators.check import worse_than_reference
from beringia.qualify.operators.float64 import NotKnown
from beringia.qualify.recording import Recorder, Recording
from beringia.qualify.refusals import REFUSALS, judging, raised_words, says_no_memory
from beringia.qualify.subject import DecoderSubject, Subject
from beringia.qualify.trace import Tracer
from beringia.qualify.wrong_calls import (
    Errors,
    beside_reference,
    beside_reference_again,
    judge_operators,
    wrong_alone,
)
from beringia.records.certificate import Departure, OperatorCheck, ProbeResult, Use

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extent:
    """How much is probed."""

    longest: int
    """Tokens: attention is not tried beyond, nor beyond what the model takes."""
    memory_bytes: int
    soak_seconds: float
    speed: bool


def probe_candidate(chip: Chip, subject: Subject, bundle: Bundle, extent: Extent) -> Iterator[Fact]:
    """The evidence, in the order in which it is found. What the chip raises ends it with a finding: of the reference,
    which made the same passes, nothing was raised."""
    begun = "opening"
    try:
        for fact in _probed(chip, subject, bundle, extent):
            if isinstance(fact, Begun):
                begun = fact.probe
            yield fact
    except REFUSALS as problem:
        _LOG.warning("%s: what was raised while probing %s", chip.name, begun, exc_info=problem)
        yield Probed(result=failure(begun, f"the chip {raised_words(chip, problem)}"))


def _probed(chip: Chip, subject: Subject, bundle: Bundle, extent: Extent) -> Iterator[Fact]:
    dtype = getattr(torch, bundle.manifest.compute_dtype)
    yield Begun(probe="arithmetic")
    for result in (*probe_transfers(chip), *probe_integers(chip), *probe_multiply_add(chip)):
        yield Probed(result=result)
    yield Begun(probe="operators")
    recorder = Recorder(subject, chip, dtype)
    tracer = Tracer(subject, bundle.plan)
    recording = recorder.record(tracer, bundle.routes)
    with judging("operators were"):
        checks = [beside_reference(check, bundle.manifest.errors) for check in recording.checks]
        of_operators = judge_operators(checks, recording)
    for check in checks:
        yield Checked(check=check)
    for result in of_operators:
        yield Probed(result=result)
    if recording.raised is not None:
        raise recording.raised
    nothing_named = False
    if recording.served is not None:
        yield Begun(probe="lockstep")
        with judging("what it serves was"):
            served = left_open(judge_served(bundle.noise, recording.served))
        for result in served:
            yield Probed(result=result)
    if recording.trace is not None:
        with judging("the trace was"):
            effects = left_open(judge_trace(bundle.noise, recording.trace))
        yield from _lockstep(recording, effects)
        all_right = not any(map(worse_than_reference, checks))
        again: list[Fact] = [*look_again(recorder, bundle.manifest.errors, checks, effects)]
        if all_right and not again:
            again = [*_look_where_it_failed(recorder, tracer, bundle, effects)]
        yield from again
        with judging("what is nearly harmed was"):
            doubts = list(doubt(checks, effects))
        for result in doubts:
            yield Probed(result=result)
        nothing_named = all_right and not again
        if nothing_named:
            departed = [*_departure(chip, subject, dtype, bundle, effects)]
            yield from departed
            nothing_named = not departed
        yield from _told_of_running(recording, bundle)
    open_where_it_raises = partial(_open_where_it_raises, chip)
    layers = probe_layers(chip, subject, dtype, bundle.traffic, bundle.routes.batches[0])
    yield from open_where_it_raises("layers", "neither", (Probed(result=result) for result in layers))
    choices = _choices(chip, subject, bundle, nothing_named)
    named: list[Departed] = []
    for fact in open_where_it_raises("experts", "infer", choices):
        named += [fact] if isinstance(fact, Departed) else []
        yield fact
    if recording.trace is not None:  # or an operator is missing, perhaps one of clipping's
        clipping = _clipping(chip, subject, bundle, nothing_named and not named)
        yield from open_where_it_raises("clipping", "train", clipping)
    yield from open_where_it_raises("replay", "neither", _replay(chip, bundle))
    lengths = _lengths(chip, subject, dtype, extent, recorder.begin_step)
    yield from open_where_it_raises("lengths", "infer", lengths)
    yield from _hardware(chip, extent)


def _open_where_it_raises(chip: Chip, probe: str, rules_out: Use, facts: Iterator[Fact]) -> Iterator[Fact]:
    """A probe of parts by themselves. After a trace in which the whole model raised nothing, what is raised here may be
    the probing's own mistake: it leaves open what the probe says something of. So does memory that the probe does not
    get beside what the model took. Another fault of the chip goes on."""
    yield Begun(probe=probe)
    try:
        yield from facts
    except (*REFUSALS, MemoryError) as problem:
        if chip.classify(problem) is not None and not says_no_memory(problem):
            raise
        _LOG.warning("%s: what was raised while probing %s", chip.name, probe, exc_info=problem)
        yield Probed(
            result=ProbeResult(
                probe=probe,
                subject="carried out",
                outcome="told" if rules_out == "neither" else "inconclusive",
                rules_out=rules_out,
                summary=f"{probe}: not carried out to the end, the chip {raised_words(chip, problem)}",
            )
        )


def _choices(chip: Chip, subject: Subject, bundle: Bundle, nothing_named: bool) -> Iterator[Fact]:
    """The first router that chooses other experts, where nothing else is named."""
    dtype = getattr(torch, bundle.manifest.compute_dtype)
    for result in probe_choices(chip, subject, dtype, bundle.traffic, bundle.routes.batches[0]):
        yield Probed(result=result)
        if nothing_named and result.outcome == "failed":
            nothing_named = False
            yield Departed(departure=departed_choice(result))


def _lockstep(recording: Recording, effects: Sequence[ProbeResult]) -> Iterator[Fact]:
    yield Begun(probe="lockstep")
    for result in effects:
        yield Probed(result=result)
    place = recording.first_unrepeatable
    if recording.unrepeatable:
        named = (
            ("", "", "forward", 0) if place is None else (place.module, place.operator, place.direction, place.ordinal)
        )
        yield Unrepeatable(module=named[0], operator=named[1], direction=named[2], ordinal=named[3])
    yield Probed(
        result=ProbeResult(
            probe="repeat",
            subject="a pass made twice",
            outcome="failed" if recording.unrepeatable else "passed",
            rules_out="neither",
            summary=f"{len(recording.unrepeatable)} tensors of a pass have other bits the second time"
            if recording.unrepeatable
            else "a pass made twice gives the same bits",
            seconds=recording.seconds.get("repeat", 0.0),
        )
    )


PASSES_AGAIN = 6
"""Of a fault that strikes every third pass, one in eleven stays unseen in them."""


def look_again(
    recorder: Recorder, errors: Errors, checks: list[OperatorCheck], effects: Sequence[ProbeResult]
) -> Iterator[Checked]:
    """Where the model is harmed and no watched call was wrong, the fault may come and go: watch further passes."""
    if any(effect.outcome == "failed" for effect in effects) and not any(map(worse_than_reference, checks)):
        for check in recorder.watch_again(PASSES_AGAIN, partial(beside_reference_again, errors=errors)):
            yield Checked(check=check)


def _look_where_it_failed(
    recorder: Recorder, tracer: Tracer, bundle: Bundle, effects: Sequence[ProbeResult]
) -> Iterator[Fact]:
    """Where a way of serving or a step over unlike batches is harmed and no watched call was wrong: a call may be wrong
    only in their shapes."""
    failed = [effect.subject for effect in effects if effect.outcome == "failed"]
    judged = partial(beside_reference_again, errors=bundle.manifest.errors)
    for check in recorder.watch_where_it_failed(tracer, bundle.routes, failed, judged):
        yield Checked(check=check)


def _departure(
    chip: Chip, subject: Subject, dtype: torch.dtype, bundle: Bundle, effects: Sequence[ProbeResult]
) -> Iterator[Fact]:
    """Where the model is harmed and every operator is right: the first module that is not, or else what differs."""
    failed = [effect for effect in effects if effect.outcome == "failed"]
    if not failed:
        return
    # What is inferred comes before what is learned from it, though a batch's gradients are made before its outputs.
    first = next((effect for effect in failed if effect.rules_out == "infer"), failed[0])
    yield Begun(probe="departure")
    found = _first_departure(chip, subject, dtype, bundle)
    if found is None:
        worst = max(first.measures, key=lambda measure: measure.used)
        found = Departure(module="", quantity=first.subject, times=worst.value)
    yield Departed(departure=found)


def _first_departure(chip: Chip, subject: Subject, dtype: torch.dtype, bundle: Bundle) -> Departure | None:
    """None, too, where modules by themselves raise something: what cannot be located is no less wrong."""
    try:
        return first_departure(chip, subject, dtype, bundle.routes.batches[0])
    except REFUSALS as problem:
        if chip.classify(problem) is not None:
            raise
        _LOG.warning("%s: what was raised by a module by itself", chip.name, exc_info=problem)
        return None


def _clipping(chip: Chip, subject: Subject, bundle: Bundle, nothing_named: bool) -> Iterator[Fact]:
    result = probe_clipping(chip, subject, getattr(torch, bundle.manifest.compute_dtype), bundle.noise)
    if result is not None:
        yield Probed(result=result)
        if nothing_named and result.outcome == "failed":
            yield Departed(departure=departed_clipping(result))


def _told_of_running(recording: Recording, bundle: Bundle) -> Iterator[Fact]:
    """Facts without a bound: batch invariance, and what a step takes."""
    same = {
        True: "has the same bits as in a batch",
        False: "has other bits than in a batch",
        None: "could not be tried",
    }
    words = f"a sample alone {same[recording.batch_invariant]}"
    yield Probed(result=_told("repeat", "batch invariance", words))
    passes = 2 * bundle.manifest.batches + bundle.manifest.steps
    seconds = recording.seconds["trace"] / passes
    yield Probed(result=_told("speed", "passes of the model", f"{seconds:.3g} s a pass, over {passes} of them"))


def _replay(chip: Chip, bundle: Bundle) -> Iterator[Fact]:
    """Every captured call with the reference's arguments. An operator that only the reference has is told."""
    beyond: list[OperatorCheck] = []
    missing: set[str] = set()
    unjudged: set[str] = set()
    count = 0
    for call in bundle.calls:
        try:
            check = replay(call, chip)
        except NotImplementedError:
            missing.add(call.place.operator)
            continue
        except NotKnown:
            unjudged.add(call.place.operator)
            continue
        count += 1
        if check is not None and wrong_alone(check):
            beyond.append(check)
    yield Probed(
        result=ProbeResult(
            probe="replay",
            subject="captured calls",
            outcome="failed" if beyond else "passed",
            rules_out="neither",
            summary=f"{len(beyond)} of {count} captured calls are wrong with the reference's arguments"
            + (f", first {beyond[0].name}" if beyond else "")
            + (
                f"; {bundle.manifest.calls_left_out} did not fit in the bundle"
                if bundle.manifest.calls_left_out
                else ""
            ),
            measures=max(beyond, key=lambda check: check.used).measures if beyond else (),
        )
    )
    if missing:
        names = ", ".join(sorted(missing))
        yield Probed(
            result=_told("replay", "other operators", f"the reference's software uses, and this chip lacks: {names}")
        )
    if unjudged:
        names = ", ".join(sorted(unjudged))
        yield Probed(result=_told("replay", "not judged", f"without a float64 form, so not judged: {names}"))
    if bundle.not_here:
        names = ", ".join(sorted(set(bundle.not_here)))
        yield Probed(
            result=_told(
                "replay",
                "operators not here",
                f"{len(bundle.not_here)} captured calls were not made, since the software here does not know: {names}",
            )
        )


def _lengths(
    chip: Chip, subject: Subject, dtype: torch.dtype, extent: Extent, begin_step: Callable[[], None]
) -> Iterator[Fact]:
    if not isinstance(subject, DecoderSubject):
        return  # what attention a module of one's own has, only its own calls can tell
    heads, longest = heads_of(subject.build())
    lengths = tuple(length for length in LENGTHS if length <= min(longest, extent.longest))
    for result, check in probe_lengths(chip, dtype, heads, lengths, subject.seed, begin_step=begin_step):
        yield Probed(result=result)
        if check is not None:
            yield Checked(check=check)


def heads_of(decoder: Decoder) -> tuple[Heads, int]:
    """Sizes of its attention heads, and the most tokens it takes."""
    config = decoder.config
    return Heads(config.key_width, config.value_width), config.context_tokens


def _hardware(chip: Chip, extent: Extent) -> Iterator[Fact]:
    parts: list[tuple[str, Use, bool, Callable[[], list[ProbeResult]]]] = [
        ("memory", "infer", extent.memory_bytes > 0, lambda: probe_memory(chip, limit_bytes=extent.memory_bytes)),
        ("speed", "neither", extent.speed, lambda: probe_speed(chip)),
        ("soak", "train", extent.soak_seconds > 0, lambda: [_soak(chip, extent.soak_seconds)]),
    ]
    for probe, rules_out, wanted, make in parts:
        if wanted:
            yield from _open_where_it_raises(chip, probe, rules_out, _made(make))


def _made(make: Callable[[], list[ProbeResult]]) -> Iterator[Fact]:
    for result in make():
        yield Probed(result=result)


def _soak(chip: Chip, seconds: float) -> ProbeResult:
    try:
        load = matrix_load(chip, 0)
    except ChipUnavailable as lacking:
        return ProbeResult(
            probe="soak", subject="carried out", outcome="inconclusive", rules_out="train", summary=f"soak: {lacking}"
        )
    return probe_soak(load, seconds)


def _told(probe: str, subject: str, summary: str) -> ProbeResult:
    return ProbeResult(probe=probe, subject=subject, outcome="told", summary=summary)
