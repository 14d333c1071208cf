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


LITTLE = 1.1
"""Times the bound on distances beside the reference's own: up to there, whatever is beyond it, a chip is 1.76 times as
far off as the reference. Sound ones are up to 1.45 times, and harm counts from twice what these are."""
ALONE = 1.35
"""Times the same bound, where it is one group of all (some seventy) that is beyond: what a single group is off by
scatters. Of 299 faults planted from outside, those that these two leave open have harm of 1.7 to 2.2 times a sound
chip's, on both sides of the 2 from which it counts."""


def left_open(effects: Sequence[ProbeResult]) -> list[ProbeResult]:
    """The effects, with those that leave their bounds by too little to tell rounding from harm left open, where nothing
    else is beyond a bound."""
    failed = [effect for effect in effects if effect.outcome == "failed"]
    beyond = [measure for effect in failed for measure in effect.measures if measure.used > 1.0]
    most = max((measure.used for measure in beyond), default=0.0)
    small = most <= LITTLE or (len(failed) == 1 and most <= ALONE)
    if not failed or not small or any(measure.name != BESIDE_REFERENCE for measure in beyond):
        return list(effects)
    return [_too_little(effect) if effect in failed else effect for effect in effects]


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
