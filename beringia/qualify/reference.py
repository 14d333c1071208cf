"""Makes a bundle: float64, the reference chip, its noise, its calls; of a reference that is sound, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from beringia.chips.chip import Chip
from beringia.qualify.bundle import DEFAULT_LIMIT_BYTES, write_bundle
from beringia.qualify.capture import CallCapture
from beringia.qualify.effects import RoundingNoise
from beringia.qualify.layers import Traffic
from beringia.qualify.recording import Recorder, Recording
from beringia.qualify.rounded_float64 import RoundedFloat64
from beringia.qualify.rounding_draw import RoundingDraw
from beringia.qualify.serving import scenarios
from beringia.qualify.sound_reference import (
    Reference,
    check_effects,
    check_has_numbers,
    check_operators,
    keeping_its_bounds,
    raising_nothing,
)
from beringia.qualify.subject import DecoderSubject, Subject
from beringia.qualify.subject_check import check_subject
from beringia.qualify.trace import Trace, TraceExtent, Tracer
from beringia.qualify.wrong_calls import USED_AT_MOST, error_key
from beringia.records.identity import ChipIdentity
from beringia.records.signature import load_or_create_key

DRAWS = 4
"""Traces from moved weights: with six batches each, 24 distances for every gradient."""


def make_bundle(
    subject: Subject,
    chip: Chip,
    dtype: torch.dtype,
    path: Path,
    *,
    plan: TraceExtent,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    key: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    rounded: bool = False,
) -> None:
    """Record `subject` on `chip` into a bundle at `path`, signed with the private key at `key` (None: this machine's);
    `say` hears what is being done. `rounded`: on the CPU, with float64's results, rounded once, in the place of its own
    (`rounded_float64.py`); the bundle says so.

    Raises Refusal, before anything is written, for a reference that is not sound (`sound_reference.py`), InputError for
    a subject that is not the same every time, and a model, or a dtype, that gives no numbers.
    """
    if not isinstance(subject, DecoderSubject):
        say("what the subject gives")
        check_subject(subject, max(plan.batches, plan.steps, 2))
    tracer = Tracer(subject, plan)
    say("float64 on the CPU")
    exact, routes = tracer.in_float64()
    check_has_numbers(exact, subject.name)
    reference = Reference(chip, subject, dtype, routes, plan)
    capture = CallCapture(limit_bytes)
    computing: Callable[[], AbstractContextManager[object]] = RoundedFloat64 if rounded else nullcontext
    with raising_nothing(reference), computing():
        recording, bounded, traffic = _recorded(reference, tracer, exact, capture, say)
    errors = {
        error_key(check.module, check.operator, check.direction, check.ordinal): (
            check.error,
            min(check.used, USED_AT_MOST),
        )
        for check in recording.checks
        if check.error is not None
    }
    say("writing the bundle")
    write_bundle(
        path,
        {
            "source": subject.name,
            "seed": subject.seed,
            "samples": subject.samples,
            "tokens": subject.tokens,
            "layers": subject.layers,
            "model": subject.fingerprint(),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "batches": plan.batches,
            "steps": plan.steps,
            "extent": "whole" if plan.whole else "quick",
            "run_tokens": subject.run_tokens,
            "servings": len(routes.servings),
            "unlike": len(routes.unlike),
            "scenarios": [*scenarios(tracer.servings), *tracer.unlike_words],
            "untried": list(subject.untried(whole=plan.whole)),
            "reference": _rounded(chip.identity) if rounded else chip.identity,
            "errors": errors,
            "calls_left_out": capture.left_out,
        },
        bounded,
        routes,
        traffic,
        capture.calls,
        load_or_create_key(key),
    )


def _rounded(identity: ChipIdentity) -> ChipIdentity:
    return identity.model_copy(update={"sku": f"{identity.sku}, float64's results rounded"})


def _recorded(
    reference: Reference, tracer: Tracer, exact: Trace, capture: CallCapture, say: Callable[[str], None]
) -> tuple[Recording, RoundingNoise, dict[str, Traffic]]:
    """What the chip gives, the noise that is its floor, and what goes through each layer. Raises what `make_bundle`
    raises, and whatever the chip does."""
    chip, dtype, routes = reference.chip, reference.dtype, reference.routes
    say("the reference's operators")
    recording = Recorder(reference.subject, chip, dtype, also=capture.take).record(tracer, routes)
    check_operators(reference, recording.checks)
    if recording.raised is not None:
        raise recording.raised
    assert recording.trace is not None, "a reference has every operator"

    def draws() -> Iterator[Trace]:
        for seed in range(DRAWS):
            say(f"noise, draw {seed + 1} of {DRAWS}")
            change = RoundingDraw(seed, dtype)
            yield tracer.on_chip(chip, dtype, routes, begin_step=lambda: None, change=change)

    noise = RoundingNoise.of(exact, recording.trace, draws())
    say("whether the reference is sound")
    traffic = {name: Traffic(x.to(dtype), gradient.to(dtype)) for name, (x, gradient) in tracer.traffic(routes).items()}
    check_effects(reference, recording, noise, traffic)
    return recording, keeping_its_bounds(reference, noise, recording.trace), traffic
