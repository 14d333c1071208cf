"""The answer of a certificate in one sentence that a tired person understands, and words for its parts.

Plain text; escaping is the template's business. A chip is never named without its truth (real or emulated).
"""

from __future__ import annotations

from dataclasses import dataclass

from beringia.records.certificate import POWER_NEEDED, Certificate, OperatorCheck, ProbeResult, Use, Verdict
from beringia.records.identity import ChipIdentity
from beringia.report.words import count, percent

_ADVICE: dict[Verdict, str] = {
    "train": "train on it and serve on it",
    "infer": "serve on it, do not train on it",
    "unfit": "neither train nor serve on it",
    "inconclusive": "not decided, so neither train nor serve on it yet",
}

_SERVING = ("forward", "decode")
"""A wrong operator of another direction is no reason against serving."""


@dataclass(frozen=True)
class Sentence:
    """The verdict in parts, so that a page can put a badge on the chip's name."""

    sku: str
    truth: str
    advice: str
    because: str

    def __str__(self) -> str:
        return f"{self.sku} ({self.truth}): {self.advice}: {self.because}."


def verdict_sentence(certificate: Certificate) -> Sentence:
    """`Ascend 910B (emulated): serve on it, do not train on it: aten.mm of model.layers.3 is wrong (backward).`"""
    identity, verdict = certificate.identity, certificate.verdict
    because = _because(certificate).strip().rstrip(".")
    part = "" if certificate.layers is None else f", for {certificate.layers} of the layers of {certificate.model.name}"
    return Sentence(identity.sku, identity.truth, _ADVICE[verdict] + part, because)


def chip_words(identity: ChipIdentity) -> str:
    """`Ascend 910B (emulated)`."""
    return f"{identity.sku} ({identity.truth})"


def operator_words(operator: str) -> str:
    """`aten.mm`: the overload that all calls have anyway is left out."""
    return operator.removesuffix(".default")


def place_words(check: OperatorCheck) -> str:
    """`aten.mm of model.layers.3.mlp`."""
    where = f"of {check.module}" if check.module else "outside the modules"
    return f"{operator_words(check.operator)} {where}"


def wrong_words(check: OperatorCheck) -> str:
    """`aten.mm of model.layers.3.mlp is wrong (backward)`."""
    return f"{place_words(check)} is {'refused' if check.refused else 'wrong'} ({check.direction})"


def largest_share(probe: ProbeResult) -> float:
    """The largest share of a bound among a probe's measures."""
    return max((measure.used for measure in probe.measures), default=0.0)


def _because(certificate: Certificate) -> str:
    if certificate.verdict == "train":
        return _why_sound(certificate)
    if certificate.verdict == "inconclusive":
        return _why_open(certificate)
    located = certificate.first_wrong
    if located is not None and (certificate.verdict == "infer" or located.check.direction in _SERVING):
        return wrong_words(located.check)
    if certificate.first_departure is not None and certificate.reasons:
        return certificate.reasons[0]
    use: Use = "infer" if certificate.verdict == "unfit" else "train"
    return _summary(certificate, "failed", (use,)) or _first_reason(certificate)


def _why_sound(certificate: Certificate) -> str:
    """An operator beyond its bound rules nothing out by itself, but must not be kept quiet."""
    probes, located = count(len(certificate.probes), "probe"), certificate.first_wrong
    wrong = wrong_words(located.check) if located is not None else _summary(certificate, "failed", ("neither",))
    if wrong:
        return f"what {probes} found rules nothing out, though {wrong}"
    checks = count(len(certificate.operators), "operator check")
    return f"{checks} and {probes} found nothing against it for {certificate.scope}"


def _why_open(certificate: Certificate) -> str:
    if certificate.power < POWER_NEEDED:
        return (
            f"a sound chip would be found equal with a probability of only {percent(certificate.power, 0)}, "
            f"{percent(POWER_NEEDED, 0)} is needed"
        )
    open_question = _summary(certificate, "inconclusive", ("infer", "train")) or _first_reason(certificate)
    if certificate.rules_out("train"):
        return f"training on it is ruled out, and for serving {open_question}"
    return open_question


def _summary(certificate: Certificate, outcome: str, uses: tuple[Use, ...]) -> str:
    """What the gravest of these probes found."""
    found = [probe for probe in certificate.probes if probe.outcome == outcome and probe.rules_out in uses]
    return max(found, key=largest_share).summary if found else ""


def _first_reason(certificate: Certificate) -> str:
    return certificate.reasons[0] if certificate.reasons else "the certificate gives no reason"
