"""From evidence to a verdict: a pure function.

Every probe says what its failure rules out. What rules out inference (outputs, decoding, operators that are missing in
the forward pass) makes the chip unfit; what rules out training alone (gradients, updates, collectives) leaves
inference, if no question about that is open; what rules out neither is told. Where nothing failed, a probe that could
not decide, or too little power, leaves the verdict open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from beringia.records.certificate import POWER_NEEDED, Departure, Located, ProbeResult, Verdict

_REASONS = 4
"""As many probes are named; the page has them all."""


@dataclass(frozen=True)
class Judgement:
    """The verdict and its reasons, the gravest first."""

    verdict: Verdict
    reasons: tuple[str, ...]
    mitigations: tuple[str, ...]


def judge(
    probes: Sequence[ProbeResult], located: Located | None, power: float, departure: Departure | None = None
) -> Judgement:
    """What the evidence amounts to."""
    first = _first_words(located, departure)
    against_inference = _ruling_out(probes, "failed", "infer")
    against_training = _ruling_out(probes, "failed", "train")
    open_to_serve = _ruling_out(probes, "inconclusive", "infer")
    open_questions = open_to_serve + _ruling_out(probes, "inconclusive", "train")
    mitigations = located.mitigations if located is not None else ()
    if against_inference:
        return Judgement("unfit", _reasons(against_inference + against_training, first), mitigations)
    if against_training and open_to_serve:
        may_serve = "whether it may serve is open, that it must not train is not"
        reasons = (*_reasons(against_training, first), may_serve, *_reasons(open_to_serve, ()))
        return Judgement("inconclusive", reasons, mitigations)
    if against_training:
        return Judgement("infer", _reasons(against_training, first), mitigations)
    if open_questions or power < POWER_NEEDED:
        too_few = (
            f"the evidence is thin: with so few batches a sound chip is shown equal with a chance of {power:.0%} only, "
            f"and {POWER_NEEDED:.0%} are needed; give it more batches (--batches)"
        )
        return Judgement(
            "inconclusive", (*_reasons(open_questions, ()), *([too_few] if power < POWER_NEEDED else [])), ()
        )
    return Judgement("train", (_sound(probes),), mitigations)


def _ruling_out(probes: Sequence[ProbeResult], outcome: str, use: str) -> list[ProbeResult]:
    found = [probe for probe in probes if probe.outcome == outcome and probe.rules_out == use]
    return sorted(found, key=lambda probe: max((measure.used for measure in probe.measures), default=0.0), reverse=True)


def _first_words(located: Located | None, departure: Departure | None) -> tuple[str, ...]:
    """Where it begins: the first wrong operator, or else what is first wrong although each operator is right."""
    if located is not None:
        return (f"the first wrong operator is {located.check.name}",)
    if departure is None:
        return ()
    times = "more than any multiple of" if departure.times is None else f"{departure.times:.3g} times"
    what = departure.quantity if not departure.module else f"{departure.module}, by its {departure.quantity}"
    kind = "module" if departure.module else "quantity"
    return (f"no operator is wrong; the first {kind} that leaves its bound is {what} ({times} what rounding explains)",)


def _reasons(probes: Sequence[ProbeResult], first: tuple[str, ...]) -> tuple[str, ...]:
    named = [probe.summary for probe in probes[:_REASONS]]
    more = len(probes) - len(named)
    return (*first, *named, *([f"and {more} more like these"] if more > 0 else []))


def _sound(probes: Sequence[ProbeResult]) -> str:
    held = [measure.used for probe in probes if probe.outcome == "passed" for measure in probe.measures]
    largest = max(held, default=0.0)
    failed = sum(probe.outcome == "failed" for probe in probes)
    several = "1 probe failed, which rules" if failed == 1 else f"{failed} probes failed, which rules"
    return f"{len(held)} bounds hold; the most that one is used is {largest:.0%}" + (
        f"; {several} nothing out" if failed else ""
    )
