"""Whether more speaks against a chip than against any that is known to be sound, though nothing alone rules a use out.

The bounds on what a model suffers are as wide as soundly different chips need, so a chip that is two or three times as
far off as these may stay within each. Two things tell it: all that it serves and learns is farther from float64 than
the reference is (`effects.OVERALL_ALLOWED`), or operators are wrong and what the model suffers is near its bound, on
this side or on the other. Which of both it is, rounding or harm, is not known then: it may not train, and is not called
unfit either.
"""

from __future__ import annotations

from collections.abc import Sequence

from beringia.qualify.effects import BESIDE_REFERENCE, OVERALL
from beringia.qualify.operators.check import worse_than_reference
from beringia.records.certificate import OperatorCheck, ProbeResult

NEAR = 0.85
"""Of a bound. Sound chips use up to 0.94 of one, and have no wrong operator; of chips with one, those that harm a model
two- to fourfold use 0.69 to 1, mostly 0.88 and more, and those that do it no harm seldom more than 0.83
(`benchmarks/results/qualify-foreign-2026-11-30.json`)."""


ALONE = 1.35
"""Times the bound on a distance beside the reference's own, where it is one way of serving of all that is beyond: each
is served once, so no median over batches takes out what a single one is off by, and the same harm is looked for in
fifteen others. A gradient is no such case: of 470 faults planted from outside one with harm of 4.4 times a sound chip's
shows in a single one, at 1.03; the one whose way of serving is alone has harm of 1.7."""


_SERVED_ONCE = ("decode", "serve ")
"""Beginnings of what effects of one pass are called; outputs and gradients are of several batches."""


def left_open(effects: Sequence[ProbeResult]) -> list[ProbeResult]:
    """The effects; one way of serving that leaves its bound by too little to tell rounding from harm is left open,
    where nothing else is beyond a bound."""
    failed = [effect for effect in effects if effect.outcome == "failed"]
    beyond = [measure for effect in failed for measure in effect.measures if measure.used > 1.0]
    little = all(measure.name == BESIDE_REFERENCE and measure.used <= ALONE for measure in beyond)
    if len(failed) != 1 or not failed[0].subject.startswith(_SERVED_ONCE) or not little:
        return list(effects)
    return [_too_little(effect) if effect is failed[0] else effect for effect in effects]


def _too_little(effect: ProbeResult) -> ProbeResult:
    summary = f"{effect.summary}, by too little beyond its bound to tell rounding from harm"
    return effect.model_copy(update={"outcome": "inconclusive", "summary": summary})


def doubt(checks: Sequence[OperatorCheck], effects: Sequence[ProbeResult]) -> list[ProbeResult]:
    """What leaves open whether a chip may train; nothing where an effect has ruled a use out already."""
    if any(effect.outcome == "failed" for effect in effects):
        return []
    overall = next((effect for effect in effects if effect.subject == OVERALL and effect.outcome == "told"), None)
    if overall is not None:
        return [_open(f"{overall.summary}: whether it may train is open")]
    wrong = next(filter(worse_than_reference, checks), None)
    near = max(effects, key=_used, default=None)
    if wrong is None or near is None or _used(near) < NEAR:
        return []
    why = f"{wrong.name} is wrong ({wrong.used:.3g} times its bound), and {_used(near):.0%} of a bound is used by"
    return [_open(f"{why} {near.subject}: too near to tell rounding from harm")]


def _open(summary: str) -> ProbeResult:
    return ProbeResult(
        probe="lockstep", subject="all together", outcome="inconclusive", rules_out="train", summary=summary
    )


def _used(effect: ProbeResult) -> float:
    return max((measure.used for measure in effect.measures), default=0.0)
