"""Which operator calls are wrong, and what that alone rules out: beside what the reference's own calls used of their
bounds."""

from __future__ import annotations

from collections.abc import Mapping

from beringia.qualify.effects import EFFECT_ALLOWED
from beringia.qualify.operators.check import RMS_ALLOWED, RMS_ERROR, WRONG_FORM, is_grave, wrong_form_words
from beringia.qualify.recording import Recording
from beringia.records.certificate import Measure, OperatorCheck, ProbeResult, Use

USED_AT_MOST = EFFECT_ALLOWED
"""Share of its bound that a reference's call is taken to have used. A call at its bound is 1.25 times as far off as a
sound chip's, and a sound chip's whole trace has effects of up to 0.8 (`docs/qualify.md`): with every call at its bound
the effect is 1, and with every call at so many times its bound it is what a chip is refused for. A single call may be
farther off without harm; a candidate is allowed nothing for that."""
REPLAY_ALLOWED = 4.0
"""Shares of the bound on the root mean square error: a chip may make several operators of one that another chip has,
and each of them rounds. Single elements say nothing then: where the parts cancel, their roundings stay."""
_ERRORS = ("worst element", RMS_ERROR, "signed error")
"""Measures of how far numbers are off."""

Errors = Mapping[str, tuple[float, float]]
"""Of the reference's calls by `error_key`: root mean square error, and the share of its bound."""


def error_key(module: str, operator: str, direction: str, ordinal: int | str) -> str:
    """By which the same call is found on another chip."""
    return f"{module}|{operator}|{direction}|{ordinal}"


def beside_reference(check: OperatorCheck, errors: Errors) -> OperatorCheck:
    """With the reference's own error in the same call; a chip may be as far off as the reference is, up to what a sound
    one can be (`USED_AT_MOST`), which no bundle exceeds that can be read."""
    return _allowed(check, errors.get(error_key(check.module, check.operator, check.direction, check.ordinal)))


def beside_reference_again(check: OperatorCheck, errors: Errors) -> OperatorCheck:
    """Likewise of a call of a further pass, in which calls may be numbered otherwise: beside the reference's worst call
    of that operator in that module."""
    alike = error_key(check.module, check.operator, check.direction, "")
    known = [own for key, own in errors.items() if key.startswith(alike)]
    return _allowed(check, max(known, key=lambda own: own[1], default=None))


def _allowed(check: OperatorCheck, own: tuple[float, float] | None) -> OperatorCheck:
    if own is None:
        return check
    error, used = own
    times = min(RMS_ALLOWED * used, USED_AT_MOST)
    measures = check.measures if times <= 1.0 else tuple(_loosened(measure, times) for measure in check.measures)
    return check.model_copy(update={"reference_error": error, "measures": measures})


def _loosened(measure: Measure, times: float) -> Measure:
    """Where it is of how far numbers are off: what the reference lost of small ones or made infinite, it says not."""
    if measure.name not in _ERRORS:
        return measure
    reason = f"{measure.reason}; {times:.3g} times that, since the reference itself used so much of it"
    return measure.model_copy(update={"bound": times * measure.bound, "reason": reason})


def judge_operators(checks: list[OperatorCheck], recording: Recording) -> list[ProbeResult]:
    """One result a direction. A wrong number in a call is told; what it does to the model is what rules a use out. A
    grave call rules out at once."""
    results = []
    for direction in ("forward", "decode", "backward", "optimizer"):
        own = [check for check in checks if check.direction == direction]
        beyond = [check for check in own if check.used > 1.0]
        use: Use = "infer" if direction in ("forward", "decode") else "train"
        worst = max(own, key=lambda check: check.used, default=None)
        results.append(
            ProbeResult(
                probe="operators",
                subject=direction,
                outcome="failed" if beyond else "passed" if own else "told",
                rules_out=use if any(map(is_grave, beyond)) else "neither",
                summary=_operators_sentence(direction, own, beyond),
                measures=() if worst is None else worst.measures,
                seconds=recording.seconds.get("operators", 0.0) if direction == "forward" else 0.0,
            )
        )
    if recording.not_judged:
        names = ", ".join(sorted(recording.not_judged))
        summary = f"without a float64 form, so not judged alone: {names}"
        results.append(ProbeResult(probe="operators", subject="not judged", outcome="told", summary=summary))
    return results


def wrong_alone(check: OperatorCheck) -> bool:
    """Whether a call that was replayed with the reference's arguments is wrong."""
    used = {measure.name: measure.used for measure in check.measures}
    rms = used.pop(RMS_ERROR, None)
    if rms is None:  # an operator that moves numbers, or integers: every bit counts
        return check.used > 1.0
    return rms > REPLAY_ALLOWED or any(used.get(name, 0.0) > 1.0 for name in ("not finite on one side", WRONG_FORM))


def _operators_sentence(direction: str, own: list[OperatorCheck], beyond: list[OperatorCheck]) -> str:
    if not own:
        return f"{direction}: no operator was seen"
    if not beyond:
        return f"{direction}: {len(own)} operator calls are as in float64"
    first = beyond[0]
    what = f"the chip does not have it ({first.refused})" if first.refused else f"{first.used:.3g} times its bound"
    what = wrong_form_words(first) or what
    return f"{direction}: {len(beyond)} of {len(own)} operator calls are wrong, first {first.name}: {what}"
